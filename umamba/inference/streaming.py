"""From windows to finished logits, strip by strip: the sums of a volume are never held whole."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch

from umamba.inference.blocks import BlockSums, Strip, Window, common, shifted

# Legend: B tiles, C input channels, K classes or regions; z, y, x extents without padding.

# Predicts (B, C, *patch): parts (first channel of the sums, logits (B, k, *patch)), one at a time.
Predict = Callable[[torch.Tensor], Iterator[tuple[int, torch.Tensor]]]
# Writes the logits of sums, whose last channel is that of the weights, to a second tensor.
Combine = Callable[[torch.Tensor, torch.Tensor], object]
# Finished logits are handed on in pieces of about so many bytes.
PIECE_BYTES = 2**24


class Piece(NamedTuple):
    """Finished logits of rows z and y; `fill` writes them to a tensor (K, z, y, x) float32."""

    z: slice
    y: slice
    fill: Callable[[torch.Tensor], None]


def stream_windows(
    predict: Predict,
    data: torch.Tensor,
    windows: Sequence[Window],
    weight: torch.Tensor,
    make_sums: Callable[[], BlockSums],
    combine: Combine,
    *,
    device: torch.device,
    inside: Sequence[slice] | None = None,
    max_batch: int = 1,
    progress: Callable[[float], object] = lambda share: None,
) -> Iterator[Piece]:
    """Pieces of the weighted mean over the windows, as soon as no later window touches them.

    They come strip by strip of rows y, within a strip in the order of z; each is to be filled
    before the next is asked for, and let go of: it holds the sums of its rows.

    Args:
        data: (C, z, y, x), at least as large as the patch.
        windows: nnU-Net's slicers into `data`, in its order.
        weight: (z, y, x) of the patch; that of a 2-D network has one plane.
        make_sums: called after the first prediction, when the memory of the network is known.
        device: where the network computes; tiles are moved there one batch at a time.
        inside: the part of `data` that is wanted: without the padding.
        max_batch: tiles that go through the network together.
        progress: called with the share of the windows just done, 1 in total.
    """
    area = tuple(inside or (slice(0, n) for n in data.shape[1:]))
    sums: BlockSums | None = None
    strips: list[Strip] = []
    try:
        for first in range(0, len(windows), max_batch):
            chunk = windows[first : first + max_batch]
            tiles = torch.stack([data[w] for w in chunk]).to(device)
            for channel, predicted in predict(tiles):
                if sums is None:
                    sums = make_sums()
                    strips = sums.grid.strips[::-1]
                for i, tile in enumerate(predicted.to(sums.device)):
                    volume = tile if tile.ndim == 4 else tile[:, None]
                    sums.add(first + i, channel, volume, weight)
                    del tile, volume
                del predicted
            assert sums is not None
            progress(len(chunk) / len(windows))
            last = first + len(chunk) - 1
            while strips and strips[-1].window <= last:
                yield from _pieces(sums, strips.pop(), last, area, combine)
    finally:
        if sums is not None:
            sums.close()


def _pieces(
    sums: BlockSums, strip: Strip, window: int, area: tuple[slice, ...], combine: Combine
) -> Iterator[Piece]:
    """A finished strip, in pieces of few planes; its blocks are freed on the way."""
    grid = sums.grid
    widest = max(s.y.stop - s.y.start for s in grid.strips)
    n_planes = max(1, PIECE_BYTES // (4 * sums.n_channels * widest * grid.shape[2]))
    y = common(strip.y, area[1])
    rows = slice(strip.z.start, strip.z.start)
    while rows.stop < strip.z.stop:
        rows = slice(rows.stop, min(c for c in grid.cuts[0] if c > rows.stop))
        blocks = grid.blocks((rows, strip.y, slice(0, grid.shape[2])))
        taken = [(grid.extent(b), sums.take(b, window)) for b in blocks]
        wanted = common(rows, area[0])
        for start in range(wanted.start, wanted.stop, n_planes):
            z = slice(start, min(start + n_planes, wanted.stop))
            if y.start < y.stop:
                yield Piece(
                    shifted(z, area[0].start),
                    shifted(y, area[1].start),
                    partial(_fill, taken, (z, y, area[2]), combine),
                )
        del taken


def _fill(
    blocks: Sequence[tuple[tuple[slice, ...], torch.Tensor]],
    box: tuple[slice, slice, slice],
    combine: Combine,
    target: torch.Tensor,
) -> None:
    for extent, total in blocks:
        parts = tuple(map(common, box, extent))
        if all(p.start < p.stop for p in parts):
            here = tuple(shifted(p, b.start) for p, b in zip(parts, box, strict=True))
            there = tuple(shifted(p, e.start) for p, e in zip(parts, extent, strict=True))
            combine(total[(slice(None), *there)], target[(slice(None), *here)])
    if not bool(torch.isfinite(target.sum())):
        raise ValueError(
            "the network's output is not finite (NaN or Inf); its weights are damaged, or the "
            "input has intensities far from those it was trained on"
        )


def mean_of_sums(sums: torch.Tensor, target: torch.Tensor) -> None:
    """The weighted mean of one network's or several folds' tiles, in float32."""
    if sums.device == target.device:
        torch.div(sums[:-1], sums[-1], out=target)
    else:
        target.copy_(sums[:-1] / sums[-1])


def mean_of_half_sums(sums: torch.Tensor, target: torch.Tensor) -> None:
    """nnU-Net's mean of folds (K channels of the sums each), every step in half precision."""
    n_folds = (len(sums) - 1) // len(target)
    total: torch.Tensor | None = None
    for of_fold in sums[:-1].chunk(n_folds):
        logits = (of_fold / sums[-1]).to("cpu")
        total = logits if total is None else total.add_(logits)
    assert total is not None
    target.copy_(total if n_folds == 1 else total.div_(n_folds))
