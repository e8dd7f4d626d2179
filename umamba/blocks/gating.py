"""Convolution blocks beside the mixers: SegMamba's gated convolution, MambaClinix's HGCN.

B batch, C channels, T = C // 2 channels inside an HGCN block, k order.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from umamba.blocks.conv import activate_, convolution
from umamba.blocks.norm import ChannelNorm, InstanceNorm
from umamba.blocks.ss2d import DropPath


class GatedSpatialConv(nn.Module):
    """SegMamba's gated spatial convolution, a residual block of one width in 2D or 3D.

        x - conv 3 - conv 3 - (+) - join 1 - (+) -
        |---- side 1 ----------|              |
        |-------------------------------------|

    Each convolution has a bias and is followed by instance normalization (without scale and offset)
    and ReLU.  parity: the two branches are added; despite the name, nothing is multiplied.
    """

    def __init__(self, width: int, spatial_dims: int) -> None:
        super().__init__()
        self.conv1 = convolution(width, width, [3] * spatial_dims)
        self.conv2 = convolution(width, width, [3] * spatial_dims)
        self.side = convolution(width, width, [1] * spatial_dims)
        self.join = convolution(width, width, [1] * spatial_dims)
        self.norm = InstanceNorm(width, affine=False)

    def forward(self, features: Tensor) -> Tensor:
        """features (B, C, *spatial) -> the same shape."""
        deep = self._respond(self.conv2, self._respond(self.conv1, features))
        return features + self._respond(self.join, deep + self._respond(self.side, features))

    def _respond(self, conv: nn.Module, features: Tensor) -> Tensor:
        return functional.relu_(self.norm(conv(features)))


class HGCNBlock(nn.Module):
    """Features plus: half the channels, a scaled high-order convolution, two convolutions.

    The scale starts at 1e-6, so at first the high-order convolution hardly takes part.
    """

    def __init__(
        self, n_channels: int, kernel_size: Sequence[int], order: int, *, drop_path: float = 0.0
    ) -> None:
        super().__init__()
        inner = n_channels // 2
        self.reduce = convolution(n_channels, inner, [1] * len(kernel_size))
        self.norm1 = ChannelNorm(inner, eps=1e-6)
        self.high_order = HighOrderConv(inner, kernel_size, order)
        self.scale = nn.Parameter(torch.full((inner,), 1e-6))
        self.norm2 = ChannelNorm(inner, eps=1e-6)
        self.conv1 = convolution(inner, n_channels, kernel_size)
        self.conv2 = convolution(n_channels, n_channels, kernel_size)
        self.drop_path = DropPath(drop_path)

    def forward(self, features: Tensor) -> Tensor:
        """features (B, C, *spatial) -> the same shape."""
        x = self.reduce(features)  # (B, T, *spatial)
        scale = self.scale.view(-1, *[1] * (x.ndim - 2))
        x = x + self.drop_path(scale * self.high_order(self.norm1(x)))
        x = self.conv2(activate_(self.conv1(self.norm2(x))))
        return features + self.drop_path(x)


class HighOrderConv(nn.Module):
    """k parts of one depthwise convolution, added one after the other to an ever wider map.

    The widths are T / 2^(k-1), ..., T / 2, T; a 1x1 convolution leads from each to the next.
    parity: MambaClinix_3d.py adds where its paper, and the gnConv it comes from, multiply.
    """

    def __init__(self, n_channels: int, kernel_size: Sequence[int], order: int) -> None:
        super().__init__()
        parts = 2 ** (order - 1)
        if n_channels < parts or n_channels % parts:
            raise ValueError(
                f"a high-order convolution of order {order} needs a multiple of {parts} channels, "
                f"got {n_channels}: make its stage's features a multiple of {2 * parts}"
            )
        self.widths = [n_channels // 2**i for i in range(order)][::-1]
        point = [1] * len(kernel_size)
        convolved = sum(self.widths)
        self.in_proj = convolution(n_channels, self.widths[0] + convolved, point)
        self.depthwise = convolution(convolved, convolved, kernel_size, groups=convolved)
        self.widen = nn.ModuleList(
            convolution(narrow, wide, point)
            for narrow, wide in zip(self.widths, self.widths[1:], strict=False)
        )
        self.out_proj = convolution(n_channels, n_channels, point)

    def forward(self, features: Tensor) -> Tensor:
        """features (B, T, *spatial) -> the same shape."""
        projected = self.in_proj(features)
        x, rest = projected.split([self.widths[0], sum(self.widths)], dim=1)
        first, *others = self.depthwise(rest).split(self.widths, dim=1)
        x = x + first
        for widen, part in zip(self.widen, others, strict=True):
            x = widen(x) + part
        return self.out_proj(x)
