"""Swin-UMamba and Swin-UMamba-D: VMamba's encoder below a convolutional or a VSS decoder, in 2D.

    Swin-UMamba
    image - R ------------------------------------------------- up, cat, R - R - seg
      stem (1/2) - R ------------------------------------ up, cat, R - seg
        embed - VSS stage (1/4) - R ---------------- up, cat, R - seg
          merge - VSS stage (1/8) - R ---------- up, cat, R - seg
            merge - VSS stage (1/16) - R --- up, cat, R
              merge - VSS stage (1/32) ------ up          R: two convolutions, residual

    Swin-UMamba-D (the dagger of the paper)
    image                                                expand x4 - seg
      embed - VSS stage (1/4) ------------- expand, cat, Linear, VSS - seg
        merge - VSS stage (1/8) -------- expand, cat, Linear, VSS - seg
          merge - VSS stage (1/16) -- expand, cat, Linear, VSS - seg
            merge - VSS stage (1/32) -- expand

arXiv 2402.03302; equals JiarunLiu/Swin-UMamba@2c1f72e, nets/SwinUMamba.py and nets/SwinUMambaD.py
(Apache-2.0), with their QUIRKS.
Different: image sizes that 32 does not divide are refused (the official networks fail inside, or
return logits of another size), and all VSS blocks compute in at least float32.
"""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

from torch import Tensor, nn

from umamba.blocks.conv import ResidualBlock, convolution, initialize_convolutions
from umamba.blocks.norm import InstanceNorm
from umamba.blocks.sampling import PatchExpand
from umamba.blocks.unet_decoder import go_up, unetr_decoder
from umamba.networks.base import SegmentationNetwork, check_official, check_stages
from umamba.networks.registry import register
from umamba.networks.state_dict import (
    KeyMap,
    Row,
    unetr_block_rows,
    unetr_decoder_rows,
    vss_block_rows,
)
from umamba.networks.vmamba import (
    VMambaEncoder,
    drop_path_rates,
    encoder_arguments,
    encoder_rows,
    official_widths,
    vss_stage,
)

PAPER = "arXiv:2402.03302"
REFERENCE = "JiarunLiu/Swin-UMamba@2c1f72e1975cef6621f239117efdc954237c6952"
QUIRKS = (
    "the stem ends with its norm, without an activation",
    "the deepest stage enters the decoder without a residual block",
    "the norms of the residual blocks have no scale and offset",
)
QUIRKS_D = ("the deepest stage has no norm behind it", "the last expansion is by 4 at once")

KERNEL = (3, 3)
STEM_KERNEL = (7, 7)


