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

SURFACE_METRICS = ("NSD", "HD95", "ASSD")
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
        total = self.reference_sizes.sum() + self.prediction_sizes.sum()
        if total == 0:
            return float("nan")
        limit = tolerance_mm * _TIE
        within = self.reference_sizes[self.reference_to_prediction <= limit].sum()
        within += self.prediction_sizes[self.prediction_to_reference <= limit].sum()
        return float(within / total)

    def hausdorff(self, percent: float = 95.0) -> float:
        """Returns the larger of the two directed percentiles in mm, weighted by size."""
        directed = [
            _weighted_percentile(distances, sizes, percent)
            for distances, sizes in (
                (self.reference_to_prediction, self.reference_sizes),
                (self.prediction_to_reference, self.prediction_sizes),
            )
            if distances.size
        ]
        return max(directed, default=float("nan"))

    def average(self) -> float:
        """Returns the mean distance over both surfaces in mm, weighted by size (ASSD)."""
        sizes = np.concatenate([self.reference_sizes, self.prediction_sizes])
        if sizes.size == 0:
            return float("nan")
        distances = np.concatenate([self.reference_to_prediction, self.prediction_to_reference])
        return float((distances * sizes).sum() / sizes.sum())


def surface_metrics(
    reference: np.ndarray,
    prediction: np.ndarray,
    spacing: Sequence[float],
    tolerance_mm: float,
) -> dict[str, float]:
    """Returns NSD, HD95 and ASSD of two boolean masks (2D or 3D), spacing in mm per axis."""
    distances = surface_distances(reference, prediction, spacing)
    return {
        "NSD": distances.nsd(tolerance_mm),
        "HD95": distances.hausdorff(95.0),
        "ASSD": distances.average(),
    }


def surface_distances(
    reference: np.ndarray, prediction: np.ndarray, spacing: Sequence[float]
) -> SurfaceDistances:
    """Returns the distances between the surfaces of two boolean masks of one shape.

    Axes of extent 1 are dropped: a single slice has a contour, not a surface. The border of the
    image closes a mask that touches it.
    """
    reference, prediction, spacing = _cropped(reference, prediction, spacing)
    table = _element_sizes(spacing)
    codes_ref, codes_pred = _corner_codes(reference), _corner_codes(prediction)
    last = len(table) - 1
    on_ref, on_pred = (codes_ref % last) != 0, (codes_pred % last) != 0
    return SurfaceDistances(
        _distances(on_ref, on_pred, spacing),
        table[codes_ref[on_ref]],
        _distances(on_pred, on_ref, spacing),
        table[codes_pred[on_pred]],
    )


def nsd_voxel_count(
    reference: np.ndarray,
    prediction: np.ndarray,
    spacing: Sequence[float],
    tolerance_mm: float,
) -> float:
    """Returns NSD with every boundary voxel counted once, whatever its area.

    The flavour of MONAI's default and of some challenges; on thick slices it differs much from
    the area-weighted one (0.39 against 0.69 for a 60 mm cube moved 6 mm along 3 mm slices).
    """
    reference, prediction, spacing = _cropped(reference, prediction, spacing)
    edges = [mask & ~ndimage.binary_erosion(mask) for mask in (reference, prediction)]
    n_edges = sum(int(edge.sum()) for edge in edges)
    if n_edges == 0:
        return float("nan")
    limit = tolerance_mm * _TIE
    within = (_distances(edges[0], edges[1], spacing) <= limit).sum()
    within += (_distances(edges[1], edges[0], spacing) <= limit).sum()
    return float(within / n_edges)


def _cropped(
    reference: np.ndarray, prediction: np.ndarray, spacing: Sequence[float]
) -> tuple[np.ndarray, np.ndarray, list[float]]:
    """Returns both masks cut to the box around their union, with a margin of one voxel."""
    if reference.shape != prediction.shape or len(spacing) != reference.ndim:
        raise ValueError(
            f"masks of shape {reference.shape} and {prediction.shape} with {len(spacing)} "
            "spacings: give two masks of one shape and one spacing per axis"
        )
    kept = [axis for axis, extent in enumerate(reference.shape) if extent > 1]
    while len(kept) < 2:  # a line or a point of voxels still has an outline in the plane
        kept = sorted([*kept, max(set(range(reference.ndim)) - set(kept))])
    reference = reference.reshape([reference.shape[axis] for axis in kept]).astype(bool, copy=False)
    prediction = prediction.reshape(reference.shape).astype(bool, copy=False)
    union = reference | prediction
    box = []
    for axis in range(union.ndim):
        present = np.flatnonzero(union.any(axis=tuple(set(range(union.ndim)) - {axis})))
        box.append(slice(present[0], present[-1] + 1) if present.size else slice(0, 0))
    window = tuple(box)
    cut = [np.pad(mask[window], 1) for mask in (reference, prediction)]
    return cut[0], cut[1], [float(spacing[axis]) for axis in kept]


