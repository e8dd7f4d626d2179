"""Sums over sliding windows, held in blocks from their first window to their last, or on disk."""

from __future__ import annotations

import itertools
import math
import os
import tempfile
from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import IO, NamedTuple

import torch

from umamba.ops.volumes import add_tile

# Legend: C channels of the sums (the last one holds the weights); z, y, x extents of the volume.

Window = tuple[slice | int, ...]
Block = tuple[int, int, int]


class Strip(NamedTuple):
    """Rows z and y of the volume that no window after number `window` touches, at full x."""

    window: int
    z: slice
    y: slice


class WindowGrid:
    """How nnU-Net's windows, in their order, cut a volume (z, y, x) into blocks.

    Cuts lie at the starts and ends of the windows along z and y; along x at the starts and the
    last ends only, and none with `whole_rows`. Nothing is added for windows that are `skipped`.
    """

    def __init__(
        self,
        windows: Sequence[Window],
        shape: Sequence[int],
        *,
        whole_rows: bool = False,
        skipped: Collection[int] = (),
    ) -> None:
        self.skipped = frozenset(skipped)
        self.shape = tuple(map(int, shape))
        self.boxes = [_box(window) for window in windows]
        starts = [sorted({box[axis].start for box in self.boxes}) for axis in range(3)]
        ends = [{box[axis].stop for box in self.boxes} for axis in range(3)]
        assert math.prod(map(len, starts)) == len(windows), "windows are not those of nnU-Net"
        inner = [set(s) | e for s, e in zip(starts, ends, strict=True)]
        # short rows are slow, but the last start alone would leave a block as wide as a window
        inner[2] = set(starts[2]) | {e for e in ends[2] if e > starts[2][-1]}
        if whole_rows:
            inner[2] = set()
        self.cuts = [sorted(c | {0, n}) for c, n in zip(inner, self.shape, strict=True)]
        self.strips = self._find_strips(starts)
        self.uses = self._find_uses()

    def blocks(self, box: Sequence[slice]) -> list[Block]:
        """The blocks that the box meets."""
        ranges = [
            range(bisect_right(cuts, s.start) - 1, bisect_right(cuts, s.stop - 1))
            for cuts, s in zip(self.cuts, box, strict=True)
        ]
        z, y, x = ranges
        return list(itertools.product(z, y, x))

    def extent(self, block: Block) -> tuple[slice, ...]:
        return tuple(slice(c[i], c[i + 1]) for c, i in zip(self.cuts, block, strict=True))

    def size(self, block: Block) -> int:
        return math.prod(s.stop - s.start for s in self.extent(block))

    def peak(self) -> tuple[int, int]:
        """The most voxels pending at a time, and the most that one window and its strip need."""
        held: set[Block] = set()
        most = least = n_held = 0
        strips = {s.window: s for s in self.strips}
        for i, box in enumerate(self.boxes):
            touched = [] if i in self.skipped else self.blocks(box)
            n_held += sum(self.size(b) for b in touched if b not in held)
            held.update(touched)
            most = max(most, n_held)
            least = max(least, sum(map(self.size, touched)))
            if i in strips:
                done = self.blocks((strips[i].z, strips[i].y, slice(0, self.shape[2])))
                least = max(least, *map(self.size, done))
                # those of skipped windows alone are made when they are taken
                most = max(most, n_held + sum(self.size(b) for b in done if b not in held))
                n_held -= sum(self.size(b) for b in done if b in held)
                held.difference_update(done)
        return most, least

    def _find_strips(self, starts: Sequence[Sequence[int]]) -> list[Strip]:
        z_ranges, y_ranges = (
            [slice(a, b) for a, b in itertools.pairwise([0, *s[1:], n])]
            for s, n in zip(starts[:2], self.shape[:2], strict=True)
        )
        n_x = len(starts[2])
        pairs = itertools.product(z_ranges, y_ranges)
        return [Strip((i + 1) * n_x - 1, z, y) for i, (z, y) in enumerate(pairs)]

    def _find_uses(self) -> dict[Block, list[int]]:
        uses: dict[Block, list[int]] = defaultdict(list)
        for i, box in enumerate(self.boxes):
            for block in () if i in self.skipped else self.blocks(box):
                uses[block].append(i)
        return dict(uses)


