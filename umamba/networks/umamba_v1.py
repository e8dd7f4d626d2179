"""U-Mamba, first version: the networks behind the published tables.

    image - stem - stage 0 ---------------------------- cat - stage - seg
                      stage 1 (stride) ---------- cat - stage - seg
                         ...                     ...
                            stage n-1 (stride) - Mamba (Bot) - transposed convolution up

    Enc: a Mamba layer behind every stage of the encoder, in 2D too, always voxel tokens.

arXiv 2401.04722; equals bowang-lab/U-Mamba@530739b, nets/UMamba{Bot,Enc}.py (Apache-2.0), one
class for 2D and 3D. Against the current version: transposed convolutions, average-pooled
shortcuts, a stem of one convolution, all skips joined, block counts as planned, any image size.
Kept: the Mamba layer replaces its input, without a residual. The official Bot leaves its Mamba
under autocast; here every mixer computes in float32.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from umamba.blocks.conv import (
    ConvNormAct,
    ResidualBlock,
    initialize_convolutions,
    residual_stage,
)
from umamba.blocks.mixer import MixerLayer, check_mixer
from umamba.blocks.sampling import TransposedUpsample
from umamba.blocks.unet_decoder import UNetDecoder
from umamba.networks.base import SegmentationNetwork, check_stages
from umamba.networks.registry import register
from umamba.networks.state_dict import KeyMap, Row, mamba_rows
from umamba.networks.umamba import ALIASES, PAPER, block_counts, official_arguments

REFERENCE = "bowang-lab/U-Mamba@530739b"
QUIRKS = ("the Mamba layer has no residual",)


class _UMambaV1(SegmentationNetwork):
    """What Bot and Enc share: encoder, decoder and their construction from the plans."""

    def __init__(
        self,
        input_channels: int,
        num_classes: int,
        strides: Sequence[Sequence[int]],
        features_per_stage: Sequence[int],
        kernel_sizes: Sequence[Sequence[int]] | None,
        blocks: tuple[Sequence[int] | int, Sequence[int] | int],
        mixer: str,
        deep_supervision: bool,
    ) -> None:
        super().__init__(input_channels, num_classes, strides=strides)
        check_mixer(mixer)
        kernels = kernel_sizes or [[3] * len(strides[0])] * len(strides)
        check_stages(strides=strides, features_per_stage=features_per_stage, kernel_sizes=kernels)
        encoder_blocks, decoder_blocks = block_counts(*blocks, len(strides))
        self.encoder = EncoderV1(
            input_channels, features_per_stage, kernels, strides, encoder_blocks
        )
        self.decoder = UNetDecoder(
            num_classes,
            features_per_stage=features_per_stage,
            strides=strides,
            kernel_sizes=kernels,
            n_conv_per_stage=decoder_blocks,
            upsample=TransposedUpsample,
            shortcut="pool",
            deep_supervision=deep_supervision,
        )
        initialize_convolutions(self)

    @classmethod
    def official_arguments(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        return official_arguments(config)


@register("umamba_bot_v1", paper=PAPER, reference=REFERENCE, licence="Apache-2.0", quirks=QUIRKS)
class UMambaBotV1(_UMambaV1):
    """First version with one Mamba layer on the deepest feature map."""

    def __init__(
        self,
        input_channels: int,
        num_classes: int,
        *,
        strides: Sequence[Sequence[int]],
        features_per_stage: Sequence[int],
        kernel_sizes: Sequence[Sequence[int]] | None = None,
        n_conv_per_stage: Sequence[int] | int = 2,
        n_conv_per_stage_decoder: Sequence[int] | int = 2,
        d_state: int = 16,
        d_conv: int = 4,
        expand: float = 2,
        mixer: str = "scan",
        deep_supervision: bool = False,
    ) -> None:
        """Arguments as UMambaBot's; block counts are taken as they are."""
        super().__init__(
            input_channels,
            num_classes,
            strides,
            features_per_stage,
            kernel_sizes,
            (n_conv_per_stage, n_conv_per_stage_decoder),
            mixer,
            deep_supervision,
        )
        self.bottleneck = MixerLayer(
            features_per_stage[-1],
            spatial_dims=len(strides[0]),
            mixer=mixer,
            d_state=d_state,
            d_conv=d_conv,
            expand=expand,
        )

    def forward(self, images: Tensor) -> Tensor | list[Tensor]:
        """images (B, input_channels, *spatial) -> logits, or a list of them, finest first."""
        self.check_input(images)
        skips = self.encoder(images)
        skips[-1] = self.bottleneck(skips[-1])
        return self.decoder(skips)

    @classmethod
    def official_key_map(cls) -> KeyMap:
        rows = [Row("ln.{p}", "bottleneck.norm.{p}"), *mamba_rows("mamba.", "bottleneck.mixer.")]
        return KeyMap([*rows, *CONVOLUTION_ROWS], ALIASES)


