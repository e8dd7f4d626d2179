"""MambaClinix: a 3D U-Net with high-order convolutions at its fine stages and Mamba at its deep.

    image - stem - stage 0, HGCN ------------------------- residual block - cat - stage - seg
                      stage 1, HGCN ---------------- residual block - cat - stage - seg
                         ...                                ...
                         norm, HGCN -          residual block - cat - stage - seg
                               ...                   ...
                             stage n-1, Mamba - residual block - up

    HGCN follows the first half of the stages, a Mamba layer the others.

arXiv 2409.12533; equals CYB08/MambaClinix-PyTorch@ba1af65, nnunetv2/nets/MambaClinix_3d.py (no
licence stated), with its QUIRKS.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from umamba.blocks.conv import ConvNormAct, ResidualBlock, initialize_convolutions
from umamba.blocks.gating import HGCNBlock
from umamba.blocks.mixer import ProjectedMixerLayer
from umamba.blocks.norm import ChannelNorm
from umamba.blocks.sampling import NearestUpsample
from umamba.blocks.unet_decoder import UNetDecoder
from umamba.networks.base import SegmentationNetwork
from umamba.networks.registry import register
from umamba.networks.state_dict import KeyMap, Row, basic_block_rows, projected_mixer_rows
from umamba.networks.umamba import (
    ALIASES,
    Counts,
    Encoder,
    residual_stages,
    spread_stages,
    stage_arguments,
    thin_blocks,
)

QUIRKS = (
    "the gates of the high-order convolution are sums",
    "the branch of the high-order convolution starts scaled by 1e-6",
    "a LayerNorm over the channels stands in front of the last HGCN block, and of no other",
    "a Mamba layer uses one norm twice, and has a skip_scale without effect",
    "a block count of 2 means HGCN, of 1 a Mamba layer, and the deep half of the counts becomes 1",
    "every decoder stage has one block, whatever the plans say",
)

HGCN, MAMBA = 2, 1  # block counts that the official constructor reads as kinds of layer


@register(
    "mamba_clinix",
    paper="arXiv:2409.12533",
    reference="CYB08/MambaClinix-PyTorch@ba1af654b644a9c7be78cc9cff048c48164056e6",
    licence="none stated",
    quirks=QUIRKS,
)
class MambaClinix(SegmentationNetwork):
    """Residual U-Net; HGCN blocks, then Mamba layers, follow the encoder's stages."""

    spatial_dims = (3,)

    def __init__(
        self,
        input_channels: int,
        num_classes: int,
        *,
        strides: Sequence[Sequence[int]],
        features_per_stage: Sequence[int],
        kernel_sizes: Sequence[Sequence[int]] | None = None,
        n_conv_per_stage: Counts = HGCN,
        drop_path: float = 0.5,
        d_state: int = 16,
        d_conv: int = 4,
        expand: float = 2,
        mixer: str = "scan",
        deep_supervision: bool = False,
    ) -> None:
        """All sequences have one entry per stage, finest first. kernel_sizes: 3 everywhere by
        default. n_conv_per_stage: 2 for HGCN, 1 for Mamba; the deep half is always Mamba.
        drop_path: rate at the deepest stage. mixer: "scan", "none" or "conv"."""
        super().__init__(input_channels, num_classes, strides=strides)
        dims, n_stages = len(strides[0]), len(strides)
        stages = stage_arguments(strides, features_per_stage, kernel_sizes)
        kernels = stages["kernel_sizes"]
        mamba: dict[str, Any] = {"d_state": d_state, "d_conv": d_conv, "expand": expand}
        layer: Callable[..., nn.Module] = functools.partial(
            ProjectedMixerLayer, spatial_dims=dims, skip="outside", mixer=mixer, **mamba
        )
        layers: list[nn.Module] = []
        kinds = layer_kinds(n_conv_per_stage, n_stages)
        for index, (kind, width) in enumerate(zip(kinds, features_per_stage, strict=True)):
            if kind == HGCN:
                rate = drop_path * index / max(n_stages - 1, 1)
                layers.append(HGCNBlock(width, kernels[index], index + 2, drop_path=rate))
            else:
                layers.append(layer(width, width))
        last_hgcn = n_stages - 1 - kinds[::-1].index(HGCN)
        stem = ConvNormAct(input_channels, features_per_stage[0], kernels[0])
        counts = [1] * n_stages
        encoder = ClinixEncoder(stem, residual_stages(counts, "pool", **stages))
        encoder.add_layers(layers, last_hgcn, features_per_stage[last_hgcn])
        decoder = ClinixDecoder(
            num_classes,
            **stages,
            n_conv_per_stage=counts[1:],
            upsample=NearestUpsample,
            shortcut="conv",
            deep_supervision=deep_supervision,
        )
        decoder.add_blocks(features_per_stage, kernels)
        self.encoder, self.decoder = encoder, decoder
        initialize_convolutions(self)

    @classmethod
    def official_key_map(cls) -> KeyMap:
        return KeyMap(ROWS, ALIASES)

    @classmethod
    def official_arguments(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        return super().official_arguments(spread_stages(config))


class ClinixEncoder(Encoder):
    """U-Mamba's encoder with a norm in front of one stage's layer."""

    def add_layers(self, layers: Sequence[nn.Module], normed_stage: int, width: int) -> None:
        """A layer for each stage; width: of the stage whose layer has the norm."""
        self.mixers.extend(layers)
        self.normed_stage = normed_stage
        self.norm = ChannelNorm(width, eps=1e-6)

    def mix(self, index: int, features: Tensor) -> Tensor:
        if index == self.normed_stage:
            features = self.norm(features)
        return super().mix(index, features)


class ClinixDecoder(UNetDecoder):
    """U-Mamba's decoder with a residual block on each of its inputs."""

    def add_blocks(self, widths: Sequence[int], kernel_sizes: Sequence[Sequence[int]]) -> None:
        """bottleneck: the block of the deepest input; skip_blocks: the others', deepest first."""
        inputs = zip(widths, kernel_sizes, strict=True)
        *blocks, self.bottleneck = (ResidualBlock(width, width, kernel) for width, kernel in inputs)
        self.skip_blocks = nn.ModuleList(reversed(blocks))

    def forward(self, skips: Sequence[Tensor]) -> Tensor | list[Tensor]:
        blocks = [self.bottleneck, *self.skip_blocks]
        refined = [block(skip) for block, skip in zip(blocks, reversed(skips), strict=True)]
        return super().forward(refined[::-1])


def layer_kinds(n_conv_per_stage: Counts, n_stages: int) -> list[int]:
    """HGCN or MAMBA for each stage, from the plan's block counts by the official rule."""
    kinds, _ = thin_blocks(n_conv_per_stage, 1, n_stages)
    if HGCN not in kinds or set(kinds) - {HGCN, MAMBA}:
        raise ValueError(
            f"MambaClinix reads n_conv_per_stage as {HGCN} for an HGCN block and {MAMBA} for a "
            f"Mamba layer, and needs an HGCN block among the first {math.ceil(n_stages / 2)} "
            f"stages; got {n_conv_per_stage}"
        )
    return kinds


# Official name, ours.
ROWS = (
    *projected_mixer_rows("encoder.encoder_layers.{s}.", "encoder.mixers.{s}."),
    *basic_block_rows("encoder.stages.{s}.blocks.0.", "encoder.stages.{s}.0."),
    *basic_block_rows("decoder.Init_Residual.", "decoder.bottleneck."),
    *basic_block_rows("decoder.residual_blocks.{s}.", "decoder.skip_blocks.{s}."),
    *(
        Row(f"encoder.encoder_layers.{{s}}.{official}", f"encoder.mixers.{{s}}.{own}")
        for official, own in (
            ("transconv.conv.{p}", "reduce.{p}"),
            ("gamma1", "scale"),
            ("lynorm{i}.gamma", "norm{i}.weight"),
            ("lynorm{i}.beta", "norm{i}.bias"),
            ("hgConvs.proj_in.{p}", "high_order.in_proj.{p}"),
            ("hgConvs.dwconv.{p}", "high_order.depthwise.{p}"),
            ("hgConvs.reconv.{i}.{p}", "high_order.widen.{i}.{p}"),
            ("hgConvs.proj_out.{p}", "high_order.out_proj.{p}"),
            ("conv{i}.conv.{p}", "conv{i}.{p}"),
        )
    ),
    Row("encoder.LayerNorm.gamma", "encoder.norm.weight"),
    Row("encoder.LayerNorm.beta", "encoder.norm.bias"),
    Row("encoder.stem.convs.0.{layer}.{p}", "encoder.stem.{layer}.{p}"),
    Row("decoder.stages.{i}.conv3.{p}", "decoder.stages.{i}.0.shortcut.{p}"),
    Row("decoder.stages.{i}.{layer}.{p}", "decoder.stages.{i}.0.{layer}.{p}"),
    Row("decoder.upsample_layers.{i}.conv.{p}", "decoder.upsample.{i}.conv.{p}"),
    Row("decoder.seg_layers.{i}.{p}", "decoder.seg_layers.{i}.{p}"),
)
