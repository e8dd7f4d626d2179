"""The contract that every segmentation network keeps, and the check of its input."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from umamba.networks.state_dict import KeyMap, Row

SHORT_TRAINING_LR = 3e-3


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
    published is not one for segmentation. short_training_lr: AdamW's learning rate where plans are
    made for a short time.
    """

    spatial_dims: ClassVar[tuple[int, ...]] = (2, 3)
    fixed_strides: ClassVar[tuple[tuple[int, ...], ...] | None] = None
    pretrained_files: ClassVar[tuple[str, ...]] = ()  # of the catalogue, the authors' choice first
    planned_arguments: ClassVar[Mapping[str, Any]] = {}
    short_training_lr: ClassVar[float] = SHORT_TRAINING_LR

    encoder: Any  # a module, or several
    decoder: nn.Module

    def __init__(
        self,
        input_channels: int,
        num_classes: int,
        *,
        strides: Sequence[Sequence[int]],
        n_outputs: int | None = None,
    ) -> None:
        """n_outputs: logits under deep supervision, by default one of each stage but the last."""
        super().__init__()
        dims = len(strides[0])
        if dims not in self.spatial_dims or any(len(stride) != dims for stride in strides):
            supported = " or ".join(f"{d}D" for d in self.spatial_dims)
            raise ValueError(
                f"{type(self).__name__} is {supported}: strides need that many values per stage, "
                f"got {[list(stride) for stride in strides]}"
            )
        if self.fixed_strides is not None and max(strides[0]) > 1:
            raise ValueError(
                f"the first of {type(self).__name__}'s strides must be 1, got {list(strides[0])}"
            )
        self.input_channels = input_channels
        self.num_classes = num_classes
        self.divisor = tuple(math.prod(stride[axis] for stride in strides) for axis in range(dims))
        self.deep_supervision_scales = tuple(
            tuple(1 / math.prod(stride[axis] for stride in strides[:n]) for axis in range(dims))
            for n in range(1, len(strides))
        )[:n_outputs]

    def forward(self, images: Tensor) -> Tensor | list[Tensor]:
        """images (B, input_channels, *spatial) -> logits, or a list of them, finest first."""
        self.check_input(images)
        return self.decoder(self.encoder(images))

    @classmethod
    def official_key_map(cls) -> KeyMap:
        """The names of the official state dict and ours."""
        raise NotImplementedError(f"{cls.__name__} has no official checkpoint")

    @classmethod
    def official_arguments(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        """Our arguments for the official constructor's: by default those of the same name."""
        return {name: config[name] for name in inspect.signature(cls).parameters if name in config}

    def encoder_parameters(self) -> Iterable[nn.Parameter]:
        """What a training recipe freezes: those of the encoder that the official code freezes."""
        return self.get_submodule("encoder").parameters()

    @classmethod
    def arguments_of(cls, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
        """Those of the arguments that tell from a state dict's shapes, under our names."""
        return {}

    def pretrained_maps(self) -> list[KeyMap]:
        """Which tensors of VMambaClassifier go where at the start; each map is a pass over all."""
        return [KeyMap([Row("encoder.{p...}", "encoder.{p...}")])]

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

    def check_strides(
        self, strides: Sequence[Sequence[int]], allowed: Sequence[Sequence[int]]
    ) -> None:
        """Raises ValueError unless the strides are the only ones that the network has."""
        given, wanted = ([list(stride) for stride in entries] for entries in (strides, allowed))
        if given != wanted:
            raise ValueError(f"{type(self).__name__} has strides like {wanted}, got {given}")


STEM_CHANNELS = 3  # of a GrayRepeatingNetwork of one input channel


class GrayRepeatingNetwork(SegmentationNetwork):
    """A 2D network that repeats images of one channel to the three of its stem.

    A network of three channels takes images of one channel, too. `encoder.patch_embed.proj` is the
    stem's convolution.
    """

    def stem_images(self, images: Tensor) -> Tensor:
        """images (B, input_channels, H, W), after the check, as the stem takes them."""
        self.check_input(images)
        return images.expand(-1, self.encoder.patch_embed.proj.in_channels, -1, -1)

    def check_input(self, images: Tensor) -> None:
        if self.input_channels == STEM_CHANNELS and images.ndim == 4 and images.shape[1] == 1:
            images = images.expand(-1, STEM_CHANNELS, -1, -1)
        super().check_input(images)


def stem_channels(input_channels: int) -> int:
    """The channels that the stem of a GrayRepeatingNetwork has."""
    return STEM_CHANNELS if input_channels == 1 else input_channels


def check_official(config: Mapping[str, Any], **only: Any) -> None:
    """Raises ValueError if an official argument has another value than the only one we have.

    only: that value, or a tuple of values that mean the same, by the argument's name.
    """
    for name, value in only.items():
        values = value if isinstance(value, tuple) else (value,)
        if name in config and config[name] not in values:
            raise ValueError(
                f"the official argument {name} is {config[name]!r}; only {values[0]!r} is available"
            )


def check_stages(stages: Sequence[Any], **per_stage: Sequence[Any]) -> None:
    """Raises ValueError unless each argument has one entry per stage."""
    for name, values in per_stage.items():
        if len(values) != len(stages):
            raise ValueError(f"{name} has {len(values)} entries, needs {len(stages)}: one a stage")
