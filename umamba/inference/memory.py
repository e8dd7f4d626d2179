"""Memory of this process, and the plan by which a prediction keeps within a limit."""

from __future__ import annotations

import contextlib
import ctypes
import re
import resource
import sys
from dataclasses import dataclass
from pathlib import Path

from umamba.inference.blocks import WindowGrid

# What a plan leaves free: allocators round up and keep some of what was freed.
RESERVE = 2**26
M_MMAP_THRESHOLD = -3  # glibc's number of this option


@dataclass(frozen=True)
class MemoryPlan:
    """How the sums of a volume are held: in whole rows or blocks of them, all or up to `budget`."""

    grid: WindowGrid
    budget: int | None
    expected_peak: int
    sentence: str


def resident_bytes() -> int:
    """Memory of this process that is in RAM now."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return peak_bytes()
    return pages * resource.getpagesize()


def peak_bytes() -> int:
    """The most that was in RAM since `reset_peak`, or since the start."""
    try:
        status = Path("/proc/self/status").read_text()
        return int(re.findall(r"VmHWM:\s+(\d+) kB", status)[0]) * 1024
    except (OSError, IndexError):
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def reset_peak() -> None:
    """Lets `peak_bytes` count from now on, where the system can."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def return_freed_memory() -> None:
    """Gives what is freed back to the system at once, from now on; only glibc has a need for it."""
    with contextlib.suppress(OSError, AttributeError):
        library = ctypes.CDLL(None)
        library.mallopt(M_MMAP_THRESHOLD, 2**20)
        library.malloc_trim(0)


def plan_memory(
    grids: tuple[WindowGrid, WindowGrid],
    bytes_per_voxel: int,
    *,
    limit: int,
    fixed: int,
    network: int,
    spill: bool = True,
) -> MemoryPlan:
    """Chooses how to hold the sums so that the process stays below `limit` bytes.

    Raises ValueError naming what would be needed where that cannot be.

    Args:
        grids: the cuts with whole rows, which are quicker, and those with divided ones.
        bytes_per_voxel: of the sums, all channels.
        fixed: libraries, image, preprocessed data, label map, pieces that are resampled.
        network: the most that one pass of the network takes, with its output.
        spill: whether pending sums may wait on disk.
    """
    room = limit - fixed - network - RESERVE
    needed = 0
    for grid in grids:
        most, least = (n * bytes_per_voxel for n in grid.peak())
        needed = least if spill else most
        if most <= room:
            return _plan(grid, None, fixed + network + most, most, limit)
        if grid is grids[-1] and spill and least <= room:
            return _plan(grid, room, limit - RESERVE, most, limit)
    total = fixed + network + RESERVE + needed
    raise ValueError(
        f"it needs at least {_gib(total)} of memory ({_gib(fixed)} for libraries and volumes, "
        f"{_gib(network)} for one tile in the network, {_gib(needed)} for sums), but "
        f"{_gib(limit)} are allowed; raise --max-ram, or free memory"
    )


def _plan(grid: WindowGrid, budget: int | None, peak: int, sums: int, limit: int) -> MemoryPlan:
    how = f"{_gib(sums)} of sums in memory"
    if budget is not None:
        how = f"{_gib(budget)} of {_gib(sums)} of sums in memory, the others in a temporary file"
    sentence = f"streams {how}; expected peak {_gib(peak)} of {_gib(limit)}"
    return MemoryPlan(grid, budget, peak, sentence)


def _gib(n_bytes: int) -> str:
    return f"{n_bytes / 2**30:.2f} GiB"
