"""Walks: how the directions of a scan go through tokens that stay where they are in memory.

A walk is seven integers (start, n0, s0, n1, s1, n2, s2), in tokens: step p of L = n0 n1 n2 visits
token start + i0 s0 + i1 s1 + i2 s2, where i2 = p % n2 runs fastest. It visits every token once.
Operators take the walks of K directions as one flat list.

B batch, K directions, E channels of a direction, L tokens, N states, G groups of channels of a
direction that share B and C.

Backends with TAKES_WALKS address their tokens by walks. The others (reference, chunked,
mamba_ssm_scan) know sequences (B, D, L) only; the functions below call them once per direction,
with copies in the order walked where that is neither the order in memory nor its reverse.
"""

import functools
from collections.abc import Iterable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from umamba.ops.layout import empty_matrix, empty_saved, empty_state, empty_walked
from umamba.ops.reference import wide_type
from umamba.ops.token_orders import TokenOrder

WALK = 7  # integers
LEVELS = 3


def sequence_walk(length: int, reverse: bool = False) -> tuple[int, ...]:
    """Return the walk through a sequence of so many tokens, from its end with `reverse`."""
    return (length - 1, 1, 0, 1, 0, length, -1) if reverse else (0, 1, 0, 1, 0, length, 1)


def order_walk(order: TokenOrder, spatial: tuple[int, ...]) -> tuple[int, ...]:
    """Return the walk of an order through the raster sequence of a feature map.

    Raises ValueError for an order that needs more than three levels or zero tokens.
    """
    start, levels = order.strides(spatial)
    if len(levels) > LEVELS:
        raise ValueError(f"the order {order.name} of {spatial} has more than {LEVELS} levels")
    padded = ((1, 0),) * (LEVELS - len(levels)) + levels
    return (start, *(number for level in padded for number in level))


def walk_positions(walk: Sequence[int], device: torch.device | None = None) -> Tensor:
    """Return the tokens of a walk (L,), in the order visited."""
    start, *levels = walk
    i0, i1, i2 = (
        stride * torch.arange(n, device=device)
        for n, stride in zip(levels[::2], levels[1::2], strict=True)
    )
    return (start + i0[:, None, None] + i1[:, None] + i2).flatten()


def takes_walks(backend: ModuleType) -> bool:
    """Return whether a backend addresses tokens by walks itself."""
    return bool(getattr(backend, "TAKES_WALKS", False))


