"""Memory of this process, and the plan by which a prediction keeps within a limit."""

from __future__ import annotations

import contextlib
import ctypes
import math
import re
import resource
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from umamba.inference.blocks import WindowGrid

# What a plan leaves free: allocators round up and keep some of what was freed.
RESERVE = 2**26
# What CUDA takes of a GPU besides tensors.
CONTEXT = 2**29
M_MMAP_THRESHOLD = -3  # glibc's number of this option


@dataclass(frozen=True)
class MemoryPlan:
    """How the sums of a volume are held: in whole rows or blocks of them, all or up to `budget`."""

    grid: WindowGrid
    budget: int | None
    expected_peak: int
    sentence: str
    on_device: bool = False


@dataclass(frozen=True)
class DeviceMemory:
    """Bytes of a GPU: those that this process may take, the most that it took for one tile."""

    limit: int
    used: int


def device_memory(device: torch.device, max_vram: int | None) -> DeviceMemory | None:
    """What is known of a GPU since `reset_peak`; None for other devices."""
    if device.type != "cuda":
        return None
    free = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    limit = free if max_vram is None else min(free, max_vram - CONTEXT)
    return DeviceMemory(limit, torch.cuda.max_memory_allocated(device))


def limit_device(device: torch.device, max_vram: int) -> None:
    """Lets CUDA refuse what is above the limit; ValueError for other devices."""
    if device.type != "cuda":
        raise ValueError(f"--max-vram is for GPUs, but this run computes on {device.type}")
    if max_vram <= CONTEXT:
        raise ValueError(f"--max-vram {_gib(max_vram)} is too little; CUDA takes {_gib(CONTEXT)}")
    total = torch.cuda.mem_get_info(device)[1]
    torch.cuda.set_per_process_memory_fraction(min(1.0, (max_vram - CONTEXT) / total), device.index)


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


def reset_peak(device: torch.device) -> None:
    """Lets `peak_bytes` and `device_memory` count from now on, where the system can."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
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
    device: DeviceMemory | None = None,
    spill: bool = True,
) -> MemoryPlan:
    """Chooses how and where to hold the sums so that the process stays below `limit` bytes.

    Raises ValueError naming what would be needed where that cannot be.

    Args:
        grids: the cuts with whole rows, which are quicker, and those with divided ones.
        bytes_per_voxel: of the sums, all channels.
        fixed: libraries, image, preprocessed data, label map, pieces that are resampled.
        network: the most that one pass of the network takes, with its output.
        device: the GPU that holds the sums if they fit, else they are in memory.
        spill: whether pending sums may wait on disk.
    """
    room = limit - fixed - network - RESERVE
    needed = 0
    beside = ""
    if device is not None:
        if device.used > device.limit:
            raise ValueError(
                f"one tile in the network takes {_gib(device.used)} of the GPU's memory, but "
                f"{_gib(device.limit)} are left for it; raise --max-vram, or predict on the CPU"
            )
        sums = grids[0].peak()[0] * bytes_per_voxel
        on_device = device.used + sums + RESERVE
        if on_device <= device.limit and room >= 0:
            sentence = (
                f"streams {_gib(sums)} of sums on the GPU; expected peak {_gib(on_device)} of "
                f"{_gib(device.limit)} there, {_gib(fixed + network)} of {_gib(limit)} in memory"
            )
            return MemoryPlan(grids[0], None, fixed + network, sentence, on_device=True)
        beside = (
            f"; sums are on the CPU: with the network they would take {_gib(on_device)} of "
            f"{_gib(device.limit)} on the GPU"
        )
    for grid in grids:
        most, least = (n * bytes_per_voxel for n in grid.peak())
        needed = least if spill else most
        if most <= room:
            return _plan(grid, None, fixed + network + most, most, limit, beside)
        if grid is grids[-1] and spill and least <= room:
            return _plan(grid, room, limit - RESERVE, most, limit, beside)
    # rounded up, so that it is enough when it is given
    total = math.ceil((fixed + network + RESERVE + needed) / 2**30 * 100) / 100
    raise ValueError(
        f"it needs at least {total:.2f} GiB of memory ({_gib(fixed)} for libraries and volumes, "
        f"{_gib(network)} for one tile in the network, {_gib(needed)} for sums), but "
        f"{_gib(limit)} are allowed; raise --max-ram, or free memory"
    )


def _plan(
    grid: WindowGrid, budget: int | None, peak: int, sums: int, limit: int, beside: str
) -> MemoryPlan:
    how = f"{_gib(sums)} of sums in memory"
    if budget is not None:
        how = f"{_gib(budget)} of {_gib(sums)} of sums in memory, the others in a temporary file"
    sentence = f"streams {how}; expected peak {_gib(peak)} of {_gib(limit)}{beside}"
    return MemoryPlan(grid, budget, peak, sentence)


def _gib(n_bytes: int) -> str:
    return f"{n_bytes / 2**30:.2f} GiB"
