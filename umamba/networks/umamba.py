"""U-Mamba, current version: a residual U-Net with Mamba at the bottleneck (Bot) or in the encoder.

    image - stem - stage 0 ------------------------------- skip (2D: not used) - stage - seg
                      stage 1 (stride) ------------- skip - cat - stage - seg
                         ...                          ...
                            stage n-1 (stride) - Mamba (Bot) - up

    Enc: a Mamba layer behind the encoder's stages; its output is the skip and the next input.

arXiv 2401.04722; equals bowang-lab/U-Mamba@28459e3, nets/UMamba{Bot,Enc}_{2d,3d}.py (Apache-2.0).
The version behind the published tables is in umamba_v1.py. Kept for the sake of checkpoints:
- the Mamba layer replaces its input; the paper's drawing shows a residual, the code has none;
- in 2D the last decoder stage does not see the skip of the full resolution;
- the deep half of the encoder's stages and the shallow half of the decoder's get one block,
  whatever the plans say (`thin_blocks`);
- Enc turns to channel tokens where a feature map has at most as many voxels as channels, which
  ties its weights to the planned patch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from umamba.blocks.conv import initialize_convolutions, residual_stage
from umamba.blocks.mixer import MixerLayer, Tokens, check_mixer
from umamba.blocks.sampling import NearestUpsample
from umamba.blocks.unet_decoder import UNetDecoder
from umamba.networks.base import SegmentationNetwork, check_stages
from umamba.networks.registry import register
from umamba.networks.state_dict import KeyMap, Row, mamba_rows

PAPER = "arXiv:2401.04722"
REFERENCE = "bowang-lab/U-Mamba@28459e33ca03769800dd35e23c6e62491d1925b5"
QUIRKS = (
    "the Mamba layer has no residual",
    "in 2D the last decoder stage does not see the skip of the full resolution",
    "the deep encoder stages and the shallow decoder stages get one block each",
)


@register("umamba_bot", paper=PAPER, reference=REFERENCE, licence="Apache-2.0", quirks=QUIRKS)
class UMambaBot(SegmentationNetwork):
    """Residual U-Net with one Mamba layer on the deepest feature map; any divisible image size."""

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
        """All sequences have one entry per stage, finest first (the decoder's: one fewer, deepest
        first). kernel_sizes: 3 everywhere by default. mixer: "scan", "none" or "conv"."""
        super().__init__(input_channels, num_classes, strides=strides)
        check_mixer(mixer)
        dims = len(strides[0])
        kernels = kernel_sizes or [[3] * dims] * len(strides)
        blocks = thin_blocks(n_conv_per_stage, n_conv_per_stage_decoder, len(strides))
        check_stages(strides=strides, features_per_stage=features_per_stage, kernel_sizes=kernels)
        self.encoder = Encoder(input_channels, features_per_stage, kernels, strides, blocks[0])
        self.bottleneck = MixerLayer(
            features_per_stage[-1],
            spatial_dims=dims,
            mixer=mixer,
            d_state=d_state,
            d_conv=d_conv,
            expand=expand,
        )
        self.decoder = decoder(
            num_classes, features_per_stage, kernels, strides, blocks[1], deep_supervision
        )
        initialize_convolutions(self)

    def forward(self, images: Tensor) -> Tensor | list[Tensor]:
        """images (B, input_channels, *spatial) -> logits, or a list of them, finest first."""
        self.check_input(images)
        skips = self.encoder(images)
        skips[-1] = self.bottleneck(skips[-1])
        return self.decoder(skips)

    @classmethod
    def official_key_map(cls) -> KeyMap:
        rows = [Row("mamba_layer.norm.{p}", "bottleneck.norm.{p}")]
        rows += mamba_rows("mamba_layer.mamba.", "bottleneck.mixer.")
        return KeyMap([*rows, *CONVOLUTION_ROWS], ALIASES)

    @classmethod
    def official_arguments(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        return official_arguments(config)


@register(
    "umamba_enc",
    paper=PAPER,
    reference=REFERENCE,
    licence="Apache-2.0",
    quirks=(*QUIRKS, "channel tokens tie the weights to the planned patch size"),
)
class UMambaEnc(SegmentationNetwork):
    """Residual U-Net with Mamba layers in the encoder.

    patch_size: the planned patch. Where a stage's feature map of that patch has at most as many
    voxels as channels, the channels are the tokens, and then the network takes no other size.
    """

    def __init__(
        self,
        input_channels: int,
        num_classes: int,
        *,
        patch_size: Sequence[int],
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
        """Arguments as UMambaBot's; patch_size in voxels, (z, y, x) or (y, x)."""
        super().__init__(input_channels, num_classes, strides=strides)
        check_mixer(mixer)
        dims = len(strides[0])
        kernels = kernel_sizes or [[3] * dims] * len(strides)
        blocks = thin_blocks(n_conv_per_stage, n_conv_per_stage_decoder, len(strides))
        check_stages(strides=strides, features_per_stage=features_per_stage, kernel_sizes=kernels)
        if len(patch_size) != dims:
            raise ValueError(f"patch_size {list(patch_size)} needs {dims} values, as the strides")
        self.patch_size = tuple(patch_size)
        self.encoder = Encoder(input_channels, features_per_stage, kernels, strides, blocks[0])
        shapes = stage_shapes(patch_size, strides)
        for stage, (width, shape) in enumerate(zip(features_per_stage, shapes, strict=True)):
            # parity: the 2D network has a layer at every second stage, counted from the deepest.
            if dims == 2 and (len(shapes) - 1 - stage) % 2:
                self.encoder.mixers.append(nn.Identity())
                continue
            voxels = math.prod(shape)
            tokens: Tokens = "channels" if voxels <= width else "voxels"
            layer = MixerLayer(
                voxels if tokens == "channels" else width,
                spatial_dims=dims,
                tokens=tokens,
                mixer=mixer,
                d_state=d_state,
                d_conv=d_conv,
                expand=expand,
            )
            self.encoder.mixers.append(layer)
        layers = [layer for layer in self.encoder.mixers if isinstance(layer, MixerLayer)]
        self.has_channel_tokens = mixer != "none" and any(x.tokens == "channels" for x in layers)
        self.decoder = decoder(
            num_classes, features_per_stage, kernels, strides, blocks[1], deep_supervision
        )
        initialize_convolutions(self)

    def forward(self, images: Tensor) -> Tensor | list[Tensor]:
        """images (B, input_channels, *patch_size) -> logits, or a list of them, finest first."""
        self.check_input(images)
        shape = tuple(images.shape[2:])
        if self.has_channel_tokens and shape != self.patch_size:
            raise ValueError(
                f"this UMambaEnc takes only its planned patch {self.patch_size}, got {shape}: its "
                "deep layers use channels as tokens; use that patch (sliding-window prediction "
                "does) or umamba_bot, which takes any size"
            )
        return self.decoder(self.encoder(images))

    @classmethod
    def official_key_map(cls) -> KeyMap:
        rows = [Row("encoder.mamba_layers.{s}.norm.{p}", "encoder.mixers.{s}.norm.{p}")]
        rows += mamba_rows("encoder.mamba_layers.{s}.mamba.", "encoder.mixers.{s}.mixer.")
        return KeyMap([*rows, *CONVOLUTION_ROWS], ALIASES)

    @classmethod
    def official_arguments(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        patch_size = config.get("patch_size", config.get("input_size"))
        return official_arguments(config) | {"patch_size": patch_size}


class Encoder(nn.Module):
    """Stem and strided residual stages; a layer of `mixers`, where there is one, follows each."""

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
        n_blocks = n_blocks_per_stage[0]
        self.stem = residual_stage(input_channels, width, kernel_sizes[0], 1, n_blocks, "conv")
        self.stages = nn.ModuleList()
        self.mixers = nn.ModuleList()
        for features, kernel, stride, n_blocks in zip(
            features_per_stage, kernel_sizes, strides, n_blocks_per_stage, strict=True
        ):
            self.stages.append(residual_stage(width, features, kernel, stride, n_blocks, "conv"))
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


def decoder(
    num_classes: int,
    features_per_stage: Sequence[int],
    kernel_sizes: Sequence[Sequence[int]],
    strides: Sequence[Sequence[int]],
    n_blocks_per_stage: Sequence[int],
    deep_supervision: bool,
) -> UNetDecoder:
    """The decoder of both networks."""
    return UNetDecoder(
        num_classes,
        features_per_stage=features_per_stage,
        strides=strides,
        kernel_sizes=kernel_sizes,
        n_conv_per_stage=n_blocks_per_stage,
        upsample=NearestUpsample,
        shortcut="conv",
        # parity: UMamba*_2d.py does not join the skip of the full resolution.
        joins_full_resolution=len(strides[0]) == 3,
        deep_supervision=deep_supervision,
    )


def thin_blocks(
    n_conv_per_stage: Sequence[int] | int,
    n_conv_per_stage_decoder: Sequence[int] | int,
    n_stages: int,
) -> tuple[list[int], list[int]]:
    """Block counts of encoder and decoder stages after the official constructors' rule.

    parity: encoder stages from ceil(n / 2) on and decoder entries from ceil((n - 1) / 2 + 0.5) on
    (deepest first) get one block; the others keep the plan's number.
    """
    encoder, decoder = block_counts(n_conv_per_stage, n_conv_per_stage_decoder, n_stages)
    first = math.ceil(n_stages / 2)
    encoder[first:] = [1] * (n_stages - first)
    first = math.ceil((n_stages - 1) / 2 + 0.5)
    decoder[first:] = [1] * (n_stages - 1 - first)
    return encoder, decoder


def block_counts(
    n_conv_per_stage: Sequence[int] | int,
    n_conv_per_stage_decoder: Sequence[int] | int,
    n_stages: int,
) -> tuple[list[int], list[int]]:
    """Copies of the plan's block counts of encoder and decoder, one number meaning all stages."""
    counts = []
    for name, value, length in (
        ("n_conv_per_stage", n_conv_per_stage, n_stages),
        ("n_conv_per_stage_decoder", n_conv_per_stage_decoder, n_stages - 1),
    ):
        values = [value] * length if isinstance(value, int) else list(value)
        if len(values) != length or min(values, default=1) < 1:
            raise ValueError(f"{name} needs {length} numbers of at least 1, got {values}")
        counts.append(values)
    return counts[0], counts[1]


def stage_shapes(
    patch_size: Sequence[int], strides: Sequence[Sequence[int]]
) -> list[tuple[int, ...]]:
    """The spatial shape of each stage's feature map of a patch."""
    shape = tuple(patch_size)
    shapes = []
    for stride in strides:
        shape = tuple(size // s for size, s in zip(shape, stride, strict=True))
        shapes.append(shape)
    return shapes


def official_arguments(config: Mapping[str, Any]) -> dict[str, Any]:
    """Our arguments for those of any official U-Mamba constructor; the names agree."""
    names = (
        "input_channels",
        "num_classes",
        "strides",
        "features_per_stage",
        "kernel_sizes",
        "n_conv_per_stage",
        "n_conv_per_stage_decoder",
        "deep_supervision",
    )
    return {name: config[name] for name in names}


# Official name, ours. The first block of a stage is a BasicResBlock, the others are BasicBlockD.
CONVOLUTION_ROWS = (
    *(
        row
        for stage in ("encoder.stem", "encoder.stages.{s}", "decoder.stages.{s}")
        for row in (
            Row(f"{stage}.0.conv3.{{p}}", f"{stage}.0.shortcut.{{p}}"),
            Row(f"{stage}.0.{{layer}}.{{p}}", f"{stage}.0.{{layer}}.{{p}}"),
            Row(f"{stage}.{{b}}.conv{{i}}.conv.{{p}}", f"{stage}.{{b}}.conv{{i}}.{{p}}"),
            Row(f"{stage}.{{b}}.conv{{i}}.norm.{{p}}", f"{stage}.{{b}}.norm{{i}}.{{p}}"),
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
