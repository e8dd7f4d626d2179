"""What nnU-Net's fingerprint takes of one case: its shape, spacing and foreground intensities."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from umamba.preprocessing.cropping import crop, nonzero_box
from umamba.preprocessing.reading import Kept, read_case

SEED = 1234


class CaseStatistics(NamedTuple):
    """shape after cropping and spacing (z, y, x); per channel the drawn intensities.

    distinct: per channel the intensities without repetition of a voxel, and how often each was
    drawn; None where that is not shorter.
    """

    shape: tuple[int, ...]
    spacing: list[float]
    drawn: list[np.ndarray]
    distinct: list[tuple[np.ndarray, np.ndarray] | None]
    relative_size: float


def analyze_case(
    images: Sequence[str], label: str, reader: str, n_samples: int, kept: Kept | None = None
) -> CaseStatistics:
    """Read a case and draw `n_samples` of its foreground voxels, those that nnU-Net draws."""
    image, labels, properties = read_case(images, label, reader, kept)
    if np.isnan(image).any():
        raise ValueError("the image holds NaN")
    assert labels is not None
    box = nonzero_box(image)
    image_shape, image = image.shape[1:], crop(image, box)
    foreground = crop(labels, box) > 0
    random = np.random.RandomState(SEED)
    drawn: list[np.ndarray] = []
    distinct: list[tuple[np.ndarray, np.ndarray] | None] = []
    for channel in image:
        values = channel[foreground]
        if not len(values):
            drawn.append(np.empty(0))  # float64, as numpy makes of nnU-Net's empty list
            distinct.append(None)
            continue
        chosen = random.randint(0, len(values), size=n_samples)
        drawn.append(values[chosen])
        few = 4 * len(values) < n_samples
        counts = np.bincount(chosen, minlength=len(values)) if few else None
        distinct.append(None if counts is None else (values, counts))
    relative = np.prod(image.shape[1:]) / np.prod(image_shape)
    spacing = properties["spacing"]
    return CaseStatistics(image.shape[1:], spacing, drawn, distinct, float(relative))


def summarize(cases: Sequence[CaseStatistics]) -> dict[str, Any]:
    """Return the fingerprint as nnU-Net puts it together; empties the cases of what they drew."""
    properties: dict[str, dict[str, float]] = {}
    for channel in range(len(cases[0].drawn)):
        # Taken out of the cases: the samples of all cases are large, twice them is too much.
        values = np.concatenate([case.drawn.pop(0) for case in cases])
        if values.size == 0:
            raise ValueError("no case has a labelled voxel: there is nothing to learn")
        mean, std = float(np.mean(values)), float(np.std(values))
        distinct = [case.distinct[channel] for case in cases]
        low, median, high = percentiles(values, distinct, (0.5, 50.0, 99.5))
        properties[str(channel)] = {
            "mean": mean,
            "median": median,
            "std": std,
            "min": float(np.min(values)),
            "max": float(np.max(values)),
            "percentile_99_5": high,
            "percentile_00_5": low,
        }
    return {
        "spacings": [[float(mm) for mm in case.spacing] for case in cases],
        "shapes_after_crop": [[int(n) for n in case.shape] for case in cases],
        "foreground_intensity_properties_per_channel": properties,
        "median_relative_size_after_cropping": float(
            np.median([case.relative_size for case in cases])
        ),
    }


def percentiles(
    values: np.ndarray,
    distinct: Sequence[tuple[np.ndarray, np.ndarray] | None],
    wanted: Sequence[float],
) -> list[float]:
    """Return np.percentile(values, wanted); by counts of the distinct values where they are known.

    values is reordered. The hundred million values of nnU-Net's fingerprint are few that repeat.
    """
    if any(each is None for each in distinct):
        return [float(p) for p in np.percentile(values, wanted, overwrite_input=True)]
    pairs = [each for each in distinct if each is not None]
    known = np.concatenate([value for value, _ in pairs])
    order = np.argsort(known)
    ends = np.cumsum(np.concatenate([count for _, count in pairs])[order])
    results = []
    for percent in wanted:
        place = (len(values) - 1) * (percent / 100)
        below = int(place)
        neighbours = np.searchsorted(ends, (below, min(below + 1, len(values) - 1)), "right")
        low, high = known[order[neighbours]]
        weight = place - below
        step = np.float64(high - low)
        results.append(float(low + step * weight if weight < 0.5 else high - step * (1 - weight)))
    return results
