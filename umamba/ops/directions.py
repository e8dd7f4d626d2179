"""Scans a feature map along one or several token orders: all that mixers call.

B batch, E d_inner, L tokens, N d_state, R dt_rank, K directions, taps = d_conv. The features stay
in raster order in memory; convolution and scan address each direction by its walk.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from umamba.ops.causal_conv import causal_conv1d_silu, conv_walks
from umamba.ops.dispatch import takes_window
from umamba.ops.local_scan import local_scan
from umamba.ops.selective_scan import scan_walks
from umamba.ops.token_orders import TokenOrder, token_order
from umamba.ops.walks import order_walk

MERGES = ("sum", "mean", "stack", None)
ROW_MULTIPLE = 16  # elements, of the rows of B and C on a GPU: they are then loaded four at a time


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


def scan_directions(
    features: Tensor,
    orders: Sequence[str],
    parameters: Sequence[DirectionParameters],
    gate: Tensor | None = None,
    merge: str | None = "sum",
    *,
    window: int | None = None,
) -> Tensor | list[Tensor]:
    """Return the scans of features (B, E, *spatial) along each order, merged, in the same shape.

    Along each order, by its own parameters: causal convolution + SiLU, projection to dt, B and C,
    projection of dt, selective scan (softplus, skip D, gate). gate, of the shape of features, is
    the input of the SiLU that multiplies each direction's result (Vim, SegMamba).
    orders: names of token_orders, one for each entry of parameters. features may be (B, E, L).
    merge: "sum" and "mean" over the directions, "stack" (B, K, E, *spatial), None a list. Sums
    are taken in the order given.
    window: the scans see the tokens ahead, too, in windows of so many (local_scan); None: not.

    Directions that agree in length and in the shapes of their parameters are one call of the
    operators, and nothing is copied for an order, but where an order needs zero tokens or the scan
    backend takes no such window. The result lies channel-last in memory.
    Raises ValueError for unknown orders and for parameters or a gate that do not fit the features.
    """
    walked = [token_order(name) for name in orders]
    _check(features, walked, parameters, gate, merge)
    directions = list(zip(walked, parameters, strict=True))
    spatial = tuple(features.shape[2:])
    n_states = parameters[0].A_log.shape[1]
    size = 0 if window is None else window
    if size and not takes_window(features.device, features.dtype, n_states, size):
        separate = [_scan_copied(features, *direction, gate, size) for direction in directions]
        return _merge(separate, merge)
    launches = _launches(directions, spatial)
    if len(launches) == 1 and merge in ("sum", "mean"):
        out = _scan_in_place(features, directions, gate, size, merged=True).squeeze(1)
        return out / len(directions) if merge == "mean" else out
    results: dict[int, Tensor] = {}
    for members in launches:
        outs = _scan_in_place(features, [directions[k] for k in members], gate, size, merged=False)
        results.update(zip(members, outs.unbind(1), strict=True))
    return _merge([results[k] for k in range(len(walked))], merge)


def _scan_in_place(
    features: Tensor,
    directions: Sequence[_Direction],
    gate: Tensor | None,
    window: int,
    *,
    merged: bool,
) -> Tensor:
    """Return the scans (B, K, E, *spatial) along orders of one length, or (B, 1, ...) their sum."""
    orders, parameters = zip(*directions, strict=True)
    p, spatial = parameters[0], tuple(features.shape[2:])
    n_tokens, length = math.prod(spatial), orders[0].n_tokens(spatial)
    padded = spatial if length == n_tokens else (length,)
    walks = [number for order in orders for number in order_walk(order, padded)]
    x = _tokens(features, length).unsqueeze(1)  # (B, 1, E, L)
    if p.conv_weight is not None:
        weight = torch.stack([q.conv_weight.flatten(1) for q in parameters])
        x = conv_walks(x, weight, _stack([q.conv_bias for q in parameters]), walks)
    dt, B, C = _project(x, parameters, aligned=x.is_cuda)  # (K, B, L, ...)
    dt_proj = torch.stack([q.dt_proj_weight for q in parameters])  # (K, E, R)
    delta = torch.bmm(dt.flatten(1, 2), dt_proj.transpose(1, 2)).unflatten(1, dt.shape[1:3])
    out, _ = scan_walks(
        x,
        delta.permute(1, 0, 3, 2),
        -torch.exp(torch.stack([q.A_log for q in parameters])),
        B.permute(1, 0, 3, 2).unsqueeze(2),
        C.permute(1, 0, 3, 2).unsqueeze(2),
        _stack([q.D for q in parameters]),
        None if gate is None else _tokens(gate, length).unsqueeze(1),
        _stack([q.delta_bias for q in parameters]),
        True,
        None,
        walks,
        merged=merged,
        window=window,
    )
    whole = out if length == n_tokens else out[..., :n_tokens]
    return whole.unflatten(-1, spatial)


def _project(
    x: Tensor, parameters: Sequence[DirectionParameters], *, aligned: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dt, B and C (K, B, L, R or N) of x (B, K or 1, E, L).

    aligned: every row of B and C begins on a multiple of 16 bytes.
    """
    p, batch, length = parameters[0], x.shape[0], x.shape[-1]
    rank, n_states = p.dt_proj_weight.shape[1], p.A_log.shape[1]
    weights = [q.x_proj_weight for q in parameters]
    sizes = [rank, n_states, n_states]
    if aligned:  # B, C, dt, zeros
        missing = -sum(sizes) % ROW_MULTIPLE
        weights = [functional.pad(w.roll(-rank, 0), (0, 0, 0, missing)) for w in weights]
        sizes = [n_states, n_states, rank, missing]
    n_directions, width = len(weights), len(weights[0])
    if x.shape[1] == 1:
        rows = functional.linear(x[:, 0].transpose(1, 2), torch.cat(weights))  # (B, L, K * width)
        projected = rows.unflatten(-1, (n_directions, width)).movedim(2, 0)
    else:
        tokens = x.permute(1, 0, 3, 2).flatten(1, 2)  # (K, B * L, E)
        projected = torch.bmm(tokens, torch.stack(weights).transpose(1, 2))
        projected = projected.unflatten(1, (batch, length))
    parts = projected.split(sizes, dim=-1)
    return (parts[2], parts[0], parts[1]) if aligned else (parts[0], parts[1], parts[2])


