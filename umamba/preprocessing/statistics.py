"""What nnU-Net's fingerprint takes of one case: its shape, spacing and foreground intensities."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np

from umamba.preprocessing.cropping import crop, nonzero_box
from umamba.preprocessing.reading import Kept, read_case

SEED = 1234
THREADS = 4


class CaseStatistics(NamedTuple):
    """shape after cropping and spacing (z, y, x); per channel the foreground's intensities.

    values: where is_drawn, the voxels that nnU-Net draws; else, which is shorter, all of them.
    """

    shape: tuple[int, ...]
    spacing: list[float]
    values: list[np.ndarray]
    is_drawn: bool
    relative_size: float


def analyze_case(
    images: Sequence[str], label: str, reader: str, n_samples: int, kept: Kept | None = None
) -> CaseStatistics:
    """Read a case and take the intensities of its foreground, of `n_samples` voxels at most."""
    image, labels, properties = read_case(images, label, reader, kept)
    if np.isnan(image).any():
        raise ValueError("the image holds NaN")
    assert labels is not None
    box = nonzero_box(image)
    relative_size = np.prod([stop - start for start, stop in box]) / np.prod(image.shape[1:])
    image = crop(image, box)
    foreground = crop(labels, box) > 0
    values = [channel[foreground] for channel in image]
    is_drawn = 4 * len(values[0]) > n_samples
    if is_drawn:
        draw = Draw(n_samples)
        values = [each[draw.places(len(each))] for each in values]
    return CaseStatistics(
        image.shape[1:], properties["spacing"], values, is_drawn, float(relative_size)
    )


class Draw:
    """nnU-Net's draw of voxels of a case, with repetition: one stream for all its channels."""

    def __init__(self, n_samples: int) -> None:
        self._random, self._n_samples = np.random.RandomState(SEED), n_samples

    def places(self, n_voxels: int) -> np.ndarray:
        """Return the indices of the next channel's voxels."""
        return self._random.randint(0, n_voxels, size=self._n_samples)


def summarize(cases: Sequence[CaseStatistics], n_samples: int) -> dict[str, Any]:
    """Return the fingerprint as nnU-Net puts it together, `n_samples` voxels of each case.

    Takes the intensities out of the cases: those of all together are large.
    """
    properties: dict[str, dict[str, float]] = {}
    draws = [Draw(n_samples) for _ in cases]
    for channel in range(len(cases[0].values)):
        pieces: list[tuple[np.ndarray, Draw | None]] = []
        empty = any(not len(case.values[0]) for case in cases)
        for case, stream in zip(cases, draws, strict=True):
            own = case.values.pop(0)
            pieces.append((own, stream if len(own) and not case.is_drawn else None))
        n_values = sum(len(own) if draw is None else n_samples for own, draw in pieces)
        if n_values == 0:
            raise ValueError("no case has a labelled voxel: there is nothing to learn")
        # float64 is what numpy makes of nnU-Net's empty list for a case without foreground
        values = np.empty(n_values, np.float64 if empty else np.float32)
        distinct = _fill(values, pieces, n_samples)
        is_known = sum(n_samples for _ in distinct) == n_values
        low, median, high = percentiles(values, distinct if is_known else None, (0.5, 50.0, 99.5))
        lowest, highest = float(values.min()), float(values.max())
        mean, std = mean_and_std(values)
        properties[str(channel)] = {
            "mean": mean,
            "median": median,
            "std": std,
            "min": lowest,
            "max": highest,
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


def _fill(
    values: np.ndarray, pieces: Sequence[tuple[np.ndarray, Draw | None]], n_samples: int
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Writes the intensities of all cases; of those drawn here each one's, and how often it was."""
    sizes = [len(own) if draw is None else n_samples for own, draw in pieces]
    ends = np.cumsum(sizes)

    def fill(index: int) -> tuple[np.ndarray, np.ndarray] | None:
        own, draw = pieces[index]
        target = values[ends[index] - sizes[index] : ends[index]]
        if draw is None:
            target[...] = own
            return None
        places = draw.places(len(own))
        target[...] = own.take(places)
        return own, np.bincount(places, minlength=len(own))

    # numpy draws and takes without the interpreter's lock
    with ThreadPoolExecutor(THREADS) as pool:
        return [each for each in pool.map(fill, range(len(pieces))) if each is not None]


def mean_and_std(values: np.ndarray) -> tuple[float, float]:
    """Return np.mean and np.std, to the last bit; `values` are used up, a copy is too large."""
    mean = np.mean(values)
    values -= mean
    np.multiply(values, values, out=values)
    return float(mean), float(np.sqrt(np.mean(values)))


def percentiles(
    values: np.ndarray,
    distinct: Sequence[tuple[np.ndarray, np.ndarray]] | None,
    wanted: Sequence[float],
) -> list[float]:
    """Return np.percentile(values, wanted), by the distinct values and their counts if known.

    The hundred million values of nnU-Net's fingerprint are often few that repeat.
    """
    if distinct is None:
        return [float(p) for p in np.percentile(values, wanted)]
    known = np.concatenate([value for value, _ in distinct])
    order = np.argsort(known)
    ends = np.cumsum(np.concatenate([count for _, count in distinct])[order])
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
