"""The Mamba-2 mixer: one projection for everything, a scan with one decay per head, a gated norm.

B batch, L tokens, C d_model, E d_inner, H heads of P channels, G groups, N d_state.
arXiv 2405.21060; state-spaces/mamba@e9594ce1 (Apache-2.0): Mamba2, Mamba2Simple.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from umamba.blocks.mamba import DT_FLOOR, DT_MAX, DT_MIN, spread_dt_bias, uniform
from umamba.ops.causal_conv import causal_conv1d_silu
from umamba.ops.dispatch import in_float32
from umamba.ops.ssd import CHUNK, ssd_scan


class Mamba2(nn.Module):
    """Mixes the tokens of a feature map, last axis fastest. No norm before, no residual.

    headdim: channels of a head, which share one decay. d_ssm: channels that are scanned; the other
    E - d_ssm are a gated MLP beside the scan. ngroups: groups of heads with their own B and C.
    A_init_range: where the decay rates start. D_has_hdim: a skip weight per channel, not per head.
    rmsnorm: RMSNorm of the gated scan, in G groups of channels unless grouped_norm is off; without
    it the scan is only gated. norm_before_gate: the gate multiplies what is normalized already.
    dt_limit: bounds of the step sizes. conv_init: the convolution starts uniform in +-conv_init,
    None for torch's start. chunk_size: of the scan, changes its memory and time, not the function.
    With grouped_norm=False and learnable_init_states=True it is Mamba2Simple.
    """

    def __init__(
        self,
        d_model: int,
        *,
        d_state: int = 128,
        d_conv: int = 4,
        conv_init: float | None = None,
        expand: float = 2,
        headdim: int = 64,
        d_ssm: int | None = None,
        ngroups: int = 1,
        A_init_range: tuple[float, float] = (1, 16),
        D_has_hdim: bool = False,
        rmsnorm: bool = True,
        norm_before_gate: bool = False,
        grouped_norm: bool = True,
        learnable_init_states: bool = False,
        dt_min: float = DT_MIN,
        dt_max: float = DT_MAX,
        dt_init_floor: float = DT_FLOOR,
        dt_limit: tuple[float, float] = (0.0, math.inf),
        bias: bool = False,
        conv_bias: bool = True,
        chunk_size: int = CHUNK,
    ) -> None:
        super().__init__()
        d_inner = int(expand * d_model)
        self.d_ssm = d_inner if d_ssm is None else d_ssm
        _check_widths(d_inner, self.d_ssm, headdim, ngroups)
        heads, d_matrix = self.d_ssm // headdim, ngroups * d_state
        self.headdim, self.ngroups = headdim, ngroups
        self.dt_limit = tuple(dt_limit)
        self.chunk_size = chunk_size
        # What in_proj gives, in the official order: the MLP's gate and input, the scan's gate, what
        # is convolved (scan input, B, C), and the steps.
        d_mlp, self.convolved = d_inner - self.d_ssm, (self.d_ssm, d_matrix, d_matrix)
        d_conv_in = sum(self.convolved)
        self.projected = (d_mlp, d_mlp, self.d_ssm, d_conv_in, heads)
        self.in_proj = nn.Linear(d_model, sum(self.projected), bias=bias)
        self.conv_weight = nn.Parameter(uniform((d_conv_in, 1, d_conv), d_conv))
        if conv_init is not None:
            nn.init.uniform_(self.conv_weight, -conv_init, conv_init)
        self.conv_bias = nn.Parameter(uniform((d_conv_in,), d_conv)) if conv_bias else None
        self.dt_bias = nn.Parameter(spread_dt_bias(heads, dt_min, dt_max, dt_init_floor))
        self.A_log = nn.Parameter(torch.empty(heads).uniform_(*A_init_range).log())
        self.D_has_hdim = D_has_hdim
        self.D = nn.Parameter(torch.ones(self.d_ssm if D_has_hdim else heads))
        states = torch.zeros(heads, headdim, d_state) if learnable_init_states else None
        self.init_states = None if states is None else nn.Parameter(states)
        norm_groups = ngroups if grouped_norm else 1
        self.norm = (
            GatedRMSNorm(self.d_ssm, norm_groups, norm_before_gate=norm_before_gate)
            if rmsnorm
            else None
        )
        self.out_proj = nn.Linear(d_inner, d_model, bias=bias)

    @in_float32
    def forward(self, tokens: Tensor) -> Tensor:
        """tokens (B, *spatial, C) -> the same shape, in at least float32."""
        projected = self.in_proj(tokens.flatten(1, -2))
        mlp_gate, mlp, gate, convolved, dt = projected.split(self.projected, -1)  # (B, L, ...)
        mixed = self._scan(convolved, dt)
        mixed = mixed * functional.silu(gate) if self.norm is None else self.norm(mixed, gate)
        if mlp.shape[-1]:
            mixed = torch.cat([functional.silu(mlp_gate) * mlp, mixed], -1)
        return self.out_proj(mixed).reshape(tokens.shape)

    def _scan(self, convolved: Tensor, dt: Tensor) -> Tensor:
        """convolved (B, L, d_ssm + 2GN), dt (B, L, H) -> (B, L, d_ssm)."""
        features = convolved.transpose(1, 2)
        features = causal_conv1d_silu(features, self.conv_weight, self.conv_bias)
        x, B, C = features.transpose(1, 2).split(self.convolved, -1)
        initial = self.init_states
        out, _ = ssd_scan(
            x.unflatten(-1, (-1, self.headdim)),  # (B, L, H, P)
            functional.softplus(dt + self.dt_bias).clamp(*self.dt_limit),
            -torch.exp(self.A_log),
            B.unflatten(-1, (self.ngroups, -1)),  # (B, L, G, N)
            C.unflatten(-1, (self.ngroups, -1)),
            self.D.unflatten(0, (-1, self.headdim)) if self.D_has_hdim else self.D,
            None if initial is None else initial.expand(x.shape[0], *initial.shape),
            chunk_size=self.chunk_size,
        )
        return out.flatten(2)


class GatedRMSNorm(nn.Module):
    """RMSNorm over groups of channels (eps 1e-5) and the SiLU of a gate, before it or after it."""

    def __init__(self, width: int, n_groups: int = 1, *, norm_before_gate: bool = False) -> None:
        super().__init__()
        self.n_groups = n_groups
        self.norm_before_gate = norm_before_gate
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, features: Tensor, gate: Tensor) -> Tensor:
        """features and gate (..., width) -> the same shape."""
        if not self.norm_before_gate:
            features = features * functional.silu(gate)
        groups = features.unflatten(-1, (self.n_groups, -1))
        normed = functional.rms_norm(groups, groups.shape[-1:], eps=1e-5).flatten(-2) * self.weight
        return normed * functional.silu(gate) if self.norm_before_gate else normed


def _check_widths(d_inner: int, d_ssm: int, headdim: int, ngroups: int) -> None:
    """Raises ValueError for widths that do not divide, naming those that do."""
    if not 0 < d_ssm <= d_inner:
        raise ValueError(f"d_ssm is {d_ssm}; choose 1 to expand * d_model = {d_inner}")
    if d_ssm % headdim:
        divisors = [d for d in range(1, d_ssm + 1) if d_ssm % d == 0]
        raise ValueError(
            f"headdim {headdim} does not divide the {d_ssm} scanned channels; choose one of "
            f"{', '.join(map(str, divisors))}"
        )
    heads = d_ssm // headdim
    if heads % ngroups:
        raise ValueError(f"ngroups is {ngroups}; it must divide the {heads} heads")
