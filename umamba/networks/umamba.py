"""U-Mamba, current version: a residual U-Net with Mamba at the bottleneck (Bot) or in the encoder.

    image - stem - stage 0 ------------------------------- skip (2D: not used) - stage - seg
                      stage 1 (stride) ------------- skip - cat - stage - seg
                         ...                          ...
                            stage n-1 (stride) - Mamba (Bot) - up

    Enc: a Mamba layer behind the encoder's stages; its output is the skip and the next input.

arXiv 2401.04722; equals bowang-lab/U-Mamba@28459e3, nets/UMamba{Bot,Enc}_{2d,3d}.py (Apache-2.0).
The official QUIRKS are kept. The version behind the published tables is in umamba_v1.py.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any, ClassVar

from torch import Tensor, nn

from umamba.blocks.conv import Shortcut, initialize_convolutions, residual_stage
from umamba.blocks.mixer import MixerLayer, Tokens
from umamba.blocks.sampling import NearestUpsample
from umamba.blocks.unet_decoder import UNetDecoder
from umamba.networks.base import SegmentationNetwork, check_stages
from umamba.networks.registry import register
from umamba.networks.state_dict import KeyMap, Row, basic_block_rows, mixer_rows

PAPER = "arXiv:2401.04722"
REFERENCE = "bowang-lab/U-Mamba@28459e33ca03769800dd35e23c6e62491d1925b5"
QUIRKS = (
    "the Mamba layer replaces its input: the paper draws a residual, the code has none",
    "in 2D the last decoder stage does not see the skip of the full resolution",
    "the deep half of the encoder's stages and the shallow half of the decoder's get one block, "
    "whatever the plans say",
)
ENC_QUIRKS = (
    *QUIRKS,
    "where a map has at most as many voxels as channels, channel tokens tie the weights to the "
    "planned patch size",
)

Counts = Sequence[int] | int


class UMamba(SegmentationNetwork):
    """The constructor of Bot and Enc, and the U-Net of the current version around their layers."""

    # Official prefixes of a layer's norm and its Mamba, our prefix of the layer.
    layer_names: ClassVar[tuple[str, str, str]]

    encoder: Encoder

    def __init__(
        self,
        input_channels: int,
        num_classes: int,
        *,
        strides: Sequence[Sequence[int]],
        features_per_stage: Sequence[int],
        kernel_sizes: Sequence[Sequence[int]] | None = None,
        n_conv_per_stage: Counts = 2,
        n_conv_per_stage_decoder: Counts = 2,
        d_state: int = 16,
        d_conv: int = 4,
        expand: float = 2,
        mixer: str = "scan",
        deep_supervision: bool = False,
    ) -> None:
        """All sequences have one entry per stage, finest first (the decoder's: one fewer, deepest
        first). kernel_sizes: 3 everywhere by default. mixer: "scan", "none" or "conv"."""
        super().__init__(input_channels, num_classes, strides=strides)
        stages = stage_arguments(strides, features_per_stage, kernel_sizes)
        options: dict[str, Any] = {"d_state": d_state, "d_conv": d_conv, "expand": expand}
        layer = functools.partial(MixerLayer, spatial_dims=len(strides[0]), mixer=mixer, **options)
        counts = (n_conv_per_stage, n_conv_per_stage_decoder, len(strides))
        self.build(layer, stages, counts, deep_supervision)

    def build(
        self,
        layer: Callable[..., MixerLayer],
        stages: Mapping[str, Any],
        counts: tuple[Counts, Counts, int],
        deep_supervision: bool,
    ) -> None:
        """Adds the parts in the order that decides on the weights of a seed."""
        encoder_blocks, decoder_blocks = thin_blocks(*counts)
        width, kernel = stages["features_per_stage"][0], stages["kernel_sizes"][0]
        stem = residual_stage(self.input_channels, width, kernel, 1, encoder_blocks[0], "conv")
        self.encoder = Encoder(stem, residual_stages(encoder_blocks, "conv", **stages))
        self.add_mixers(layer, stages)
        self.decoder = UNetDecoder(
            self.num_classes,
            **stages,
            n_conv_per_stage=decoder_blocks,
            upsample=NearestUpsample,
            shortcut="conv",
            # parity: UMamba*_2d.py does not join the skip of the full resolution.
            joins_full_resolution=len(self.divisor) == 3,
            deep_supervision=deep_supervision,
        )
        initialize_convolutions(self)

    @classmethod
    def official_arguments(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        return super().official_arguments(spread_stages(config))

    def add_mixers(self, layer: Callable[..., MixerLayer], stages: Mapping[str, Any]) -> None:
        """Adds the Mamba layers; layer(d_model, tokens=...) makes one."""
        raise NotImplementedError

    @classmethod
    def official_key_map(cls) -> KeyMap:
        return KeyMap([*mixer_rows(*cls.layer_names), *CONVOLUTION_ROWS], ALIASES)


@register("umamba_bot", paper=PAPER, reference=REFERENCE, licence="Apache-2.0", quirks=QUIRKS)
class UMambaBot(UMamba):
    """Residual U-Net with one Mamba layer on the deepest feature map; any divisible image size."""

    layer_names = ("mamba_layer.norm.", "mamba_layer.mamba.", "bottleneck.")

    def add_mixers(self, layer: Callable[..., MixerLayer], stages: Mapping[str, Any]) -> None:
        self.bottleneck = layer(stages["features_per_stage"][-1])

    def forward(self, images: Tensor) -> Tensor | list[Tensor]:
        self.check_input(images)
        skips = self.encoder(images)
        skips[-1] = self.bottleneck(skips[-1])
        return self.decoder(skips)


@register("umamba_enc", paper=PAPER, reference=REFERENCE, licence="Apache-2.0", quirks=ENC_QUIRKS)
class UMambaEnc(UMamba):
    """Residual U-Net with Mamba layers in the encoder.

    patch_size: the planned patch. Where a stage's feature map of that patch has at most as many
    voxels as channels, the channels are the tokens, and then the network takes no other size.
    """

    layer_names = (
        "encoder.mamba_layers.{s}.norm.",
        "encoder.mamba_layers.{s}.mamba.",
        "encoder.mixers.{s}.",
    )

    def __init__(
        self,
        input_channels: int,
        num_classes: int,
        *,
        patch_size: Sequence[int],
        strides: Sequence[Sequence[int]],
        features_per_stage: Sequence[int],
        kernel_sizes: Sequence[Sequence[int]] | None = None,
        n_conv_per_stage: Counts = 2,
        n_conv_per_stage_decoder: Counts = 2,
        d_state: int = 16,
        d_conv: int = 4,
        expand: float = 2,
        mixer: str = "scan",
        deep_supervision: bool = False,
    ) -> None:
        """Arguments as UMambaBot's; patch_size in voxels, (z, y, x) or (y, x)."""
        dims = len(strides[0])
        if len(patch_size) != dims:
            raise ValueError(f"patch_size {list(patch_size)} needs {dims} values, as the strides")
        self.patch_size = tuple(patch_size)  # first: super().__init__ calls add_mixers
        super().__init__(
            input_channels, num_classes, strides=strides, features_per_stage=features_per_stage,
            kernel_sizes=kernel_sizes, n_conv_per_stage=n_conv_per_stage,
            n_conv_per_stage_decoder=n_conv_per_stage_decoder, d_state=d_state, d_conv=d_conv,
            expand=expand, mixer=mixer, deep_supervision=deep_supervision,
        )  # fmt: skip
        layers = [layer for layer in self.encoder.mixers if isinstance(layer, MixerLayer)]
        self.has_channel_tokens = mixer != "none" and any(x.tokens == "channels" for x in layers)

    def add_mixers(self, layer: Callable[..., MixerLayer], stages: Mapping[str, Any]) -> None:
        shape = self.patch_size
        below = len(stages["strides"])  # stages from this one to the deepest
        for width, stride in zip(stages["features_per_stage"], stages["strides"], strict=True):
            shape = tuple(size // s for size, s in zip(shape, stride, strict=True))
            below -= 1
            # parity: the 2D network has a layer at every second stage, counted from the deepest.
            if len(shape) == 2 and below % 2:
                self.encoder.mixers.append(nn.Identity())
                continue
            voxels = math.prod(shape)
            tokens: Tokens = "channels" if voxels <= width else "voxels"
            self.encoder.mixers.append(layer(min(voxels, width), tokens=tokens))

    def check_input(self, images: Tensor) -> None:
        super().check_input(images)
        shape = tuple(images.shape[2:])
        if self.has_channel_tokens and shape != self.patch_size:
            raise ValueError(
                f"this UMambaEnc takes only its planned patch {self.patch_size}, got {shape}: its "
                "deep layers use channels as tokens; use that patch (sliding-window prediction "
                "does) or umamba_bot, which takes any size"
            )

    @classmethod
    def official_arguments(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        return super().official_arguments({"patch_size": config.get("input_size"), **config})


class Encoder(nn.Module):
    """Stem and stages; a layer of `mixers`, where there is one, follows each stage."""

    def __init__(self, stem: nn.Module, stages: Iterable[nn.Module]) -> None:
        super().__init__()
        self.stem = stem
        self.stages = nn.ModuleList(stages)
        self.mixers = nn.ModuleList()

    def forward(self, images: Tensor) -> list[Tensor]:
        """images (B, input_channels, *spatial) -> the feature maps of all stages, finest first."""
        features = self.stem(images)
        skips = []
        for index, stage in enumerate(self.stages):
            features = self.mix(index, stage(features))
            skips.append(features)
        return skips

    def mix(self, index: int, features: Tensor) -> Tensor:
        """What follows the stage of this index, on its feature map."""
        return self.mixers[index](features) if len(self.mixers) else features


def residual_stages(
    n_conv_per_stage: Sequence[int],
    shortcut: Shortcut,
    *,
    strides: Sequence[Sequence[int]],
    features_per_stage: Sequence[int],
    kernel_sizes: Sequence[Sequence[int]],
) -> Iterator[nn.Module]:
    """The strided stages of an encoder of residual blocks."""
    widths = pairwise((features_per_stage[0], *features_per_stage))
    stages = zip(widths, kernel_sizes, strides, n_conv_per_stage, strict=True)
    for (below, width), kernel, stride, n_blocks in stages:
        yield residual_stage(below, width, kernel, stride, n_blocks, shortcut)


def spread_stages(config: Mapping[str, Any]) -> dict[str, Any]:
    """Official arguments with an entry per stage, and kernels and strides with one per axis.

    The official constructors take one number for all stages or all axes, too.
    """
    spread = dict(config)
    for name in {"features_per_stage", "kernel_sizes", "strides"} & config.keys():
        if isinstance(config[name], int):
            spread[name] = [config[name]] * config["n_stages"]
        if name != "features_per_stage":
            spread[name] = [[n] * config["dims"] if isinstance(n, int) else n for n in spread[name]]
    return spread


def stage_arguments(
    strides: Sequence[Sequence[int]],
    features_per_stage: Sequence[int],
    kernel_sizes: Sequence[Sequence[int]] | None,
) -> dict[str, Any]:
    """What encoder and decoder both take, after a check; the kernels are 3 by default."""
    kernels = kernel_sizes or [[3] * len(strides[0])] * len(strides)
    check_stages(strides, features_per_stage=features_per_stage, kernel_sizes=kernels)
    return {"strides": strides, "features_per_stage": features_per_stage, "kernel_sizes": kernels}


def thin_blocks(encoder: Counts, decoder: Counts, n_stages: int) -> tuple[list[int], list[int]]:
    """Block counts of encoder and decoder stages after the official constructors' rule.

    parity: encoder stages from ceil(n / 2) on and decoder entries from ceil((n - 1) / 2 + 0.5) on
    (deepest first) get one block; the others keep the plan's number.
    """
    n_encoder, n_decoder = block_counts(encoder, decoder, n_stages)
    kept = math.ceil(n_stages / 2)
    n_encoder[kept:] = [1] * (n_stages - kept)
    kept = math.ceil((n_stages - 1) / 2 + 0.5)
    n_decoder[kept:] = [1] * (n_stages - 1 - kept)
    return n_encoder, n_decoder


def block_counts(encoder: Counts, decoder: Counts, n_stages: int) -> tuple[list[int], list[int]]:
    """Copies of the plan's block counts of encoder and decoder, one number meaning all stages."""

    def per_stage(name: str, value: Counts, length: int) -> list[int]:
        values = [value] * length if isinstance(value, int) else list(value)
        if len(values) != length or min(values, default=1) < 1:
            raise ValueError(f"{name} needs {length} numbers of at least 1, got {values}")
        return values

    return (
        per_stage("n_conv_per_stage", encoder, n_stages),
        per_stage("n_conv_per_stage_decoder", decoder, n_stages - 1),
    )


# Official name, ours. The first block of a stage is a BasicResBlock, the others are BasicBlockD.
CONVOLUTION_ROWS = (
    *(
        row
        for stage in ("encoder.stem", "encoder.stages.{s}", "decoder.stages.{s}")
        for row in (
            Row(f"{stage}.0.conv3.{{p}}", f"{stage}.0.shortcut.{{p}}"),
            Row(f"{stage}.0.{{layer}}.{{p}}", f"{stage}.0.{{layer}}.{{p}}"),
            *basic_block_rows(f"{stage}.{{b}}.", f"{stage}.{{b}}.", skips=()),
        )
    ),
    Row("decoder.upsample_layers.{i}.conv.{p}", "decoder.upsample.{i}.conv.{p}"),
    Row("decoder.seg_layers.{i}.{p}", "decoder.seg_layers.{i}.{p}"),
)

ALIASES = (
    ("decoder.encoder.{rest...}", "encoder.{rest...}"),
    ("{block...}.all_modules.0.{p}", "{block...}.conv.{p}"),
    ("{block...}.all_modules.1.{p}", "{block...}.norm.{p}"),
)
