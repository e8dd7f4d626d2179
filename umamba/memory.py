"""How much memory this process may still take: what the machine has free and its cgroup allows."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

UNITS = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4}


def available_memory(root: Path = Path("/")) -> int:
    """Bytes that can still be allocated without swapping or being killed.

    The smallest of the machine's free memory and what is left below the limits of the cgroups
    (version 1 or 2) that hold this process; page cache that can be dropped counts as free.
    sys.maxsize where the system tells nothing.
    """
    found = [_left(folder, *names) for folder, *names in _cgroups(root)]
    return max(0, min([_free_memory(root), *found]))


def parse_size(text: str) -> int:
    """Bytes of "4G", "1.5 GiB", "800MB" or "1000000"; K, M, G, T are powers of 1024.

    Raises ValueError for anything else, and for nothing or less.
    """
    match = re.fullmatch(r"([0-9]*\.?[0-9]+)\s*([KMGT]?)(?:i?B)?", text.strip(), re.IGNORECASE)
    size = int(float(match[1]) * 1024 ** UNITS[match[2].upper()]) if match else 0
    if size <= 0:
        raise ValueError(f"{text!r} is not a size; give bytes, or for example 800M or 4G")
    return size


def _free_memory(root: Path) -> int:
    if (value := _numbers(root / "proc/meminfo").get("MemAvailable")) is not None:
        return value * 1024
    try:  # systems without /proc
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return sys.maxsize


def _cgroups(root: Path) -> list[tuple[Path, str, str, str]]:
    """Folders of the memory cgroups around this process, with the names of limit, usage, cache."""
    v2 = ("memory.max", "memory.current", "inactive_file")
    v1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
    found: list[tuple[Path, str, str, str]] = []
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        mount = root / ("sys/fs/cgroup/memory" if controllers else "sys/fs/cgroup")
        # within a container the path may be the host's, of which only the mount itself is seen
        here = mount / path.strip("/")
        folders = [here, *here.parents][: len(here.parts) - len(mount.parts) + 1]
        found += [(folder, *(v1 if controllers else v2)) for folder in folders]
    return found


def _left(folder: Path, limit_file: str, usage_file: str, cache: str) -> int:
    limit, usage = _text(folder / limit_file).strip(), _text(folder / usage_file).strip()
    if not (limit.isdigit() and usage.isdigit()):  # no such cgroup, or "max"
        return sys.maxsize
    return int(limit) - int(usage) + _numbers(folder / "memory.stat").get(cache, 0)


def _numbers(file: Path) -> dict[str, int]:
    """The values of a file of lines "name value" or "name: value kB"."""
    lines = (line.replace(":", " ").split() for line in _text(file).splitlines())
    return {words[0]: int(words[1]) for words in lines if len(words) > 1 and words[1].isdigit()}


def _text(file: Path) -> str:
    try:
        return file.read_text()
    except OSError:
        return ""
