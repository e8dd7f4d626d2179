"""Mamba-UNet: Swin-UNet's U of VMamba's blocks, joined by concatenation, in 2D.

    size   encoder                        decoder
    1      image                          expand by 4 - seg
    1/4    embed - stage                  cat, Linear, stage - norm
    1/8    merge - stage                  cat, Linear, stage - expand
    1/16   merge - stage                  cat, Linear, stage - expand
    1/32   merge - stage - - - norm - - - expand

    A skip is the input of its stage; the input of the deepest stage is none.

arXiv 2402.05079; equals ziyangwang007/Mamba-UNet@dfe92ba, code/networks/vision_mamba.py and
mamba_sys.py (Apache-2.0), with their QUIRKS.
Different: widths are free (the official ones are fixed, whatever its configuration says); image
sizes that 32 does not divide are refused (the official network fails inside, or returns another
size); all VSS blocks compute in at least float32.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from umamba.blocks.patch_unet import PatchDecoder
from umamba.blocks.ss2d import initialize_linear
from umamba.networks.base import GrayRepeatingNetwork, check_official, check_stages, stem_channels
from umamba.networks.registry import register
from umamba.networks.state_dict import KeyMap, Row, vss_block_rows
from umamba.networks.vmamba import (
    VMambaEncoder,
    drop_path_rates,
    encoder_arguments,
    encoder_rows,
    mirrored_stages,
    official_widths,
    vss_stage,
)

REFERENCE = "ziyangwang007/Mamba-UNet@dfe92ba3788970e2dd5a4eaf7876bd3e32d3dc0a"
QUIRKS = (
    "skips are the inputs of their stages; the deepest stage's is none",
    "the decoder's stages have the depths and the stochastic depth of the encoder's",
    "the head has no bias",
    "images of one channel are repeated to three",
    "one output, no deep supervision",
)


@register(
    "mamba_unet",
    paper="arXiv:2402.05079",
    reference=REFERENCE,
    licence="Apache-2.0",
    quirks=QUIRKS,
)
class MambaUNet(GrayRepeatingNetwork):
    """2D U-Net of VSS blocks on patches of 4 x 4 pixels, skips concatenated."""

    spatial_dims = (2,)
    fixed_strides = ((1, 1), (4, 4), (2, 2), (2, 2), (2, 2))
    short_training_lr = 1e-3  # as VM-UNet, its relative; 3e-3 was not tried
    pretrained_files = ("vssm_tiny",)

    def __init__(
        self,
        input_channels: int,
        num_classes: int,
        *,
        strides: Sequence[Sequence[int]] = fixed_strides,
        features_per_stage: Sequence[int] = (96, 96, 192, 384, 768),
        depths: Sequence[int] = (2, 2, 2, 2),
        d_state: int = 16,
        expand: float = 2,
        drop_path_rate: float = 0.2,
        mixer: str = "scan",
        deep_supervision: bool = False,
    ) -> None:
        """features_per_stage: widths at the full size (in front of the head), 1/4, 1/8, 1/16, 1/32.

        strides: as fixed_strides, with as many stages as wanted. depths: VSS blocks per stage,
        finest first, in the encoder and in the decoder. drop_path_rate: of the encoder's last
        block, rising from 0. mixer: "scan", "none" or "conv".
        """
        super().__init__(input_channels, num_classes, strides=strides, n_outputs=1)
        self.check_strides(strides, [(1, 1), (4, 4), *[(2, 2)] * (len(strides) - 2)])
        check_stages(strides, features_per_stage=features_per_stage)
        check_stages(strides[1:], depths=depths)
        widths = features_per_stage[1:]
        self.encoder = VMambaEncoder(
            stem_channels(input_channels),
            features_per_stage=widths,
            depths=depths,
            d_state=d_state,
            expand=expand,
            drop_path_rate=drop_path_rate,
            mixer=mixer,
        )
        ss2d = {"d_state": d_state, "expand": expand}
        stage = functools.partial(vss_stage, ss2d=ss2d, mlp_ratio=0, mixer=mixer)
        rates = drop_path_rates(0, drop_path_rate, depths)
        stages = map(stage, widths[-2::-1], rates[-2::-1])
        self.decoder = PatchDecoder(
            num_classes, features_per_stage, stages, deep_supervision=deep_supervision
        )
        initialize_linear(self.decoder)

    def forward(self, images: Tensor) -> Tensor | list[Tensor]:
        """images (B, input_channels, H, W) -> logits; a list of them under deep supervision."""
        inputs, outputs = self.encoder.stage_maps(self.stem_images(images))
        return self.decoder(outputs[-1], inputs[:-1])

    def pretrained_maps(self) -> list[KeyMap]:
        # parity: load_from also takes the classifier's norm, and copies the encoder's stages into
        # the decoder's of the same width.
        rows = [Row("encoder.{p...}", "encoder.{p...}"), Row("norm.{p}", "decoder.norm.{p}")]
        return [KeyMap(rows), mirrored_stages(len(self.encoder.stages))]

    @classmethod
    def official_key_map(cls, prefix: str = "mamba_unet.") -> KeyMap:
        """prefix: of the official names; empty for the module inside the official network."""
        blocks = (f"{prefix}layers_up.{{i}}.blocks.{{j}}.", "decoder.stages.{i}.{j}.")
        return KeyMap(
            [
                *encoder_rows(prefix, "encoder.", old=True),
                *vss_block_rows(*blocks, old=True),
                *decoder_rows(prefix),
            ]
        )

    @classmethod
    def arguments_of(cls, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
        return encoder_arguments(shapes, finest=shapes["decoder.final_up.norm.weight"][0])

    @classmethod
    def official_arguments(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        """Of MambaUNet's, or of those of the VSSM inside it."""
        depths = list(config.get("depths", (2, 2, 2, 2)))
        widths = official_widths(config.get("dims", 96), len(depths))
        check_official(config, patch_size=4, dims_decoder=widths[::-1])
        return {
            "input_channels": config.get("in_chans", 3),
            "num_classes": config["num_classes"],
            "strides": [[1, 1], [4, 4], *[[2, 2]] * (len(widths) - 1)],
            "features_per_stage": [widths[0], *widths],
            "depths": depths,
            "d_state": config.get("d_state", 16),
            "drop_path_rate": config.get("drop_path_rate", 0.2),
        }


def decoder_rows(prefix: str) -> list[Row]:
    """The rows of a PatchDecoder without its blocks, under `decoder.`; prefix: of official names.

    The official modules of the first expansion and of the others are different ones.
    """
    return [
        Row(f"{prefix}layers_up.0.{{layer}}.{{p}}", "decoder.expands.0.{layer}.{p}"),
        Row(f"{prefix}layers_up.{{i}}.upsample.{{layer}}.{{p}}", "decoder.expands.{i}.{layer}.{p}"),
        Row(f"{prefix}concat_back_dim.{{i}}.{{p}}", "decoder.joins.{i}.{p}"),
        Row(f"{prefix}norm.{{p}}", "decoder.norm.{p}"),
        Row(f"{prefix}norm_up.{{p}}", "decoder.norm_up.{p}"),
        Row(f"{prefix}up.{{layer}}.{{p}}", "decoder.final_up.{layer}.{p}"),
        Row(f"{prefix}output.weight", "decoder.seg_layers.0.weight"),
    ]
