"""Memory of the machine that plans are made for."""

import os
from pathlib import Path

import torch

GIB = 1024**3


def default_memory_gb() -> float:
    """Returns the GPU's memory in GiB if there is one, else half of the free RAM, at least 2."""
    if torch.cuda.is_available():
        return round(torch.cuda.get_device_properties(0).total_memory / GIB, 1)
    return float(max(available_memory_bytes() // 2 // GIB, 2))


def available_memory_bytes() -> int:
    """Returns the bytes of RAM that this process could still take, within its container's limit."""
    available = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():
        lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        available = int(lines.get("MemAvailable", lines["MemTotal"]).split()[0]) * 1024
    for limit in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        text = Path(limit).read_text().strip() if Path(limit).is_file() else "max"
        if text.isdigit():
            available = min(available, int(text))
    return available
