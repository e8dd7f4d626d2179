"""The partners of Mamba-UNet: a convolutional U-Net and Swin-UNet, in 2D, for its trainings.

    UNetSmall                                     SwinUNet
    image - stage ------------ cat, stage - seg   image --------------------- expand by 4 - seg
      pool - stage ----- cat, stage - up            embed - stage - - - cat, Linear, stage
        pool - stage - cat, stage - up                merge - stage - cat, Linear, stage - expand
          pool - stage - up                             merge - stage - norm - expand

arXiv 2402.05079 compares them, 2402.07245 and 2402.10887 train them beside Mamba-UNet. Equal to
ziyangwang007/Mamba-UNet@dfe92ba, code/networks/unet.py (UNet) and vision_transformer.py (SwinUnet,
arXiv 2105.05537), Apache-2.0. These are modules without plans: they do not follow nnU-Net's (fixed
stages, dropout). Kept for the sake of checkpoints:
- UNetSmall goes up bilinearly with aligned corners, and has dropout in the encoder alone;
- SwinUNet's windows do not shift where the map is one window high or wide;
- SwinUNet's head has no bias, and images of one channel are repeated to three.
Different: SwinUNet takes any image whose maps divide into windows (there: 224 x 224 alone), and its
blocks compute in at least float32.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from umamba.blocks.conv import NEGATIVE_SLOPE, convolution
from umamba.blocks.patch_unet import PatchDecoder, PatchEncoder
from umamba.blocks.sampling import PatchEmbed, PatchMerging, channels_to_pixels
from umamba.blocks.ss2d import MLP, VSSBlock, initialize_linear
from umamba.networks.base import (
    GrayRepeatingNetwork,
    SegmentationNetwork,
    check_official,
    check_stages,
    stem_channels,
)
from umamba.networks.mamba_unet import REFERENCE, decoder_rows
from umamba.networks.registry import register_module
from umamba.networks.state_dict import KeyMap, Row
from umamba.networks.vmamba import drop_path_rates

KERNEL = (3, 3)
PATCH = 4
OTHER_REGION = -100.0  # added to the attention between pixels that were no neighbours


@register_module("unet_small", paper="arXiv:2402.05079", reference=REFERENCE, licence="Apache-2.0")
class UNetSmall(SegmentationNetwork):
    """A 2D U-Net of 1.8 million parameters; image sizes divisible by 16, with five stages."""

    spatial_dims = (2,)

    def __init__(
        self,
        input_channels: int,
        num_classes: int,
        *,
        features_per_stage: Sequence[int] = (16, 32, 64, 128, 256),
        dropout: Sequence[float] = (0.05, 0.1, 0.2, 0.3, 0.5),
    ) -> None:
        """dropout: rates of the encoder's stages, finest first as features_per_stage."""
        super().__init__(
            input_channels, num_classes, strides=[(1, 1), *[(2, 2)] * (len(features_per_stage) - 1)]
        )
        check_stages(features_per_stage, dropout=dropout)
        widths = pairwise((input_channels, *features_per_stage))
        self.encoder = nn.ModuleList(
            double_conv(below, width, rate)
            for (below, width), rate in zip(widths, dropout, strict=True)
        )
        self.decoder = UNetSmallDecoder(num_classes, features_per_stage)

    def forward(self, images: Tensor) -> Tensor:
        """images (B, input_channels, H, W) -> logits (B, num_classes, H, W)."""
        self.check_input(images)
        skips = [self.encoder[0](images)]
        for stage in self.encoder[1:]:
            skips.append(stage(functional.max_pool2d(skips[-1], 2)))
        return self.decoder(skips)

    @classmethod
    def official_key_map(cls) -> KeyMap:
        conv = "conv_conv.{i}.{p}"
        rows = [
            Row(f"encoder.in_conv.{conv}", "encoder.0.{i}.{p}"),
            Row(f"encoder.down{{s}}.maxpool_conv.1.{conv}", "encoder.{s}.{i}.{p}"),
            Row("decoder.out_conv.{p}", "decoder.seg_layers.0.{p}"),
        ]
        for i in range(4):
            up = f"decoder.up{i + 1}."
            rows.append(Row(f"{up}conv.{conv}", f"decoder.stages.{i}.{{i}}.{{p}}"))
            rows.append(Row(f"{up}conv1x1.{{p}}", f"decoder.points.{i}.{{p}}"))
        return KeyMap(rows)

    @classmethod
    def official_arguments(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        return {"input_channels": config["in_chns"], "num_classes": config["class_num"]}


class UNetSmallDecoder(nn.Module):
    """1x1 convolution, bilinear upsampling, [skip, upsampled], two convolutions; a 3x3 head."""

    deep_supervision = False

    def __init__(self, num_classes: int, features_per_stage: Sequence[int]) -> None:
        super().__init__()
        steps = list(pairwise(features_per_stage[::-1]))
        self.points = nn.ModuleList(convolution(below, width, [1, 1]) for below, width in steps)
        self.stages = nn.ModuleList(double_conv(2 * width, width, 0) for _, width in steps)
        head = convolution(features_per_stage[0], num_classes, KERNEL)
        self.seg_layers = nn.ModuleList([head])

    def forward(self, skips: Sequence[Tensor]) -> Tensor:
        """skips (B, C, *spatial) finest first -> logits."""
        features = skips[-1]
        for point, stage, skip in zip(self.points, self.stages, skips[-2::-1], strict=True):
            upsampled = functional.interpolate(
                point(features), scale_factor=2.0, mode="bilinear", align_corners=True
            )
            features = stage(torch.cat([skip, upsampled], dim=1))
        return self.seg_layers[0](features)


def double_conv(in_channels: int, out_channels: int, dropout: float) -> nn.Sequential:
    """Convolution, batch norm and leaky ReLU, twice, with dropout between."""
    layers: list[nn.Module] = []
    for below in (in_channels, out_channels):
        layers += [
            convolution(below, out_channels, KERNEL),
            nn.BatchNorm2d(out_channels),
            nn.LeakyReLU(NEGATIVE_SLOPE, inplace=True),
            nn.Dropout(dropout),
        ]
    return nn.Sequential(*layers[:-1])


@register_module("swin_unet", paper="arXiv:2105.05537", reference=REFERENCE, licence="Apache-2.0")
class SwinUNet(GrayRepeatingNetwork):
    """A 2D U-Net of attention in windows; image sizes divisible by 224, with the defaults."""

    spatial_dims = (2,)

    def __init__(
        self,
        input_channels: int,
        num_classes: int,
        *,
        features_per_stage: Sequence[int] = (96, 192, 384, 768),
        depths: Sequence[int] = (2, 2, 2, 2),
        n_heads: Sequence[int] = (3, 6, 12, 24),
        window_sizes: Sequence[int] = (7, 7, 7, 7),
        mlp_ratio: float = 4,
        drop_path_rate: float = 0.2,
    ) -> None:
        """Sequences per stage of the encoder, at 1/4, 1/8, ... of the size; the decoder mirrors it.

        window_sizes: extents of the windows, in pixels of the stage's map, which they must divide.
        """
        n_stages = len(features_per_stage)
        strides = [(1, 1), (PATCH, PATCH), *[(2, 2)] * (n_stages - 1)]
        super().__init__(input_channels, num_classes, strides=strides)
        stages = {"depths": depths, "n_heads": n_heads, "window_sizes": window_sizes}
        check_stages(features_per_stage, **stages)
        shares = [PATCH * 2**i * window for i, window in enumerate(window_sizes)]
        self.divisor = (math.lcm(*shares),) * 2
        rates = drop_path_rates(0, drop_path_rate, depths)
        stage = [*zip(features_per_stage, n_heads, window_sizes, rates, strict=True)]
        self.encoder = PatchEncoder(
            PatchEmbed(stem_channels(input_channels), features_per_stage[0], PATCH),
            [swin_stage(*arguments, mlp_ratio) for arguments in stage],
            [PatchMerging(above, width) for above, width in pairwise(features_per_stage)],
        )
        self.decoder = PatchDecoder(
            num_classes,
            (features_per_stage[0], *features_per_stage),
            [swin_stage(*arguments, mlp_ratio) for arguments in stage[-2::-1]],
        )
        initialize_linear(self)

    def forward(self, images: Tensor) -> Tensor:
        """images (B, input_channels, H, W) -> logits (B, num_classes, H, W)."""
        inputs, outputs = self.encoder.stage_maps(self.stem_images(images))
        return self.decoder(outputs[-1], inputs[:-1])

    @classmethod
    def official_key_map(cls, prefix: str = "swin_unet.") -> KeyMap:
        """prefix: of the official names; empty for the module inside the official network."""
        layer, block = f"{prefix}layers.{{i}}.", "blocks.{j}."
        rows = [
            Row(f"{prefix}patch_embed.{{layer}}.{{p}}", "encoder.patch_embed.{layer}.{p}"),
            Row(f"{layer}downsample.{{layer}}.{{p}}", "encoder.downsamples.{i}.{layer}.{p}"),
        ]
        places = {
            layer: "encoder.stages.{i}.{j}.",
            f"{prefix}layers_up.{{i}}.": "decoder.stages.{i}.{j}.",
        }
        names = {"norm1": "norm", "attn": "mixer", "norm2": "norm2", "mlp": "mlp"}
        for official, own in places.items():
            rows += [
                Row(f"{official}{block}{name}.{{p...}}", f"{own}{ours}.{{p...}}")
                for name, ours in names.items()
            ]
        computed = ("attn_mask", "attn.relative_position_index")
        ignored = [f"{prefix}{{layers}}.{{i}}.{block}{name}" for name in computed]
        return KeyMap([*rows, *decoder_rows(prefix)], ignored=ignored)

    @classmethod
    def official_arguments(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        """Of SwinUnet's, or of those of the network inside it."""
        # The official constructor takes a scale of false for none: that of the heads' width.
        check_official(
            config, patch_size=PATCH, qkv_bias=True, qk_scale=(False, None), ape=False,
            patch_norm=True,
        )  # fmt: skip
        width, depths = config.get("embed_dim", 96), list(config.get("depths", (2, 2, 2, 2)))
        window, size = config.get("window_size", 7), config.get("img_size", 224) // PATCH
        return {
            "input_channels": config.get("in_chans", 3),
            "num_classes": config["num_classes"],
            "features_per_stage": [width * 2**i for i in range(len(depths))],
            "depths": depths,
            "n_heads": list(config.get("num_heads", (3, 6, 12, 24))),
            "window_sizes": [min(window, size // 2**i) for i in range(len(depths))],
            "mlp_ratio": config.get("mlp_ratio", 4),
            "drop_path_rate": config.get("drop_path_rate", 0.2),
        }


def swin_stage(
    width: int, n_heads: int, window: int, drop_path: Sequence[float], mlp_ratio: float
) -> nn.Sequential:
    """A block for each rate of drop_path; the windows of every second one are shifted by half."""
    mlp = functools.partial(MLP, width, mlp_ratio)
    return nn.Sequential(
        *(
            VSSBlock(
                width,
                functools.partial(WindowAttention, width, n_heads, window, shifted=j % 2 == 1),
                drop_path=rate,
                mlp=mlp,
            )
            for j, rate in enumerate(drop_path)
        )
    )


class WindowAttention(nn.Module):
    """Self-attention among the pixels of each window x window square, biased by their offset."""

    relative_positions: Tensor

    def __init__(self, width: int, n_heads: int, window: int, *, shifted: bool) -> None:
        """shifted: the squares start in the middle of others, where there are several per axis."""
        super().__init__()
        if width % n_heads:
            raise ValueError(f"{n_heads} heads do not divide {width} channels: change n_heads")
        self.n_heads, self.window, self.shifted = n_heads, window, shifted
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        reach = 2 * window - 1
        self.relative_position_bias_table = nn.Parameter(torch.empty(reach**2, n_heads))
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)
        row, column = torch.arange(window**2) // window, torch.arange(window**2) % window
        offsets = [axis[:, None] - axis + window - 1 for axis in (row, column)]  # query - key
        positions = offsets[0] * reach + offsets[1]  # (T, T) of the T pixels of a window
        self.register_buffer("relative_positions", positions, persistent=False)

    def forward(self, features: Tensor) -> Tensor:
        """features (B, H, W, C) -> the same shape; H and W are multiples of the window."""
        rows, columns = features.shape[1:3]
        shift = self.window // 2 if self.shifted and min(rows, columns) > self.window else 0
        features = features.roll((-shift, -shift), (1, 2))
        bias = self.relative_position_bias_table[self.relative_positions].movedim(-1, 0)
        if shift:
            mask = region_mask(rows, columns, self.window, shift, features.device)
            bias = bias + mask.to(bias.dtype)  # (windows, n_heads, T, T)
        qkv = self.qkv(to_windows(features, self.window)).unflatten(-1, (3, self.n_heads, -1))
        query, key, value = qkv.movedim(-3, 0).transpose(-2, -3)  # (B, windows, n_heads, T, c)
        mixed = functional.scaled_dot_product_attention(query, key, value, attn_mask=bias)
        mixed = self.proj(mixed.transpose(-2, -3).flatten(-2))  # (B, windows, T, C)
        squares = mixed.flatten(2).unflatten(1, (-1, columns // self.window))
        return channels_to_pixels(squares, self.window).roll((shift, shift), (1, 2))


def to_windows(features: Tensor, window: int) -> Tensor:
    """features (B, H, W, C) -> (B, windows, window * window, C)."""
    squares = features.unflatten(2, (-1, window)).unflatten(1, (-1, window))
    return squares.movedim(2, 3).flatten(3, 4).flatten(1, 2)


def region_mask(rows: int, columns: int, window: int, shift: int, device: torch.device) -> Tensor:
    """What is added to the attention of a shifted map's windows: (windows, 1, T, T).

    The shift brings pixels from both ends of the map into one window: they ignore each other.
    """
    lines = []
    for size in (rows, columns):
        line = torch.arange(size, device=device)
        lines.append((line >= size - window).long() + (line >= size - shift).long())
    regions = to_windows((3 * lines[0][:, None] + lines[1])[None, ..., None], window)[0]
    return OTHER_REGION * (regions != regions.transpose(1, 2)).float()[:, None]
