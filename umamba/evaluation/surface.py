"""Surface metrics of two masks in mm: area-weighted NSD, HD95 and ASSD, and NSD by voxel count.

A surface lives on the corners between voxels. A corner whose 2 x 2 (x 2) voxels are neither all
inside nor all outside is a surface element; its length (2D) or area (3D) is that of the surface
that separates the inside corners from the outside ones, with the spacing taken into account. This
is the measure of most public leaderboards (the `surface-distance` package), and unlike a count of
boundary voxels it gives the faces of thick slices their true weight.

Empty masks: both empty -> every metric is nan. One empty -> NSD 0, HD95 and ASSD inf.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from scipy import ndimage
from scipy.spatial import cKDTree

_TIE = 1 + 1e-9  # 3 voxels of 0.7 mm are within 2.1 mm, whatever the last bit says


@dataclass(frozen=True)
class SurfaceDistances:
    """Distance in mm of every surface element to the other surface, and its size (mm or mm^2)."""

    reference_to_prediction: np.ndarray
    reference_sizes: np.ndarray
    prediction_to_reference: np.ndarray
    prediction_sizes: np.ndarray

    def nsd(self, tolerance_mm: float) -> float:
        """Returns the share of both surfaces that lies within the tolerance of the other one."""
        distances, sizes = self._both()
        within = distances <= tolerance_mm * _TIE
        return float(sizes[within].sum() / sizes.sum()) if sizes.size else float("nan")

    def hausdorff(self, percent: float = 95.0) -> float:
        """Returns the larger of the two directed percentiles in mm, weighted by size."""
        directed = (
            (self.reference_to_prediction, self.reference_sizes),
            (self.prediction_to_reference, self.prediction_sizes),
        )
        found = [_weighted_percentile(*each, percent) for each in directed if each[0].size]
        return max(found, default=float("nan"))

    def average(self) -> float:
        """Returns the mean distance over both surfaces in mm, weighted by size (ASSD)."""
        distances, sizes = self._both()
        return float((distances * sizes).sum() / sizes.sum()) if sizes.size else float("nan")

    def _both(self) -> tuple[np.ndarray, np.ndarray]:
        distances = np.concatenate([self.reference_to_prediction, self.prediction_to_reference])
        return distances, np.concatenate([self.reference_sizes, self.prediction_sizes])


def surface_metrics(
    reference: np.ndarray,
    prediction: np.ndarray,
    spacing: Sequence[float],
    tolerance_mm: float,
    voxel_count: bool = False,
) -> dict[str, float]:
    """Returns NSD, HD95, ASSD of two boolean masks (2D or 3D); voxel_count adds `nsd_voxel_count`.

    spacing: mm per axis.
    """
    found = surface_distances(reference, prediction, spacing)
    metrics = {"NSD": found.nsd(tolerance_mm)}
    if voxel_count:
        metrics["NSD_voxel_count"] = nsd_voxel_count(reference, prediction, spacing, tolerance_mm)
    return metrics | {"HD95": found.hausdorff(), "ASSD": found.average()}


def surface_distances(
    reference: np.ndarray, prediction: np.ndarray, spacing: Sequence[float]
) -> SurfaceDistances:
    """Returns the distances between the surfaces of two boolean masks of one shape.

    Axes of extent 1 are dropped: a single slice has a contour, not a surface. The border of the
    image closes a mask that touches it. Raises ValueError where shapes and spacing do not fit.
    """
    reference, prediction, spacing = _cropped(reference, prediction, spacing)
    sizes = _element_sizes(spacing)
    codes_ref, codes_pred = _corner_codes(reference), _corner_codes(prediction)
    last = len(sizes) - 1
    on_ref, on_pred = (codes_ref % last) != 0, (codes_pred % last) != 0
    return SurfaceDistances(
        _distances(on_ref, on_pred, spacing),
        sizes[codes_ref[on_ref]],
        _distances(on_pred, on_ref, spacing),
        sizes[codes_pred[on_pred]],
    )


def nsd_voxel_count(
    reference: np.ndarray, prediction: np.ndarray, spacing: Sequence[float], tolerance_mm: float
) -> float:
    """Returns NSD with every boundary voxel counted once, whatever its area.

    The flavour of MONAI's default and of some challenges; on thick slices it differs much from
    the area-weighted one (0.39 against 0.69 for a 60 mm cube moved 6 mm along 3 mm slices).
    """
    reference, prediction, spacing = _cropped(reference, prediction, spacing)
    ref, pred = (mask & ~ndimage.binary_erosion(mask) for mask in (reference, prediction))
    distances = np.append(_distances(ref, pred, spacing), _distances(pred, ref, spacing))
    return float((distances <= tolerance_mm * _TIE).mean()) if distances.size else float("nan")


def _cropped(
    reference: np.ndarray, prediction: np.ndarray, spacing: Sequence[float]
) -> tuple[np.ndarray, np.ndarray, list[float]]:
    """Returns both masks cut to the box around their union, with a margin of one voxel."""
    shape = reference.shape
    if prediction.shape != shape or len(spacing) != len(shape):
        raise ValueError(
            f"masks of shape {shape} and {prediction.shape} with {len(spacing)} "
            "spacings: give two masks of one shape and one spacing per axis"
        )
    kept = [axis for axis, extent in enumerate(shape) if extent > 1]
    while len(kept) < 2:  # a line or a point of voxels still has an outline in the plane
        kept = sorted([*kept, max(set(range(len(shape))) - set(kept))])
    reference = reference.reshape([shape[axis] for axis in kept]).astype(bool, copy=False)
    prediction = prediction.reshape(reference.shape).astype(bool, copy=False)
    union = reference | prediction
    axes = range(union.ndim)
    present = [np.flatnonzero(union.any(axis=tuple({*axes} - {axis}))) for axis in axes]
    box = tuple(slice(at[0], at[-1] + 1) if at.size else slice(0) for at in present)
    kept_spacing = [float(spacing[axis]) for axis in kept]
    return np.pad(reference[box], 1), np.pad(prediction[box], 1), kept_spacing


def _corner_codes(mask: np.ndarray) -> np.ndarray:
    """Returns one bit per voxel around every corner, bit 0 at the lowest indices, C order."""
    bits = mask.view(np.uint8)
    codes = np.zeros([extent - 1 for extent in mask.shape], dtype=np.uint8)
    for bit, offset in enumerate(itertools.product((0, 1), repeat=mask.ndim)):
        window = tuple(slice(o, o + extent) for o, extent in zip(offset, codes.shape, strict=True))
        codes |= bits[window] << bit
    return codes


def _distances(at: np.ndarray, to: np.ndarray, spacing: Sequence[float]) -> np.ndarray:
    """Returns the distance in mm from every True element of `at` to the nearest one of `to`."""
    n_at, n_to = int(at.sum()), int(to.sum())
    if n_to == 0 or n_at == 0:
        return np.full(n_at, np.inf)
    # A tree costs about 1 us per point, the transform 0.2 us per voxel: surfaces are sparse, noise
    # is not.
    if n_at + n_to > at.size // 8:
        return np.asarray(ndimage.distance_transform_edt(~to, sampling=spacing))[at]
    tree = cKDTree(np.argwhere(to) * spacing, balanced_tree=False, compact_nodes=False)
    apart = ~to[at]
    distances = np.zeros(n_at)
    distances[apart] = tree.query(np.argwhere(at)[apart] * spacing)[0]
    return distances


def _weighted_percentile(distances: np.ndarray, sizes: np.ndarray, percent: float) -> float:
    """Returns the smallest distance that `percent` of the surface does not exceed."""
    order = np.argsort(distances, kind="stable")
    covered = np.cumsum(sizes[order])
    place = int(np.searchsorted(covered, covered[-1] * percent / 100.0 / _TIE))
    return float(distances[order][min(place, distances.size - 1)])


def _element_sizes(spacing: Sequence[float]) -> np.ndarray:
    """Returns the length (2D) or area (3D) of the surface in a cell for each corner code."""
    scale = np.asarray(spacing)
    if len(spacing) == 3:
        scale = np.prod(scale) / scale  # areas of the faces across each axis
    return np.linalg.norm(_elements(len(spacing)) * scale, axis=-1).sum(axis=-1)


@lru_cache(maxsize=2)
def _elements(ndim: int) -> np.ndarray:
    """Returns the pieces of surface per corner code in a unit cell, (codes, pieces, ndim).

    A piece is a vector along the contour (2D) or a normal as long as its area (3D); unused places
    are zero.
    """
    n_corners = 2**ndim
    elements = np.zeros((2**n_corners, 4, ndim))
    for code in range(1, len(elements) - 1):
        inside = (code >> np.arange(n_corners) & 1).astype(bool).reshape((2,) * ndim)
        if 2 * inside.sum() > n_corners:
            inside = ~inside  # the rarer side decides what hangs together
        groups, n_groups = ndimage.label(inside)  # joined by edges of the cell
        outlines = [_outline(groups == group) for group in range(1, n_groups + 1)]
        found = np.concatenate([o[:1] - o[1:] if ndim == 2 else _normals(o) for o in outlines])
        elements[code, : len(found)] = found
    return elements


def _outline(group: np.ndarray) -> np.ndarray:
    """Returns the middles of the edges that leave the group of corners, in order around it."""
    middles = []
    for corner in np.argwhere(group):
        for step in np.eye(group.ndim, dtype=int):
            other = corner ^ step  # the corner at the other end of the edge along one axis
            if not group[tuple(other)]:
                middles.append((corner + other) / 2)
    outline = [middles.pop(0)]
    while middles:
        # neighbours in the outline lie on one face of the cell (in 2D there are but two)
        shared = [((m == outline[-1]) & (m != 0.5)).any() or group.ndim == 2 for m in middles]
        outline.append(middles.pop(shared.index(True)))
    return np.array(outline)


def _normals(outline: np.ndarray) -> np.ndarray:
    """Returns the normals of the triangles of the polygon, each as long as its area.

    Where the polygon is not flat, the fan of the largest triangles is taken: that gives the areas
    which the `surface-distance` package tabulates.
    """
    fans = [np.roll(outline, -first, axis=0) for first in range(len(outline))]
    normals = [np.cross(fan[1:-1] - fan[0], fan[2:] - fan[0]) / 2 for fan in fans]
    return max(normals, key=lambda normal: float(np.linalg.norm(normal, axis=-1).sum()))
