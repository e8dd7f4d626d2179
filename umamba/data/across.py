"""What only all cases together show: duplicates, unusual intensities, labels that are missing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from umamba.data.case import Findings
from umamba.data.faults import Faults

FEWEST, FACTOR, SPREADS = 5, 20.0, 5.0  # cases that make a habit; how far off is absurd


def check_duplicates(cases: Sequence[Findings], tests: Sequence[Findings], to: Faults) -> None:
    """Add a warning per image that an earlier one equals, in training, test or both."""
    first: dict[str, tuple[str, int, bool]] = {}
    for i, found in enumerate((*cases, *tests)):
        is_test = i >= len(cases)
        for digest, name in found.digests:
            other, case, other_is_test = first.setdefault(digest, (name, i, is_test))
            if other == name:
                continue
            what = f"is the same image as {Path(other).name}"
            cure = "remove one, else a fold may be validated on what it was trained on"
            if case == i:
                cure = "check that the channels were not mixed up"
            elif is_test:
                where = "imagesTs" if other_is_test else "imagesTr"
                what = f"is the same image as {Path(other).name} in {where}"
                cure = "remove one, else the test counts it twice"
                if not other_is_test:
                    cure = "remove one, else the test is on what was trained on"
            to.add(name, what, cure)


def check_spacings(cases: Sequence[Findings], to: Faults) -> None:
    """Add one warning where images carry no spacing."""
    names = [found.without_spacing for found in cases if found.without_spacing]
    if names:
        what = f"and {len(names) - 1} more have no spacing" if names[1:] else "has no spacing"
        cure = 'write {"spacing": [z, y, x]} in mm to <case>.json beside it, else 1 mm is taken'
        to.add(names[0], what, cure)


def check_intensities(cases: Sequence[Findings], channel_names: Sequence[str], to: Faults) -> None:
    """Add a warning per channel of a case whose values lie absurdly far from the other cases'.

    Compared are, on a log scale, the span of the values from the 0.5 to the 99.5 percentile, and
    how far the highest value lies above that span; for CT also whether values start at 0 where the
    others hold air. Far is more than 20 times the median over cases and 5 of their spreads, which
    scanners and protocols do not reach.
    """
    for channel, channel_name in enumerate(channel_names):
        rows = [row for found in cases if (row := found.intensities.get(channel))]
        rows = [row for row in rows if row[4] > row[1]]  # not the alpha of a picture, say
        if len(rows) < FEWEST:
            continue
        names = [row[0] for row in rows]
        smallest, low, high, largest = np.array([row[1:] for row in rows]).T
        span = np.where(high > low, high - low, largest - smallest)
        for i, times in _far_off(span):
            usual = _number(float(np.median(span)))
            what = f"its values span {_number(span[i])} where {usual} is usual ({times})"
            cure = "check its units and its export; only z-score normalization copes with it"
            to.add(names[i], what, cure)
        for i, _ in _far_off((largest - low) / span):
            if largest[i] - low[i] > span[i] * FACTOR:
                what = f"its highest value {_number(largest[i])} is far above the others"
                what += f" (99.5 % of them are below {_number(high[i])})"
                to.add(names[i], what, "clip the few bright voxels, unless they are meant")
        if channel_name.lower() == "ct" and np.median(low) <= -500:
            for i in np.flatnonzero(low >= 0).tolist():
                usual = _number(float(np.median(low)))
                what = f"its values start at {_number(low[i])} where {usual} is usual"
                to.add(names[i], what, "export it in Hounsfield units, with the rescale intercept")


def check_presence(
    cases: Sequence[Findings], values: Sequence[int], source: Path, faults: Faults, to: Faults
) -> None:
    """Add the fault of a dataset without any label, else warnings for labels never found."""
    counts = [found.counts for found in cases if found.counts is not None]
    missing = [v for v in values if v > 0 and not any(v in count for count in counts)]
    if not counts:
        return
    if len(missing) == sum(v > 0 for v in values):
        what = f"has no labeled voxel in any of its {len(counts)} labels"
        cure = "there is nothing to learn: check how the labels were made"
        faults.add(source, what, cure)
        return
    for v in missing:
        what = f"names label {v} in dataset.json but no case shows it"
        to.add(source, what, "remove it from dataset.json, or add cases that show it")


def _far_off(values: np.ndarray) -> list[tuple[int, str]]:
    """Return (index, how far off in words) of the values far from the median, on a log scale."""
    logs = np.log(np.maximum(values, 1e-30))
    offsets = logs - np.median(logs)
    spread = 1.4826 * float(np.median(np.abs(offsets)))
    limit = max(math.log(FACTOR), SPREADS * spread)
    found = []
    for i in np.flatnonzero(np.abs(offsets) > limit).tolist():
        times = _number(math.exp(abs(offsets[i])))
        found.append((i, f"{times} times {'more' if offsets[i] > 0 else 'less'}"))
    return found


def _number(value: float) -> str:
    """Return three digits of a number, without powers of ten."""
    return f"{float(f'{value:.3g}'):,.12g}"