def scan_forward(
    backend: ModuleType,
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
    delta_bias: Tensor | None, delta_softplus: bool, initial_state: Tensor | None,
    walks: Sequence[int], merged: bool, save_states: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return out, last_state and states as a backend with TAKES_WALKS does, by plain scans."""
    batch, n_directions, _, length = delta.shape
    out = empty_walked(u, 1 if merged else n_directions)
    last_state = empty_state(A, batch)
    states = empty_saved(A, batch, length, save_states)
    total: Tensor | None = None
    for k, way in _ways(walks, u.device):
        result, last, saved = backend.forward(
            *way.arguments(k, (u, delta, A, B, C, D, z, delta_bias)),
            *(delta_softplus, _one(initial_state, k), way.reverse, save_states),
        )
        last_state[:, k] = last
        if save_states:
            states[k] = saved.flatten(2)
        result = way.back(result)
        if merged:
            wide = result.to(wide_type(u.dtype))
            total = wide if total is None else total + wide
        else:
            out[:, k] = result
    if total is not None:
        out[:, 0] = total
    return out, last_state, states


def scan_backward(
    backend: ModuleType,
    dout: Tensor, dlast_state: Tensor | None, u: Tensor, delta: Tensor, A: Tensor, B: Tensor,
    C: Tensor, D: Tensor | None, z: Tensor | None, delta_bias: Tensor | None, delta_softplus: bool,
    initial_state: Tensor | None, states: Tensor, walks: Sequence[int],
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """Return the gradients as a backend with TAKES_WALKS does, by plain scans."""
    batch, _, channels, _ = delta.shape
    n_states = A.shape[2]
    ddelta, dB, dC = empty_walked(delta, delta.shape[1]), empty_matrix(B), empty_matrix(C)
    dA = torch.empty_like(A, memory_format=torch.contiguous_format)
    dD, dbias = (None if x is None else A.new_empty(x.shape) for x in (D, delta_bias))
    dinitial = None if initial_state is None else empty_state(A, batch)
    du, dz = _Sum(u), _Sum(z)
    for k, way in _ways(walks, u.device):
        gradients = backend.backward(
            *way.tokens(k, (dout,)), _one(dlast_state, k),
            *way.arguments(k, (u, delta, A, B, C, D, z, delta_bias)),
            *(delta_softplus, _one(initial_state, k)),
            *(states[k].unflatten(-1, (n_states, channels)), way.reverse),
        )  # fmt: skip
        du_k, ddelta_k, dA[k], dB_k, dC_k, dD_k, dz_k, dbias_k, dinitial_k = gradients
        for total, gradient in ((ddelta, ddelta_k), (dB, dB_k), (dC, dC_k)):
            total[:, k] = way.back(gradient)
        if dD is not None:
            dD[k] = dD_k
        if dbias is not None:
            dbias[k] = dbias_k
        if dinitial is not None:
            dinitial[:, k] = dinitial_k
        du.add(k, way.back(du_k))
        dz.add(k, None if z is None else way.back(dz_k))
    return (du.result, ddelta, dA, dB, dC, dD, dz.result, dbias, dinitial)


def conv_forward(
    backend: ModuleType, x: Tensor, weight: Tensor, bias: Tensor | None, walks: Sequence[int]
) -> Tensor:
    """Return silu(conv(x)) (B, K, E, L) as a backend with TAKES_WALKS does, by plain ones."""
    out = empty_walked(x, weight.shape[0])
    for k, way in _ways(walks, x.device):
        (tokens,) = way.tokens(k, (x,))
        out[:, k] = way.back(backend.conv_forward(tokens, weight[k], _part(bias, k), way.reverse))
    return out


def conv_backward(
    backend: ModuleType, dout: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None,
    walks: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    """Return (dx, dweight, dbias) as a backend with TAKES_WALKS does, by plain convolutions."""
    dweight = torch.empty_like(weight, memory_format=torch.contiguous_format)
    dbias = None if bias is None else weight.new_empty(bias.shape)
    dx = _Sum(x)
    for k, way in _ways(walks, x.device):
        arguments = (*way.tokens(k, (dout, x)), weight[k], _part(bias, k), way.reverse)
        gradient, dweight[k], db = backend.conv_backward(*arguments)
        dx.add(k, way.back(gradient))
        if dbias is not None:
            dbias[k] = db
    assert dx.result is not None
    return dx.result, dweight, dbias


class _Way:
    """One walk: whether it is a plain sequence, and the copies where it is not."""

    def __init__(self, walk: tuple[int, ...], device: torch.device) -> None:
        length = walk[1] * walk[3] * walk[5]
        self.reverse = walk == sequence_walk(length, reverse=True) and length > 1
        self._index: Tensor | None = None
        if not self.reverse and walk != sequence_walk(length):
            self._index, self._inverse = _indices(walk, device)

    def arguments(self, k: int, tensors: tuple[Any, ...]) -> tuple[Any, ...]:
        """Return u, delta, A, B, C, D, z and delta_bias of direction k, tokens as walked."""
        u, delta, A, B, C, D, z, bias = tensors
        u, delta, B, C, z = self.tokens(k, (u, delta, B, C, z))
        return (u, delta, A[k], B, C, _part(D, k), z, _part(bias, k))

    def tokens(self, k: int, tensors: tuple[Tensor | None, ...]) -> tuple[Any, ...]:
        """Return tensors (B, K or 1, ..., L) for direction k, (B, ..., L) in the order walked."""
        return tuple(
            None if x is None else self._moved(x[:, k if x.shape[1] > 1 else 0], self._index)
            for x in tensors
        )

    def back(self, x: Tensor) -> Tensor:
        """Return a result (B, ..., L) in the order in memory."""
        return x if self._index is None else self._moved(x, self._inverse)

    def _moved(self, x: Tensor, index: Tensor | None) -> Tensor:
        return x if index is None else x.movedim(-1, 1).index_select(1, index).movedim(1, -1)


class _Sum:
    """The gradient of a tensor (B, K or 1, E, L): of each direction, or summed in their order."""

    def __init__(self, x: Tensor | None) -> None:
        self.result = None if x is None else empty_walked(x, x.shape[1])
        self._total: Tensor | None = None

    def add(self, k: int, gradient: Tensor | None) -> None:
        if self.result is None or gradient is None:
            return
        if self.result.shape[1] > 1:
            self.result[:, k] = gradient
            return
        wide = gradient.to(wide_type(gradient.dtype))
        self._total = wide if self._total is None else self._total + wide
        self.result[:, 0] = self._total


def _ways(walks: Sequence[int], device: torch.device) -> Iterable[tuple[int, _Way]]:
    numbers = tuple(int(number) for number in walks)
    for k in range(len(numbers) // WALK):
        yield k, _Way(numbers[k * WALK : (k + 1) * WALK], device)


@functools.lru_cache(maxsize=16)
def _indices(walk: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the tokens in the order visited, and the step at which each token is."""
    index = walk_positions(walk, device)
    return index, torch.argsort(index)


def _one(state: Tensor | None, k: int) -> Tensor | None:
    return None if state is None else state[:, k]


def _part(x: Tensor | None, k: int) -> Tensor | None:
    return None if x is None else x[k]
