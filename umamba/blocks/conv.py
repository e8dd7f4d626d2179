"""Convolution blocks of the residual U-Nets, in 2D and 3D: one convolution, one residual block."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from umamba.blocks.norm import InstanceNorm

NEGATIVE_SLOPE = 0.01

Shortcut = Literal["conv", "pool"]
Stride = Sequence[int] | int  # per spatial axis, or the same along all


class ConvNormAct(nn.Module):
    """Convolution, instance normalization, leaky ReLU."""

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: Sequence[int], stride: Stride = 1
    ) -> None:
        super().__init__()
        self.conv = convolution(in_channels, out_channels, kernel_size, stride)
        self.norm = InstanceNorm(out_channels)

    def forward(self, features: Tensor) -> Tensor:
        """features (B, in_channels, *spatial) -> (B, out_channels, *spatial / stride)."""
        return activate_(self.norm(self.conv(features)))


class ResidualBlock(nn.Module):
    """Two convolutions with instance normalization, added to a shortcut of the input.

    shortcut "conv": a 1x1 convolution with bias and the block's stride, without norm, always
    there (U-Mamba's BasicResBlock). "pool": average pooling where the block is strided, then a
    1x1 convolution without bias and a norm where the widths differ, else the identity
    (BasicBlockD of dynamic-network-architectures).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Sequence[int],
        stride: Stride = 1,
        *,
        shortcut: Shortcut = "pool",
    ) -> None:
        super().__init__()
        self.conv1 = convolution(in_channels, out_channels, kernel_size, stride)
        self.norm1 = InstanceNorm(out_channels)
        self.conv2 = convolution(out_channels, out_channels, kernel_size)
        self.norm2 = InstanceNorm(out_channels)
        if shortcut == "conv":
            point = [1] * len(kernel_size)
            self.shortcut: nn.Module = convolution(in_channels, out_channels, point, stride)
        else:
            strides = per_axis(stride, len(kernel_size))
            self.shortcut = PoolShortcut(in_channels, out_channels, strides)

    def forward(self, features: Tensor) -> Tensor:
        """features (B, in_channels, *spatial) -> (B, out_channels, *spatial / stride)."""
        result = activate_(self.norm1(self.conv1(features)))
        result = self.norm2(self.conv2(result))
        return activate_(result.add_(self.shortcut(features)))


class PoolShortcut(nn.Module):
    """The identity, with average pooling for a stride and a 1x1 convolution for a new width."""

    def __init__(self, in_channels: int, out_channels: int, stride: tuple[int, ...]) -> None:
        super().__init__()
        self.stride = stride
        self.conv: nn.Module | None = None
        self.norm: nn.Module | None = None
        if in_channels != out_channels:
            self.conv = convolution(in_channels, out_channels, [1] * len(stride), bias=False)
            self.norm = InstanceNorm(out_channels)

    def forward(self, features: Tensor) -> Tensor:
        if max(self.stride) > 1:
            pool = functional.avg_pool2d if len(self.stride) == 2 else functional.avg_pool3d
            features = pool(features, self.stride, self.stride)
        if self.conv is not None and self.norm is not None:
            features = self.norm(self.conv(features))
        return features


def residual_stage(
    in_channels: int,
    out_channels: int,
    kernel_size: Sequence[int],
    stride: Stride,
    n_blocks: int,
    shortcut: Shortcut,
) -> nn.Sequential:
    """n_blocks residual blocks; the first has the stride, the new width and the given shortcut."""
    first = ResidualBlock(in_channels, out_channels, kernel_size, stride, shortcut=shortcut)
    others = (ResidualBlock(out_channels, out_channels, kernel_size) for _ in range(n_blocks - 1))
    return nn.Sequential(first, *others)


def convolution(
    in_channels: int,
    out_channels: int,
    kernel_size: Sequence[int],
    stride: Stride = 1,
    *,
    bias: bool = True,
) -> nn.Conv2d | nn.Conv3d:
    """A 2D or 3D convolution (by the length of kernel_size) that pads kernel // 2 per axis."""
    dims = len(kernel_size)
    conv: Any = {2: nn.Conv2d, 3: nn.Conv3d}[dims]
    return conv(
        in_channels,
        out_channels,
        tuple(kernel_size),
        per_axis(stride, dims),
        padding=tuple(k // 2 for k in kernel_size),
        bias=bias,
    )


def activate_(features: Tensor) -> Tensor:
    """Leaky ReLU of slope 0.01, in place."""
    return functional.leaky_relu_(features, NEGATIVE_SLOPE)


def per_axis(value: Stride, spatial_dims: int) -> tuple[int, ...]:
    """One value per spatial axis."""
    return (value,) * spatial_dims if isinstance(value, int) else tuple(value)


def initialize_convolutions(network: nn.Module) -> None:
    """Kaiming-normal weights (leaky slope 0.01) and zero biases, as nnU-Net's initialization.

    Touches 2D and 3D convolutions and their transposes only: linear layers, norms and the
    causal convolutions of Mamba keep their own start.
    """
    kinds = (nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d, nn.ConvTranspose3d)
    for module in network.modules():
        if isinstance(module, kinds):
            nn.init.kaiming_normal_(module.weight, a=NEGATIVE_SLOPE)
            if module.bias is not None:
                with torch.no_grad():
                    module.bias.zero_()
