"""The Mamba-1 mixer: projections around a selective scan along one or several token orders.

B batch, C d_model, E d_inner, N d_state, R dt_rank, K d_conv.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from umamba.ops.directions import DirectionParameters, scan_directions

DT_MIN, DT_MAX, DT_FLOOR = 1e-3, 0.1, 1e-4


class Mamba(nn.Module):
    """Mixes the tokens of a feature map (state-spaces/mamba, `Mamba`; arXiv 2312.00752).

    Each entry of `orders` names how the tokens are walked and has its own parameters (Direction);
    in_proj and out_proj are shared and the directions' gated results are merged before out_proj.
    One order, the default, is plain Mamba. tied: all orders have the same parameters. There is no
    norm and no residual inside.
    """

    def __init__(
        self,
        d_model: int,
        *,
        d_state: int = 16,
        d_conv: int = 4,
        expand: float = 2,
        dt_rank: int | None = None,
        bias: bool = False,
        conv_bias: bool = True,
        orders: Sequence[str] = ("raster",),
        merge: str = "sum",
        tied: bool = False,
    ) -> None:
        super().__init__()
        d_inner = int(expand * d_model)
        rank = math.ceil(d_model / 16) if dt_rank is None else dt_rank
        self.orders = tuple(orders)
        self.merge = merge
        self.in_proj = nn.Linear(d_model, 2 * d_inner, bias=bias)
        self.directions = nn.ModuleList(
            Direction(d_inner, d_state, d_conv, rank, conv_bias, spread_dt=k == 0)
            for k in range(1 if tied else len(self.orders))
        )
        self.out_proj = nn.Linear(d_inner, d_model, bias=bias)

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens (B, *spatial, C) -> the same shape; *spatial may be one axis (a sequence)."""
        features, gate = (x.movedim(-1, 1) for x in halves(self.in_proj, tokens))  # (B, E, ...)
        parameters = [direction() for direction in self.directions]
        parameters *= len(self.orders) // len(parameters)  # tied: the same for all
        window = self.scan_window(math.prod(features.shape[2:]))
        mixed = scan_directions(
            features, self.orders, parameters, gate=gate, merge=self.merge, window=window
        )
        assert isinstance(mixed, Tensor)  # merge=None, a list, is not for mixers
        return self.out_proj(mixed.movedim(1, -1))

    def scan_window(self, n_tokens: int) -> int | None:
        """The window of a locally bidirectional scan of so many tokens; None for a plain scan."""
        return None


class Direction(nn.Module):
    """The parameters of one scan direction: causal convolution, dt/B/C projections, A and D.

    spread_dt: the step sizes start log-uniformly in [0.001, 0.1]. Only the first direction of the
    official blocks does that; the others start as plain linear layers.
    """

    def __init__(
        self,
        d_inner: int,
        d_state: int,
        d_conv: int,
        rank: int,
        conv_bias: bool,
        *,
        spread_dt: bool,
    ) -> None:
        super().__init__()
        self.conv_weight = nn.Parameter(uniform((d_inner, 1, d_conv), d_conv))
        self.conv_bias = nn.Parameter(uniform((d_inner,), d_conv)) if conv_bias else None
        self.x_proj_weight = nn.Parameter(uniform((rank + 2 * d_state, d_inner), d_inner))
        self.dt_proj_weight = nn.Parameter(uniform((d_inner, rank), rank))
        start = spread_dt_bias(d_inner) if spread_dt else uniform((d_inner,), rank)
        self.dt_proj_bias = nn.Parameter(start)
        states = torch.arange(1, d_state + 1, dtype=torch.float32)
        self.A_log = nn.Parameter(states.log().repeat(d_inner, 1))
        self.D = nn.Parameter(torch.ones(d_inner))

    def forward(self) -> DirectionParameters:
        """The parameters as scan_directions takes them."""
        return DirectionParameters(
            *(self.conv_weight, self.conv_bias, self.x_proj_weight, self.dt_proj_weight),
            *(self.A_log, self.D, self.dt_proj_bias),
        )


def halves(projection: nn.Linear, x: Tensor) -> list[Tensor]:
    """The two halves of projection(x), each in memory of its own.

    Cut from one tensor, their gradients would have to be joined to one: a copy of all tokens.
    """
    biases: tuple[Tensor | None, ...] = (None, None)
    if projection.bias is not None:
        biases = projection.bias.chunk(2)
    pairs = zip(projection.weight.chunk(2), biases, strict=True)
    return [functional.linear(x, weight, bias) for weight, bias in pairs]


def uniform(shape: tuple[int, ...], fan_in: int) -> Tensor:
    """torch's own start of linear layers and convolutions: uniform in +-fan_in^-0.5."""
    bound = fan_in**-0.5
    return torch.empty(shape).uniform_(-bound, bound)


def spread_dt_bias(
    n: int, dt_min: float = DT_MIN, dt_max: float = DT_MAX, dt_floor: float = DT_FLOOR
) -> Tensor:
    """n biases whose softplus is log-uniform in [dt_min, dt_max], and at least dt_floor."""
    # not torch.rand: the same numbers, but on the meta device it imports all of torch._dynamo
    exponent = torch.empty(n).uniform_() * (math.log(dt_max) - math.log(dt_min)) + math.log(dt_min)
    dt = exponent.exp().clamp(min=dt_floor)
    return dt + torch.log(-torch.expm1(-dt))
