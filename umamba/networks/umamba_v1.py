"""U-Mamba, first version: the networks behind the published tables.

    image - stem - stage 0 ---------------------------- cat - stage - seg
                      stage 1 (stride) ---------- cat - stage - seg
                         ...                     ...
                            stage n-1 (stride) - Mamba (Bot) - transposed convolution up

    Enc: a Mamba layer behind every stage of the encoder, in 2D too, always voxel tokens.

arXiv 2401.04722; equals bowang-lab/U-Mamba@530739b, nets/UMamba{Bot,Enc}.py (Apache-2.0), one
class for 2D and 3D. Against the current version: transposed convolutions, average-pooled
shortcuts, a stem of one convolution, all skips joined, block counts as planned.
Kept: QUIRKS. The official Bot leaves its Mamba under autocast; here every mixer computes in
float32.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from umamba.blocks.conv import ConvNormAct, ResidualBlock, initialize_convolutions
from umamba.blocks.mixer import MixerLayer
from umamba.blocks.sampling import TransposedUpsample
from umamba.blocks.unet_decoder import UNetDecoder
from umamba.networks.registry import register
from umamba.networks.state_dict import KeyMap, Row, basic_block_rows, mixer_rows
from umamba.networks.umamba import (
    ALIASES,
    PAPER,
    Counts,
    Encoder,
    UMamba,
    UMambaBot,
    UMambaEnc,
    block_counts,
    residual_stages,
)

REFERENCE = "bowang-lab/U-Mamba@530739b"
QUIRKS = ("the Mamba layer replaces its input, without a residual",)


class UMambaV1(UMamba):
    """The U-Net of the first version; arguments as UMambaBot's, block counts taken as they are."""

    def build(
        self,
        layer: Callable[..., MixerLayer],
        stages: Mapping[str, Any],
        counts: tuple[Counts, Counts, int],
        deep_supervision: bool,
    ) -> None:
        encoder_blocks, decoder_blocks = block_counts(*counts)
        width, kernel = stages["features_per_stage"][0], stages["kernel_sizes"][0]
        stem = ConvNormAct(self.input_channels, width, kernel)
        self.encoder = Encoder(stem, residual_stages(encoder_blocks, "pool", **stages))
        self.decoder = UNetDecoder(
            self.num_classes,
            **stages,
            n_conv_per_stage=decoder_blocks,
            upsample=TransposedUpsample,
            shortcut="pool",
            deep_supervision=deep_supervision,
        )
        initialize_convolutions(self)
        self.add_mixers(layer, stages)

    @classmethod
    def official_key_map(cls) -> KeyMap:
        return KeyMap([*mixer_rows(*cls.layer_names), *CONVOLUTION_ROWS], ALIASES)


@register("umamba_bot_v1", paper=PAPER, reference=REFERENCE, licence="Apache-2.0", quirks=QUIRKS)
class UMambaBotV1(UMambaV1, UMambaBot):
    """First version with one Mamba layer on the deepest feature map."""

    layer_names = ("ln.", "mamba.", "bottleneck.")


@register("umamba_enc_v1", paper=PAPER, reference=REFERENCE, licence="Apache-2.0", quirks=QUIRKS)
class UMambaEncV1(UMambaV1):
    """First version with a Mamba layer behind every encoder stage; any divisible image size."""

    layer_names = UMambaEnc.layer_names

    def add_mixers(self, layer: Callable[..., MixerLayer], stages: Mapping[str, Any]) -> None:
        for width in stages["features_per_stage"]:
            self.encoder.mixers.append(layer(width))
        # parity: the official Enc of this version starts every residual block as its shortcut.
        for module in self.modules():
            if isinstance(module, ResidualBlock):
                for parameter in module.norm2.parameters():
                    nn.init.zeros_(parameter)


# Official name, ours.
CONVOLUTION_ROWS = (
    Row("encoder.stem.convs.0.{layer}.{p}", "encoder.stem.{layer}.{p}"),
    *basic_block_rows("encoder.stages.{s}.blocks.{b}.", "encoder.stages.{s}.{b}."),
    *basic_block_rows("decoder.stages.{s}.blocks.{b}.", "decoder.stages.{s}.{b}.", skips=(0,)),
    Row("decoder.transpconvs.{i}.{p}", "decoder.upsample.{i}.conv.{p}"),
    Row("decoder.seg_layers.{i}.{p}", "decoder.seg_layers.{i}.{p}"),
)