def _corner_codes(mask: np.ndarray) -> np.ndarray:
    """Returns one bit per voxel around every corner; bit k belongs to offset k of `_offsets`."""
    bits = mask.view(np.uint8)
    codes = np.zeros([extent - 1 for extent in mask.shape], dtype=np.uint8)
    for bit, offset in enumerate(_offsets(mask.ndim)):
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
        transform = ndimage.distance_transform_edt(~to, sampling=spacing)
        return np.asarray(transform)[at]
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


def _offsets(ndim: int) -> list[tuple[int, ...]]:
    return list(itertools.product((0, 1), repeat=ndim))


def _element_sizes(spacing: Sequence[float]) -> np.ndarray:
    """Returns the length (2D) or area (3D) of the surface in a cell for each corner code."""
    if len(spacing) == 2:
        return np.linalg.norm(_elements(2) * spacing, axis=-1).sum(axis=-1)
    per_axis = np.prod(spacing) / np.asarray(spacing)  # areas of the faces across each axis
    return np.linalg.norm(_elements(3) * per_axis, axis=-1).sum(axis=-1)


@lru_cache(maxsize=2)
def _elements(ndim: int) -> np.ndarray:
    """Returns the pieces of surface per corner code in a unit cell, (codes, pieces, ndim).

    A piece is a vector along the contour (2D) or a normal as long as its area (3D); unused places
    are zero.
    """
    offsets = _offsets(ndim)
    elements = np.zeros((2 ** len(offsets), 4, ndim))
    for code in range(1, len(elements) - 1):
        inside = [offset for bit, offset in enumerate(offsets) if code >> bit & 1]
        if 2 * len(inside) > len(offsets):  # the rarer side decides what hangs together
            inside = [offset for offset in offsets if offset not in inside]
        outlines = [_outline(group) for group in _connected(inside)]
        pieces = [o[:1] - o[1:2] if ndim == 2 else _normals(o) for o in outlines]
        found = np.concatenate(pieces)
        elements[code, : len(found)] = found
    return elements


def _connected(corners: list[tuple[int, ...]]) -> list[set[tuple[int, ...]]]:
    """Returns the groups of corners that are joined by edges of the cell."""
    groups: list[set[tuple[int, ...]]] = []
    for corner in corners:
        touching = [g for g in groups if any(_n_steps(corner, other) == 1 for other in g)]
        groups = [g for g in groups if g not in touching] + [{corner}.union(*touching)]
    return groups


def _n_steps(a: tuple[int, ...], b: tuple[int, ...]) -> int:
    return sum(abs(x - y) for x, y in zip(a, b, strict=True))


def _outline(group: set[tuple[int, ...]]) -> np.ndarray:
    """Returns the middles of the edges that leave the group, in order around it."""
    middles = []
    for corner in sorted(group):
        for axis in range(len(corner)):
            other = tuple(1 - x if i == axis else x for i, x in enumerate(corner))
            if other not in group:
                middles.append(tuple((x + y) / 2 for x, y in zip(corner, other, strict=True)))
    outline = [middles.pop(0)]
    while middles:
        # neighbours in the outline lie on one face of the cell
        following = next(
            m
            for m in middles
            if any(x == y and x != 0.5 for x, y in zip(outline[-1], m, strict=True)) or len(m) == 2
        )
        middles.remove(following)
        outline.append(following)
    return np.array(outline)


def _normals(outline: np.ndarray) -> np.ndarray:
    """Returns the normals of the triangles of the polygon, each as long as its area.

    Where the polygon is not flat the largest triangles are taken: that gives the areas which the
    `surface-distance` package tabulates.
    """
    triangles = np.array(_triangulations(0, len(outline) - 1))  # (ways, triangles, corners)
    a, b, c = (outline[triangles[..., corner]] for corner in range(3))
    normals = np.cross(b - a, c - a) / 2
    best: np.ndarray = normals[np.linalg.norm(normals, axis=-1).sum(axis=-1).argmax()]
    return best


def _triangulations(first: int, last: int) -> list[list[tuple[int, int, int]]]:
    """Returns every way to cut the polygon first..last into triangles of its corners."""
    if last - first < 2:
        return [[]]
    return [
        [*left, (first, apex, last), *right]
        for apex in range(first + 1, last)
        for left in _triangulations(first, apex)
        for right in _triangulations(apex, last)
    ]
