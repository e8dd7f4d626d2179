"""Tests of the memory plan of a prediction."""

from __future__ import annotations

import pytest

from umamba.inference.blocks import WindowGrid
from umamba.inference.memory import RESERVE, plan_memory


def grids():
    windows = [
        (slice(None), slice(z, z + 4), slice(y, y + 4), slice(x, x + 4))
        for z in range(0, 9, 2) for y in range(0, 9, 2) for x in range(0, 9, 2)
    ]  # fmt: skip
    shape = (12, 12, 12)
    return WindowGrid(windows, shape, whole_rows=True), WindowGrid(windows, shape)


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
