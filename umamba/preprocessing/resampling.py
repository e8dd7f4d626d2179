"""nnU-Net's spline resampling as one matrix per axis, applied to the part that is asked for.

Takes numpy arrays and torch tensors on any device; torch is not imported here, so that worker
processes need not.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from umamba.preprocessing.geometry import find_separate_axis

if TYPE_CHECKING:
    import torch

    Array = TypeVar("Array", np.ndarray, torch.Tensor)

# Legend: C channels; z, y, x extents before, Z, Y, X extents after resampling.

# The function that is separable, and its defaults.
FUNCTION = "resample_data_or_seg_to_shape"
DEFAULTS: dict[str, Any] = {
    "is_seg": False,
    "order": 3,
    "order_z": 0,
    "force_separate_z": False,
    "separate_z_anisotropy_threshold": 3,
}
# Working set of one block: small enough for a cache, large enough to amortise the calls.
MEMORY_LIMIT = 2**26
# Weights of a cubic spline fall by 0.27 per voxel without end; below this they are dropped.
NEGLIGIBLE_WEIGHT = 1e-9
ROWS_PER_BAND = 64


def separable_resampling(
    function_name: str,
    kwargs: dict[str, Any],
    shape: Sequence[int],
    new_shape: Sequence[int],
    current_spacing: Sequence[float],
    new_spacing: Sequence[float],
) -> SeparableResampling | None:
    """The operator equal to nnU-Net's function of that name, or None where it is not separable.

    `function_name` and `kwargs` are those of the plans, for probabilities or for the data;
    shapes (z, y, x) and spacings in mm, as nnU-Net hands them over.
    """
    if not is_separable(function_name, kwargs):
        return None
    options = DEFAULTS | kwargs
    _, order, order_z, force, threshold = options.values()
    through_plane = find_separate_axis(force, current_spacing, new_spacing, threshold)
    matrices: list[np.ndarray | None] = []
    for i, (n_in, n_out) in enumerate(zip(map(int, shape), map(int, new_shape), strict=True)):
        through = i == through_plane
        axis_order = order_z if through else order
        matrices.append(None if n_in == n_out else axis_matrix(n_in, n_out, axis_order, through))
    # skimage clips to the range of its input; order 0 and 1 cannot leave it
    clip = order > 1
    return SeparableResampling(tuple(map(int, new_shape)), tuple(matrices), through_plane, clip)


def is_separable(function_name: str, kwargs: dict[str, Any]) -> bool:
    """Whether the plans' resampling of data or probabilities is the one that is done here."""
    options = DEFAULTS | kwargs
    known = function_name == FUNCTION and len(options) == len(DEFAULTS)
    return known and not options["is_seg"]


@dataclass(frozen=True)
class SeparableResampling:
    """Resampling of (C, z, y, x) to (C, Z, Y, X), computed block by block of the output."""

    new_shape: tuple[int, ...]
    # one (n_out, n_in) operator per axis, None for an axis that keeps its extent
    matrices: tuple[np.ndarray | None, ...] = (None, None, None)
    separate_axis: int | None = None
    clip: bool = False

    @property
    def is_identity(self) -> bool:
        return all(matrix is None for matrix in self.matrices)

    def clip_bounds(self, data: Array) -> tuple[Array, Array] | None:
        """Smallest and largest input per channel (per slice where slices are resampled alone)."""
        if not self.clip or self.is_identity:
            return None
        axes = tuple(a + 1 for a in range(3) if a != self.separate_axis)
        if isinstance(data, np.ndarray):
            return data.min(axes, keepdims=True), data.max(axes, keepdims=True)
        return data.amin(axes, keepdim=True), data.amax(axes, keepdim=True)

    def block(
        self,
        data: Array,
        rows: slice,
        columns: slice,
        bounds: tuple[Array, Array] | None = None,
    ) -> Array:
        """The resampled data (C, Z', Y', X) at `rows` of axis z and `columns` of axis y."""
        wanted = [(rows.start, rows.stop), (columns.start, columns.stop), (0, self.new_shape[2])]
        needed: list[tuple[int, int]] = [
            (start, stop) if matrix is None else used_columns(matrix[start:stop])
            for matrix, (start, stop) in zip(self.matrices, wanted, strict=True)
        ]

        def resample(part: Array, axis: int) -> Array:
            matrix = self.matrices[axis]
            if matrix is None:
                return part
            return apply_matrix(matrix, part, axis + 1, *wanted[axis], needed[axis][0])

        # In plane first, then clip, then along the separate axis: nnU-Net's order of the steps.
        inside: tuple[Any, ...] = (slice(None), *(slice(*n) for n in needed))
        result = data[inside]
        separate = self.separate_axis
        for axis in range(3):
            if axis != separate:
                result = resample(result, axis)
        if bounds is not None:
            low, high = bounds
            if separate is not None:
                kept = (slice(None),) * (separate + 1) + (slice(*needed[separate]),)
                low, high = low[kept], high[kept]
            result = result.clip(low, high)
        return result if separate is None else resample(result, separate)

    def whole(self, data: Array, memory_limit: int = MEMORY_LIMIT) -> Array:
        """All of the resampled data (C, Z, Y, X), with little more memory than the result."""
        if self.is_identity:
            return data
        result = _empty_like(data, (data.shape[0], *self.new_shape))
        bounds = self.clip_bounds(data)
        for rows, columns in output_blocks(self.new_shape, data.shape[0], memory_limit):
            result[:, rows, columns] = self.block(data, rows, columns, bounds)
        return result


