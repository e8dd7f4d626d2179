"""Layers that change the spatial shape of a feature map: the ways down and up in a U-Net."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from umamba.blocks.conv import convolution


class NearestUpsample(nn.Module):
    """Nearest interpolation by the stride and a 1x1 convolution."""

    def __init__(
        self, in_channels: int, out_channels: int, stride: Sequence[int], *, bias: bool = True
    ) -> None:
        super().__init__()
        self.mode = "nearest"
        self.stride = tuple(float(s) for s in stride)
        self.conv = convolution(in_channels, out_channels, [1] * len(stride), bias=bias)

    def forward(self, features: Tensor) -> Tensor:
        """features (B, in_channels, *spatial) -> (B, out_channels, *spatial * stride)."""
        # A 1x1 convolution commutes with repetition: convolving first is the same function for a
        # fraction (1 / prod(stride)) of the work. parity: U-Mamba's layer interpolates first.
        return functional.interpolate(self.conv(features), scale_factor=self.stride, mode=self.mode)


class LinearUpsample(NearestUpsample):
    """A 1x1 convolution without bias and bi- or trilinear interpolation by the stride."""

    def __init__(self, in_channels: int, out_channels: int, stride: Sequence[int]) -> None:
        super().__init__(in_channels, out_channels, stride, bias=False)
        self.mode = {2: "bilinear", 3: "trilinear"}[len(stride)]


class TransposedUpsample(nn.Module):
    """Transposed convolution whose kernel is its stride."""

    def __init__(
        self, in_channels: int, out_channels: int, stride: Sequence[int], *, bias: bool = True
    ) -> None:
        super().__init__()
        conv: Any = {2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}[len(stride)]
        self.conv = conv(in_channels, out_channels, tuple(stride), tuple(stride), bias=bias)

    def forward(self, features: Tensor) -> Tensor:
        """features (B, in_channels, *spatial) -> (B, out_channels, *spatial * stride)."""
        return self.conv(features)


class PatchEmbed(nn.Module):
    """A convolution whose kernel is its stride, and LayerNorm: (B, C, H, W) to channels-last."""

    def __init__(self, in_channels: int, width: int, patch: int = 4) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, width, patch, patch)
        self.norm = nn.LayerNorm(width)

    def forward(self, images: Tensor) -> Tensor:
        """images (B, in_channels, H, W) -> (B, H // patch, W // patch, width)."""
        return self.norm(self.proj(images).movedim(1, -1))


class ConvPatchEmbed(nn.Module):
    """Two convolutions of kernel 3 and stride 2, each with LayerNorm, and GELU between them."""

    def __init__(self, in_channels: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, width // 2, 3, 2, 1)
        self.norm = nn.LayerNorm(width // 2)
        self.proj2 = nn.Conv2d(width // 2, width, 3, 2, 1)
        self.norm2 = nn.LayerNorm(width)

    def forward(self, images: Tensor) -> Tensor:
        """images (B, in_channels, H, W) -> (B, H / 4, W / 4, width), extents rounded up."""
        features = functional.gelu(self.norm(self.proj(images).movedim(1, -1)))
        return self.norm2(self.proj2(features.movedim(-1, 1)).movedim(1, -1))


class PatchMerging(nn.Module):
    """Four neighbours side by side, LayerNorm, and a linear layer from 4C to out_width channels.

    out_width: default 2C. parity: where an extent is odd, the last row or column is dropped; with
    pad_odd a row or column of zeros is added instead, as VMamba's later code does.
    """

    def __init__(self, width: int, out_width: int | None = None, *, pad_odd: bool = False) -> None:
        super().__init__()
        self.pad_odd = pad_odd
        self.norm = nn.LayerNorm(4 * width)
        self.reduction = nn.Linear(4 * width, out_width or 2 * width, bias=False)

    def forward(self, features: Tensor) -> Tensor:
        """features (B, H, W, C) -> (B, H / 2, W / 2, out_width)."""
        rows, columns = features.shape[1:3]
        if self.pad_odd and (rows % 2 or columns % 2):
            features = functional.pad(features, (0, 0, 0, columns % 2, 0, rows % 2))
        elif rows % 2 or columns % 2:
            features = features[:, : rows - rows % 2, : columns - columns % 2]
        corners = [features[:, i::2, j::2] for j in (0, 1) for i in (0, 1)]
        return self.reduction(self.norm(torch.cat(corners, -1)))


class ConvDownsample(nn.Module):
    """A convolution of stride 2 and kernel 2 or 3 (which pads 1), and LayerNorm."""

    def __init__(self, width: int, out_width: int, kernel: int = 3) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, out_width, kernel, 2, kernel - 2)
        self.post_norm = nn.LayerNorm(out_width)

    def forward(self, features: Tensor) -> Tensor:
        """features (B, H, W, width) -> (B, H / 2, W / 2, out_width)."""
        return self.post_norm(self.conv(features.movedim(-1, 1)).movedim(1, -1))


class PatchExpand(nn.Module):
    """A linear layer whose channels become factor x factor pixels, and LayerNorm."""

    def __init__(self, in_width: int, out_width: int, factor: int = 2) -> None:
        super().__init__()
        self.factor = factor
        self.expand = nn.Linear(in_width, factor**2 * out_width, bias=False)
        self.norm = nn.LayerNorm(out_width)

    def forward(self, features: Tensor) -> Tensor:
        """features (B, H, W, in_width) -> (B, factor * H, factor * W, out_width)."""
        return self.norm(channels_to_pixels(self.expand(features), self.factor))


class LargeKernelPatchExpand(nn.Module):
    """Pointwise layer, BatchNorm, ReLU and depthwise convolution before channels become pixels.

    MSVM-UNet's LKPE (factor 2) and, without its head, FLKPE (factor 4); the large kernel is 3.
    """

    def __init__(self, in_width: int, out_width: int, factor: int = 2) -> None:
        super().__init__()
        self.factor = factor
        width = factor**2 * out_width
        self.expand = nn.Linear(in_width, width)
        self.batch_norm = nn.BatchNorm2d(width)
        self.conv = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.norm = nn.LayerNorm(out_width)

    def forward(self, features: Tensor) -> Tensor:
        """features (B, H, W, in_width) -> (B, factor * H, factor * W, out_width)."""
        wide = functional.relu(self.batch_norm(self.expand(features).movedim(-1, 1)))
        return self.norm(channels_to_pixels(self.conv(wide).movedim(1, -1), self.factor))


def channels_to_pixels(features: Tensor, factor: int) -> Tensor:
    """features (B, H, W, factor * factor * C) -> (B, factor * H, factor * W, C).

    The channels are (row offset, column offset, C), the last fastest.
    """
    pixels = features.unflatten(-1, (factor, factor, -1))  # (B, H, W, rows, columns, C)
    return pixels.permute(0, 1, 3, 2, 4, 5).flatten(3, 4).flatten(1, 2)