@register("umamba_enc_v1", paper=PAPER, reference=REFERENCE, licence="Apache-2.0", quirks=QUIRKS)
class UMambaEncV1(_UMambaV1):
    """First version with a Mamba layer behind every encoder stage; any divisible image size."""

    def __init__(
        self,
        input_channels: int,
        num_classes: int,
        *,
        strides: Sequence[Sequence[int]],
        features_per_stage: Sequence[int],
        kernel_sizes: Sequence[Sequence[int]] | None = None,
        n_conv_per_stage: Sequence[int] | int = 2,
        n_conv_per_stage_decoder: Sequence[int] | int = 2,
        d_state: int = 16,
        d_conv: int = 4,
        expand: float = 2,
        mixer: str = "scan",
        deep_supervision: bool = False,
    ) -> None:
        """Arguments as UMambaBot's; block counts are taken as they are."""
        super().__init__(
            input_channels,
            num_classes,
            strides,
            features_per_stage,
            kernel_sizes,
            (n_conv_per_stage, n_conv_per_stage_decoder),
            mixer,
            deep_supervision,
        )
        for width in features_per_stage:
            layer = MixerLayer(
                width,
                spatial_dims=len(strides[0]),
                mixer=mixer,
                d_state=d_state,
                d_conv=d_conv,
                expand=expand,
            )
            self.encoder.mixers.append(layer)
        zero_last_norms(self)

    def forward(self, images: Tensor) -> Tensor | list[Tensor]:
        """images (B, input_channels, *spatial) -> logits, or a list of them, finest first."""
        self.check_input(images)
        return self.decoder(self.encoder(images))

    @classmethod
    def official_key_map(cls) -> KeyMap:
        rows = [Row("encoder.mamba_layers.{s}.norm.{p}", "encoder.mixers.{s}.norm.{p}")]
        rows += mamba_rows("encoder.mamba_layers.{s}.mamba.", "encoder.mixers.{s}.mixer.")
        return KeyMap([*rows, *CONVOLUTION_ROWS], ALIASES)


class EncoderV1(nn.Module):
    """Stem of one convolution and strided stages; a layer of `mixers`, if any, follows each."""

    def __init__(
        self,
        input_channels: int,
        features_per_stage: Sequence[int],
        kernel_sizes: Sequence[Sequence[int]],
        strides: Sequence[Sequence[int]],
        n_blocks_per_stage: Sequence[int],
    ) -> None:
        super().__init__()
        width = features_per_stage[0]
        self.stem = ConvNormAct(input_channels, width, kernel_sizes[0])
        self.stages = nn.ModuleList()
        self.mixers = nn.ModuleList()
        for features, kernel, stride, n_blocks in zip(
            features_per_stage, kernel_sizes, strides, n_blocks_per_stage, strict=True
        ):
            self.stages.append(residual_stage(width, features, kernel, stride, n_blocks, "pool"))
            width = features

    def forward(self, images: Tensor) -> list[Tensor]:
        """images (B, input_channels, *spatial) -> the feature maps of all stages, finest first."""
        features = self.stem(images)
        skips = []
        for index, stage in enumerate(self.stages):
            features = stage(features)
            if len(self.mixers):
                features = self.mixers[index](features)
            skips.append(features)
        return skips


def zero_last_norms(network: nn.Module) -> None:
    """Starts every residual block as its shortcut (parity: the official Enc of this version)."""
    for module in network.modules():
        if isinstance(module, ResidualBlock):
            with torch.no_grad():
                module.norm2.weight.zero_()
                module.norm2.bias.zero_()


# Official name, ours. A shortcut's projection sits at index 1 behind a pool (encoder), else at 0.
CONVOLUTION_ROWS = (
    Row("encoder.stem.convs.0.{layer}.{p}", "encoder.stem.{layer}.{p}"),
    *(
        row
        for stage, index in (
            ("encoder.stages.{s}", 1),
            ("encoder.stages.{s}", 0),
            ("decoder.stages.{s}", 0),
        )
        for row in (
            Row(f"{stage}.blocks.{{b}}.conv{{i}}.conv.{{p}}", f"{stage}.{{b}}.conv{{i}}.{{p}}"),
            Row(f"{stage}.blocks.{{b}}.conv{{i}}.norm.{{p}}", f"{stage}.{{b}}.norm{{i}}.{{p}}"),
            Row(
                f"{stage}.blocks.{{b}}.skip.{index}.{{layer}}.{{p}}",
                f"{stage}.{{b}}.shortcut.{{layer}}.{{p}}",
            ),
        )
    ),
    Row("decoder.transpconvs.{i}.{p}", "decoder.upsample.{i}.conv.{p}"),
    Row("decoder.seg_layers.{i}.{p}", "decoder.seg_layers.{i}.{p}"),
)
