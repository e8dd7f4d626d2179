"""Layers that change the spatial shape of a feature map: the two ways to go up in a U-Net."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from umamba.blocks.conv import convolution


class NearestUpsample(nn.Module):
    """Nearest interpolation by the stride and a 1x1 convolution with bias."""

    def __init__(self, in_channels: int, out_channels: int, stride: Sequence[int]) -> None:
        super().__init__()
        self.stride = tuple(float(s) for s in stride)
        self.conv = convolution(in_channels, out_channels, [1] * len(stride))

    def forward(self, features: Tensor) -> Tensor:
        """features (B, in_channels, *spatial) -> (B, out_channels, *spatial * stride)."""
        # A 1x1 convolution commutes with repetition: convolving first is the same function for a
        # fraction (1 / prod(stride)) of the work. parity: the official layer interpolates first.
        return functional.interpolate(self.conv(features), scale_factor=self.stride, mode="nearest")


class TransposedUpsample(nn.Module):
    """Transposed convolution with bias whose kernel is its stride."""

    def __init__(self, in_channels: int, out_channels: int, stride: Sequence[int]) -> None:
        super().__init__()
        conv: Any = {2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}[len(stride)]
        self.conv = conv(in_channels, out_channels, tuple(stride), tuple(stride))

    def forward(self, features: Tensor) -> Tensor:
        """features (B, in_channels, *spatial) -> (B, out_channels, *spatial * stride)."""
        return self.conv(features)
