"""Convolution blocks of the U-Nets, in 2D and 3D: one or two convolutions, residual blocks."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from umamba.blocks.norm import InstanceNorm

NEGATIVE_SLOPE = 0.01

Shortcut = Literal["conv", "pool"]
Stride = Sequence[int] | int  # per spatial axis, or the same along all
NormBuilder = Callable[[int], nn.Module]


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
    affine=False leaves out the biases of the convolutions and the scale and offset of the norms;
    with shortcut "pool" and no stride that is MONAI's UnetResBlock.
    norm: builds another norm of so many channels. shortcut_bias: for the one of "pool".
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Sequence[int],
        stride: Stride = 1,
        *,
        shortcut: Shortcut = "pool",
        affine: bool = True,
        norm: NormBuilder | None = None,
        shortcut_bias: bool = False,
    ) -> None:
        super().__init__()
        norm = norm or functools.partial(InstanceNorm, affine=affine)
        self.conv1 = convolution(in_channels, out_channels, kernel_size, stride, bias=affine)
        self.norm1 = norm(out_channels)
        self.conv2 = convolution(out_channels, out_channels, kernel_size, bias=affine)
        self.norm2 = norm(out_channels)
        if shortcut == "conv":
            point = [1] * len(kernel_size)
            self.shortcut: nn.Module = convolution(
                in_channels, out_channels, point, stride, bias=affine
            )
        else:
            strides = per_axis(stride, len(kernel_size))
            self.shortcut = PoolShortcut(in_channels, out_channels, strides, norm, shortcut_bias)

    def forward(self, features: Tensor) -> Tensor:
        """features (B, in_channels, *spatial) -> (B, out_channels, *spatial / stride)."""
        result = activate_(self.norm1(self.conv1(features)))
        result = self.norm2(self.conv2(result))
        return activate_(result.add_(self.shortcut(features)))


class PoolShortcut(nn.Module):
    """The identity, with average pooling for a stride and a 1x1 convolution for a new width."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: tuple[int, ...],
        norm: NormBuilder = InstanceNorm,
        bias: bool = False,
    ) -> None:
        super().__init__()
        self.stride = stride
        self.conv: nn.Module | None = None
        self.norm: nn.Module | None = None
        if in_channels != out_channels:
            self.conv = convolution(in_channels, out_channels, [1] * len(stride), bias=bias)
            self.norm = norm(out_channels)

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
    affine: bool = True,
) -> nn.Sequential:
    """n_blocks residual blocks; the first has the stride, the new width and the given shortcut."""
    block = functools.partial(ResidualBlock, kernel_size=kernel_size, affine=affine)
    first = block(in_channels, out_channels, stride=stride, shortcut=shortcut)
    return nn.Sequential(first, *(block(out_channels, out_channels) for _ in range(n_blocks - 1)))


class DoubleConv(nn.Module):
    """Convolution, batch norm, ReLU, twice; the first convolution has the stride."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Sequence[int],
        stride: Stride = 1,
        *,
        bias: bool = True,
    ) -> None:
        super().__init__()
        dims = len(kernel_size)
        self.conv1 = convolution(in_channels, out_channels, kernel_size, stride, bias=bias)
        self.norm1 = batch_norm(out_channels, dims)
        self.conv2 = convolution(out_channels, out_channels, kernel_size, bias=bias)
        self.norm2 = batch_norm(out_channels, dims)

    def forward(self, features: Tensor) -> Tensor:
        """features (B, in_channels, *spatial) -> (B, out_channels, *spatial / stride)."""
        return functional.relu_(self.convolve(features))

    def convolve(self, features: Tensor) -> Tensor:
        """All but the last ReLU."""
        return self.norm2(self.conv2(functional.relu_(self.norm1(self.conv1(features)))))


class BatchNormBlock(DoubleConv):
    """A DoubleConv without biases, plus another branch where given, plus a shortcut; ReLU.

    With a stride (1 is one) the shortcut is a 1x1 convolution and a batch norm, without one the
    identity (ResNet's basic block).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Sequence[int],
        stride: Stride | None = None,
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, stride or 1, bias=False)
        self.shortcut = nn.Sequential()  # the identity
        if stride is not None:
            point = convolution(
                in_channels, out_channels, [1] * len(kernel_size), stride, bias=False
            )
            self.shortcut = nn.Sequential(point, batch_norm(out_channels, len(kernel_size)))

    def forward(self, features: Tensor, branch: Tensor | None = None) -> Tensor:
        """features as DoubleConv's; branch: of the result's shape."""
        result = self.convolve(features)
        if branch is not None:
            result = result.add_(branch)
        return functional.relu_(result.add_(self.shortcut(features)))


def batch_norm(n_channels: int, spatial_dims: int) -> nn.BatchNorm2d | nn.BatchNorm3d:
    """torch's batch normalization in 2D or 3D."""
    norm: Any = {2: nn.BatchNorm2d, 3: nn.BatchNorm3d}[spatial_dims]
    return norm(n_channels)


def convolution(
    in_channels: int,
    out_channels: int,
    kernel_size: Sequence[int],
    stride: Stride = 1,
    *,
    bias: bool = True,
    groups: int = 1,
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
        groups=groups,
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
