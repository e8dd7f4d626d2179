"""nnU-Net's rules of a case's shape: which axis is resampled alone, how many voxels result."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

ANISOTROPY = 3.0  # ratio of spacings above which slices are resampled one by one


def find_separate_axis(
    force: bool | None,
    spacing: Sequence[float],
    new_spacing: Sequence[float],
    threshold: float = ANISOTROPY,
) -> int | None:
    """Return the axis along which slices are resampled alone, None where all are treated alike.

    force: the plans' force_separate_z; None decides by the spacings (mm).
    """
    if force is None:
        decisive = next((s for s in (spacing, new_spacing) if max(s) / min(s) > threshold), None)
    else:
        decisive = spacing if force else None
    if decisive is None:
        return None
    largest = np.flatnonzero(max(decisive) / np.asarray(decisive) == 1)
    return int(largest[0]) if len(largest) == 1 else None


def shape_at_spacing(
    shape: Sequence[int], spacing: Sequence[float], new_spacing: Sequence[float]
) -> tuple[int, ...]:
    """Return the voxels per axis of an image of `shape` at another spacing (mm), at least one.

    nnU-Net's number may be none, on which it fails.
    """
    extents = zip(spacing, new_spacing, shape, strict=True)
    return tuple(max(1, round(old / new * n)) for old, new, n in extents)
