"""UVM-Net: the classic 2D U-Net with a block of three Mamba mixers before every double convolution.

    image - stage 0 ------------------------------------ cat - stage - 1x1 (+ image) - seg
               pool - stage 1 -------------------- cat - stage - up
                         ...                    ...
                            pool - stage n-1 - up

    stage: x + resize(UVM block(resize(x to inner_size))), then two convolutions
    UVM block: x + two convolutions - norm - Mamba along - Mamba across - * - convolution
                                       |---- Mamba ------- softmax -----|

arXiv 2402.04139; equals zzr-idam/UVM-Net@d3d70d8, Ultra/ (no licence file), a network for image
restoration: 3 channels in and out, and the image is added to the output. Its use for segmentation
is our adaptation: input_residual=False, attention="channels" and a small inner_size, as plans have.
The official QUIRKS are kept. Different: every mixer computes in at least float32.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from umamba.blocks.conv import convolution
from umamba.blocks.mamba import Mamba
from umamba.blocks.mixer import build_mixer
from umamba.blocks.recompute import RecomputableLayer, recomputable
from umamba.blocks.sampling import TransposedUpsample
from umamba.networks.base import SegmentationNetwork, check_stages
from umamba.networks.registry import register
from umamba.networks.state_dict import KeyMap, Row, double_conv_rows, mamba_rows, renamed_rows
from umamba.ops.dispatch import in_float32

QUIRKS = (
    "a network for image restoration: the image is added to the output",
    "a token of the UVM block is not a pixel: it is C consecutive values of the (C, H, W) array, "
    "thus a run of pixels of one channel",
    "the softmax runs over the batch: for a batch of 1 it is 1 everywhere and the mixer before it "
    "gets no gradient, in larger batches the results depend on the other images",
    "Mamba always sees maps of inner_size, 64 x 64, to which the deep levels are enlarged; the "
    "Mamba across is as wide as they have pixels, 4096, hence a billion parameters",
    "one output, no deep supervision",
)
KERNEL, POINT = (3, 3), (1, 1)
HIDDEN = 16  # channels inside the UVM block's residual convolutions
N_LEVELS = 5  # of the official network, which its state dict's names count
ATTENTIONS = ("batch", "channels", "none")
UPSAMPLES = ("bilinear", "transposed")


@register(
    "uvm_net",
    paper="arXiv:2402.04139",
    reference="zzr-idam/UVM-Net@d3d70d8730daa9b1997afbe3c078cdf549d3c721",
    licence="no licence file",
    quirks=QUIRKS,
)
class UVMNet(SegmentationNetwork):
    """2D U-Net with UVM blocks; any image size from 16 x 16 (the product of the strides) on."""

    spatial_dims = (2,)
    fixed_strides = ((1, 1), (2, 2), (2, 2), (2, 2), (2, 2))
    planned_arguments: ClassVar[Mapping[str, Any]] = {
        "inner_size": [16, 16],
        "attention": "channels",
        "input_residual": False,
    }

    def __init__(
        self,
        input_channels: int,
        num_classes: int,
        *,
        strides: Sequence[Sequence[int]] = fixed_strides,
        features_per_stage: Sequence[int] = (64, 128, 256, 512, 512),
        inner_size: Sequence[int] = (64, 64),
        upsample: str = "bilinear",
        attention: str = "batch",
        input_residual: bool = True,
        d_state: int = 16,
        d_conv: int = 4,
        expand: float = 2,
        mixer: str = "scan",
        deep_supervision: bool = False,
    ) -> None:
        """Per-stage sequences are finest first.

        inner_size: (y, x) of the maps in UVM blocks. upsample: "bilinear", or "transposed"
        convolutions, for which the official deepest width is 1024. attention: what the softmax runs
        over, "batch" or "channels"; "none" leaves it and its mixer out. input_residual: the images
        are added to the output, which needs as many classes as channels, or one channel.
        """
        super().__init__(input_channels, num_classes, strides=strides, n_outputs=1)
        check_stages(strides, features_per_stage=features_per_stage)
        check_choice("attention", attention, ATTENTIONS)
        check_choice("upsample", upsample, UPSAMPLES)
        if input_residual and input_channels not in (1, num_classes):
            raise ValueError(
                f"UVMNet adds its {input_channels} input channels to the {num_classes} outputs, "
                "which must be as many; for segmentation give input_residual=false"
            )
        # Maps are padded to the size of the skips, so that any size is taken from this one on.
        self.smallest, self.divisor = self.divisor, (1, 1)
        self.input_residual = input_residual
        options = {"d_state": d_state, "d_conv": d_conv, "expand": expand}
        block = functools.partial(
            UVMBlock, shape=tuple(inner_size), attention=attention, mixer=mixer, options=options
        )
        steps = pairwise((input_channels, *features_per_stage))
        stages = (Stage(below, width, width, block) for below, width in steps)
        self.encoder = Encoder(stages, strides)
        self.decoder = Decoder(
            num_classes,
            strides,
            features_per_stage,
            block,
            transposed=upsample == "transposed",
            deep_supervision=deep_supervision,
        )

    def forward(self, images: Tensor) -> Tensor | list[Tensor]:
        """images (B, input_channels, H, W) -> logits; a list of them under deep supervision."""
        self.check_input(images)
        logits = self.decoder(self.encoder(images))
        if self.input_residual:
            logits = logits + images
        return [logits] if self.decoder.deep_supervision else logits

    def check_input(self, images: Tensor) -> None:
        super().check_input(images)
        shape = tuple(images.shape[2:])
        larger = tuple(map(max, shape, self.smallest))
        if shape != larger:
            raise ValueError(
                f"{type(self).__name__} takes images of at least {self.smallest}, got {shape}; "
                f"the next larger valid shape is {larger}"
            )

    @classmethod
    def official_key_map(cls) -> KeyMap:
        return KeyMap(ROWS)

    @classmethod
    def official_arguments(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        """base and size are constants (64) of the official code, not arguments."""
        bilinear = config.get("bilinear", True)
        base, size = config.get("base", 64), config.get("size", 64)
        widths = [base * 2**level for level in range(N_LEVELS)]
        if bilinear:
            widths[-1] //= 2
        return {
            "input_channels": config["n_channels"],
            "num_classes": 3,
            "features_per_stage": widths,
            "inner_size": [size, size],
            "upsample": "bilinear" if bilinear else "transposed",
        }


class Encoder(nn.Module):
    """Stages, with max-pooling by the stride in front of all but the first."""

    def __init__(self, stages: Iterable[nn.Module], strides: Sequence[Sequence[int]]) -> None:
        super().__init__()
        self.strides = tuple(map(tuple, strides))
        self.stages = nn.ModuleList(stages)

    def forward(self, images: Tensor) -> list[Tensor]:
        """images (B, input_channels, H, W) -> the maps of all stages, finest first."""
        maps = [self.stages[0](images)]
        for stage, stride in zip(self.stages[1:], self.strides[1:], strict=True):
            maps.append(stage(functional.max_pool2d(maps[-1], stride, stride)))
        return maps


class Decoder(nn.Module):
    """Goes up stage by stage: upsample, pad to the skip, concatenate [skip, upsampled], stage.

    Where interpolation cannot change the width, a stage has the width of the next finer one.
    """

    def __init__(
        self,
        num_classes: int,
        strides: Sequence[Sequence[int]],
        features_per_stage: Sequence[int],
        block: Callable[[int], UVMBlock],
        *,
        transposed: bool,
        deep_supervision: bool,
    ) -> None:
        super().__init__()
        self.deep_supervision = deep_supervision
        self.upsample = nn.ModuleList()
        self.stages = nn.ModuleList()
        below = features_per_stage[-1]
        for stage in range(len(strides) - 2, -1, -1):
            skip, stride = features_per_stage[stage], tuple(strides[stage + 1])
            if transposed:
                self.upsample.append(TransposedUpsample(below, skip, stride))
                joined, middle, width = 2 * skip, skip, skip
            else:
                scale = tuple(map(float, stride))
                bilinear = nn.Upsample(scale_factor=scale, mode="bilinear", align_corners=True)
                self.upsample.append(bilinear)
                joined, middle = skip + below, (skip + below) // 2
                width = features_per_stage[max(stage - 1, 0)]
            self.stages.append(Stage(joined, middle, width, block))
            below = width
        self.seg_layers = nn.ModuleList([convolution(below, num_classes, POINT)])

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """maps finest first -> logits of the full resolution."""
        features = maps[-1]
        for upsample, stage, skip in zip(self.upsample, self.stages, maps[-2::-1], strict=True):
            features = pad_to(upsample(features), skip)
            features = stage(torch.cat([skip, features], dim=1))
        return self.seg_layers[0](features)


class Stage(nn.Module):
    """A UVM block on the map at its inner size, added, and two convolutions with BatchNorm."""

    def __init__(
        self, in_channels: int, middle: int, out_channels: int, block: Callable[[int], UVMBlock]
    ) -> None:
        super().__init__()
        self.block = block(in_channels)
        self.conv1 = convolution(in_channels, middle, KERNEL, bias=False)
        self.norm1 = nn.BatchNorm2d(middle)
        self.conv2 = convolution(middle, out_channels, KERNEL, bias=False)
        self.norm2 = nn.BatchNorm2d(out_channels)

    def forward(self, features: Tensor) -> Tensor:
        """features (B, in_channels, H, W) -> (B, out_channels, H, W)."""
        mixed = self.block(resize(features, self.block.shape))
        features = resize(mixed, features.shape[2:]) + features
        features = functional.relu_(self.norm1(self.conv1(features)))
        return functional.relu_(self.norm2(self.conv2(features)))


class UVMBlock(RecomputableLayer):
    """Two convolutions with a residual, norm, Mamba along and across, attention, a convolution.

    B batch, C channels, L pixels of `shape`. Tokens are (B, L, C) as the memory of (B, C, H, W)
    has them: token l is the values l * C to l * C + C of the flattened map (parity: a reshape
    where a transpose was likely meant). mixer as in MixerLayer; options: d_state, d_conv, expand.
    """

    def __init__(
        self,
        n_channels: int,
        shape: tuple[int, ...],
        *,
        attention: str = "batch",
        mixer: str = "scan",
        options: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()

        def mamba(d_model: int) -> nn.Module | None:
            build = functools.partial(Mamba, d_model, **(options or {}))
            return build_mixer(mixer, build, d_model, axes=1)

        self.shape = shape
        self.attention = attention
        self.conv1 = convolution(n_channels, HIDDEN, KERNEL)
        self.conv2 = convolution(HIDDEN, n_channels, KERNEL)
        self.mixer_along = mamba(n_channels)
        self.mixer_across = mamba(math.prod(shape))
        self.mixer_attention = None if attention == "none" else mamba(n_channels)
        self.norm = None if self.mixer_along is None else nn.LayerNorm(n_channels)
        self.smooth = convolution(n_channels, n_channels, KERNEL)

    def forward(self, features: Tensor) -> Tensor:
        """features (B, C, *shape) -> the same shape."""
        features = features + self.conv2(functional.relu_(self.conv1(features)))
        return self.smooth(features if self.norm is None else self.mix(features))

    @recomputable
    @in_float32
    def mix(self, features: Tensor) -> Tensor:
        """The mixers on the tokens, outside autocast, in at least float32."""
        assert self.norm is not None and self.mixer_along is not None
        assert self.mixer_across is not None
        tokens = self.norm(features.reshape(features.shape[0], -1, features.shape[1]))  # (B, L, C)
        across = self.mixer_along(tokens).transpose(1, 2)  # (B, C, L)
        mixed = self.mixer_across(across).transpose(1, 2)  # (B, L, C)
        if self.mixer_attention is not None:
            # parity: nn.Softmax() without an axis takes the first of three, the batch.
            axis = 0 if self.attention == "batch" else -1
            mixed = self.mixer_attention(tokens).softmax(axis) * mixed
        return mixed.reshape(features.shape)


def resize(features: Tensor, shape: Sequence[int]) -> Tensor:
    """Bilinear interpolation to a shape, corners on corners."""
    return functional.interpolate(features, tuple(shape), mode="bilinear", align_corners=True)


def pad_to(features: Tensor, like: Tensor) -> Tensor:
    """Zeros around the map, of two unequal sides more behind it, to the size of another."""
    rows, columns = (like.shape[axis] - features.shape[axis] for axis in (2, 3))
    sides = (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2)
    return functional.pad(features, sides)


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """Raises ValueError unless the value is one of the choices."""
    if value not in choices:
        raise ValueError(f"{name} is {value!r}; choose one of {', '.join(map(repr, choices))}")


def block_rows(official: str, own: str) -> list[Row]:
    """The rows of a UVM block; both prefixes end in a dot or are empty."""
    names = {"convb.0": "conv1", "convb.2": "conv2", "smooth": "smooth", "ln": "norm"}
    return [
        *renamed_rows(official, own, names),
        *mamba_rows(f"{official}model1.", f"{own}mixer_along."),
        *mamba_rows(f"{official}model2.", f"{own}mixer_attention."),
        *mamba_rows(f"{official}model3.", f"{own}mixer_across."),
    ]


def stage_rows(official: str, own: str) -> list[Row]:
    """The rows of a stage, officially a DoubleConv; both prefixes end in a dot."""
    block = block_rows(f"{official}ub.", f"{own}block.")
    return [*block, *double_conv_rows(f"{official}double_conv.", own)]


ROWS = (
    *stage_rows("inc.", "encoder.stages.0."),
    *stage_rows("down{i}.maxpool_conv.1.", "encoder.stages.{i}."),
    *(
        row
        for i in range(N_LEVELS - 1)
        for row in (
            Row(f"up{i + 1}.up.{{p}}", f"decoder.upsample.{i}.conv.{{p}}"),
            *stage_rows(f"up{i + 1}.conv.", f"decoder.stages.{i}."),
        )
    ),
    Row("outc.conv.{p}", "decoder.seg_layers.0.{p}"),
)
