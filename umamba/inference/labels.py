"""Labels from logits that arrive in pieces: resampled, decided and forgotten piece by piece."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from nnunetv2.utilities.label_handling.label_handling import LabelManager

from umamba.ops.volumes import LinearAxis, has_linear_argmax, linear_argmax
from umamba.preprocessing.resampling import (
    MEMORY_LIMIT,
    NEGLIGIBLE_WEIGHT,
    SeparableResampling,
    apply_matrix,
    output_blocks,
    used_columns,
)

# Legend: K classes or regions; z, y, x extents of the logits, Z, Y, X extents of the cropped image.


class ProbabilitySink(Protocol):
    """Takes probabilities (K, z, y, x) of a box of the whole image, in the order of the plans."""

    def write(self, probabilities: np.ndarray, box: Sequence[slice]) -> None: ...


class LabelMaker:
    """Fills the label map of a case, in the order of axes of the plans, from pieces of logits.

    Pieces are those of `stream_windows`. What the next pieces still need of the last ones, a row
    or a plane where the resampling is linear, is kept.
    """

    def __init__(
        self,
        operator: SeparableResampling,
        shape: Sequence[int],
        properties: dict[str, Any],
        label_manager: LabelManager,
        *,
        half: bool = False,
        probabilities: ProbabilitySink | None = None,
        memory_limit: int = MEMORY_LIMIT,
    ) -> None:
        """`shape` is that of the logits; `half` rounds resampled logits as nnU-Net's dtype does."""
        self.operator = operator
        self.shape = tuple(shape)
        self.n_outputs = label_manager.num_segmentation_heads
        self.label_manager = label_manager
        self.labels = np.zeros(
            tuple(properties["shape_before_cropping"]), dtype=label_dtype(label_manager)
        )
        self._crop = tuple(slice(int(a), int(b)) for a, b in properties["bbox_used_for_cropping"])
        self._half = half
        self._probabilities = probabilities
        self._memory_limit = memory_limit
        self._z, self._y = (
            _Progress(m, n) for m, n in zip(operator.matrices[:2], self.shape[:2], strict=True)
        )
        # the last planes before the next piece, per y; the last rows before it, per piece in z
        self._planes: torch.Tensor | None = None
        self._rows: dict[int, torch.Tensor] = {}
        self._axes = self._linear_axes()

    @property
    def n_bytes(self) -> int:
        """What is taken of memory besides pieces: labels, planes that are kept, working sets."""
        kept = 4 * self.n_outputs * self._z.kept * self.shape[1] * self.shape[2]
        return self.labels.nbytes + kept + (self._memory_limit if self._axes is None else 0)

    def add(self, z: slice, y: slice, fill: Callable[[torch.Tensor], None]) -> None:
        """Takes the logits of rows z and y, which `fill` writes to a tensor (K, z, y, x)."""
        n_planes, n_rows = min(self._z.kept, z.start), min(self._y.kept, y.start)
        n_x = self.shape[2]
        logits = torch.empty(
            self.n_outputs, n_planes + z.stop - z.start, n_rows + y.stop - y.start, n_x
        )
        fill(logits[:, n_planes:, n_rows:])
        if n_planes:
            assert self._planes is not None
            logits[:, :n_planes, n_rows:] = self._planes[:, -n_planes:, y]
        if n_rows:
            logits[:, :, :n_rows] = self._rows.pop(z.start)
        if self._y.kept and y.stop < self.shape[1]:
            self._rows[z.start] = logits[:, :, -self._y.kept :].clone()
        if self._z.kept and z.stop < self.shape[0]:
            if self._planes is None:
                self._planes = torch.empty(self.n_outputs, self._z.kept, self.shape[1], n_x)
            last = logits[:, -self._z.kept :, n_rows:]
            self._planes[:, -last.shape[1] :, y] = last
        wanted = (self._z.outputs(z), self._y.outputs(y), slice(0, self.operator.new_shape[2]))
        if all(w.start < w.stop for w in wanted):
            self._decide(logits, (z.start - n_planes, y.start - n_rows, 0), wanted)

    def add_whole(self, logits: torch.Tensor) -> None:
        """Takes all logits (K, z, y, x) at once: needed where the resampling is not linear."""
        bounds = self.operator.clip_bounds(logits)
        n_x = self.operator.new_shape[2]
        for rows, columns in self._blocks(self.operator.new_shape):
            block = self.operator.block(logits, rows, columns, bounds)
            self._put(block, (rows, columns, slice(0, n_x)))

    def _linear_axes(self) -> tuple[LinearAxis, LinearAxis, LinearAxis | None] | None:
        """The axes for the compiled argmax, None where it cannot do what is asked for."""
        plain = type(self.label_manager) is LabelManager and not self.label_manager.has_regions
        if not plain or self._probabilities is not None or not has_linear_argmax():
            return None
        z, y, x = (
            LinearAxis.from_matrix(None if m is None else torch.from_numpy(m), n)
            for m, n in zip(self.operator.matrices, self.shape, strict=True)
        )
        if z is None or y is None or x is None:
            return None
        return z, y, None if self.operator.matrices[2] is None else x

    def _decide(
        self, logits: torch.Tensor, origin: tuple[int, int, int], wanted: tuple[slice, ...]
    ) -> None:
        if self._axes is not None:
            z, y, x = self._axes
            axes = (
                z.part(wanted[0].start, wanted[0].stop, origin[0]),
                y.part(wanted[1].start, wanted[1].stop, origin[1]),
                x,
            )
            labels = torch.from_numpy(self.labels[self._crop][wanted])
            linear_argmax(logits, axes, labels, round_half=self._half)
            return
        for rows, columns in self._blocks([w.stop - w.start for w in wanted]):
            box = (
                slice(wanted[0].start + rows.start, wanted[0].start + rows.stop),
                slice(wanted[1].start + columns.start, wanted[1].start + columns.stop),
                wanted[2],
            )
            self._put(_resampled(self.operator, logits, origin, box), box)

    def _blocks(self, extents: Sequence[int]) -> list[tuple[slice, slice]]:
        return output_blocks(extents, self.n_outputs, self._memory_limit)

    def _put(self, block: torch.Tensor, box: tuple[slice, ...]) -> None:
        """Decides resampled logits (K, Z, Y, X) of a box of the cropped image."""
        if self._half:
            block = block.half().float()
        there = tuple(
            slice(c.start + b.start, c.start + b.stop) for c, b in zip(self._crop, box, strict=True)
        )
        self.labels[there] = decide(block, self.label_manager, self.labels.dtype.type)
        if self._probabilities is not None:
            found = self.label_manager.apply_inference_nonlin(block)
            self._probabilities.write(np.asarray(found), there)