def output_blocks(
    shape: Sequence[int], n_channels: int, memory_limit: int
) -> list[tuple[slice, slice]]:
    """Blocks (z range, y range) of an output (Z, Y, X), of about `memory_limit` bytes each.

    The working set of a block is counted as three float32 copies of it.
    """
    voxels = max(1, memory_limit // (4 * 3 * n_channels))
    n_rows = min(shape[0], max(1, voxels // (shape[1] * shape[2])))
    n_columns = shape[1] if n_rows > 1 else min(shape[1], max(1, voxels // shape[2]))
    return [
        (slice(z, min(z + n_rows, shape[0])), slice(y, min(y + n_columns, shape[1])))
        for z in range(0, shape[0], n_rows)
        for y in range(0, shape[1], n_columns)
    ]


@lru_cache(maxsize=32)
def axis_matrix(n_in: int, n_out: int, order: int, through_plane: bool) -> np.ndarray:
    """The (n_out, n_in) operator of one axis: unit vectors, resampled with nnU-Net's own calls."""
    from scipy.ndimage import map_coordinates
    from skimage.transform import resize

    unit = np.eye(n_in)
    if through_plane:
        positions = float(n_in) / n_out * (np.arange(n_out) + 0.5) - 0.5
        columns = [map_coordinates(u, [positions], order=order, mode="nearest") for u in unit]
    else:
        columns = [
            resize(u, (n_out,), order, mode="edge", anti_aliasing=False, clip=False) for u in unit
        ]
    return np.stack(columns, axis=1).astype(np.float32)


def used_columns(rows: np.ndarray) -> tuple[int, int]:
    """The range of input positions that these rows of a matrix depend on."""
    used = np.flatnonzero((np.abs(rows) > NEGLIGIBLE_WEIGHT).any(0))
    return int(used[0]), int(used[-1]) + 1


def apply_matrix(
    matrix: np.ndarray, data: Array, axis: int, start: int, stop: int, offset: int
) -> Array:
    """Outputs start..stop along `axis` of data (C, z, y, x), whose first input is `offset`.

    The rows are taken in bands, each with the columns that it uses: the rest of it is zeros.
    """
    extent = list(data.shape)
    extent[axis] = stop - start
    out = _empty_like(data, extent)
    n_before = math.prod(extent[:axis])
    source = data.reshape(n_before, data.shape[axis], -1)
    target = out.reshape(n_before, stop - start, -1)
    for first in range(start, stop, ROWS_PER_BAND):
        last = min(first + ROWS_PER_BAND, stop)
        a, b = used_columns(matrix[first:last])
        weights = _beside(data, np.ascontiguousarray(matrix[first:last, a:b]))
        rows, columns = slice(first - start, last - start), slice(a - offset, b - offset)
        if axis == data.ndim - 1:
            target[:, rows, 0] = source[:, columns, 0] @ weights.T
        else:
            target[:, rows] = weights @ source[:, columns]
    return out


def _empty_like(data: Array, shape: Sequence[int]) -> Array:
    if isinstance(data, np.ndarray):
        return np.empty(shape, data.dtype)
    return data.new_empty(tuple(shape))


def _beside(data: Array, weights: np.ndarray) -> Array:
    """The weights as what `data` is, where it is."""
    if isinstance(data, np.ndarray):
        return weights
    return sys.modules["torch"].as_tensor(weights, dtype=data.dtype, device=data.device)
