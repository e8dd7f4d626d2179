"""LightM-UNet: a U-Net with Mamba layers for an encoder and depthwise convolutions for a decoder.

    image - stem - level 0 ---------------------------------------------- + - block - norm - seg
                     layer, pool - level 1 ----------------------- + - block - up
                                     layer, pool - level 2 - ... - up

    level: residual blocks of two Mamba layers. layer, pool: a Mamba layer to the next width, at
    the resolution above, and max pooling. up: a 1x1 convolution and linear interpolation.

arXiv 2403.05246; equals MrBlankness/LightM-UNet@6b72e27, nnunetv2/nets/LightMUNet.py (Apache-2.0),
2D and 3D, by default as its nnU-Net trainer builds it (README: "1M" parameters; measured: 5.0 M),
with its QUIRKS.
The official code knows only halvings of all axes; other strides work here, with the same weights.
"""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from umamba.blocks.conv import convolution
from umamba.blocks.mixer import ProjectedMixerLayer
from umamba.blocks.sampling import LinearUpsample
from umamba.networks.base import SegmentationNetwork, check_official, check_stages
from umamba.networks.registry import register
from umamba.networks.state_dict import KeyMap, Row, projected_mixer_rows
from umamba.networks.umamba import Counts, Encoder, block_counts

QUIRKS = (
    "a Mamba layer uses one norm twice, before its scan and before its projection",
    "a decoder block ends with norm and ReLU behind the sum",
    "one head: with deep supervision switched on, forward returns a list of one tensor",
)


