"""Components: their number and sizes per label, as a slow count by hand finds them."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from scipy import ndimage

from umamba.data.components import component_sizes


def count_slowly(label: np.ndarray) -> dict[int, dict[int, int]]:
    found: dict[int, dict[int, int]] = {}
    for value in np.unique(label[label > 0]).tolist():
        numbered, _ = ndimage.label(label == value, np.ones((3, 3, 3)))
        sizes, times = np.unique(np.bincount(numbered.reshape(-1))[1:], return_counts=True)
        found[int(value)] = dict(zip(sizes.tolist(), times.tolist(), strict=True))
    return found


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, ">i2", np.uint32, np.float32, np.float64])
@pytest.mark.parametrize("shape", [(7, 9, 8), (1, 13, 11)])
def test_sizes_equal_those_of_a_count_per_label(shape, dtype):
    rng = np.random.default_rng(0)
    label = rng.choice(
        [0, 1, 2, 300 if np.dtype(dtype).itemsize > 1 else 30], shape, p=[0.8, 0.1, 0.05, 0.05]
    )
    label[:, :2] = 0  # foreground in a box within the image
    label = label.astype(dtype)
    label.flags.writeable = False
    assert component_sizes(label) == count_slowly(label)


def test_touching_labels_are_components_of_their_own_and_corners_connect():
    label = np.zeros((4, 4, 4), np.uint8)
    label[0, 0, 0] = label[1, 1, 1] = 1
    label[2, 2, 2:4] = 2
    assert component_sizes(label) == {1: {2: 1}, 2: {2: 1}}


def test_sizes_are_right_over_more_voxels_than_are_counted_at_once(monkeypatch):
    monkeypatch.setattr("umamba.data.components.SLAB", 7)
    label = np.random.default_rng(1).integers(0, 3, (5, 6, 7))
    assert component_sizes(label) == count_slowly(label)


def test_a_label_map_without_foreground_costs_no_import(monkeypatch):
    monkeypatch.setitem(sys.modules, "cc3d", None)
    assert component_sizes(np.zeros((3, 4, 5), np.uint8)) == {}
