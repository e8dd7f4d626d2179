"""Overlap metrics: counts by hand, nnU-Net's own results, regions and the ignore label."""

import numpy as np
import pytest

from umamba.evaluation.overlap import OVERLAP_METRICS, compare_labels


def overlap_metrics(*maps_and_labels) -> dict:
    return {label: metrics for label, metrics, _, _ in compare_labels(*maps_and_labels)}


@pytest.fixture
def maps() -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(3)
    shape = (5, 7, 11)
    return generator.integers(0, 5, shape), generator.integers(0, 5, shape)


def test_counts_of_a_hand_made_pair_are_right() -> None:
    reference = np.array([[0, 1, 1, 2], [0, 1, 2, 2]])
    prediction = np.array([[1, 1, 0, 2], [0, 1, 2, 1]])
    result = overlap_metrics(reference, prediction, [1, 2])
    assert result[1] == {
        "Dice": pytest.approx(4 / 7),
        "IoU": pytest.approx(2 / 5),
        "TP": 2,
        "FP": 2,
        "FN": 1,
        "TN": 3,
        "n_pred": 4,
        "n_ref": 3,
    }
    assert result[2]["Dice"] == pytest.approx(4 / 5)


@pytest.mark.parametrize("ignore_label", [None, 4], ids=["all voxels", "ignore label"])
def test_labels_and_regions_agree_with_nnunet(
    maps: tuple[np.ndarray, np.ndarray], ignore_label: int | None
) -> None:
    from nnunetv2.evaluation.evaluate_predictions import (
        compute_tp_fp_fn_tn,
        region_or_label_to_mask,
    )

    reference, prediction = maps
    ignored = None if ignore_label is None else reference == ignore_label
    labels = [0, 1, (1, 2), (2, 3, 1), 3]
    ours = overlap_metrics(reference, prediction, labels, ignore_label)
    for label in labels:
        masks = [region_or_label_to_mask(part, label) for part in maps]
        theirs = [int(count) for count in compute_tp_fp_fn_tn(masks[0], masks[1], ignored)]
        assert [ours[label][name] for name in ("TP", "FP", "FN", "TN")] == theirs
        tp, fp, fn, _ = theirs
        assert ours[label]["Dice"] == pytest.approx(2 * tp / (2 * tp + fp + fn))


def test_a_label_in_neither_map_is_nan_and_in_one_map_is_zero() -> None:
    reference = np.zeros((3, 4, 5), dtype=np.uint8)
    prediction = reference.copy()
    prediction[1, 1, 1] = 1
    result = overlap_metrics(reference, prediction, [1, 2])
    assert result[1]["Dice"] == 0
    assert result[1]["IoU"] == 0
    assert np.isnan(result[2]["Dice"])
    assert set(result[2]) == set(OVERLAP_METRICS)


def test_values_that_nobody_asked_for_count_as_other(maps: tuple[np.ndarray, np.ndarray]) -> None:
    reference, prediction = maps
    odd = np.where(prediction == 3, -7, np.where(prediction == 4, 60_000, prediction))
    expected = overlap_metrics(reference, prediction, [1, 2])
    assert overlap_metrics(reference.astype(np.uint8), odd, [1, 2]) == expected


def test_high_label_values_need_no_table_of_their_square() -> None:
    reference = np.array([[60_000, 0], [3, 3]], dtype=np.uint16)
    result = overlap_metrics(reference, reference.copy(), [60_000, 3])
    assert [result[label]["TP"] for label in (60_000, 3)] == [1, 2]


def test_maps_of_different_shape_are_refused() -> None:
    with pytest.raises(ValueError, match=r"differ in shape"):
        overlap_metrics(np.zeros((2, 3), int), np.zeros((3, 2), int), [1])
