"""Sums up what the cases of a dataset showed: shapes, spacings, and each label's components."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from umamba.data.case import Findings


def summarize(
    cases: Sequence[Findings], names: Mapping[int, str], values: Sequence[int]
) -> dict[str, Any]:
    """Return shapes and spacings (smallest, median, largest), voxels, and facts of each label.

    names: of the labels by value; values: of the labels to report. A label has its share of all
    voxels, the cases that show it, its voxels in all and in the case with the fewest, and its
    connected components: how many, how many in the median case that shows it, and the sizes.
    """
    shapes = np.array([found.shape for found in cases if found.shape])
    spacings = np.array([found.spacing for found in cases if found.spacing])
    n_voxels: Counter[float] = Counter()
    for found in cases:
        n_voxels.update(found.counts or {})
    total = max(1, n_voxels.total())
    labels = {}
    for v in values:
        per_case = [found.counts[v] for found in cases if found.counts and v in found.counts]
        labels[str(v)] = {
            "name": names.get(v, str(v)),
            "share": n_voxels[v] / total,
            "n_cases": len(per_case),
            "n_voxels": n_voxels[v],
            "smallest_case_voxels": min(per_case, default=0),
            **({"components": _components(cases, v)} if v > 0 else {}),
        }
    return {
        "n_cases": len(cases),
        "shape": _spread(shapes),
        "spacing_mm": _spread(spacings),
        "voxels": int(np.prod(shapes, axis=1).sum()) if shapes.size else 0,
        "labels": labels,
    }


def _components(cases: Sequence[Findings], value: int) -> dict[str, Any]:
    sizes, mm3, weights, per_case = [], [], [], []
    for found in cases:
        by_size = found.components.get(value)
        if by_size:
            volume = float(np.prod(found.spacing)) if found.spacing else 1.0
            sizes += list(by_size)
            mm3 += [size * volume for size in by_size]
            weights += list(by_size.values())
            per_case.append(sum(by_size.values()))
    return {
        "n": sum(per_case),
        "per_case_median": float(np.median(per_case)) if per_case else 0.0,
        "smallest_voxels": min(sizes, default=0),
        "median_voxels": _median(sizes, weights),
        "largest_voxels": max(sizes, default=0),
        "median_mm3": round(_median(mm3, weights), 4),
    }


def _median(values: Sequence[float], weights: Sequence[int]) -> float:
    """Return the lower median of values that occur several times each; 0 of none."""
    if not values:
        return 0
    order = np.argsort(values, kind="stable")
    reached = np.cumsum(np.asarray(weights)[order])
    return values[int(order[np.searchsorted(reached, reached[-1] / 2)])]


def _spread(rows: np.ndarray) -> dict[str, list[float]]:
    if not rows.size:
        return {}
    spread = {"smallest": rows.min(0), "median": np.median(rows, 0), "largest": rows.max(0)}
    return {name: [round(float(v), 4) for v in row] for name, row in spread.items()}
