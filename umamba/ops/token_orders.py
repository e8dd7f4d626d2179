"""The orders in which a feature map is read as a sequence of tokens, each with its inverse.

B batch, C channels, L tokens.

    raster             as the memory of a (z, y, x) array: the last axis runs fastest
    transposed         the first axis runs fastest (column-major; all axes in opposite order)
    axes_120           the axes in the order named: here axis 1 slowest, axis 0 fastest
    inter_slice_5      the raster sequence cut in 5 slices; token 0 of every slice, then 1, ...;
                       filled up with zero tokens at its end where 5 does not divide it
    <any>_reversed     the same, read from its end
"""

import math
from typing import NamedTuple

from torch import Tensor
from torch.nn import functional


class TokenOrder(NamedTuple):
    """One order; obtained by name from `token_order`.

    axes: the spatial axes from slowest to fastest, None for all in their own order (raster) or,
    with `transposed`, in the opposite one. n_slices: of the inter-slice order, 0 for the others.
    """

    name: str
    axes: tuple[int, ...] | None = None
    transposed: bool = False
    n_slices: int = 0
    reverse: bool = False

    def to_tokens(self, features: Tensor) -> Tensor:
        """Return (B, C, *spatial) as (B, C, L) in this order; a view where strides allow it."""
        tokens = self.arrange(features)
        return tokens.flip(2) if self.reverse else tokens

    def from_tokens(self, tokens: Tensor, spatial: tuple[int, ...]) -> Tensor:
        """Return (B, C, L) in this order as (B, C, *spatial): the inverse of to_tokens."""
        return self.restore(tokens.flip(2) if self.reverse else tokens, spatial)

    def arrange(self, features: Tensor) -> Tensor:
        """Return to_tokens without the reversal, which a scan does itself by walking backwards."""
        shape, sequence = self._grid(tuple(features.shape[2:]))
        last = features.movedim(1, -1)  # channels innermost, so that a copy is token-major
        if self.n_slices:
            last = last.flatten(1, -2)
            missing = math.prod(shape) - last.shape[1]
            padded = functional.pad(last, (0, 0, 0, missing)) if missing else last
            last = padded.unflatten(1, shape)
        permuted = last.permute(0, *(axis + 1 for axis in sequence), last.ndim - 1)
        return permuted.flatten(1, -2).transpose(1, 2)

    def restore(self, tokens: Tensor, spatial: tuple[int, ...]) -> Tensor:
        """Return arrange's result (B, C, L) as (B, C, *spatial)."""
        shape, sequence = self._grid(spatial)
        last = tokens.transpose(1, 2).unflatten(1, tuple(shape[axis] for axis in sequence))
        inverse = sorted(range(len(sequence)), key=sequence.__getitem__)
        permuted = last.permute(0, *(axis + 1 for axis in inverse), last.ndim - 1)
        if self.n_slices:
            permuted = permuted.flatten(1, 2)[:, : math.prod(spatial)]
        return permuted.reshape(last.shape[0], *spatial, tokens.shape[1]).movedim(-1, 1)

    def strides(self, spatial: tuple[int, ...]) -> tuple[int, tuple[tuple[int, int], ...]]:
        """Return (start, levels): where in the raster sequence the tokens of this order lie.

        levels are (length, stride) from the slowest to the fastest, in tokens, with the fewest that
        describe the order: one for raster, two for inter-slice, for 2D and for any order of three
        axes that keeps two neighbours together. A reversed order starts at the last token and has
        negative strides. Raises ValueError for an inter-slice order that needs zero tokens.
        """
        shape, sequence = self._grid(spatial)
        if self.n_tokens(spatial) != math.prod(spatial):
            raise ValueError(f"{self.name} of {spatial} has zero tokens: no strides describe it")
        steps = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
        levels: list[tuple[int, int]] = []
        for axis in sequence:
            length, stride = shape[axis], steps[axis]
            if length == 1:
                continue
            if levels and levels[-1][1] == length * stride:
                length *= levels.pop()[0]
            levels.append((length, stride))
        levels = levels or [(1, 1)]
        if not self.reverse:
            return 0, tuple(levels)
        return math.prod(spatial) - 1, tuple((length, -stride) for length, stride in levels)

    def n_tokens(self, spatial: tuple[int, ...]) -> int:
        """Return the length L of this order's sequence, zero tokens counted."""
        return math.prod(self._grid(spatial)[0])

    def _grid(self, spatial: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the shape to permute and its axes from slowest to fastest."""
        if self.n_slices:
            return (self.n_slices, -(-math.prod(spatial) // self.n_slices)), (1, 0)
        axes = tuple(range(len(spatial)))
        if self.transposed:
            return spatial, axes[::-1]
        if self.axes is None:
            return spatial, axes
        if len(self.axes) != len(axes):
            raise ValueError(
                f"the order {self.name} names {len(self.axes)} axes, the features have {len(axes)}"
            )
        return spatial, self.axes


def token_order(name: str) -> TokenOrder:
    """Return the order of this name (see the head of this file); ValueError for an unknown name."""
    base = name.removesuffix("_reversed")
    reverse = base != name
    if base == "raster":
        return TokenOrder(name, reverse=reverse)
    if base == "transposed":
        return TokenOrder(name, transposed=True, reverse=reverse)
    kind, _, digits = base.rpartition("_")
    if kind == "inter_slice" and digits.isdecimal() and int(digits):
        return TokenOrder(name, n_slices=int(digits), reverse=reverse)
    if kind == "axes" and digits.isdecimal():
        axes = tuple(int(digit) for digit in digits)
        if sorted(axes) == list(range(len(axes))):
            return TokenOrder(name, axes=axes, reverse=reverse)
    raise ValueError(
        f"unknown token order {name!r}; choose raster, transposed, axes_ with each axis once (as "
        "axes_120) or inter_slice_ with a number (as inter_slice_5), each also with _reversed"
    )
