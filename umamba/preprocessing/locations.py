"""nnU-Net's draw of voxels per class, from which training patches are centred."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

SEED = 1234
LEAST_VOXELS = 10_000  # per class, or all it has
LEAST_SHARE = 0.01

ClassOrRegion = int | tuple[int, ...]


def draw_locations(labels: np.ndarray, classes: Sequence[ClassOrRegion]) -> dict[Any, Any]:
    """Return (n, 4) int64 indices (0, z, y, x) per class or region; [] for one without voxels.

    labels: (z, y, x) integers. The draw is nnU-Net's own: same seed, order and numbers.
    """
    random = np.random.RandomState(SEED)
    members = [each if isinstance(each, tuple) else (each,) for each in classes]
    wanted = sorted({label for group in members for label in group})
    low = int(min(labels.min(), wanted[0]))
    table = np.zeros(int(max(labels.max(), wanted[-1])) - low + 1, bool)
    table[np.array(wanted) - low] = True
    flat = labels.reshape(-1)
    places = np.flatnonzero(table[flat - low if low else flat])
    order = np.argsort(flat[places], kind="stable")
    places = places[order]
    sorted_labels = flat[places]
    starts = np.searchsorted(sorted_labels, wanted, "left")
    stops = np.searchsorted(sorted_labels, wanted, "right")
    ranges = dict(zip(wanted, zip(starts, stops, strict=True), strict=True))
    found: dict[Any, Any] = {}
    for key, group in zip(classes, members, strict=True):
        parts = [ranges[label] for label in group if ranges[label][0] < ranges[label][1]]
        counts = [int(stop - start) for start, stop in parts]
        total = sum(counts)
        if not total:
            found[key] = []
            continue
        n_drawn = max(min(LEAST_VOXELS, total), int(np.ceil(total * LEAST_SHARE)))
        drawn = random.choice(total, n_drawn, replace=False)
        ends = np.cumsum(counts)
        part = np.searchsorted(ends, drawn, side="right")
        first = np.array([start for start, _ in parts]) - (ends - counts)
        picked = places[first[part] + drawn]
        indices = np.unravel_index(picked, (1, *labels.shape))
        found[key] = np.stack(indices, axis=1).astype(np.int64, copy=False)
    return found
