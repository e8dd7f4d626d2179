"""Normalization of feature maps of any dimension: per channel, and over the channels."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


class InstanceNorm(nn.Module):
    """Normalizes each channel of each sample over its voxels; if affine, scales and shifts it.

    The same function as torch's instance normalization without running statistics (eps 1e-5),
    with the keys `weight` and `bias` where it is affine and none elsewhere.
    """

    weight: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(self, n_channels: int, affine: bool = True) -> None:
        super().__init__()
        self.n_channels = n_channels
        self.weight = nn.Parameter(torch.ones(n_channels)) if affine else None
        self.bias = nn.Parameter(torch.zeros(n_channels)) if affine else None

    def forward(self, features: Tensor) -> Tensor:
        """features (B, C, *spatial) -> the same shape."""
        if features.device.type == "cpu":
            # One group per channel is the same function, and torch's CPU kernel for it is 3 to 5
            # times faster. On a GPU autocast would turn it into float32, so not there.
            return functional.group_norm(features, self.n_channels, self.weight, self.bias)
        return functional.instance_norm(features, weight=self.weight, bias=self.bias)


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of each voxel."""

    def forward(self, features: Tensor) -> Tensor:
        """features (B, C, *spatial) -> the same shape."""
        return lay_out_as(features, super().forward(features.movedim(1, -1)))


def lay_out_as(features: Tensor, tokens: Tensor) -> Tensor:
    """tokens (B, *spatial, C) as (B, C, *spatial): a view if features are channels-last in memory.

    Else a dense copy, which the convolutions that follow would make otherwise.
    """
    result = tokens.movedim(-1, 1)
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    layout = formats.get(features.ndim)
    if layout is not None and features.is_contiguous(memory_format=layout):
        return result.contiguous(memory_format=layout)
    return result.contiguous()
