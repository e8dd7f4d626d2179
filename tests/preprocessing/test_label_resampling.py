"""Labels resampled in one pass equal nnU-Net's, at ties too."""

from __future__ import annotations

import numpy as np
import pytest
from nnunetv2.preprocessing.resampling.default_resampling import resample_data_or_seg_to_shape
from skimage.transform import resize

from umamba.preprocessing.label_resampling import linear_taps, nearest_slices, resample_labels

OPTIONS = {"is_seg": True, "order": 1, "order_z": 0, "force_separate_z": None}


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (5.0, 1.0, 1.0), (1.0, 4.0, 1.0)])
@pytest.mark.parametrize("kind", ["noise", "blocks", "pairs"])
@pytest.mark.parametrize("factors", [(2, 2, 2), (0.5, 2, 4), (1, 1.5, 0.73), (3, 1, 1.31)])
def test_every_voxel_equals_that_of_nnunet(spacing, kind, factors):
    generator = np.random.default_rng(len(kind))
    for shape in ((9, 8, 7), (5, 12, 1), (2, 3, 11)):
        labels = generator.integers(-1, 2 if kind == "pairs" else 9, shape).astype(np.int16)
        if kind == "blocks":
            labels = labels.repeat(3, 1).repeat(3, 2)[:, : shape[1], : shape[2]]
        new_shape = tuple(max(1, round(n * f)) for n, f in zip(shape, factors, strict=True))
        stock = resample_data_or_seg_to_shape(
            labels[None].astype(np.float32), new_shape, spacing, spacing, **OPTIONS
        )
        ours = resample_labels(labels, new_shape, OPTIONS, spacing, spacing)
        assert ours.dtype == np.int16
        np.testing.assert_array_equal(ours, stock[0])


@pytest.mark.parametrize(("n_in", "n_out"), [(7, 14), (14, 7), (9, 13), (5, 1), (1, 4), (6, 6)])
def test_taps_are_those_of_the_resize_that_nnunet_calls(n_in, n_out):
    taps = linear_taps(n_in, n_out)
    matrix = np.zeros((n_out, n_in))
    for position, weight in zip(taps.positions, taps.weights, strict=True):
        np.add.at(matrix, (np.arange(n_out), position), weight)
    resized = resize(np.eye(n_in), (n_out, n_in), 1, mode="edge", anti_aliasing=False)
    np.testing.assert_array_equal(matrix, resized)
    nearest = resize(np.arange(float(n_in)), (n_out,), 0, mode="edge", anti_aliasing=False)
    np.testing.assert_array_equal(taps.nearest, nearest)


def test_the_same_shape_is_not_touched():
    labels = np.zeros((3, 4, 5), np.int16)
    assert resample_labels(labels, (3, 4, 5), OPTIONS, (1, 1, 1), (2, 1, 1)) is labels
    assert nearest_slices(3, 3) == [0, 1, 2]