@register(
    "lightm_unet",
    paper="arXiv:2403.05246",
    reference="MrBlankness/LightM-UNet@6b72e27ba70c499ba8f6f341843de75262086fa5",
    licence="Apache-2.0",
    quirks=QUIRKS,
)
class LightMUNet(SegmentationNetwork):
    """Four levels, each half as fine as the one above; 2D by strides of two values."""

    fixed_strides = ((1, 1, 1), (2, 2, 2), (2, 2, 2), (2, 2, 2))

    def __init__(
        self,
        input_channels: int,
        num_classes: int,
        *,
        strides: Sequence[Sequence[int]] = fixed_strides,
        features_per_stage: Sequence[int] = (32, 64, 128, 256),
        n_conv_per_stage: Counts = (1, 2, 2, 4),
        n_conv_per_stage_decoder: Counts = (1, 1, 1),
        n_groups: int = 8,
        d_state: int = 16,
        d_conv: int = 4,
        expand: float = 2,
        mixer: str = "scan",
        deep_supervision: bool = False,
    ) -> None:
        """All sequences have one entry per level, finest first (the decoder's: one fewer, deepest
        first). n_conv_per_stage: residual blocks. n_groups: of the group norms. mixer: "scan",
        "none" or "conv". deep_supervision: a list of one is returned."""
        super().__init__(input_channels, num_classes, strides=strides, n_outputs=1)
        check_stages(strides, features_per_stage=features_per_stage)
        if any(width % n_groups for width in features_per_stage):
            raise ValueError(
                f"features_per_stage {list(features_per_stage)} need to be multiples of n_groups, "
                f"{n_groups}; choose such widths or fewer groups"
            )
        counts = block_counts(n_conv_per_stage, n_conv_per_stage_decoder, len(strides))
        layer = functools.partial(
            ProjectedMixerLayer,
            spatial_dims=len(strides[0]),
            skip="inside",
            mixer=mixer,
            d_state=d_state,
            d_conv=d_conv,
            expand=expand,
        )
        norm = functools.partial(nn.GroupNorm, n_groups)
        width = features_per_stage[0]
        stem = depthwise_separable(input_channels, width, [3] * len(strides[0]))
        levels: list[nn.Module] = []
        for features, stride, n_blocks in zip(features_per_stage, strides, counts[0], strict=True):
            down = downsample(layer(width, features), stride) if levels else nn.Identity()
            blocks = (MambaBlock(features, layer, norm) for _ in range(n_blocks))
            levels.append(nn.Sequential(down, *blocks))
            width = features
        self.encoder = Encoder(stem, levels)
        self.decoder = Decoder(
            num_classes, strides, features_per_stage, counts[1], norm, deep_supervision
        )

    @classmethod
    def official_key_map(cls) -> KeyMap:
        return KeyMap(ROWS)

    @classmethod
    def official_arguments(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        check_official(config, use_conv_final=True, upsample_mode="nontrainable")
        kind, options = config.get("norm", ("GROUP", {"num_groups": 8}))
        check_official({"norm": kind.upper()}, norm="GROUP")
        dims, width = config.get("spatial_dims", 3), config.get("init_filters", 8)
        blocks = list(config.get("blocks_down", (1, 2, 2, 4)))
        return {
            "input_channels": config.get("in_channels", 1),
            "num_classes": config.get("out_channels", 2),
            "strides": [[1 if level == 0 else 2] * dims for level in range(len(blocks))],
            "features_per_stage": [width * 2**level for level in range(len(blocks))],
            "n_conv_per_stage": blocks,
            "n_conv_per_stage_decoder": list(config.get("blocks_up", (1, 1, 1))),
            "n_groups": options["num_groups"],
        }


class Decoder(nn.Module):
    """Up by an interpolation to which the skip is added, convolution blocks, and one head."""

    def __init__(
        self,
        num_classes: int,
        strides: Sequence[Sequence[int]],
        features_per_stage: Sequence[int],
        n_conv_per_stage: Sequence[int],
        norm: Callable[[int], nn.Module],
        deep_supervision: bool,
    ) -> None:
        super().__init__()
        self.deep_supervision = deep_supervision
        self.upsample = nn.ModuleList()
        self.stages = nn.ModuleList()
        dims = len(strides[0])
        levels = reversed(range(len(strides) - 1))
        for level, n_blocks in zip(levels, n_conv_per_stage, strict=True):
            below, width = features_per_stage[level + 1], features_per_stage[level]
            self.upsample.append(LinearUpsample(below, width, strides[level + 1]))
            blocks = (ConvBlock(width, [3] * dims, norm) for _ in range(n_blocks))
            self.stages.append(nn.Sequential(*blocks))
        width = features_per_stage[0]
        self.norm = norm(width)
        head = depthwise_separable(width, num_classes, [1] * dims, bias=True)
        self.seg_layers = nn.ModuleList([head])

    def forward(self, skips: Sequence[Tensor]) -> Tensor | list[Tensor]:
        """skips finest first -> logits of the full resolution, alone or as a list."""
        features = skips[-1]
        for upsample, stage, skip in zip(self.upsample, self.stages, skips[-2::-1], strict=True):
            features = stage(upsample(features) + skip)
        logits = self.seg_layers[0](functional.relu_(self.norm(features)))
        return [logits] if self.deep_supervision else logits


class MambaBlock(nn.Module):
    """Norm, ReLU and Mamba layer, twice, added to the input."""

    def __init__(
        self,
        n_channels: int,
        layer: Callable[[int, int], nn.Module],
        norm: Callable[[int], nn.Module],
    ) -> None:
        super().__init__()
        self.norm1 = norm(n_channels)
        self.layer1 = layer(n_channels, n_channels)
        self.norm2 = norm(n_channels)
        self.layer2 = layer(n_channels, n_channels)

    def forward(self, features: Tensor) -> Tensor:
        """features (B, C, *spatial) -> the same shape."""
        x = self.layer1(functional.relu_(self.norm1(features)))
        return features + self.layer2(functional.relu_(self.norm2(x)))


class ConvBlock(nn.Module):
    """Norm, ReLU and convolution, plus the scaled input; then again norm and ReLU."""

    def __init__(
        self, n_channels: int, kernel_size: Sequence[int], norm: Callable[[int], nn.Module]
    ) -> None:
        super().__init__()
        self.skip_scale = nn.Parameter(torch.ones(1))
        self.norm1 = norm(n_channels)
        self.conv = depthwise_separable(n_channels, n_channels, kernel_size)
        self.norm2 = norm(n_channels)

    def forward(self, features: Tensor) -> Tensor:
        """features (B, C, *spatial) -> the same shape."""
        x = self.conv(functional.relu_(self.norm1(features))) + self.skip_scale * features
        # parity: ResUpBlock of LightMUNet.py normalizes the sum; a pre-activation block would not.
        return functional.relu_(self.norm2(x))


def downsample(layer: nn.Module, stride: Sequence[int]) -> nn.Sequential:
    """A Mamba layer to the new width, then max pooling by the stride."""
    pool = {2: nn.MaxPool2d, 3: nn.MaxPool3d}[len(stride)]
    return nn.Sequential(OrderedDict(layer=layer, pool=pool(tuple(stride))))


def depthwise_separable(
    in_channels: int, out_channels: int, kernel_size: Sequence[int], bias: bool = False
) -> nn.Sequential:
    """A convolution of each channel by itself, and a 1x1 convolution to the new width."""
    depthwise = convolution(in_channels, in_channels, kernel_size, groups=in_channels, bias=bias)
    pointwise = convolution(in_channels, out_channels, [1] * len(kernel_size), bias=bias)
    return nn.Sequential(OrderedDict(depthwise=depthwise, pointwise=pointwise))


# Official name, ours.
ROWS = (
    *projected_mixer_rows("down_layers.{i}.0.0.", "encoder.stages.{i}.0.layer."),
    *projected_mixer_rows("down_layers.{i}.{j}.conv{k}.", "encoder.stages.{i}.{j}.layer{k}."),
    Row("down_layers.{i}.{j}.norm{k}.{p}", "encoder.stages.{i}.{j}.norm{k}.{p}"),
    Row("convInit.0.conv.weight", "encoder.stem.depthwise.weight"),
    Row("convInit.1.conv.weight", "encoder.stem.pointwise.weight"),
    Row("up_layers.{i}.{j}.skip_scale", "decoder.stages.{i}.{j}.skip_scale"),
    Row("up_layers.{i}.{j}.norm{k}.{p}", "decoder.stages.{i}.{j}.norm{k}.{p}"),
    Row("up_layers.{i}.{j}.conv.0.conv.weight", "decoder.stages.{i}.{j}.conv.depthwise.weight"),
    Row("up_layers.{i}.{j}.conv.1.conv.weight", "decoder.stages.{i}.{j}.conv.pointwise.weight"),
    Row("up_samples.{i}.0.conv.weight", "decoder.upsample.{i}.conv.weight"),
    Row("conv_final.0.{p}", "decoder.norm.{p}"),
    Row("conv_final.2.0.conv.{p}", "decoder.seg_layers.0.depthwise.{p}"),
    Row("conv_final.2.1.conv.{p}", "decoder.seg_layers.0.pointwise.{p}"),
)