class BlockSums:
    """Weighted sums (C, z, y, x) of tiles; those beyond `budget` bytes wait in a file.

    The file has no name, so nothing remains of it however the process ends.  Voxels that only
    skipped windows cover get the logits `background`.
    """

    def __init__(
        self,
        grid: WindowGrid,
        n_channels: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | None = None,
        budget: int | None = None,
        spill_folder: Path | None = None,
        background: Sequence[float] = (),
    ) -> None:
        self.grid = grid
        self.n_channels = n_channels
        self.dtype = dtype
        self.device = device or torch.device("cpu")
        self.budget = budget
        self.n_spilled = 0  # bytes written in all
        self._spill_folder = spill_folder
        self._background = background
        self._file: IO[bytes] | None = None
        self._free_places: dict[int, list[int]] = defaultdict(list)
        self._end = 0
        self._held: dict[Block, torch.Tensor] = {}
        self._places: dict[Block, int] = {}
        self._n_held = 0

    def add(self, window: int, channel: int, tile: torch.Tensor, weight: torch.Tensor) -> None:
        """Adds the tile (K, *patch) of a window, times weight (z, y, x), from `channel` on.

        Of the parts of a tile, the one of channel 0 comes first.
        """
        box = self.grid.boxes[window]
        touched = self.grid.blocks(box)
        for block in touched:
            total = self._resident(block, window, touched)
            extent = self.grid.extent(block)
            here = tuple(map(common, box, extent))
            in_tile = tuple(shifted(h, b.start) for h, b in zip(here, box, strict=True))
            in_block = tuple(shifted(h, e.start) for h, e in zip(here, extent, strict=True))
            part, of_part = tile[(slice(None), *in_tile)], weight[in_tile]
            held = common(here[2], slice(0, self._covered(block, window)))
            n_held = max(0, held.stop - held.start)
            channels = slice(channel, channel + len(tile))
            add_tile(total[(channels, *in_block)], part, of_part, n_held)
            if channel == 0:
                add_tile(total[(slice(-1, None), *in_block)], None, of_part, n_held)

    def _covered(self, block: Block, window: int) -> int:
        """Where along x the sums end that a block holds before this window adds to them.

        Windows come in the order of x and leave no gap, and along z and y they cover their blocks:
        the cuts are made so.  Where some are skipped, blocks begin as zeros.
        """
        extent = self.grid.extent(block)[2]
        if self.grid.skipped:
            return extent.stop
        uses = self.grid.uses[block]
        earlier = [self.grid.boxes[i][2].stop for i in uses[: bisect_left(uses, window)]]
        return min(max(earlier, default=extent.start), extent.stop)

    def take(self, block: Block, window: int) -> torch.Tensor:
        """The sums (C, z, y, x) of a block that no window after this one touches."""
        total = self._resident(block, window, [block])
        del self._held[block]
        self._n_held -= total.nbytes
        if self.grid.skipped:
            uncovered = total[-1] == 0
            for channel, value in zip(total, (*self._background, 1.0), strict=True):
                channel.masked_fill_(uncovered, value)
        return total

    def close(self) -> None:
        self._held.clear()
        if self._file is not None:
            self._file.close()

    def _resident(self, block: Block, window: int, keep: Sequence[Block]) -> torch.Tensor:
        """The block in memory, after others have made room for it."""
        if block in self._held:
            return self._held[block]
        shape = [s.stop - s.start for s in self.grid.extent(block)]
        n_bytes = self.n_channels * math.prod(shape) * self.dtype.itemsize
        if self.budget is not None:
            while self._n_held + n_bytes > self.budget and (
                others := [b for b in self._held if b not in keep]
            ):
                self._spill(max(others, key=lambda b: self._next_use(b, window)))
        total = torch.empty((self.n_channels, *shape), dtype=self.dtype, device=self.device)
        if block in self._places:
            place = self._places.pop(block)
            self._free_places[n_bytes].append(place)
            buffer = total if total.device.type == "cpu" else total.cpu()
            _transfer(os.preadv, self._descriptor(), buffer, place)
            if buffer is not total:
                total.copy_(buffer)
        elif self.grid.skipped:
            total.zero_()
        self._held[block] = total
        self._n_held += n_bytes
        return total

    def _spill(self, block: Block) -> None:
        total = self._held.pop(block)
        free = self._free_places[total.nbytes]
        place = free.pop() if free else self._end
        self._end = max(self._end, place + total.nbytes)
        _transfer(os.pwritev, self._descriptor(), total.cpu(), place)
        self._places[block] = place
        self._n_held -= total.nbytes
        self.n_spilled += total.nbytes

    def _next_use(self, block: Block, window: int) -> int:
        uses = self.grid.uses[block]
        i = bisect_right(uses, window)
        return uses[i] if i < len(uses) else uses[-1]

    def _descriptor(self) -> int:
        if self._file is None:
            self._file = tempfile.TemporaryFile(prefix=".umamba_", dir=self._spill_folder)  # noqa: SIM115
        return self._file.fileno()


def common(first: slice, second: slice) -> slice:
    return slice(max(first.start, second.start), min(first.stop, second.stop))


def shifted(part: slice, origin: int) -> slice:
    return slice(part.start - origin, part.stop - origin)


def _transfer(
    call: Callable[[int, list[memoryview], int], int], file: int, tensor: torch.Tensor, place: int
) -> None:
    """Reads or writes the whole tensor at `place`; one call may do only a part."""
    memory = tensor.numpy().data.cast("B")
    done = 0
    while done < len(memory):
        n = call(file, [memory[done:]], place + done)
        if n == 0:
            raise OSError("the temporary file of pending sums ended early")
        done += n


def _box(window: Window) -> tuple[slice, slice, slice]:
    """The (z, y, x) extent of nnU-Net's slicer, whose first entry is for the channels."""
    z, y, x = (
        slice(int(w.start), int(w.stop)) if isinstance(w, slice) else slice(int(w), int(w) + 1)
        for w in window[1:]
    )
    return z, y, x
