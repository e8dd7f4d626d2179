"""nnU-Net's crop to the voxels that are not zero, and what counts as outside of the body."""

from __future__ import annotations

from typing import Any

import numpy as np

Box = list[list[int]]


def nonzero_box(image: np.ndarray) -> Box:
    """Return [start, stop] per axis of the voxels of (C, z, y, x) that are not 0 in any channel.

    The whole image where all are 0.
    """
    shape = image.shape[1:]
    hit = [np.zeros(n, bool) for n in shape]
    for z in range(shape[0]):
        plane = (image[:, z] != 0).any(0)
        rows = plane.any(1)
        hit[0][z] = rows.any()
        hit[1] |= rows
        hit[2] |= plane.any(0)
    box = []
    for axis, n in zip(hit, shape, strict=True):
        places = np.flatnonzero(axis)
        box.append([int(places[0]), int(places[-1]) + 1] if len(places) else [0, n])
    return box


def crop(array: np.ndarray, box: Box) -> np.ndarray:
    """Return the view of (..., z, y, x) inside the box."""
    inside: tuple[Any, ...] = (..., *(slice(start, stop) for start, stop in box))
    view: np.ndarray = array[inside]
    return view


def outside_of_body(image: np.ndarray) -> np.ndarray | None:
    """Return where a cropped (C, z, y, x) is 0 in all channels up to its border; None: nowhere.

    What is 0 but enclosed by voxels that are not (along the axes) belongs to the body.
    """
    zero = image[0] == 0
    for channel in image[1:]:
        zero &= channel == 0
    if not zero.any():
        return None
    from scipy.ndimage import label

    components, n_components = label(zero)
    open_ones = np.zeros(n_components + 1, bool)
    for axis in range(3):
        for side in (0, -1):
            open_ones[components.take(side, axis)] = True
    open_ones[0] = False
    outside = open_ones[components]
    return outside if open_ones.any() else None
