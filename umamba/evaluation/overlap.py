"""Overlap of two label maps per label or region: Dice, IoU and counts, by nnU-Net's rules."""

import math
import operator
from collections.abc import Collection, Iterator
from functools import reduce

import numpy as np
from scipy import ndimage

Label = int | tuple[int, ...]
OVERLAP_METRICS = ("Dice", "IoU", "TP", "FP", "FN", "TN", "n_pred", "n_ref")


def compare_labels(
    reference: np.ndarray,
    prediction: np.ndarray,
    labels: Collection[Label],
    ignore_label: int | None = None,
) -> Iterator[tuple[Label, dict[str, float], np.ndarray, np.ndarray]]:
    """Yields each label or region, its OVERLAP_METRICS, its masks in reference and prediction.

    The masks are cut to the box that holds the label in both maps, with a margin of one voxel.
    Voxels that carry `ignore_label` in the reference count nowhere. Dice and IoU are nan where
    neither map holds the label, the rule of nnU-Net; where only one holds it they are 0.
    Raises ValueError when the shapes differ.
    """
    if reference.shape != prediction.shape:
        raise ValueError(
            f"reference and prediction differ in shape, {reference.shape} and "
            f"{prediction.shape}: compare label maps of the same grid"
        )
    counted = None if ignore_label is None else reference != ignore_label
    n_counted = reference.size if counted is None else int(np.count_nonzero(counted))
    largest = max(1, *(value for label in labels for value in label_values(label)))
    boxes = [ndimage.find_objects(part, largest) for part in (reference, prediction)]
    for label in labels:
        box = label_box(boxes, label, reference.ndim)
        ref, pred = label_mask(reference[box], label), label_mask(prediction[box], label)
        if counted is not None:
            ref, pred = ref & counted[box], pred & counted[box]
        tp, n_ref, n_pred = (int(np.count_nonzero(mask)) for mask in (ref & pred, ref, pred))
        union = n_ref + n_pred - tp
        dice, iou = (2 * tp / (n_ref + n_pred), tp / union) if union else (math.nan, math.nan)
        values = (dice, iou, tp, n_pred - tp, n_ref - tp, n_counted - union, n_pred, n_ref)
        yield label, dict(zip(OVERLAP_METRICS, values, strict=True)), ref, pred


def label_values(label: Label) -> tuple[int, ...]:
    """Returns the values of a label or a region."""
    return (label,) if isinstance(label, int) else label


def label_mask(segmentation: np.ndarray, label: Label) -> np.ndarray:
    """Returns where the segmentation carries the label, or any label of the region."""
    return reduce(operator.or_, (segmentation == value for value in label_values(label)))


def label_box(boxes: list[list], label: Label, ndim: int) -> tuple[slice, ...]:
    """Returns the box around a label with a margin of one voxel.

    boxes: of the values 1, 2, ... in each map, as scipy's find_objects gives them.
    """
    values = label_values(label)
    if 0 in values:
        return (slice(None),) * ndim
    present = [found[value - 1] for found in boxes for value in values if found[value - 1]]
    if not present:
        return (slice(0, 2),) * ndim
    # one voxel of margin, so that a structure of one slice stays a body of that thickness
    return tuple(
        slice(max(min(s.start for s in axis) - 1, 0), max(s.stop for s in axis) + 1)
        for axis in zip(*present, strict=True)
    )
