"""Overlap of two label maps per label or region: Dice, IoU and counts, by nnU-Net's rules."""

from collections.abc import Sequence

import numpy as np

Label = int | tuple[int, ...]
OVERLAP_METRICS = ("Dice", "IoU", "TP", "FP", "FN", "TN", "n_pred", "n_ref")


def overlap_metrics(
    reference: np.ndarray,
    prediction: np.ndarray,
    labels: Sequence[Label],
    ignore_label: int | None = None,
) -> dict[Label, dict[str, float]]:
    """Returns Dice, IoU, TP, FP, FN, TN, n_pred and n_ref of every label or region.

    A region is a tuple of labels. reference and prediction are integer label maps of one shape.
    Voxels that carry `ignore_label` in the reference count nowhere. Dice and IoU are nan where
    neither map holds the label, the rule of nnU-Net; where only one holds it they are 0.
    Raises ValueError when the shapes differ.
    """
    values = sorted({value for label in labels for value in label_values(label)})
    counts = _joint_histogram(reference, prediction, values, ignore_label)
    total = int(counts.sum())
    results: dict[Label, dict[str, float]] = {}
    for label in labels:
        bins = [values.index(value) + 1 for value in label_values(label)]
        tp = int(counts[np.ix_(bins, bins)].sum())
        n_ref, n_pred = int(counts[bins, :].sum()), int(counts[:, bins].sum())
        fp, fn = n_pred - tp, n_ref - tp
        union = tp + fp + fn
        results[label] = {
            "Dice": 2 * tp / (2 * tp + fp + fn) if union else float("nan"),
            "IoU": tp / union if union else float("nan"),
            "TP": tp,
            "FP": fp,
            "FN": fn,
            "TN": total - union,
            "n_pred": n_pred,
            "n_ref": n_ref,
        }
    return results


def label_values(label: Label) -> tuple[int, ...]:
    """Returns the distinct values of a label or a region."""
    return (label,) if isinstance(label, int) else tuple(dict.fromkeys(label))


def label_mask(segmentation: np.ndarray, label: Label) -> np.ndarray:
    """Returns where the segmentation carries the label, or any label of the region."""
    values = label_values(label)
    mask: np.ndarray = segmentation == values[0]
    for value in values[1:]:
        mask |= segmentation == value
    return mask


def _joint_histogram(
    reference: np.ndarray,
    prediction: np.ndarray,
    values: Sequence[int],
    ignore_label: int | None,
) -> np.ndarray:
    """Counts voxels per pair of values: row reference, column prediction.

    values[i] lies in bin i + 1, every other value in bin 0.
    """
    if reference.shape != prediction.shape:
        raise ValueError(
            f"reference and prediction differ in shape, {reference.shape} and "
            f"{prediction.shape}: compare label maps of the same grid"
        )
    n_bins = len(values) + 1
    largest = max(values)
    bin_of = np.zeros(largest + 3, dtype=np.int64)  # entries: negative, 0 .. largest, above
    bin_of[np.asarray(values) + 1] = np.arange(1, n_bins)
    counts = np.zeros(n_bins * n_bins, dtype=np.int64)
    # slab by slab, because the pair index of a whole CT would take 8 bytes per voxel
    for ref, pred in zip(reference, prediction, strict=True):
        pairs = bin_of[_clipped(ref, largest)] * n_bins + bin_of[_clipped(pred, largest)]
        if ignore_label is not None:
            pairs = pairs[ref != ignore_label]
        counts += np.bincount(pairs.ravel(), minlength=n_bins * n_bins)
    return counts.reshape(n_bins, n_bins)


def _clipped(segmentation: np.ndarray, largest: int) -> np.ndarray:
    return np.clip(segmentation.astype(np.int64), -1, largest + 1) + 1
