"""nnU-Net's spline resampling as one matrix per axis, applied to the part that is asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from nnunetv2.preprocessing.resampling.default_resampling import determine_do_sep_z_and_axis
from scipy.ndimage import map_coordinates
from skimage.transform import resize

# Legend: C channels; z, y, x extents before, Z, Y, X extents after resampling.

SEPARABLE_FUNCTION = "resample_data_or_seg_to_shape"
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
    options = {
        "is_seg": False,
        "order": 3,
        "order_z": 0,
        "force_separate_z": False,
        "separate_z_anisotropy_threshold": 3,
    }
    if function_name != SEPARABLE_FUNCTION or not set(kwargs) <= set(options):
        return None
    options.update(kwargs)
    if options["is_seg"]:
        return None
    separate, axis = determine_do_sep_z_and_axis(
        options["force_separate_z"],
        current_spacing,
        new_spacing,
        options["separate_z_anisotropy_threshold"],
    )
    shape, new_shape = tuple(map(int, shape)), tuple(map(int, new_shape))
    if shape == new_shape:
        return SeparableResampling(shape, new_shape, (None, None, None), None, clip=False)
    through_plane = int(axis) if separate and axis is not None else None
    matrices = []
    for i, (n_in, n_out) in enumerate(zip(shape, new_shape, strict=True)):
        order = options["order_z"] if i == through_plane else options["order"]
        same = n_in == n_out
        matrices.append(None if same else axis_matrix(n_in, n_out, order, i == through_plane))
    return SeparableResampling(
        shape,
        new_shape,
        (matrices[0], matrices[1], matrices[2]),
        through_plane,
        # skimage clips to the range of its input; order 0 and 1 cannot leave it
        clip=options["order"] > 1,
    )


@dataclass(frozen=True)
class AxisMatrix:
    """An (n_out, n_in) operator in bands of rows, each with the input columns that it needs."""

    shape: tuple[int, int]
    bands: tuple[tuple[int, int, int, int, torch.Tensor], ...]

    def source_rows(self, start: int, stop: int) -> tuple[int, int]:
        """The range of input positions that the outputs start..stop depend on."""
        touched = [(a, b) for first, last, a, b, _ in self.bands if first < stop and last > start]
        return min(a for a, _ in touched), max(b for _, b in touched)

    def apply(
        self, data: torch.Tensor, axis: int, start: int, stop: int, offset: int
    ) -> torch.Tensor:
        """Outputs start..stop along `axis` of data (C, z, y, x), whose first input is `offset`."""
        extent = list(data.shape)
        extent[axis] = stop - start
        out = data.new_empty(extent)
        last_axis = axis == data.ndim - 1
        n_before = int(np.prod(extent[:axis]))
        source = data.reshape(n_before, data.shape[axis], -1)
        target = out.view(n_before, stop - start, -1)
        for first, last, a, b, weights in self.bands:
            low, high = max(first, start), min(last, stop)
            if low >= high:
                continue
            part = weights[low - first : high - first]
            columns = slice(a - offset, b - offset)
            rows = slice(low - start, high - start)
            if last_axis:
                torch.mm(source[:, columns, 0], part.T, out=target[:, rows, 0])
            else:
                target[:, rows] = torch.matmul(part, source[:, columns])
        return out


@dataclass(frozen=True)
class SeparableResampling:
    """Resampling of (C, z, y, x) to (C, Z, Y, X), computed block by block of the output."""

    shape: tuple[int, ...]
    new_shape: tuple[int, ...]
    matrices: tuple[AxisMatrix | None, AxisMatrix | None, AxisMatrix | None]
    separate_axis: int | None
    clip: bool

    @property
    def is_identity(self) -> bool:
        return self.shape == self.new_shape

    def clip_bounds(self, data: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Smallest and largest input per channel (per slice where slices are resampled alone)."""
        if not self.clip:
            return None
        axes = [a + 1 for a in range(3) if a != self.separate_axis]
        return torch.amin(data, axes, keepdim=True), torch.amax(data, axes, keepdim=True)

    def block(
        self,
        data: torch.Tensor,
        rows: slice,
        columns: slice,
        bounds: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """The resampled data (C, Z', Y', X) at `rows` of axis z and `columns` of axis y."""
        wanted = (
            (rows.start, rows.stop),
            (columns.start, columns.stop),
            (0, self.new_shape[2]),
        )
        needed: list[tuple[int, int]] = []
        for matrix, (start, stop) in zip(self.matrices, wanted, strict=True):
            needed.append((start, stop) if matrix is None else matrix.source_rows(start, stop))
        region = tuple(slice(start, stop) for start, stop in needed)
        result = data[(slice(None), *region)]
        # In plane first, then clip, then along the separate axis: nnU-Net's order of the steps.
        in_plane = [a for a in range(3) if a != self.separate_axis]
        for axis in in_plane:
            result = self._apply(result, axis, wanted[axis], needed[axis][0])
        if bounds is not None:
            low, high = bounds
            if self.separate_axis is not None:
                index = [slice(None)] * 4
                index[self.separate_axis + 1] = region[self.separate_axis]
                low, high = low[tuple(index)], high[tuple(index)]
            result = torch.clamp(result, low, high)
        if self.separate_axis is not None:
            axis = self.separate_axis
            result = self._apply(result, axis, wanted[axis], needed[axis][0])
        return result

    def _apply(
        self, data: torch.Tensor, axis: int, wanted: tuple[int, int], offset: int
    ) -> torch.Tensor:
        matrix = self.matrices[axis]
        if matrix is None:
            return data
        return matrix.apply(data, axis + 1, *wanted, offset)

    def whole(self, data: torch.Tensor, memory_limit: int = 2**26) -> torch.Tensor:
        """All of the resampled data (C, Z, Y, X), with little more memory than the result."""
        if self.is_identity:
            return data
        result = data.new_empty((data.shape[0], *self.new_shape))
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


@lru_cache(maxsize=64)
def axis_matrix(n_in: int, n_out: int, order: int, through_plane: bool = False) -> AxisMatrix:
    """The operator of one axis, found by resampling unit vectors with the calls of nnU-Net."""
    unit = np.eye(n_in)
    if through_plane:
        positions = float(n_in) / n_out * (np.arange(n_out) + 0.5) - 0.5
        columns = [map_coordinates(u, [positions], order=order, mode="nearest") for u in unit]
    else:
        columns = [
            resize(u, (n_out,), order, mode="edge", anti_aliasing=False, clip=False) for u in unit
        ]
    dense = np.stack(columns, axis=1)
    bands = []
    for first in range(0, n_out, ROWS_PER_BAND):
        last = min(first + ROWS_PER_BAND, n_out)
        used = np.flatnonzero(np.abs(dense[first:last]).max(0) > NEGLIGIBLE_WEIGHT)
        a, b = int(used[0]), int(used[-1]) + 1
        weights = torch.from_numpy(dense[first:last, a:b].astype(np.float32))
        bands.append((first, last, a, b, weights))
    return AxisMatrix((n_out, n_in), tuple(bands))
