"""Counting located voxels without reading them, and which patches hold a voxel."""

import pickle
from itertools import product

import numpy as np
import pytest

from umamba.preprocessing.class_locations import corner_bounds, count_locations, jittered_bounds


def write_properties(file, located):
    file.write_bytes(pickle.dumps({"spacing": [1.0] * 3, "class_locations": located, "after": 1}))


def test_voxels_are_counted_as_if_they_were_read(tmp_path):
    generator = np.random.default_rng(0)
    sizes = {1: 10_000, 2: 0, 3: 7, (1, 3): 20_000, 4: 1_100}
    located = {k: generator.integers(0, 99, (n, 4)) if n else [] for k, n in sizes.items()}
    write_properties(tmp_path / "case.pkl", located)
    assert count_locations(tmp_path / "case.pkl") == sizes


@pytest.mark.parametrize("kept", [0, 40, 200_000])
def test_a_cut_file_is_refused_with_its_name(tmp_path, kept):
    file = tmp_path / "case.pkl"
    write_properties(file, {1: np.zeros((10_000, 4), int), 2: np.zeros((5_000, 4), int)})
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(ValueError, match=r"case\.pkl does not tell .* preprocess the case again"):
        count_locations(file)


@pytest.mark.parametrize(
    ("shape", "patch", "seen"),
    [((20, 31, 9), (14, 15, 6), (10, 11, 6)), ((5, 40, 12), (9, 9, 16), (8, 8, 8))],
    ids=["patch inside", "patch larger than the image"],
)
def test_a_jittered_patch_keeps_every_voxel_in_what_the_network_sees(shape, patch, seen):
    padding = np.array(patch) - seen
    lowest, highest = corner_bounds(shape, patch, padding)
    first = (np.array(patch) - seen) // 2
    for voxel in product(*(range(0, n, 2) for n in shape)):
        low, high = jittered_bounds(np.array(voxel), shape, patch, seen, padding)
        assert (lowest <= low).all() and (low <= high).all() and (high <= highest).all()
        for corner in (low, high):
            position = voxel - corner - first
            assert (position >= 0).all() and (position < seen).all()


def test_a_jittered_patch_keeps_an_eighth_between_voxel_and_border():
    voxel = np.array([50, 60, 1])
    low, high = jittered_bounds(voxel, (100, 100, 3), (24, 16, 1), (24, 16, 1), (0, 0, 0))
    assert (voxel - high).tolist() == [3, 2, 0]
    assert (voxel - low).tolist() == [20, 13, 0]