@register("swin_umamba", paper=PAPER, reference=REFERENCE, licence="Apache-2.0", quirks=QUIRKS)
class SwinUMamba(SegmentationNetwork):
    """Stem and VMamba encoder, residual convolutions on all skips, convolutional decoder."""

    spatial_dims = (2,)
    pretrained_files = ("vssm_tiny",)
    # The last level is both the 1/16 map and the 1/32 map below it, which are equally wide.
    fixed_strides = ((1, 1), (2, 2), (2, 2), (2, 2), (4, 4))

    def __init__(
        self,
        input_channels: int,
        num_classes: int,
        *,
        strides: Sequence[Sequence[int]] = fixed_strides,
        features_per_stage: Sequence[int] = (48, 96, 192, 384, 768),
        depths: Sequence[int] = (2, 2, 9, 2),
        d_state: int = 16,
        expand: float = 2,
        drop_path_rate: float = 0.2,
        mixer: str = "scan",
        deep_supervision: bool = False,
    ) -> None:
        """features_per_stage: the decoder's widths at the full size, 1/2, 1/4, 1/8 and 1/16; the
        VSS stages, each at half the size, have all but the first.

        strides: as fixed_strides, with as many stages as wanted. depths: VSS blocks per stage of
        the encoder, finest first. mixer: "scan", "none" or "conv".
        """
        super().__init__(input_channels, num_classes, strides=strides)
        self.check_strides(strides, [(1, 1), *[(2, 2)] * (len(strides) - 2), (4, 4)])
        check_stages(strides, features_per_stage=features_per_stage)
        check_stages(strides[1:], depths=depths)
        first, *widths = features_per_stage
        stem = {
            "conv": convolution(input_channels, first, STEM_KERNEL, 2),
            "norm": InstanceNorm(first),
        }
        self.stem = nn.Sequential(OrderedDict(stem))
        self.encoder = VMambaEncoder(
            first,
            features_per_stage=widths,
            depths=depths,
            patch=2,
            d_state=d_state,
            expand=expand,
            drop_path_rate=drop_path_rate,
            mixer=mixer,
        )
        self.skips = nn.ModuleList(
            ResidualBlock(below, width, KERNEL, affine=False)
            for below, width in pairwise((input_channels, *features_per_stage))
        )
        n_levels = len(features_per_stage) + 1  # with the 1/32 map
        self.decoder = unetr_decoder(
            num_classes,
            (*features_per_stage, features_per_stage[-1]),
            [(1, 1), *[(2, 2)] * (n_levels - 1)],
            n_outputs=len(strides) - 1,
            deep_supervision=deep_supervision,
        )

    def forward(self, images: Tensor) -> Tensor | list[Tensor]:
        """images (B, input_channels, H, W) -> logits, or a list of them, finest first."""
        self.check_input(images)
        stem = self.stem(images)
        *maps, deepest = (features.movedim(-1, 1) for features in self.encoder(stem))
        inputs = [images, stem, *maps]
        skips = [block(x) for block, x in zip(self.skips, inputs, strict=True)]
        return self.decoder([*skips, deepest])

    def encoder_parameters(self) -> list[nn.Parameter]:
        return behind_patch_embed(self.encoder)

    def pretrained_maps(self) -> list[KeyMap]:
        # parity: load_pretrained_ckpt names the embedding's norm.weight twice where it leaves the
        # embedding out, and so takes its norm.bias.
        names = ("stages.{p...}", "downsamples.{p...}", "patch_embed.norm.bias")
        return [KeyMap(Row(f"encoder.{name}", f"encoder.{name}") for name in names)]

    @classmethod
    def official_key_map(cls) -> KeyMap:
        return KeyMap([*STEM_ROWS, *ENCODER_ROWS, *CONVOLUTION_ROWS])

    @classmethod
    def arguments_of(cls, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
        return encoder_arguments(shapes, finest=shapes["stem.norm.weight"][0])

    @classmethod
    def official_arguments(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        """encoder: those of the VSSMEncoder, which the official constructor leaves at defaults."""
        encoder = config.get("encoder", {})
        widths = list(config.get("feat_size", (48, 96, 192, 384, 768)))
        check_official(
            config, hidden_size=widths[-1], norm_name="instance", res_block=True, spatial_dims=2
        )
        check_official(encoder, dims=widths[1:], patch_size=2, in_chans=widths[0])
        names = ("depths", "d_state", "drop_path_rate")
        return {
            "input_channels": config.get("in_chans", 1),
            "num_classes": config.get("out_chans", 13),
            "features_per_stage": widths,
            "deep_supervision": config.get("deep_supervision", False),
            **{name: encoder[name] for name in names if name in encoder},
        }


@register("swin_umamba_d", paper=PAPER, reference=REFERENCE, licence="Apache-2.0", quirks=QUIRKS_D)
class SwinUMambaD(SegmentationNetwork):
    """VMamba encoder on patches of 4 x 4 pixels and a decoder of VSS blocks."""

    spatial_dims = (2,)
    fixed_strides = ((1, 1), (4, 4), (2, 2), (2, 2), (2, 2))
    pretrained_files = ("vssm_tiny",)

    def __init__(
        self,
        input_channels: int,
        num_classes: int,
        *,
        strides: Sequence[Sequence[int]] = fixed_strides,
        features_per_stage: Sequence[int] = (96, 96, 192, 384, 768),
        depths: Sequence[int] = (2, 2, 9, 2),
        depths_decoder: Sequence[int] = (2, 2, 2),
        d_state: int = 16,
        d_state_decoder: int | None = None,
        expand: float = 2,
        drop_path_rate: float = 0.2,
        drop_path_rate_decoder: float = 0.2,
        mixer: str = "scan",
        deep_supervision: bool = False,
    ) -> None:
        """features_per_stage: widths at the full size (in front of its head), 1/4, 1/8, 1/16, 1/32.

        strides: as fixed_strides, with as many stages as wanted. depths, depths_decoder: VSS blocks
        per stage, finest first in the encoder, deepest first in the decoder. d_state_decoder: of
        the decoder's blocks, by default d_state. drop_path_rate: of the encoder's last block,
        rising from 0; drop_path_rate_decoder: of the decoder's first block, falling to 0. mixer:
        "scan", "none" or "conv".
        """
        super().__init__(input_channels, num_classes, strides=strides)
        self.check_strides(strides, [(1, 1), (4, 4), *[(2, 2)] * (len(strides) - 2)])
        check_stages(strides, features_per_stage=features_per_stage)
        check_stages(strides[1:], depths=depths)
        check_stages(strides[2:], depths_decoder=depths_decoder)
        self.encoder = VMambaEncoder(
            input_channels,
            features_per_stage=features_per_stage[1:],
            depths=depths,
            patch=4,
            d_state=d_state,
            expand=expand,
            drop_path_rate=drop_path_rate,
            mixer=mixer,
        )
        ss2d = {"d_state": d_state_decoder or d_state, "expand": expand}
        self.decoder = VSSDecoder(
            num_classes,
            features_per_stage,
            drop_path_rates(drop_path_rate_decoder, 0, depths_decoder),
            stage=functools.partial(vss_stage, ss2d=ss2d, mlp_ratio=0, mixer=mixer),
            deep_supervision=deep_supervision,
        )
        initialize_convolutions(self)

    def encoder_parameters(self) -> list[nn.Parameter]:
        return behind_patch_embed(self.encoder)

    def pretrained_maps(self) -> list[KeyMap]:
        # parity: with other than three channels the official loader leaves out all of patch_embed.
        if self.input_channels == 3:
            return super().pretrained_maps()
        names = ("stages.{p...}", "downsamples.{p...}")
        return [KeyMap(Row(f"encoder.{name}", f"encoder.{name}") for name in names)]

    @classmethod
    def official_key_map(cls) -> KeyMap:
        return KeyMap([*ENCODER_ROWS, *VSS_DECODER_ROWS])

    @classmethod
    def arguments_of(cls, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
        arguments = encoder_arguments(shapes, finest=shapes["decoder.seg_layers.3.weight"][1])
        d_state = shapes["decoder.stages.0.0.mixer.A_log"][-1]
        return {**arguments, "d_state_decoder": d_state}

    @classmethod
    def official_arguments(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        encoder, decoder = config["vss_args"], config["decoder_args"]
        depths = list(encoder.get("depths", (2, 2, 9, 2)))
        widths = official_widths(encoder.get("dims", 96), len(depths))
        check_official(encoder, patch_size=4)
        check_official(decoder, features_per_stage=widths)
        return {
            "input_channels": encoder.get("in_chans", 3),
            "num_classes": decoder["num_classes"],
            "strides": [[1, 1], [4, 4], *[[2, 2]] * (len(widths) - 1)],
            "features_per_stage": [widths[0], *widths],
            "depths": depths,
            "depths_decoder": [2] * (len(widths) - 1),
            "d_state": encoder.get("d_state", 16),
            "d_state_decoder": decoder.get("d_state", 16),
            "drop_path_rate": encoder.get("drop_path_rate", 0.2),
            "drop_path_rate_decoder": decoder.get("drop_path_rate", 0.2),
            "deep_supervision": decoder.get("deep_supervision", False),
        }


class VSSDecoder(nn.Module):
    """Goes up by patch expanding and VSS blocks to 1/4, then by one expansion to the full size.

    drop_path: rates of stochastic depth per stage, deepest first. stage(width, rates) builds the
    blocks of a stage.
    """

    def __init__(
        self,
        num_classes: int,
        features_per_stage: Sequence[int],
        drop_path: Sequence[Sequence[float]],
        *,
        stage: Callable[[int, Sequence[float]], nn.Module],
        deep_supervision: bool,
    ) -> None:
        super().__init__()
        self.deep_supervision = deep_supervision
        finest, *widths = features_per_stage
        self.expands, self.joins, self.stages, self.seg_layers = (nn.ModuleList() for _ in range(4))
        for (below, width), rates in zip(pairwise(widths[::-1]), drop_path, strict=True):
            self.expands.append(PatchExpand(below, width))
            self.joins.append(nn.Linear(2 * width, width))
            self.stages.append(stage(width, rates))
            self.seg_layers.append(convolution(width, num_classes, [1, 1]))
        self.expands.append(PatchExpand(widths[0], finest, factor=4))
        self.seg_layers.append(convolution(finest, num_classes, [1, 1]))

    def forward(self, maps: Sequence[Tensor]) -> Tensor | list[Tensor]:
        """maps (B, H, W, C) finest first -> logits of the full size, or of all, finest first."""
        *expands, last_expand = self.expands
        _, *coarse = found = go_up(maps, expands, self.joins, self.stages)
        finest = self.seg_layers[-1](last_expand(found[-1]).movedim(-1, 1))
        if not self.deep_supervision:
            return finest
        heads = zip(self.seg_layers[:-1], coarse, strict=True)
        return [finest, *[head(features.movedim(-1, 1)) for head, features in heads][::-1]]


def behind_patch_embed(encoder: nn.Module) -> list[nn.Parameter]:
    """The encoder's parameters but those of its patch embedding, which official training leaves."""
    named = encoder.named_parameters()
    return [value for name, value in named if not name.startswith("patch_embed.")]


# Official name, ours. Here VMamba's downsampling stands outside its stages.
ENCODER_ROWS = (
    Row("vssm_encoder.downsamples.{s}.{layer}.{p}", "encoder.downsamples.{s}.{layer}.{p}"),
    *encoder_rows("vssm_encoder.", "encoder.", old=True),
)
STEM_ROWS = (Row("stem.0.{p}", "stem.conv.{p}"), Row("stem.1.{p}", "stem.norm.{p}"))
CONVOLUTION_ROWS = (
    *(row for k in range(5) for row in unetr_block_rows(f"encoder{k + 1}.layer.", f"skips.{k}.")),
    *unetr_decoder_rows("", 5),
    *(
        Row(f"out_layers.{k}.conv.conv.{{p}}", f"decoder.seg_layers.{4 - k}.{{p}}")
        for k in range(4)
    ),
)
VSS_DECODER_ROWS = (
    *vss_block_rows("decoder.stages.{s}.blocks.{b}.", "decoder.stages.{s}.{b}.", old=True),
    Row("decoder.expand_layers.{s}.{layer}.{p}", "decoder.expands.{s}.{layer}.{p}"),
    Row("decoder.concat_back_dim.{s}.{p}", "decoder.joins.{s}.{p}"),
    Row("decoder.seg_layers.{s}.{p}", "decoder.seg_layers.{s}.{p}"),
)
