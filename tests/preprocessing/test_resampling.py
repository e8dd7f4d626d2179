"""Tests that resampling by matrices equals nnU-Net's function."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from nnunetv2.preprocessing.resampling.default_resampling import resample_data_or_seg_to_shape

from umamba.preprocessing.resampling import output_blocks, separable_resampling

NAME = "resample_data_or_seg_to_shape"
CASES = {
    "isotropic up": ((9, 14, 11), (13, 25, 30), (1.0, 1.0, 1.0), (0.7, 0.6, 0.4)),
    "isotropic down": ((15, 14, 40), (7, 9, 13), (1.0, 1.0, 1.0), (2.0, 1.5, 3.0)),
    "mixed": ((12, 14, 10), (12, 9, 21), (1.0, 1.0, 1.0), (1.0, 1.5, 0.5)),
    "many rows": ((20, 9, 70), (75, 9, 150), (1.0, 1.0, 1.0), (0.3, 1.0, 0.5)),
    "separate z": ((6, 14, 11), (9, 21, 17), (5.0, 1.0, 1.0), (3.3, 0.7, 0.7)),
    "separate z, same slices": ((6, 14, 11), (6, 21, 17), (5.0, 1.0, 1.0), (5.0, 0.7, 0.7)),
    "separate y": ((14, 5, 11), (21, 8, 17), (1.0, 6.0, 1.0), (0.7, 4.0, 0.7)),
    "separate x": ((10, 14, 5), (7, 9, 3), (1.0, 1.0, 6.0), (1.5, 1.5, 9.0)),
    "two thick axes": ((6, 7, 21), (9, 10, 30), (4.0, 4.0, 1.0), (3.0, 3.0, 0.7)),
    "plane": ((1, 14, 11), (1, 31, 19), (999.0, 1.0, 1.0), (999.0, 0.4, 0.6)),
    "single voxel axis": ((1, 6, 5), (4, 12, 9), (1.0, 1.0, 1.0), (0.3, 0.5, 0.6)),
}


def random_data(shape, n_channels=3):
    return np.random.default_rng(0).normal(0, 3, (n_channels, *shape)).astype(np.float32)


@pytest.mark.parametrize("order", [0, 1, 3])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_equals_nnunet_to_one_in_a_hundred_thousand(case, order):
    shape, new_shape, spacing, new_spacing = case
    kwargs = {"is_seg": False, "order": order, "order_z": 0, "force_separate_z": None}
    data = random_data(shape)
    operator = separable_resampling(NAME, kwargs, shape, new_shape, spacing, new_spacing)
    expected = resample_data_or_seg_to_shape(data, new_shape, spacing, new_spacing, **kwargs)
    result = operator.whole(torch.from_numpy(data))
    assert result.dtype == torch.float32
    np.testing.assert_allclose(result.numpy(), expected, atol=1e-5)


def test_linear_interpolation_between_slices_equals_nnunet():
    shape, new_shape, spacing, new_spacing = CASES["separate z"]
    kwargs = {"is_seg": False, "order": 3, "order_z": 1, "force_separate_z": True}
    data = random_data(shape)
    operator = separable_resampling(NAME, kwargs, shape, new_shape, spacing, new_spacing)
    expected = resample_data_or_seg_to_shape(data, new_shape, spacing, new_spacing, **kwargs)
    np.testing.assert_allclose(operator.whole(torch.from_numpy(data)), expected, atol=1e-5)


@pytest.mark.parametrize("name", ["isotropic up", "many rows", "separate z", "separate y"])
@pytest.mark.parametrize("order", [1, 3])
def test_blocks_are_parts_of_the_whole(name, order):
    shape, new_shape, spacing, new_spacing = CASES[name]
    kwargs = {"is_seg": False, "order": order, "order_z": 0, "force_separate_z": None}
    data = torch.from_numpy(random_data(shape))
    operator = separable_resampling(NAME, kwargs, shape, new_shape, spacing, new_spacing)
    whole = operator.whole(data, memory_limit=2**40)
    bounds = operator.clip_bounds(data)
    for rows, columns in output_blocks(new_shape, 3, memory_limit=3 * 4 * 3 * 100):
        block = operator.block(data, rows, columns, bounds)
        torch.testing.assert_close(block, whole[:, rows, columns], atol=2e-6, rtol=1e-6)


def test_equal_shapes_are_not_touched():
    data = torch.randn(2, 4, 5, 6)
    kwargs = {"is_seg": False, "order": 3, "order_z": 0, "force_separate_z": None}
    operator = separable_resampling(NAME, kwargs, (4, 5, 6), (4, 5, 6), (1, 1, 1), (2, 1, 1))
    assert operator.is_identity
    assert operator.whole(data) is data


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("resample_torch_fornnunet", {"is_seg": False}),
        (NAME, {"is_seg": True, "order": 1}),
        (NAME, {"is_seg": False, "order": 1, "invented": 3}),
    ],
    ids=["other function", "labels", "unknown option"],
)
def test_what_is_not_known_to_be_separable_is_left_to_nnunet(name, kwargs):
    assert separable_resampling(name, kwargs, (4, 4, 4), (8, 8, 8), (1, 1, 1), (1, 1, 1)) is None


@pytest.mark.parametrize("shape", [(7, 9, 11), (1, 200, 30), (40, 3, 2)])
def test_blocks_cover_the_output_once_within_the_memory_limit(shape):
    n_channels, limit = 5, 20_000
    seen = np.zeros(shape, dtype=int)
    for rows, columns in output_blocks(shape, n_channels, limit):
        seen[rows, columns] += 1
        voxels = (rows.stop - rows.start) * (columns.stop - columns.start) * shape[2]
        assert voxels * n_channels * 12 <= limit or columns.stop - columns.start == 1
    assert (seen == 1).all()
