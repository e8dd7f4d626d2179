"""nnMamba: a 3D residual U-Net with Mamba layers inside its residual blocks, and its relatives.

    image - stem 1/2 ------------------------ gate - cat - double conv - up - double conv - seg
              stage 1/4 (Mamba) ------- gate - cat - double conv - up
                stage 1/8 (Mamba) - gate - cat - double conv - up
                  stage 1/16 (Mamba) --- up

    stage: strided block - block - block. A Mamba layer, which all blocks but the first share, is
    added to each of them beside the shortcut.

arXiv 2402.03526; lhaof/nnMamba@6fb35a3 (no licence file) holds several networks of one name:
    NnMamba            nnMamba.py nnMambaSeg: the published one, four views of the tokens
    NnMambaSingle      nnunet/network_architecture nnMambaSeg: one scan, heads at every stage
    NnMambaSL          the same file's nnMambaSegSL: saves Mamba layers and never calls them
    NnMambaEarly       nnunet/training/network_training nnMambaSeg: Mamba layers behind the stages
    NnMambaLandmark    the same file's nnMambaLand: one Mamba layer, behind the stem
    NnMambaClassifier  nnMamba4cls.py nnMambaEncoder: classes of a whole image
Their QUIRKS are kept. Sizes that 16 does not divide are refused; some of them the official code
takes and returns another size. Its limits to 32 channels (deep supervision) or at least 16 (gates)
are gone.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from umamba.blocks.conv import BatchNormBlock, DoubleConv, Stride, convolution
from umamba.blocks.mixer import MixerLayer, PointwiseMixerLayer
from umamba.networks.base import SegmentationNetwork, check_stages
from umamba.networks.registry import register, register_module
from umamba.networks.state_dict import KeyMap, Row, double_conv_rows, mamba_rows, renamed_rows

PAPER = "arXiv:2402.03526"
REFERENCE = "lhaof/nnMamba@6fb35a3d7e9352f7b3cc83a035ef3ae0d0e8fa28"
LICENCE = "no licence file"
QUIRKS = (
    "the logits go through batch norm and ReLU, so they are never negative",
    "the full resolution has no encoder stage and no skip",
)
SINGLE_QUIRKS = (*QUIRKS, "one scan where the paper describes four views")
KERNEL, POINT = (3, 3, 3), (1, 1, 1)

# Where Mamba layers sit: in the residual blocks, behind the stem, behind the other stages, or
# beside these without being called.
Placement = Literal["blocks", "stem", "stages", "unused"]


@register("nnmamba", paper=PAPER, reference=REFERENCE, licence=LICENCE, quirks=QUIRKS)
class NnMamba(SegmentationNetwork):
    """The published network. It has one head: with deep supervision it returns a list of one."""

    spatial_dims = (3,)
    fixed_strides = ((1, 1, 1), *[(2, 2, 2)] * 4)

    placement: ClassVar[Placement] = "blocks"
    four_views: ClassVar[bool] = True
    gated: ClassVar[bool] = True
    supervised: ClassVar[bool] = False  # whether every decoder stage has a head

    def __init__(
        self,
        input_channels: int,
        num_classes: int,
        *,
        strides: Sequence[Sequence[int]] = fixed_strides,
        features_per_stage: Sequence[int] = (32, 32, 64, 128, 256),
        n_blocks_per_stage: int = 3,
        d_state: int = 16,
        d_conv: int = 4,
        expand: float = 2,
        mixer: str = "scan",
        deep_supervision: bool = False,
    ) -> None:
        """Sequences have one entry per stage, finest first; features_per_stage begins with the
        width that the decoder brings to the full resolution, where the encoder has no stage.
        n_blocks_per_stage: of the encoder below its stem. mixer: "scan", "none" or "conv"."""
        n_outputs = None if self.supervised else 1
        super().__init__(input_channels, num_classes, strides=strides, n_outputs=n_outputs)
        check_stages(strides, features_per_stage=features_per_stage)
        if len(strides) < 3:
            raise ValueError(f"{type(self).__name__} needs three strides or more, got {strides}")
        fewest = 2 if self.placement == "blocks" else 1
        if n_blocks_per_stage < fewest:
            raise ValueError(f"n_blocks_per_stage is {n_blocks_per_stage}, needs {fewest} or more")
        options = {"mixer": mixer, "d_state": d_state, "d_conv": d_conv, "expand": expand}
        layer = functools.partial(self.layer, options)
        widths = features_per_stage[1:]
        self.encoder = Encoder(
            input_channels, strides[1:], widths, n_blocks_per_stage, layer, self.placement
        )
        self.decoder = Decoder(
            num_classes, strides, features_per_stage, self.gated, self.supervised, deep_supervision
        )

    @classmethod
    def layer(cls, options: Mapping[str, Any], width: int) -> nn.Module | None:
        """A Mamba layer of this network, None without a mixer; options: the constructor's."""
        views = cls.four_views
        if options["mixer"] == "none":
            return None
        return PointwiseMixerLayer(width, four_views=views, projects=views, **options)

    @classmethod
    def official_key_map(cls) -> KeyMap:
        layers = layer_rows(cls.placement, projects=cls.four_views)
        return KeyMap([*ENCODER_ROWS, *layers, *decoder_rows(cls.supervised)], ALIASES)

    @classmethod
    def official_arguments(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        arguments = official_arguments(config)
        widths = arguments["features_per_stage"]
        return {**arguments, "features_per_stage": [widths[0], *widths]}


@register("nnmamba_single", paper=PAPER, reference=REFERENCE, licence=LICENCE, quirks=SINGLE_QUIRKS)
class NnMambaSingle(NnMamba):
    """What the official nnU-Net trainers train: one scan per layer, deep supervision."""

    four_views = False
    supervised = True

    @classmethod
    def official_arguments(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        deep_supervision = config.get("do_ds", True)
        return {**super().official_arguments(config), "deep_supervision": deep_supervision}


class NnMambaSL(NnMamba):
    """The official network without Mamba: the function of `nnmamba_noscan`, for its checkpoints.

    parity: nnMambaSegSL saves a Mamba layer per stage that its forward pass never calls.
    """

    placement = "unused"
    four_views = False


class NnMambaEarly(NnMamba):
    """The early network: LayerNorm and Mamba with a residual behind each stage but the stem.

    The next stage, and the decoder from the deepest one, see the sums; the skips do not.
    """

    placement: ClassVar[Placement] = "stages"
    four_views = False
    gated = False

    @classmethod
    def layer(cls, options: Mapping[str, Any], width: int) -> nn.Module | None:
        return MixerLayer(width, spatial_dims=3, residual=True, **options)


@register_module("nnmamba_landmark", paper=PAPER, reference=REFERENCE, licence=LICENCE)
class NnMambaLandmark(NnMambaEarly):
    """The landmark network: one heatmap per landmark, never negative; Mamba behind the stem.

    images (B, input_channels, *spatial) -> heatmaps (B, num_classes, *spatial).
    """

    placement = "stem"


@register_module("nnmamba_classifier", paper=PAPER, reference=REFERENCE, licence=LICENCE)
class NnMambaClassifier(nn.Module):
    """Classes of whole 3D images: the means of all stages but the stem, and two linear layers.

    features_per_stage: of the stem and the stages below it, each of stride 2. Any spatial shape.
    """

    def __init__(
        self,
        input_channels: int = 1,
        num_classes: int = 1,
        *,
        features_per_stage: Sequence[int] = (32, 64, 128, 256),
        n_blocks_per_stage: int = 3,
        d_state: int = 8,
        d_conv: int = 4,
        expand: float = 2,
        mixer: str = "scan",
        dropout: float = 0.5,
    ) -> None:
        super().__init__()
        self.input_channels = input_channels
        options: dict[str, Any] = {"d_state": d_state, "d_conv": d_conv, "expand": expand}
        options |= {"mixer": mixer, "projects": True, "residual": True}

        def layer(width: int) -> nn.Module | None:
            return None if mixer == "none" else PointwiseMixerLayer(width, **options)

        strides = [2] * len(features_per_stage)
        self.encoder = Encoder(
            input_channels, strides, features_per_stage, n_blocks_per_stage, layer, "stem"
        )
        stem, *widths = features_per_stage
        hidden = [nn.Linear(sum(widths), stem), nn.ReLU(), nn.Dropout(dropout)]
        self.head = nn.Sequential(*hidden, nn.Linear(stem, num_classes))

    def forward(self, images: Tensor) -> Tensor:
        """images (B, input_channels, *spatial) -> logits (B, num_classes)."""
        if images.ndim != 5 or images.shape[1] != self.input_channels:
            raise ValueError(
                f"NnMambaClassifier takes images of (batch, {self.input_channels} channels, "
                f"3 spatial axes), got the shape {tuple(images.shape)}"
            )
        _, *features = self.encoder(images)
        return self.head(torch.cat([voxel_means(each) for each in features], dim=1))

    @classmethod
    def official_key_map(cls) -> KeyMap:
        """The names of the official state dict and ours."""
        layer = layer_rows("stem", projects=True)
        return KeyMap([*ENCODER_ROWS, *layer, Row("mlp.{i}.{p}", "head.{i}.{p}")])

    @classmethod
    def official_arguments(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        """Our arguments for the official constructor's."""
        return official_arguments({"number_classes": 1, **config})


class Encoder(nn.Module):
    """Stem and residual stages (`stages`), and what follows each of them (`mixers`).

    layer(width) makes a Mamba layer, or None without a mixer; placement says where they go.
    """

    def __init__(
        self,
        input_channels: int,
        strides: Sequence[Stride],
        features_per_stage: Sequence[int],
        n_blocks: int,
        layer: Callable[[int], nn.Module | None],
        placement: Placement,
    ) -> None:
        super().__init__()
        self.uses_mixers = placement != "unused"
        self.stages = nn.ModuleList()
        self.mixers = nn.ModuleList()
        below = input_channels
        for i, (stride, width) in enumerate(zip(strides, features_per_stage, strict=True)):
            has_layer = (i == 0) == (placement == "stem")
            made = layer(width) if has_layer else None
            inside, behind = (made, None) if placement == "blocks" else (None, made)
            if i == 0:
                self.stages.append(DoubleConv(below, width, KERNEL, stride))
            else:
                first = BatchNormBlock(below, width, KERNEL, stride)
                others = (BatchNormBlock(width, width, KERNEL) for _ in range(n_blocks - 1))
                self.stages.append(ResidualStage([first, *others], inside))
            self.mixers.append(behind or nn.Identity())
            below = width

    def forward(self, images: Tensor) -> list[Tensor]:
        """images (B, input_channels, *spatial) -> the feature maps of all stages, finest first.

        Of the maps that are returned only the deepest has passed the mixer behind its stage.
        """
        features, skips = images, []
        for stage, mixer in zip(self.stages, self.mixers, strict=True):
            features = stage(features)
            skips.append(features)
            if self.uses_mixers:
                features = mixer(features)
        return [*skips[:-1], features]


class Decoder(nn.Module):
    """Goes up by trilinear interpolation and joins [upsampled, gated skip] where there is a skip.

    seg_layers, deepest first: where `supervised`, a 1x1 convolution for each stage; then the head
    of the full resolution, a double convolution.
    """

    def __init__(
        self,
        num_classes: int,
        strides: Sequence[Sequence[int]],
        features_per_stage: Sequence[int],
        gated: bool,
        supervised: bool,
        deep_supervision: bool,
    ) -> None:
        super().__init__()
        self.deep_supervision = deep_supervision
        self.supervised = supervised
        self.upsample = nn.ModuleList(
            nn.Upsample(scale_factor=tuple(map(float, stride)), mode="trilinear")
            for stride in strides[:0:-1]  # deepest first
        )
        self.gates = nn.ModuleList()
        self.stages = nn.ModuleList()
        self.seg_layers = nn.ModuleList()
        finest, *skips, below = features_per_stage
        for skip, width in zip(skips[::-1], [*skips[:0:-1], finest], strict=True):
            self.gates.append(ChannelGate(skip) if gated else nn.Identity())
            self.stages.append(DoubleConv(below + skip, width, KERNEL))
            if supervised:
                self.seg_layers.append(convolution(width, num_classes, POINT))
            below = width
        self.seg_layers.append(DoubleConv(below, num_classes, KERNEL))

    def forward(self, skips: Sequence[Tensor]) -> Tensor | list[Tensor]:
        """skips finest first -> logits of the full resolution, or a list of them, finest first."""
        features = skips[-1]
        logits = []
        for i, (gate, stage) in enumerate(zip(self.gates, self.stages, strict=True)):
            upsampled = self.upsample[i](features)
            features = stage(torch.cat([upsampled, gate(skips[-2 - i])], dim=1))
            if self.deep_supervision and self.supervised:
                logits.append(self.seg_layers[i](features))
        logits.append(self.seg_layers[-1](self.upsample[-1](features)))
        return logits[::-1] if self.deep_supervision else logits[0]


class ResidualStage(nn.Module):
    """Residual blocks, the first of them strided; the others share one mixer_layer."""

    def __init__(self, blocks: Iterable[nn.Module], mixer_layer: nn.Module | None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.mixer_layer = mixer_layer

    def forward(self, features: Tensor) -> Tensor:
        """features (B, in_channels, *spatial) -> (B, width, *spatial / stride)."""
        first, *others = self.blocks
        features = first(features)
        for block in others:
            branch = None if self.mixer_layer is None else self.mixer_layer(features)
            features = block(features, branch)
        return features


class ChannelGate(nn.Module):
    """Scales each channel by a sigmoid of two linear layers on the channels' means."""

    def __init__(self, width: int) -> None:
        super().__init__()
        hidden = max(1, width // 16)
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, features: Tensor) -> Tensor:
        """features (B, C, *spatial) -> the same shape."""
        hidden = functional.relu(self.fc1(voxel_means(features)))
        return features * torch.sigmoid(self.fc2(hidden))[..., None, None, None]


def voxel_means(features: Tensor) -> Tensor:
    """(B, C, *spatial) -> the means (B, C) over the voxels."""
    return features.flatten(2).mean(2)


def official_arguments(config: Mapping[str, Any]) -> dict[str, Any]:
    """Our arguments for the official constructors', with the widths of the encoder's stages."""
    return {
        "input_channels": config.get("in_ch", 1),
        "num_classes": config["number_classes"],
        "features_per_stage": [config.get("channels", 32) * 2**stage for stage in range(4)],
        "n_blocks_per_stage": config.get("blocks", 3),
    }


def layer_rows(placement: Placement, projects: bool) -> list[Row]:
    """The rows of the Mamba layers of a network; projects as in PointwiseMixerLayer."""
    official, own = {
        "blocks": ("layer{s}.1.mamba_layer.", "encoder.stages.{s}.mixer_layer."),
        "stem": ("mamba_layer_stem.", "encoder.mixers.0."),
    }.get(placement, ("mamba_layer_{s}.", "encoder.mixers.{s}."))
    names = {"nin": "in_conv", "norm": "norm"}
    if projects:
        names |= {"nin2": "out_conv", "norm2": "out_norm"}
    return [*renamed_rows(official, own, names), *mamba_rows(f"{official}mamba.", f"{own}mixer.")]


def decoder_rows(supervised: bool) -> list[Row]:
    """The rows of a decoder of the official depth: three stages and the full resolution."""
    rows = double_conv_rows("conv8.conv.", f"decoder.seg_layers.{3 if supervised else 0}.")
    for i in range(3):
        rows += double_conv_rows(f"conv{5 + i}.conv.", f"decoder.stages.{i}.")
        rows.append(Row(f"att{3 - i}.layer{{n}}.{{p}}", f"decoder.gates.{i}.fc{{n}}.{{p}}"))
        if supervised:
            rows.append(Row(f"ds{3 - i}_cls_conv.{{p}}", f"decoder.seg_layers.{i}.{{p}}"))
    return rows


BLOCK = "layer{s}.{b}."
BLOCK_NAMES = {"conv{i}": "conv{i}", "bn{i}": "norm{i}", "downsample.{i}": "shortcut.{i}"}
ENCODER_ROWS = (
    *double_conv_rows("in_conv.conv.", "encoder.stages.0."),
    *renamed_rows(BLOCK, "encoder.stages.{s}.blocks.{b}.", BLOCK_NAMES),
)

# Every block of a stage saves the layer that they share.
ALIASES = ((BLOCK + "mamba_layer.{rest...}", "layer{s}.1.mamba_layer.{rest...}"),)
