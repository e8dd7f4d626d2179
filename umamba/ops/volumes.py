"""Sums of weighted tiles, and linear resampling with its argmax, in the C library where it is."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor

from umamba.ops import cpu

# Legend: K classes; z, y, x extents before, Z, Y, X extents after resampling.


@dataclass(frozen=True)
class LinearAxis:
    """One axis of a linear resampling: output i is the sum of two weighted inputs.

    low and high (n,) int32 are their positions, weight (2, n) float32 their weights.
    """

    low: Tensor
    high: Tensor
    weight: Tensor

    def part(self, start: int, stop: int, offset: int) -> LinearAxis:
        """The outputs start to stop, of an input that begins at `offset`."""
        low, high = (positions[start:stop] - offset for positions in (self.low, self.high))
        return LinearAxis(low, high, self.weight[:, start:stop].contiguous())

    @classmethod
    def from_matrix(cls, matrix: Tensor | None, n: int) -> LinearAxis | None:
        """The axis of an (n_out, n_in) operator, None for an identity; None for more than two."""
        if matrix is None:
            position = torch.arange(n, dtype=torch.int32)
            return cls(position, position, torch.stack([torch.ones(n), torch.zeros(n)]))
        used = (matrix.abs() > 1e-7).int()
        count = used.sum(1)
        if count.max() > 2 or count.min() < 1:
            return None
        low = used.argmax(1)
        high = matrix.shape[1] - 1 - used.flip(1).argmax(1)
        first, second = (matrix.gather(1, at[:, None])[:, 0] for at in (low, high))
        second = torch.where(high > low, second, 0.0)
        return cls(low.int(), high.int(), torch.stack([first, second]).float())


def add_tile(total: Tensor, tile: Tensor | None, weight: Tensor, n_held: int) -> None:
    """Adds tile * weight to the first n_held values of each row of total, and puts it behind them.

    total (K, z, y, x), tile (K, z, y, x) of any strides or None for ones, weight (z, y, x).
    """
    given = (total, weight) if tile is None else (total, weight, tile)
    if not _usable(*given) or total.stride(3) != 1 or weight.stride(2) != 1:
        if tile is None:
            total[..., :n_held] += weight[..., :n_held]
            total[..., n_held:] = weight[..., n_held:]
            return
        if total.dtype == tile.dtype == torch.float32:
            total[..., :n_held].addcmul_(tile[..., :n_held], weight[..., :n_held])
        else:  # products of half precision are rounded before they are added, as nnU-Net's are
            total[..., :n_held] += tile[..., :n_held] * weight[..., :n_held]
        torch.mul(tile[..., n_held:], weight[..., n_held:], out=total[..., n_held:])
        return
    arguments = _AddTile(
        *total.shape, n_held, torch.get_num_threads(), *total.stride()[:3],
        *((0, 0, 0, 1) if tile is None else tile.stride()), *weight.stride()[:2],
        total.data_ptr(), None if tile is None else tile.data_ptr(), weight.data_ptr(),
    )  # fmt: skip
    cpu._call("umamba_add_tile", arguments)


def has_linear_argmax() -> bool:
    """Whether `linear_argmax` can be called here."""
    return _has("umamba_linear_argmax")


def linear_argmax(
    data: Tensor,
    axes: tuple[LinearAxis, LinearAxis, LinearAxis | None],
    labels: Tensor,
    *,
    round_half: bool = False,
) -> None:
    """Fills labels (Z, Y, X) uint8 or uint16 with the argmax of data (K, z, y, x) resampled.

    The first of equal values wins.  The last of `axes` is None where X is x.

    Args:
        data: float32 on the CPU, dense along x.
        round_half: compare what remains of the resampled values in half precision.
    """
    z, y, x = axes
    assert data.dtype == torch.float32
    assert data.stride(3) == labels.stride(2) == 1
    positions = [p.data_ptr() for axis in (z, y) for p in (axis.low, axis.high)]
    along_x: tuple[int | None, ...] = (None, None, None)
    if x is not None:
        along_x = (x.weight.data_ptr(), x.low.data_ptr(), x.high.data_ptr())
    arguments = _LinearArgmax(
        data.shape[0], data.shape[3], *labels.shape, *data.stride()[:3], *labels.stride()[:2],
        labels.element_size(), round_half, torch.get_num_threads(), data.data_ptr(),
        z.weight.data_ptr(), y.weight.data_ptr(), along_x[0], *positions, *along_x[1:],
        labels.data_ptr(), None, 0,
    )  # fmt: skip
    cpu._call("umamba_linear_argmax", arguments)


def _usable(*tensors: Tensor) -> bool:
    alike = all(t.dtype == torch.float32 and t.device.type == "cpu" for t in tensors)
    return alike and _has("umamba_add_tile")


def _has(name: str) -> bool:
    library = cpu._load()[0]
    return library is not None and hasattr(library, name)


def _fields(sizes: str, pointers: str) -> list[tuple[str, type]]:
    fields: list[tuple[str, type]] = [(name, ctypes.c_int64) for name in sizes.split()]
    return fields + [(name, ctypes.c_void_p) for name in pointers.split()]


# The field order is that of csrc/umamba.h.
class _AddTile(ctypes.Structure):
    _fields_ = _fields(
        "K n_z n_y n_x n_held n_threads s_k s_z s_y t_k t_z t_y t_x w_z w_y", "sum tile weight"
    )


class _LinearArgmax(ctypes.Structure):
    _fields_ = [
        *_fields(
            "K n_x Z Y X s_k s_z s_y l_z l_y label_bytes round_half n_threads",
            "data z_weight y_weight x_weight z_low z_high y_low y_high x_low x_high labels scratch",
        ),
        ("scratch_floats", ctypes.c_int64),
    ]