class _Progress:
    """Which outputs of an axis are complete when its inputs have arrived up to a position."""

    def __init__(self, matrix: np.ndarray | None, n_in: int) -> None:
        if matrix is None:
            first, last = np.arange(n_in), np.arange(n_in) + 1
        else:
            used = np.abs(matrix) > NEGLIGIBLE_WEIGHT
            first, last = used.argmax(1), n_in - used[:, ::-1].argmax(1)
        needed = np.maximum.accumulate(last)
        # outputs that are complete when inputs 0 ... i - 1 are there
        self._complete = np.searchsorted(needed, np.arange(n_in + 1), side="right")
        self._complete[n_in] = len(first)
        oldest = np.append(np.minimum.accumulate(first[::-1])[::-1], n_in)[self._complete]
        self.kept = int(max(0, (np.arange(n_in + 1) - oldest).max()))

    def outputs(self, inputs: slice) -> slice:
        return slice(int(self._complete[inputs.start]), int(self._complete[inputs.stop]))


def _resampled(
    operator: SeparableResampling,
    logits: torch.Tensor,
    origin: tuple[int, int, int],
    box: tuple[slice, ...],
) -> torch.Tensor:
    """The box of the output, from logits that begin at `origin` and hold all that it needs."""
    result = logits
    order = [a for a in range(3) if a != operator.separate_axis]
    for axis in [*order, *({0, 1, 2} - set(order))]:
        matrix, part, n = operator.matrices[axis], box[axis], result.shape[axis + 1]
        if matrix is None:
            result = result.narrow(axis + 1, part.start - origin[axis], part.stop - part.start)
        else:
            first, last = used_columns(matrix[part])
            assert origin[axis] <= first < last <= origin[axis] + n
            needed = result.narrow(axis + 1, first - origin[axis], last - first)
            result = apply_matrix(matrix, needed, axis + 1, part.start, part.stop, first)
    return result


def decide(
    logits: torch.Tensor, label_manager: LabelManager, dtype: type[np.unsignedinteger]
) -> np.ndarray:
    """Labels of logits (K, ...) by the rule of the label manager."""
    if label_manager.has_regions or type(label_manager) is not LabelManager:
        return np.asarray(label_manager.convert_logits_to_segmentation(logits))
    return argmax_first(logits.numpy(), dtype)


def label_dtype(label_manager: LabelManager) -> type[np.unsignedinteger]:
    """uint8 while all labels fit, as nnU-Net, else uint16."""
    values = [*label_manager.all_labels, *(label_manager.regions_class_order or [])]
    few = len(label_manager.foreground_labels) < 255 and max(map(int, values)) < 256
    return np.uint8 if few else np.uint16


def argmax_first(values: np.ndarray, dtype: type[np.unsignedinteger]) -> np.ndarray:
    """`values.argmax(0)` in `dtype`, four times faster: a running maximum over the first axis."""
    best = values[0].copy()
    labels = np.zeros(best.shape, dtype=dtype)
    larger = np.empty(best.shape, dtype=bool)
    for k in range(1, len(values)):
        np.greater(values[k], best, out=larger)
        np.maximum(values[k], best, out=best)
        np.maximum(labels, larger * dtype(k), out=labels)
    return labels
