"""Counts the connected components of each label of a label map, and their sizes."""

from __future__ import annotations

from collections import Counter

import numpy as np

SLAB = 1 << 22  # voxels counted at once


def component_sizes(label: np.ndarray) -> dict[int, dict[int, int]]:
    """Return, per value above 0, size in voxels -> number of components of that size.

    label: (z, y, x), whole numbers from 0 up. Voxels that share a face, an edge or a corner belong
    together; a label map without foreground costs one look at its voxels.
    """
    box = _foreground_box(label)
    if box is None:
        return {}
    import cc3d  # only labels with foreground need it

    part = label[box]
    # a copy, since cc3d does not take what may not be written to
    part = np.array(part, np.min_scalar_type(int(part.max())), order="C")
    components, n = cc3d.connected_components(part, connectivity=26, return_N=True)
    components, values = components.reshape(-1), part.reshape(-1)
    value_of = np.zeros(n + 1, part.dtype)
    value_of[components] = values
    sizes = np.zeros(n + 1, np.int64)
    for start in range(0, components.size, SLAB):
        sizes += np.bincount(components[start : start + SLAB], minlength=n + 1)
    found: dict[int, Counter[int]] = {}
    for value, size in zip(value_of[1:].tolist(), sizes[1:].tolist(), strict=True):
        found.setdefault(value, Counter())[size] += 1
    return {value: dict(sorted(found[value].items())) for value in sorted(found)}


def _foreground_box(label: np.ndarray) -> tuple[slice, ...] | None:
    """Return the smallest box that holds all voxels other than 0, None where there is none."""
    planes = np.flatnonzero(label.reshape(label.shape[0], -1).any(1))
    if not planes.size:
        return None
    image = np.asarray(label[planes[0] : planes[-1] + 1].any(0))
    marks = (planes, np.flatnonzero(image.any(1)), np.flatnonzero(image.any(0)))
    return tuple(slice(int(mark[0]), int(mark[-1]) + 1) for mark in marks)
