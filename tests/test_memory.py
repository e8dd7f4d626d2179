"""Tests of the memory a process may still take, on made-up system files."""

from __future__ import annotations

import sys

import pytest

from umamba.memory import available_memory, parse_size

GIB = 1024**3


def write(root, files):
    for name, text in files.items():
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return root


MEMINFO = {"proc/meminfo": "MemTotal:  33554432 kB\nMemFree: 1 kB\nMemAvailable: 16777216 kB\n"}
V2 = {"proc/self/cgroup": "0::/user/job\n"}
V1 = {"proc/self/cgroup": "5:cpu,cpuacct:/job\n4:memory:/job\n"}


def v2(folder, limit, usage, cache=0):
    files = {
        "memory.max": limit,
        "memory.current": usage,
        "memory.stat": f"anon 1\ninactive_file {cache}",
    }
    return {f"sys/fs/cgroup/{folder}{name}": f"{text}\n" for name, text in files.items()}


def v1(folder, limit, usage, cache=0):
    files = {
        "memory.limit_in_bytes": limit,
        "memory.usage_in_bytes": usage,
        "memory.stat": f"inactive_file 7\ntotal_inactive_file {cache}",
    }
    return {f"sys/fs/cgroup/memory/{folder}{name}": f"{text}\n" for name, text in files.items()}


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (MEMINFO, 16 * GIB),
        (MEMINFO | V2 | v2("user/job/", "max", GIB), 16 * GIB),
        (MEMINFO | V2 | v2("user/job/", 4 * GIB, GIB), 3 * GIB),
        (MEMINFO | V2 | v2("user/job/", 4 * GIB, 3 * GIB, cache=2 * GIB), 3 * GIB),
        (MEMINFO | V2 | v2("user/job/", 8 * GIB, 0) | v2("user/", 2 * GIB, GIB), GIB),
        (MEMINFO | V2 | v2("", 5 * GIB, GIB), 4 * GIB),
        (MEMINFO | V1 | v1("job/", 4 * GIB, GIB, cache=GIB // 2), 3 * GIB + GIB // 2),
        (MEMINFO | V1 | v1("", 6 * GIB, GIB), 5 * GIB),
        (MEMINFO | V1 | v1("job/", 9223372036854771712, GIB), 16 * GIB),
        (MEMINFO | V2 | v2("user/job/", GIB, 2 * GIB), 0),
    ],
    ids=["no limit", "v2 max", "v2", "v2 cache", "v2 parent", "v2 container", "v1",
         "v1 container", "v1 unlimited", "over the limit"],
)  # fmt: skip
def test_the_smallest_of_the_machine_and_every_cgroup_around_is_left(tmp_path, files, expected):
    assert available_memory(write(tmp_path, files)) == expected


def test_this_machine_has_memory_left():
    assert 0 < available_memory() <= sys.maxsize


def test_a_machine_that_tells_nothing_has_its_physical_memory_or_no_limit(tmp_path):
    assert available_memory(tmp_path) > 0


@pytest.mark.parametrize(
    ("text", "expected"),
    [("4G", 4 * GIB), ("1.5 GiB", 3 * GIB // 2), ("800MB", 800 * 1024**2), ("1000", 1000)],
)
def test_sizes_are_read_with_their_units(text, expected):
    assert parse_size(text) == expected


@pytest.mark.parametrize("text", ["", "4X", "-1G", "0", "G", "4 G G"])
def test_what_is_no_size_is_refused_with_an_example(text):
    with pytest.raises(ValueError, match="for example 800M or 4G"):
        parse_size(text)