def _scan_copied(
    features: Tensor, order: TokenOrder, p: DirectionParameters, gate: Tensor | None, window: int
) -> Tensor:
    """Return the locally bidirectional scan along one order, by copies in that order."""
    x = order.arrange(features)  # (B, E, L)
    if p.conv_weight is not None:
        x = causal_conv1d_silu(x, p.conv_weight, p.conv_bias, order.reverse)
    rank, n_states = p.dt_proj_weight.shape[1], p.A_log.shape[1]
    projected = functional.linear(x.transpose(1, 2), p.x_proj_weight)  # (B, L, R + 2N)
    dt, B, C = projected.split([rank, n_states, n_states], dim=-1)
    delta = functional.linear(dt, p.dt_proj_weight)  # (B, L, E)
    out = local_scan(
        *(x, delta.transpose(1, 2), -torch.exp(p.A_log), B.transpose(1, 2), C.transpose(1, 2)),
        *(p.D, None if gate is None else order.arrange(gate), p.delta_bias),
        delta_softplus=True,
        reverse=order.reverse,
        window=window,
    )
    return order.restore(out, tuple(features.shape[2:]))


def _tokens(features: Tensor, length: int) -> Tensor:
    """Return features (B, E, *spatial) as (B, E, L) in raster order, zeros added at its end."""
    tokens = features.flatten(2)
    missing = length - tokens.shape[2]
    if not missing:
        return tokens
    return functional.pad(tokens.transpose(1, 2), (0, 0, 0, missing)).transpose(1, 2)


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
    """Return the directions that one call can take together."""
    groups: list[tuple[object, list[int]]] = []
    for k, (order, p) in enumerate(directions):
        shapes = tuple(None if tensor is None else tuple(tensor.shape) for tensor in p)
        kind = (order.n_tokens(spatial), shapes)
        # No dict: a compiled graph would serve the lengths it has hashed, and no others.
        fitting = [members for other, members in groups if other == kind]
        if fitting:
            fitting[0].append(k)
        else:
            groups.append((kind, [k]))
    return [members for _, members in groups]


def _stack(tensors: list[Tensor | None]) -> Tensor | None:
    present = [tensor for tensor in tensors if tensor is not None]
    return torch.stack(present) if present else None


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
