"""The contract that every segmentation network keeps, and the check of its input."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from umamba.networks.state_dict import KeyMap


class SegmentationNetwork(nn.Module):
    """A network from (B, input_channels, *spatial) to logits (B, num_classes, *spatial).

    Its keyword arguments are plain JSON values and are what the plans hold. `decoder` has
    `seg_layers` and `deep_supervision`, a switch: when on, forward returns a list of logits, finest
    first, one of each seg_layer (len(strides) - 1 at most). Initialization happens in the
    constructor: nnU-Net would apply an attribute `initialize` to every submodule, so there is none.

    deep_supervision_scales: each output's extents as shares of the image's. By default those that
    nnU-Net's trainer computes from the strides in the plans: all stages' but the deepest's. A
    network whose outputs skip a size has a larger stride there (4 in place of 2 and 2), one with
    fewer outputs declares its own scales, which our trainer takes and the stock trainer ignores.

    planned_arguments: what plans give in place of the constructor's defaults, where a network as
    published is not one for segmentation.
    """

    spatial_dims: ClassVar[tuple[int, ...]] = (2, 3)
    fixed_strides: ClassVar[tuple[tuple[int, ...], ...] | None] = None
    planned_arguments: ClassVar[Mapping[str, Any]] = {}

    decoder: nn.Module

    def __init__(
        self, input_channels: int, num_classes: int, *, strides: Sequence[Sequence[int]]
    ) -> None:
        super().__init__()
        dims = len(strides[0])
        if dims not in self.spatial_dims or any(len(stride) != dims for stride in strides):
            supported = " or ".join(f"{d}D" for d in self.spatial_dims)
            raise ValueError(
                f"{type(self).__name__} is {supported}: strides need that many values per stage, "
                f"got {[list(stride) for stride in strides]}"
            )
        self.input_channels = input_channels
        self.num_classes = num_classes
        self.divisor = tuple(math.prod(stride[axis] for stride in strides) for axis in range(dims))
        self.deep_supervision_scales = tuple(
            tuple(1 / math.prod(stride[axis] for stride in strides[:n]) for axis in range(dims))
            for n in range(1, len(strides))
        )

    @classmethod
    def official_key_map(cls) -> KeyMap:
        """The names of the official state dict and ours."""
        raise NotImplementedError(f"{cls.__name__} has no official checkpoint")

    @classmethod
    def official_arguments(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        """Our arguments for the official constructor's: by default those of the same name."""
        return {name: config[name] for name in inspect.signature(cls).parameters if name in config}

    def check_input(self, images: Tensor) -> None:
        """Raises ValueError for a shape that the network does not take, naming one that it does."""
        dims = len(self.divisor)
        name = type(self).__name__
        if images.ndim != dims + 2 or images.shape[1] != self.input_channels:
            raise ValueError(
                f"{name} takes images of (batch, {self.input_channels} channels, "
                f"{dims} spatial axes), got the shape {tuple(images.shape)}"
            )
        shape = tuple(images.shape[2:])
        if any(size % d for size, d in zip(shape, self.divisor, strict=True)):
            larger = tuple(-(-size // d) * d for size, d in zip(shape, self.divisor, strict=True))
            raise ValueError(
                f"{name} takes images divisible by {self.divisor}, got {shape}; "
                f"the next larger valid shape is {larger}"
            )


def check_stages(**per_stage: Sequence[Any]) -> None:
    """Raises ValueError unless all arguments have as many entries as the first."""
    (first, values), *others = per_stage.items()
    for name, other in others:
        if len(other) != len(values):
            raise ValueError(
                f"{name} has {len(other)} entries where {first} has {len(values)}: "
                "both need one per stage"
            )
