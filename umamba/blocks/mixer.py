"""The layer that mixes tokens, and the switch that replaces its scan in control networks.

B batch, C channels, L tokens.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from umamba.blocks.mamba import Mamba, uniform
from umamba.blocks.norm import lay_out_as
from umamba.blocks.recompute import RecomputableLayer, recomputable
from umamba.ops.dispatch import in_float32

MIXERS = ("scan", "none", "conv")

Tokens = Literal["voxels", "channels"]
Skip = Literal["inside", "outside"]


class MixerLayer(RecomputableLayer):
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
        orders: Sequence[str] = ("raster",),
        merge: str = "sum",
    ) -> None:
        super().__init__()
        self.tokens = tokens
        self.residual = residual
        options: dict[str, Any] = {"d_state": d_state, "d_conv": d_conv, "expand": expand}
        build = functools.partial(Mamba, d_model, **options, orders=orders, merge=merge)
        axes = spatial_dims if tokens == "voxels" else 1
        self.mixer = build_mixer(mixer, build, d_model, axes)
        self.norm = None if self.mixer is None else nn.LayerNorm(d_model)

    def forward(self, features: Tensor) -> Tensor:
        """features (B, C, *spatial) -> the same shape."""
        return features if self.mixer is None else self._mix(features)

    @recomputable
    @in_float32
    def _mix(self, features: Tensor) -> Tensor:
        assert self.norm is not None and self.mixer is not None
        if self.tokens == "voxels":
            mixed = lay_out_as(features, self.mixer(self.norm(features.movedim(1, -1))))
        else:
            mixed = self.mixer(self.norm(features.flatten(2))).reshape(features.shape)
        return features + mixed if self.residual else mixed


class ProjectedMixerLayer(RecomputableLayer):
    """Norm, mixer, the same norm again and a linear layer over the voxels, outside autocast.

    skip "inside": proj(norm(mixer(norm(x)) + skip_scale * x)), skip_scale one learned number
    (LightM-UNet). "outside": x + proj(norm(mixer(norm(x)))) (MambaClinix).
    mixer and precision as in MixerLayer. "none" leaves out what the mixer adds: "inside" is
    proj(norm(x)), "outside" the input itself, without parameters.
    """

    def __init__(
        self,
        d_model: int,
        out_channels: int,
        *,
        spatial_dims: int,
        skip: Skip,
        mixer: str = "scan",
        d_state: int = 16,
        d_conv: int = 4,
        expand: float = 2,
    ) -> None:
        super().__init__()
        assert skip == "inside" or out_channels == d_model
        self.skip = skip
        build = functools.partial(Mamba, d_model, d_state=d_state, d_conv=d_conv, expand=expand)
        self.mixer = build_mixer(mixer, build, d_model, spatial_dims)
        if self.mixer is None and skip == "outside":
            return
        self.norm = nn.LayerNorm(d_model)
        self.proj = nn.Linear(d_model, out_channels)
        # Without a mixer the norm would cancel it.
        self.skip_scale = None if self.mixer is None else nn.Parameter(torch.ones(1))

    def forward(self, features: Tensor) -> Tensor:
        """features (B, d_model, *spatial) -> (B, out_channels, *spatial)."""
        if self.mixer is None and self.skip == "outside":
            return features
        return self._mix(features)

    @recomputable
    @in_float32
    def _mix(self, features: Tensor) -> Tensor:
        mixed = tokens = features.movedim(1, -1)
        if self.mixer is not None:
            mixed = self.mixer(self.norm(tokens))
        if self.skip == "inside":
            if self.skip_scale is not None:
                mixed = mixed + self.skip_scale * tokens
            return lay_out_as(features, self.proj(self.norm(mixed)))
        # parity: MambaClinix has the scale and does not use it. Without a gradient, if only of 0,
        # training on several GPUs would stop at it.
        assert self.skip_scale is not None
        bias = self.proj.bias + 0 * self.skip_scale
        mixed = functional.linear(self.norm(mixed), self.proj.weight, bias)
        return features + lay_out_as(features, mixed)


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


class PointwiseMixerLayer(RecomputableLayer):
    """1x1 convolution, batch norm and ReLU, then a mixer over the voxels, outside autocast.

    four_views: the mixer also takes the map with its channels in reversed order, what comes out is
    reversed back, and the result is the mean of both. projects: the mixer's input is added, and
    1x1 convolution, batch norm and ReLU follow. residual: the layer's input is added.
    mixer: as in MixerLayer, but not "none", where the whole layer goes. Only the mixer computes in
    at least float32. (nnMamba; 3D)
    """

    def __init__(
        self,
        width: int,
        *,
        mixer: str = "scan",
        d_state: int = 16,
        d_conv: int = 4,
        expand: float = 2,
        four_views: bool = False,
        projects: bool = False,
        residual: bool = False,
    ) -> None:
        super().__init__()
        build = functools.partial(Mamba, width, d_state=d_state, d_conv=d_conv, expand=expand)
        if four_views:
            both = ("raster", "raster_reversed")
            build = functools.partial(build, orders=both, merge="mean", tied=True)
        built = build_mixer(mixer, build, width, axes=3)
        assert built is not None
        self.four_views = four_views
        self.residual = residual
        self.in_conv = nn.Conv3d(width, width, 1, bias=False)
        self.norm = nn.BatchNorm3d(width)
        self.mixer = built
        self.out_conv = nn.Conv3d(width, width, 1, bias=False) if projects else None
        self.out_norm = nn.BatchNorm3d(width) if projects else None

    def forward(self, features: Tensor) -> Tensor:
        """features (B, C, *spatial) -> the same shape."""
        x = functional.relu_(self.norm(self.in_conv(features)))
        result = self._mix(x)
        if self.out_conv is not None and self.out_norm is not None:
            result = functional.relu_(self.out_norm(self.out_conv(x + result)))
        return features + result if self.residual else result

    @recomputable
    @in_float32
    def _mix(self, features: Tensor) -> Tensor:
        tokens = features.movedim(1, -1)  # (B, *spatial, C)
        if self.four_views:
            views = self.mixer(torch.cat([tokens, tokens.flip(-1)])).unflatten(0, (2, -1))
            plain, reverse = views.unbind(0)
            return ((plain + reverse.flip(-1)) / 2).movedim(-1, 1)
        return self.mixer(tokens).movedim(-1, 1)


def build_mixer(
    mixer: str, build: Callable[[], nn.Module], d_model: int, axes: int
) -> nn.Module | None:
    """The mixer of a layer: "scan" what `build` builds, "none" None, "conv" a ConvMixer as large.

    axes: spatial axes of the maps (B, *spatial, d_model) that it takes. ValueError for other names.
    """
    if mixer not in MIXERS:
        raise ValueError(f"mixer is {mixer!r}; choose one of {', '.join(map(repr, MIXERS))}")
    if mixer == "none":
        return None
    if mixer == "scan":
        return build()
    with torch.device("meta"):
        size = count_parameters(build())
    return ConvMixer(d_model, spatial_dims=axes, n_parameters=size)


def count_parameters(module: nn.Module) -> int:
    """The number of learned values."""
    return sum(math.prod(parameter.shape) for parameter in module.parameters())
