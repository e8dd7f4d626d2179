"""SS2D, VMamba's mixer of 2D feature maps, in the variants that differ as functions, and its block.

B batch, C d_model, E d_inner, N d_state, R dt_rank; maps are channels-last (B, H, W, C).
arXiv 2401.10166; MzeroMiko/VMamba@2ed52ea (MIT): SS2Dv0, SS2Dv2, VSSBlock.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from umamba.blocks.mamba import halves, spread_dt_bias, uniform
from umamba.blocks.mixer import build_mixer
from umamba.ops.directions import DirectionParameters, scan_directions
from umamba.ops.dispatch import in_float32

# The walk of each of the four parameter sets, in the official order of the sets.
WALKS = {
    "cross": ("raster", "transposed", "raster_reversed", "transposed_reversed"),
    "unidi": ("raster",) * 4,
    "bidi": ("raster", "raster", "raster_reversed", "raster_reversed"),
    "cascade": ("raster", "raster_reversed", "raster", "raster_reversed"),
}
FORWARD_TYPES = {
    **dict.fromkeys(("v0", "v01", "v02", "v03", "v2", "v3", "v04", "v05"), "cross"),
    "v051d": "unidi",
    "v052d": "bidi",
    "v052dc": "cascade",
}
GATES = ("silu", "linear", "none")
OUT_NORMS = ("layer", "none", "dwconv3", "cnorm", "softmax", "sigmoid")


def ss2d_options(forward_type: str) -> dict[str, Any]:
    """The arguments of SS2D that one of VMamba's forward types stands for, such as "v05_noz".

    A base (a key of FORWARD_TYPES), then each or none of: a norm after the scans (_onnone,
    _ondwconv3, _oncnorm, _onsoftmax, _onsigmoid), _nozact, _noz, _oact, _no32, in this order. "v0"
    takes none of them. _no32 changes nothing: scans are in float32 here. ValueError for all else:
    VMamba's xv* and m0 are not available here, other names fail there in the first forward pass.
    """
    rest = forward_type
    found = set()
    for flag in ("_no32", "_oact", "_noz", "_nozact"):
        if rest.endswith(flag):
            rest = rest.removesuffix(flag)
            found.add(flag)
    base, postfix, out_norm = rest.partition("_on")
    unknown = base not in FORWARD_TYPES or (postfix and out_norm not in OUT_NORMS[1:])
    if unknown or (base == "v0" and forward_type != base):
        raise ValueError(
            f"unknown forward type {forward_type!r}; give one of {', '.join(FORWARD_TYPES)}, and "
            "after all but v0 in this order, where wanted: "
            f"{' or '.join('_on' + norm for norm in OUT_NORMS[1:])}, _nozact, _noz, _oact, _no32"
        )
    gate = "none" if "_noz" in found else "linear" if "_nozact" in found else "silu"
    return {
        "directions": FORWARD_TYPES[base],
        "gate": gate,
        "out_norm": out_norm or "layer",
        "out_gelu": "_oact" in found,
    }


class SS2D(nn.Module):
    """Four scans over a 2D map, summed: gate, depthwise convolution, scans, norm, projection.

    dt_rank: default ceil(d_model / 16). directions: a key of WALKS. "cascade" scans every row both
    ways, then every column; cascade_norm puts norms without parameters before both passes
    (msvm-unet's older copy has none). gate: "silu", "linear" (VMamba's `nozact`) or "none" (`noz`).
    out_norm: one of OUT_NORMS. out_gelu: GELU between norm and gate (`oact`).
    """

    def __init__(
        self,
        d_model: int,
        *,
        d_state: int = 16,
        expand: float = 2,
        d_conv: int = 3,
        conv_bias: bool = True,
        directions: str = "cross",
        gate: str = "silu",
        out_norm: str = "layer",
        out_gelu: bool = False,
        cascade_norm: bool = True,
        dt_rank: int | None = None,
    ) -> None:
        super().__init__()
        if directions not in WALKS or gate not in GATES:
            raise ValueError(
                f"directions {directions!r} with gate {gate!r}: directions are one of "
                f"{', '.join(WALKS)}, the gate is one of {', '.join(GATES)}"
            )
        if d_conv % 2 == 0:
            raise ValueError(f"d_conv is {d_conv}; a kernel centered on its pixel needs an odd one")
        d_inner = int(expand * d_model)
        rank = math.ceil(d_model / 16) if dt_rank is None else dt_rank
        self.walks = WALKS[directions]
        self.cascade = directions == "cascade"
        self.cascade_norm = cascade_norm
        self.gate = gate
        self.out_gelu = out_gelu
        self.in_proj = nn.Linear(d_model, d_inner * (1 if gate == "none" else 2), bias=False)
        self.conv = (
            nn.Conv2d(d_inner, d_inner, d_conv, 1, d_conv // 2, groups=d_inner, bias=conv_bias)
            if d_conv > 1
            else None
        )
        self.x_proj_weight = nn.Parameter(uniform((4, rank + 2 * d_state, d_inner), d_inner))
        self.dt_proj_weight = nn.Parameter(uniform((4, d_inner, rank), rank))
        self.dt_proj_bias = nn.Parameter(torch.stack([spread_dt_bias(d_inner) for _ in range(4)]))
        states = torch.arange(1, d_state + 1, dtype=torch.float32)
        self.A_log = nn.Parameter(states.log().repeat(4, d_inner, 1))
        self.D = nn.Parameter(torch.ones(4, d_inner))
        self.out_norm = OutNorm(out_norm, d_inner)
        self.out_proj = nn.Linear(d_inner, d_model, bias=False)

    def forward(self, features: Tensor) -> Tensor:
        """features (B, H, W, C) -> the same shape."""
        gate: Tensor | None = None
        if self.gate == "none":
            x = self.in_proj(features)
        else:
            x, gate = halves(self.in_proj, features)
        x = x.movedim(-1, 1)  # (B, E, H, W)
        x = functional.silu(x if self.conv is None else self.conv(x))
        mixed = self._scan_cascade(x) if self.cascade else self._scan(x)
        mixed = self.out_norm(mixed.movedim(1, -1))
        if self.out_gelu:
            mixed = functional.gelu(mixed)
        if gate is not None:
            mixed = mixed * (functional.silu(gate) if self.gate == "silu" else gate)
        return self.out_proj(mixed)

    def _scan(self, x: Tensor) -> Tensor:
        # VMamba adds the reversed walk to its forward walk first, then the columns.
        order = (0, 2, 1, 3)
        walks = [self.walks[k] for k in order]
        summed = scan_directions(x, walks, [self._direction(k) for k in order])
        assert isinstance(summed, Tensor)
        return summed

    def _scan_cascade(self, x: Tensor) -> Tensor:
        for first in (0, 2):
            if self.cascade_norm:
                x = functional.layer_norm(x.movedim(1, -1), x.shape[1:2]).movedim(-1, 1)
            lines = x.movedim(1, 2).flatten(0, 1)  # (B * rows, E, L)
            pair = [self._direction(first), self._direction(first + 1)]
            ahead, back = scan_directions(lines, self.walks[:2], pair, merge=None)
            # parity: the backward scan is added as it was walked, not flipped back.
            mixed = (ahead + back.flip(-1)).unflatten(0, (len(x), -1))
            x = mixed.movedim(1, 3)  # (B, E, L, rows): the other axis is scanned next
        return x

    def _direction(self, k: int) -> DirectionParameters:
        return DirectionParameters(
            conv_weight=None,
            conv_bias=None,
            x_proj_weight=self.x_proj_weight[k],
            dt_proj_weight=self.dt_proj_weight[k],
            A_log=self.A_log[k],
            D=self.D[k],
            delta_bias=self.dt_proj_bias[k],
        )


class OutNorm(nn.Module):
    """What follows the scans: LayerNorm, a depthwise convolution, both, a softmax, or nothing."""

    def __init__(self, kind: str, width: int) -> None:
        super().__init__()
        if kind not in OUT_NORMS:
            raise ValueError(f"out_norm is {kind!r}; choose one of {', '.join(OUT_NORMS)}")
        self.kind = kind
        self.norm = nn.LayerNorm(width) if kind in ("layer", "cnorm") else None
        convolves = kind in ("dwconv3", "cnorm")
        self.conv = (
            nn.Conv2d(width, width, 3, 1, 1, groups=width, bias=False) if convolves else None
        )

    def forward(self, features: Tensor) -> Tensor:
        """features (B, H, W, E) -> the same shape."""
        if self.norm is not None:
            features = self.norm(features)
        if self.conv is not None:
            features = self.conv(features.movedim(-1, 1)).movedim(1, -1)
        if self.kind == "softmax":
            return features.flatten(1, 2).softmax(1).view_as(features)
        return features.sigmoid() if self.kind == "sigmoid" else features


class VSSBlock(nn.Module):
    """x + drop(mixer(norm(x))), then, where there is an MLP, x + drop(mlp(norm2(x))).

    Runs outside autocast in at least float32. mixer as in MixerLayer. mlp: builds the module that
    maps (B, *spatial, C) to itself. norm: builds a norm of so many channels.
    """

    def __init__(
        self,
        d_model: int,
        build: Callable[[], nn.Module],
        *,
        spatial_dims: int = 2,
        mixer: str = "scan",
        drop_path: float = 0.0,
        mlp: Callable[[], nn.Module] | None = None,
        norm: Callable[[int], nn.Module] = nn.LayerNorm,
    ) -> None:
        super().__init__()
        self.mixer = build_mixer(mixer, build, d_model, axes=spatial_dims)
        self.norm = None if self.mixer is None else norm(d_model)
        self.norm2 = None if mlp is None else norm(d_model)
        self.mlp = None if mlp is None else mlp()
        self.drop_path = DropPath(drop_path)

    @in_float32
    def forward(self, features: Tensor) -> Tensor:
        """features (B, *spatial, C) -> the same shape."""
        if self.norm is not None and self.mixer is not None:
            features = features + self.drop_path(self.mixer(self.norm(features)))
        if self.norm2 is not None and self.mlp is not None:
            features = features + self.drop_path(self.mlp(self.norm2(features)))
        return features


class MLP(nn.Module):
    """Linear to `ratio` times the width, GELU, Linear back."""

    def __init__(self, width: int, ratio: float = 4) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, int(ratio * width))
        self.fc2 = nn.Linear(int(ratio * width), width)

    def forward(self, features: Tensor) -> Tensor:
        return self.fc2(functional.gelu(self.fc1(features)))


class DropPath(nn.Module):
    """In training, drops a sample's branch at this rate and scales the others by 1 / (1 - rate)."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, branch: Tensor) -> Tensor:
        if not self.training or self.rate == 0:
            return branch
        kept = branch.new_empty((len(branch), *[1] * (branch.ndim - 1))).bernoulli_(1 - self.rate)
        return branch * kept / (1 - self.rate)


def initialize_linear(network: nn.Module) -> None:
    """VMamba's start of linear layers: truncated normal weights of std 0.02, zero biases."""
    for module in network.modules():
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
