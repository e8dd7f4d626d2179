"""Scans a feature map along one or several token orders: all that mixers call.

B batch, E d_inner, L tokens, N d_state, R dt_rank, K directions, taps = d_conv.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from umamba.ops.causal_conv import causal_conv1d_silu
from umamba.ops.local_scan import local_scan
from umamba.ops.selective_scan import selective_scan
from umamba.ops.token_orders import TokenOrder, token_order

MERGES = ("sum", "mean", "stack", None)


class DirectionParameters(NamedTuple):
    """The learned tensors of one direction.

    conv_weight (E, taps) or (E, 1, taps), None for no convolution and no SiLU; conv_bias (E,) or
    None; x_proj_weight (R + 2N, E), its rows dt, B, C; dt_proj_weight (E, R); A_log (E, N), where
    A = -exp(A_log); D (E,) or None; delta_bias (E,) or None.
    """

    conv_weight: Tensor | None
    conv_bias: Tensor | None
    x_proj_weight: Tensor
    dt_proj_weight: Tensor
    A_log: Tensor
    D: Tensor | None
    delta_bias: Tensor | None


_Direction = tuple[TokenOrder, DirectionParameters]
_Scan = Callable[..., Tensor]


def scan_directions(
    features: Tensor,
    orders: Sequence[str],
    parameters: Sequence[DirectionParameters],
    gate: Tensor | None = None,
    merge: str | None = "sum",
    *,
    window: int | None = None,
    stacked: bool | None = None,
) -> Tensor | list[Tensor]:
    """Return the scans of features (B, E, *spatial) along each order, merged, in the same shape.

    Along each order, by its own parameters: causal convolution + SiLU, projection to dt, B and C,
    projection of dt, selective scan (softplus, skip D, gate). gate, of the shape of features, is
    the input of the SiLU that multiplies each direction's result (Vim, SegMamba).
    orders: names of token_orders, one for each entry of parameters. features may be (B, E, L).
    merge: "sum" and "mean" over the directions, "stack" (B, K, E, *spatial), None a list. Sums
    are taken in the order given.
    window: the scans see the tokens ahead, too, in windows of so many (local_scan); None: not.
    stacked: directions that are walked the same way and agree in length and in the shapes of their
    parameters are scanned in one launch (as groups of channels); None does so on a GPU, where
    launches cost, and not on a CPU, where copies do.

    The result lies channel-last in memory; features that do, too, are not copied in raster order.
    Raises ValueError for unknown orders and for parameters or a gate that do not fit the features.
    """
    walked = [token_order(name) for name in orders]
    _check(features, walked, parameters, gate, merge)
    if stacked is None:
        stacked = features.is_cuda
    scan: _Scan = selective_scan if window is None else partial(local_scan, window=window)
    directions = list(zip(walked, parameters, strict=True))
    results: dict[int, Tensor] = {}
    spatial = tuple(features.shape[2:])
    separate = [[k] for k in range(len(directions))]
    for members in _launches(directions, spatial) if stacked else separate:
        if len(members) == 1:
            outs = [_scan_one(features, *directions[members[0]], gate, scan)]
        else:
            outs = _scan_stack(features, [directions[k] for k in members], gate, scan)
        for k, out in zip(members, outs, strict=True):
            results[k] = walked[k].restore(out, spatial)
    return _merge([results[k] for k in range(len(walked))], merge)


def _scan_one(
    features: Tensor, order: TokenOrder, p: DirectionParameters, gate: Tensor | None, scan: _Scan
) -> Tensor:
    """Return the scan along one order as (B, E, L), in that order."""
    x = order.arrange(features)  # (B, E, L)
    if p.conv_weight is not None:
        x = causal_conv1d_silu(x, p.conv_weight, p.conv_bias, order.reverse)
    rank, n_states = p.dt_proj_weight.shape[1], p.A_log.shape[1]
    projected = functional.linear(x.transpose(1, 2), p.x_proj_weight)  # (B, L, R + 2N)
    dt, B, C = projected.split([rank, n_states, n_states], dim=-1)
    delta = functional.linear(dt, p.dt_proj_weight)  # (B, L, E)
    z = None if gate is None else order.arrange(gate)
    return scan(
        *(x, delta.transpose(1, 2), -torch.exp(p.A_log), B.transpose(1, 2), C.transpose(1, 2)),
        *(p.D, z, p.delta_bias),
        delta_softplus=True,
        reverse=order.reverse,
    )


def _scan_stack(
    features: Tensor, directions: Sequence[_Direction], gate: Tensor | None, scan: _Scan
) -> list[Tensor]:
    """Return the scans along K orders walked the same way, in one launch: K groups of channels."""
    orders, parameters = zip(*directions, strict=True)
    p, reverse, n_directions = parameters[0], orders[0].reverse, len(orders)

    def arranged(x: Tensor) -> Tensor:  # (B, KE, L)
        return torch.cat([order.arrange(x).transpose(1, 2) for order in orders], -1).transpose(1, 2)

    x = arranged(features)
    if p.conv_weight is not None:
        weight = torch.cat([q.conv_weight.flatten(1) for q in parameters])
        x = causal_conv1d_silu(x, weight, _cat([q.conv_bias for q in parameters]), reverse)
    rank, n_states = p.dt_proj_weight.shape[1], p.A_log.shape[1]
    x_proj = torch.stack([q.x_proj_weight for q in parameters])  # (K, R + 2N, E)
    dt_proj = torch.stack([q.dt_proj_weight for q in parameters])  # (K, E, R)
    tokens = x.transpose(1, 2).unflatten(-1, (n_directions, -1))  # (B, L, K, E)
    projected = torch.einsum("blke,kpe->blkp", tokens, x_proj)
    dt, B, C = projected.split([rank, n_states, n_states], dim=-1)  # (B, L, K, ...)
    delta = torch.einsum("blkr,ker->blke", dt, dt_proj).flatten(2)  # (B, L, KE)
    decay = -torch.exp(torch.cat([q.A_log for q in parameters]))
    out = scan(
        *(x, delta.transpose(1, 2), decay, B.permute(0, 2, 3, 1), C.permute(0, 2, 3, 1)),
        _cat([q.D for q in parameters]),
        None if gate is None else arranged(gate),
        _cat([q.delta_bias for q in parameters]),
        delta_softplus=True,
        reverse=reverse,
    )
    return list(out.chunk(n_directions, dim=1))


def _merge(results: list[Tensor], merge: str | None) -> Tensor | list[Tensor]:
    if merge is None:
        return results
    if merge == "stack":
        return torch.stack(results, 1)
    total = results[0]
    for result in results[1:]:
        total = total + result
    return total / len(results) if merge == "mean" else total


def _launches(directions: Sequence[_Direction], spatial: tuple[int, ...]) -> list[list[int]]:
    """Return the directions that one launch can take together."""
    groups: dict[object, list[int]] = {}
    for k, (order, p) in enumerate(directions):
        shapes = tuple(None if tensor is None else tuple(tensor.shape) for tensor in p)
        groups.setdefault((order.reverse, order.n_tokens(spatial), shapes), []).append(k)
    return list(groups.values())


def _cat(tensors: list[Tensor | None]) -> Tensor | None:
    present = [tensor for tensor in tensors if tensor is not None]
    return torch.cat(present) if present else None


def _check(
    features: Tensor,
    orders: list[TokenOrder],
    parameters: Sequence[DirectionParameters],
    gate: Tensor | None,
    merge: str | None,
) -> None:
    if features.ndim < 3:
        raise ValueError(f"features must be (B, E, *spatial), not {tuple(features.shape)}")
    if not orders or len(orders) != len(parameters):
        raise ValueError(f"{len(orders)} orders but {len(parameters)} sets of parameters are given")
    if merge not in MERGES:
        raise ValueError(f"merge is {merge!r}; choose 'sum', 'mean', 'stack' or None")
    if gate is not None and gate.shape != features.shape:
        raise ValueError(
            f"gate {tuple(gate.shape)} and features {tuple(features.shape)} must agree in shape"
        )
    width = features.shape[1]
    for order, p in zip(orders, parameters, strict=True):
        n_states, rank = p.A_log.shape[-1], p.dt_proj_weight.shape[-1]
        expected = {
            "x_proj_weight": (p.x_proj_weight, (rank + 2 * n_states, width)),
            "dt_proj_weight": (p.dt_proj_weight, (width, rank)),
            "A_log": (p.A_log, (width, n_states)),
        }
        for name, (tensor, shape) in expected.items():
            if tuple(tensor.shape) != shape:
                raise ValueError(
                    f"{name} of the direction {order.name} has shape {tuple(tensor.shape)}, "
                    f"features with {width} channels need {shape}"
                )
