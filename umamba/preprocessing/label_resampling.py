"""nnU-Net's resampling of a label map, all labels in one pass, voxel by voxel the same result.

nnU-Net interpolates the indicator of each label linearly and takes the label with the largest
value; where the largest is shared, the nearest voxel's label if it is among them, else the
smallest. Such ties are common and decided by equality of float64, so weights and sums are formed
in the order in which scipy forms them. Most voxels need none of it: their up to eight neighbours
have one label.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from typing import Any

import numpy as np

from umamba.preprocessing.geometry import find_separate_axis
from umamba.preprocessing.resampling import DEFAULTS, FUNCTION

MIXED = np.iinfo(np.int16).min  # no label: the neighbours differ
SURE = 0.5 + 1e-6  # a share of the weights that no other label can reach


def is_fused(function_name: str, kwargs: dict[str, Any]) -> bool:
    """Return whether the plans' resampling of labels is the one that is done here."""
    options = DEFAULTS | kwargs
    known = function_name == FUNCTION and len(options) == len(DEFAULTS)
    return known and options["is_seg"] and options["order"] == 1 and options["order_z"] == 0


def resample_labels(
    labels: np.ndarray,
    new_shape: Sequence[int],
    kwargs: dict[str, Any],
    spacing: Sequence[float],
    new_spacing: Sequence[float],
) -> np.ndarray:
    """Return int16 labels (z, y, x) resampled to `new_shape`, as nnU-Net does with `kwargs`.

    kwargs: of the plans' resampling_fn_seg, for which `is_fused`; spacings in mm.
    """
    if labels.shape == tuple(new_shape):
        return labels
    options = DEFAULTS | kwargs
    axis = find_separate_axis(
        options["force_separate_z"],
        spacing,
        new_spacing,
        options["separate_z_anisotropy_threshold"],
    )
    result = np.empty(tuple(new_shape), np.int16)
    if axis is None:
        _fill(result, labels, [linear_taps(*n) for n in zip(labels.shape, new_shape, strict=True)])
        return result
    moved, target = np.moveaxis(labels, axis, 0), np.moveaxis(result, axis, 0)
    in_plane = [linear_taps(*n) for n in zip(moved.shape[1:], target.shape[1:], strict=True)]
    slices = nearest_slices(len(moved), len(target))
    plane = np.empty(target.shape[1:], np.int16)
    for z, wanted in enumerate(slices):
        if z == 0 or wanted != slices[z - 1]:
            part = moved[wanted : wanted + 1]
            _fill(plane[None], part, [linear_taps(1, 1), *in_plane])
        target[z] = plane
    return result


@dataclass(frozen=True, eq=False)
class Taps:
    """Per output position of an axis: two input positions, their weights, the nearer of them."""

    positions: tuple[np.ndarray, np.ndarray]
    weights: tuple[np.ndarray, np.ndarray]
    nearest: np.ndarray

    @property
    def n_used(self) -> int:
        """Return 1 where no second position has a weight, else 2."""
        return 2 if self.weights[1].any() else 1


@lru_cache(maxsize=64)
def linear_taps(n_in: int, n_out: int) -> Taps:
    """Return the taps of scipy's linear zoom of one axis in its grid mode, to the last bit.

    Beyond the first and last voxel both taps are that voxel: its two weights are added apart.
    """
    places = (np.arange(n_out) + 0.5) * (n_in / n_out) - 0.5
    below = np.floor(places)
    above_weight = places - below
    first = below.astype(np.intp)
    positions = [np.clip(index, 0, n_in - 1) for index in (first, first + 1)]
    nearest = np.clip(np.floor(places + 0.5).astype(np.intp), 0, n_in - 1)
    return Taps((positions[0], positions[1]), (1.0 - above_weight, above_weight), nearest)


@lru_cache(maxsize=64)
def nearest_slices(n_in: int, n_out: int) -> list[int]:
    """Return which input slice nnU-Net takes for each output slice between which is no spline."""
    from scipy.ndimage import map_coordinates

    if n_in == n_out:
        return list(range(n_in))
    positions = float(n_in) / n_out * (np.arange(n_out) + 0.5) - 0.5
    found = map_coordinates(np.arange(float(n_in)), [positions], order=0, mode="nearest")
    return [int(z) for z in found]


def _fill(result: np.ndarray, labels: np.ndarray, taps: Sequence[Taps]) -> None:
    """Resample labels (z, y, x) into result (Z, Y, X), slice by slice of the result."""
    z_taps, y_taps, x_taps = taps
    known: tuple[int, int] | None = None
    for z in range(len(result)):
        pair = (int(z_taps.positions[0][z]), int(z_taps.positions[1][z]))
        if z_taps.weights[1][z] == 0:
            pair = (pair[0], pair[0])
        if pair != known:
            cells, known = _common_label(labels[pair[0]], labels[pair[1]], y_taps, x_taps), pair
        plane = cells[y_taps.positions[0]].take(x_taps.positions[0], axis=1)
        mixed = np.flatnonzero(plane == MIXED)
        if len(mixed):
            rows, columns = np.divmod(mixed, plane.shape[1])
            plane.reshape(-1)[mixed] = _vote(labels, taps, z, rows, columns)
        result[z] = plane


def _common_label(below: np.ndarray, above: np.ndarray, y_taps: Taps, x_taps: Taps) -> np.ndarray:
    """Return (y, x): the label of all neighbours at (y..y+1, x..x+1) of both planes, or MIXED."""
    cells = below.astype(np.int16)
    differ = below != above if below is not above else np.zeros(below.shape, bool)
    if y_taps.n_used == 2:
        step = below[1:] != below[:-1]
        # equal columns of both planes follow from equal corners of this one
        differ[:-1] |= step | differ[1:]
    if x_taps.n_used == 2:
        differ[:, :-1] |= (below[:, 1:] != below[:, :-1]) | differ[:, 1:]
    cells[differ] = MIXED
    return cells


def _vote(
    labels: np.ndarray, taps: Sequence[Taps], z: int, rows: np.ndarray, columns: np.ndarray
) -> np.ndarray:
    """Return the label with the most weight at (z, rows, columns) of the result, ties as told."""
    z_taps, y_taps, x_taps = taps
    found, weights = [], []
    for i, j, k in product(*(range(t.n_used) for t in taps)):
        plane = labels[z_taps.positions[i][z]]
        found.append(plane[y_taps.positions[j][rows], x_taps.positions[k][columns]])
        # the order of the factors, as that of the sums below, decides the last bit
        weight = z_taps.weights[i][z] * y_taps.weights[j][rows]
        weights.append(weight * x_taps.weights[k][columns])
    winner = labels[z_taps.nearest[z]][y_taps.nearest[rows], x_taps.nearest[columns]]
    open_ones = np.flatnonzero(_weight_of(winner, found, weights) < SURE)
    if len(open_ones):
        found = [label[open_ones] for label in found]
        weights = [weight[open_ones] for weight in weights]
        nearest = winner[open_ones]
        best = nearest_weight = _weight_of(nearest, found, weights)
        smallest = nearest
        for label in found:
            weight = _weight_of(label, found, weights)
            better = (weight > best) | ((weight == best) & (label < smallest))
            smallest, best = np.where(better, label, smallest), np.maximum(weight, best)
        winner[open_ones] = np.where(nearest_weight == best, nearest, smallest)
    return winner


def _weight_of(
    label: np.ndarray, found: Sequence[np.ndarray], weights: Sequence[np.ndarray]
) -> np.ndarray:
    total = np.zeros(len(label))
    for other, weight in zip(found, weights, strict=True):
        total += weight * (other == label)
    return total
