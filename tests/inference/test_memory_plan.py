"""Tests of the memory plan of a prediction."""

from __future__ import annotations

import re

import pytest
import torch

from umamba.inference.blocks import WindowGrid
from umamba.inference.memory import (
    CONTEXT,
    RESERVE,
    DeviceMemory,
    device_memory,
    limit_device,
    plan_memory,
)
from umamba.memory import parse_size

WINDOWS = [
    (slice(None), slice(z, z + 4), slice(y, y + 4), slice(x, x + 4))
    for z in range(0, 9, 2) for y in range(0, 9, 2) for x in range(0, 9, 2)
]  # fmt: skip


def grids():
    shape = (12, 12, 12)
    return WindowGrid(WINDOWS, shape, whole_rows=True), WindowGrid(WINDOWS, shape)


@pytest.mark.parametrize(
    ("which", "divided", "spilled"),
    [(0, False, False), (1, True, True)],
    ids=["all in memory", "the rest on disk"],
)
def test_the_plan_takes_the_quickest_way_that_fits(which, divided, spilled):
    whole, blocks = grids()
    per_voxel = 2**20
    assert blocks.peak()[1] < min(blocks.peak()[0], whole.peak()[0])
    room = (whole.peak()[0], blocks.peak()[1])[which] * per_voxel
    plan = plan_memory((whole, blocks), per_voxel, limit=2**33 + room + RESERVE, fixed=2**32,
                       network=2**32)  # fmt: skip
    assert (plan.grid is blocks) == divided
    assert (plan.budget is not None) == spilled
    assert plan.expected_peak <= 2**33 + room
    assert "expected peak" in plan.sentence


def test_an_impossible_limit_names_the_need():
    with pytest.raises(ValueError, match=r"needs at least .* GiB of memory .* but 1\.00 GiB"):
        plan_memory(grids(), 2**30, limit=2**30, fixed=2**29, network=0)


def test_what_is_named_as_needed_is_enough():
    whole, _ = grids()
    one_way = {"fixed": int(0.508 * 2**30), "network": 0}  # with the rest 0.572
    with pytest.raises(ValueError, match="needs at least") as refusal:
        plan_memory((whole, whole), 2**10, limit=2**20, **one_way)
    needed = re.search(r"at least ([\d.]+) GiB", str(refusal.value))[1]
    assert plan_memory((whole, whole), 2**10, limit=parse_size(f"{needed}G"), **one_way)


PER_VOXEL = 2**20


def plan_on(device, limit=2**40):
    return plan_memory(
        grids(), PER_VOXEL, limit=limit, fixed=2**32, network=2**30, device=device
    )  # fmt: skip


def test_sums_are_on_the_gpu_if_they_fit_beside_the_network_and_else_on_the_cpu():
    used = 3 * 2**30
    enough = used + grids()[0].peak()[0] * PER_VOXEL + RESERVE
    fits, falls_back = (plan_on(DeviceMemory(enough - less, used)) for less in (0, 1))
    assert fits.on_device
    assert fits.budget is None
    assert fits.expected_peak == 2**32 + 2**30
    assert "of sums on the GPU" in fits.sentence
    assert not falls_back.on_device
    assert falls_back.expected_peak == fits.expected_peak + grids()[0].peak()[0] * PER_VOXEL
    assert "sums are on the CPU" in falls_back.sentence
    assert not plan_on(None).on_device


def test_a_gpu_too_small_for_one_tile_is_refused():
    with pytest.raises(ValueError, match=r"takes 3\.00 GiB of the GPU.* raise --max-vram"):
        plan_on(DeviceMemory(2**31, 3 * 2**30))


def test_the_limit_of_memory_holds_with_sums_on_the_gpu():
    with pytest.raises(ValueError, match="raise --max-ram"):
        plan_on(DeviceMemory(2**40, 0), limit=2**32)


def test_what_skipped_windows_would_hold_is_not_counted():
    whole, _ = grids()
    few = WindowGrid(WINDOWS, (12, 12, 12), whole_rows=True, skipped=range(3, len(WINDOWS)))
    assert few.peak()[0] < whole.peak()[0]
    assert few.strips == whole.strips


def test_a_limit_of_a_gpu_without_one_is_refused():
    with pytest.raises(ValueError, match="--max-vram is for GPUs, but this run computes on cpu"):
        limit_device(torch.device("cpu"), 2**33)


def test_a_limit_of_a_gpu_leaves_room_for_cuda_itself(monkeypatch):
    gib, device, asked = 2**30, torch.device("cuda"), []
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (6 * gib, 16 * gib))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 2 * gib)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda _: gib)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda *a: asked.append(a))
    limit_device(device, 4 * gib + CONTEXT)
    assert asked == [(0.25, None)]
    assert device_memory(device, 4 * gib + CONTEXT) == DeviceMemory(4 * gib, gib)
    assert device_memory(device, 40 * gib) == DeviceMemory(8 * gib, gib)
    assert device_memory(device, None) == DeviceMemory(8 * gib, gib)
    assert device_memory(torch.device("cpu"), None) is None
    with pytest.raises(ValueError, match="is too little"):
        limit_device(device, CONTEXT)
