"""From windows to finished logits, strip by strip: the sums of a volume are never held whole."""

from __future__ import annotations

import itertools
from bisect import bisect_right
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch

from umamba.inference.blocks import BlockSums, Strip, Window, WindowGrid, common, shifted

# Legend: B tiles, C input channels, K classes or regions; z, y, x extents without padding.

# Predicts (B, C, *patch): parts (first channel of the sums, logits (B, k, *patch)), one at a time.
Predict = Callable[[torch.Tensor], Iterator[tuple[int, torch.Tensor]]]
# Writes the logits of sums, whose last channel is that of the weights, to a second tensor.
Combine = Callable[[torch.Tensor, torch.Tensor], object]
# Finished logits are handed on in pieces of about so many bytes.
PIECE_BYTES = 2**23


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
    skipped: Collection[int] = (),
    progress: Callable[[float], object] = lambda share: None,
) -> Iterator[Piece]:
    """Pieces of the weighted mean over the windows, as soon as no later window touches them.

    They come strip by strip of rows y, within a strip in the order of z; each is to be filled
    before the next is asked for, and let go of: it holds the sums of its rows.

    Args:
        data: (C, z, y, x), at least as large as the patch; on the CPU or on `device`.
        windows: nnU-Net's slicers into `data`, in its order.
        weight: (z, y, x) of the patch; that of a 2-D network has one plane.
        make_sums: called after the first prediction, when the memory of the network is known;
            its grid skips the same windows.
        device: where the network computes; tiles are moved there one batch at a time.
        inside: the part of `data` that is wanted: without the padding.
        max_batch: tiles that go through the network together.
        skipped: numbers of the windows that do not.
        progress: called with the share of the windows just done, 1 in total.
    """
    area = tuple(inside or (slice(0, n) for n in data.shape[1:]))
    wanted = [i for i in range(len(windows)) if i not in skipped]
    chunks = [wanted[i : i + max_batch] for i in range(0, len(wanted), max_batch)]
    batches = _copied_ahead(data, windows, chunks, device)
    sums = None if chunks else make_sums()
    done = n_strips = 0
    try:
        for chunk, following in itertools.zip_longest(chunks or [[]], chunks[1:]):
            parts = predict(next(batches)) if chunk else iter(())
            for channel, predicted in parts:
                if sums is None:
                    sums = make_sums()
                    weight = weight.to(sums.device)
                for i, tile in zip(chunk, predicted.to(sums.device), strict=True):
                    volume = tile if tile.ndim == 4 else tile[:, None]
                    sums.add(i, channel, volume, weight)
                    del tile, volume
                del predicted
            assert sums is not None
            # what is skipped after a chunk is done with it
            end = following[0] if following else len(windows)
            progress((end - done) / len(windows))
            done = end
            strips = sums.grid.strips
            while n_strips < len(strips) and strips[n_strips].window < end:
                yield from _pieces(sums, strips[n_strips], end - 1, area, combine)
                n_strips += 1
    finally:
        if sums is not None:
            sums.close()


def _copied_ahead(
    data: torch.Tensor,
    windows: Sequence[Window],
    chunks: Sequence[Sequence[int]],
    device: torch.device,
) -> Iterator[torch.Tensor]:
    """Tiles (B, C, *patch) of each chunk on the device; on a GPU the next ones are under way."""

    def cut(chunk: Sequence[int]) -> torch.Tensor:
        tiles = [data[windows[i]] for i in chunk]
        return tiles[0][None] if len(tiles) == 1 else torch.stack(tiles)

    if device.type != "cuda" or data.device.type != "cpu":
        for chunk in chunks:
            yield cut(chunk).to(device)
        return
    copying = torch.cuda.Stream(device)

    def copy(chunk: Sequence[int]) -> torch.Tensor:
        tiles = cut(chunk).pin_memory()
        with torch.cuda.stream(copying):
            return tiles.to(device, non_blocking=True)

    upcoming = map(copy, chunks)
    following = next(upcoming, None)
    while following is not None:
        tiles, computing = following, torch.cuda.current_stream(device)
        computing.wait_stream(copying)
        tiles.record_stream(computing)
        following = next(upcoming, None)
        yield tiles
        del tiles


def _pieces(
    sums: BlockSums, strip: Strip, window: int, area: tuple[slice, ...], combine: Combine
) -> Iterator[Piece]:
    """A finished strip, in pieces of few planes; its blocks are freed on the way."""
    grid = sums.grid
    # the same number in every strip: what is kept of one belongs to the pieces of the next
    n_planes = max(1, PIECE_BYTES // plane_bytes(grid, sums.n_channels))
    y = common(strip.y, area[1])
    rows = slice(strip.z.start, strip.z.start)
    while rows.stop < strip.z.stop:
        rows = slice(rows.stop, grid.cuts[0][bisect_right(grid.cuts[0], rows.stop)])
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


def plane_bytes(grid: WindowGrid, n_channels: int) -> int:
    """The most that one plane of a strip takes in float32: no strip is wider than a window."""
    y = grid.boxes[0][1]
    return 4 * n_channels * (y.stop - y.start) * grid.shape[2]


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
        torch.mul(sums[:-1], sums[-1].reciprocal(), out=target)
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
