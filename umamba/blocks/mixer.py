"""The layer that mixes tokens, and the switch that replaces its scan in control networks.

B batch, C channels, L tokens.
"""

from __future__ import annotations

import functools
import math
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from umamba.blocks.mamba import Mamba, uniform
from umamba.ops.dispatch import without_autocast

MIXERS = ("scan", "none", "conv")

Tokens = Literal["voxels", "channels"]


class MixerLayer(nn.Module):
    """LayerNorm and mixer over the tokens of a feature map, outside autocast.

    mixer "scan": Mamba. "none": no norm and no mixer, the layer returns its input. "conv": a gated
    depthwise convolution with as many parameters as Mamba.
    tokens "voxels": one token per voxel, as wide as there are channels (d_model = C), the last
    axis running fastest. "channels": one token per channel, as wide as there are voxels
    (d_model = L), which ties the weights to one spatial shape.
    Half-precision input is cast to float32 (the scan's exponentials need it) and float32 comes
    out; float64 stays float64.
    """

    def __init__(
        self,
        d_model: int,
        *,
        spatial_dims: int,
        tokens: Tokens = "voxels",
        mixer: str = "scan",
        residual: bool = False,
        d_state: int = 16,
        d_conv: int = 4,
        expand: float = 2,
    ) -> None:
        super().__init__()
        check_mixer(mixer)
        self.tokens = tokens
        self.residual = residual
        self.norm: nn.Module | None = None
        self.mixer: nn.Module | None = None
        if mixer == "none":
            return
        self.norm = nn.LayerNorm(d_model)
        build = functools.partial(Mamba, d_model, d_state=d_state, d_conv=d_conv, expand=expand)
        if mixer == "scan":
            self.mixer = build()
        else:
            with torch.device("meta"):
                size = count_parameters(build())
            axes = spatial_dims if tokens == "voxels" else 1
            self.mixer = ConvMixer(d_model, spatial_dims=axes, n_parameters=size)

    def forward(self, features: Tensor) -> Tensor:
        """features (B, C, *spatial) -> the same shape."""
        if self.norm is None or self.mixer is None:
            return features
        with without_autocast(features.device):
            wide = features.float() if features.dtype.itemsize < 4 else features
            if self.tokens == "voxels":
                mixed = self.mixer(self.norm(wide.movedim(1, -1))).movedim(-1, 1).contiguous()
            else:
                mixed = self.mixer(self.norm(wide.flatten(2))).reshape(features.shape)
            return wide + mixed if self.residual else mixed


class ConvMixer(nn.Module):
    """A gated depthwise convolution of kernel 3 per axis, sized to a number of parameters.

    in_proj d -> 2e, depthwise convolution of one half, SiLU, gate by the SiLU of the other half,
    out_proj e -> d: Mamba without its scan, and without an order of the tokens.
    """

    def __init__(self, d_model: int, *, spatial_dims: int, n_parameters: int) -> None:
        super().__init__()
        taps = 3**spatial_dims
        per_channel = 3 * d_model + taps + 1
        width = max(1, round(n_parameters / per_channel))
        self.in_proj = nn.Linear(d_model, 2 * width, bias=False)
        self.conv_weight = nn.Parameter(uniform((width, 1, *[3] * spatial_dims), taps))
        self.conv_bias = nn.Parameter(uniform((width,), taps))
        self.out_proj = nn.Linear(width, d_model, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens (B, *spatial, C) -> the same shape."""
        features, gate = self.in_proj(tokens).chunk(2, dim=-1)
        conv = (functional.conv1d, functional.conv2d, functional.conv3d)[tokens.ndim - 3]
        weight, bias = self.conv_weight, self.conv_bias
        mixed = conv(features.movedim(-1, 1), weight, bias, padding=1, groups=bias.numel())
        return self.out_proj(functional.silu(mixed.movedim(1, -1)) * functional.silu(gate))


def check_mixer(mixer: str) -> None:
    """Raises ValueError for a name that is not a mixer."""
    if mixer not in MIXERS:
        raise ValueError(f"mixer is {mixer!r}; choose one of {', '.join(map(repr, MIXERS))}")


def count_parameters(module: nn.Module) -> int:
    """The number of learned values."""
    return sum(math.prod(parameter.shape) for parameter in module.parameters())
