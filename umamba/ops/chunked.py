"""Backend of the selective scan in pure PyTorch: windows of tokens and segments of the sequence.

B batch, S segments of the sequence, T tokens of a segment, w tokens of a window, G groups of
channels that share B and C, E channels of a group, N states. It runs wherever torch does and is
what serves where the C library was not built.

All that does not depend on the state before is computed for a window of tokens at once; only the
recursion h_t = a_t h_(t-1) + b_t itself goes token by token, so nothing over- or underflows as
quotients of cumulative products do. Where a token holds too few numbers to keep the device busy the
sequence is cut into segments that run side by side, after a first pass that finds the state that
enters each. Samples and channels are taken in blocks, so memory stays bounded and in the cache.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional

from umamba.ops.chunked_layout import Cut, window_elements
from umamba.ops.layout import CHUNK
from umamba.ops.reference import (
    conv_backward,
    conv_forward,
    silu_slope,
    step_sizes,
    step_slopes,
    supports,
    token_major,
    why_unavailable,
)

__all__ = ["backward", "conv_backward", "conv_forward", "forward", "supports", "why_unavailable"]


def forward(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
    delta_bias: Tensor | None, delta_softplus: bool, initial_state: Tensor | None, reverse: bool,
    save_states: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return out, last_state and states as reference.forward does, and of the same shapes."""
    cut = Cut(u, A, B, reverse)
    steps = cut.tokens(step_sizes(delta, delta_bias, delta_softplus))  # (B, S, T, G, E)
    inputs = steps * cut.tokens(u)
    input_B, output_C, decay = cut.matrix(B), cut.matrix(C), cut.rates(A)
    entering = cut.state(initial_state, u.device)  # (B, G, N, E)
    y, last = torch.empty_like(steps), torch.empty_like(entering)
    saved = None
    if save_states:
        shape = (cut.batch, cut.segments, cut.n_chunks, cut.n_states, cut.groups, cut.width)
        saved = y.new_zeros(shape)
    for b, e in cut.blocks(window_elements(u)):
        walk = _Walk(steps[b, ..., e], inputs[b, ..., e], input_B[b], decay[..., e])
        h = walk.enter_segments(entering[b, ..., e])
        for t, w in walk.windows():
            if saved is not None and t % CHUNK == 0:
                saved[b, :, t // CHUNK, :, :, e] = h.transpose(2, 3)
            hs, spare = walk.run(h, t, w)
            h = hs[-1]
            C_w = _window(output_C[b], t, w).unsqueeze(-1)
            y[b, :, t : t + w, :, e] = torch.mul(hs, C_w, out=spare).sum(-2).movedim(0, 2)
        last[b, ..., e] = h[:, -1]
    out = cut.whole(y)
    if D is not None:
        out.addcmul_(u.to(cut.wide), D.to(cut.wide)[:, None])
    if z is not None:
        out.mul_(functional.silu(z.to(cut.wide)))
    states = y.new_empty(0) if saved is None else cut.whole_saved(saved)
    return token_major(out, u.dtype), cut.whole_state(last), states


def backward(
    dout: Tensor, dlast_state: Tensor | None, u: Tensor, delta: Tensor, A: Tensor, B: Tensor,
    C: Tensor, D: Tensor | None, z: Tensor | None, delta_bias: Tensor | None, delta_softplus: bool,
    initial_state: Tensor | None, states: Tensor, reverse: bool,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """Return the gradients as reference.backward does, in the same types.

    The states within a chunk are computed again from the one saved before it.
    """
    cut = Cut(u, A, B, reverse)
    d = step_sizes(delta, delta_bias, delta_softplus)
    q = dout.to(cut.wide)
    if z is not None:
        q = q * functional.silu(z.to(cut.wide))
    steps, upstream = cut.tokens(d), cut.tokens(q)
    inputs = steps * cut.tokens(u)
    input_B, output_C, decay = cut.matrix(B), cut.matrix(C), cut.rates(A)
    saved = cut.saved(states)
    leaving = cut.state(dlast_state, u.device)
    r, s = torch.empty_like(steps), torch.empty_like(steps)
    y = torch.empty_like(steps) if z is not None else r
    dB, dC = torch.zeros_like(input_B), torch.zeros_like(output_C)
    dA, first = torch.zeros_like(decay), torch.empty_like(leaving)
    for b, e in cut.blocks(8 * window_elements(u) // CHUNK):
        walk = _Walk(steps[b, ..., e], inputs[b, ..., e], input_B[b], decay[..., e])
        q_b, A_b = upstream[b, ..., e], decay[..., e]
        carry = walk.enter_backwards(leaving[b, ..., e], q_b, output_C[b])
        for t, w in walk.windows(backwards=True):
            h = saved[b, :, t // CHUNK, :, :, e].transpose(2, 3)
            hs, a = walk.run(h, t, w)
            q_w = _window(q_b, t, w)
            C_w = _window(output_C[b], t, w)
            if z is not None:
                y[b, :, t : t + w, :, e] = _over_states(C_w, hs)
            dC[b, :, t : t + w] += _over_channels(hs, q_w)
            g = walk.pull(a, C_w, q_w, carry)
            dB[b, :, t : t + w] += _over_channels(g, _window(walk.inputs, t, w))
            r[b, :, t : t + w, :, e] = _over_states(_window(input_B[b], t, w), g)
            a.mul_(g)
            carry = a[0].clone()
            a[0].mul_(h)
            a[1:].mul_(hs[:-1])
            s[b, :, t : t + w, :, e] = torch.mul(a, A_b, out=g).sum(-2).movedim(0, 2)
            dA[..., e] += a.mul_(_window(walk.steps, t, w).unsqueeze(-2)).sum((0, 1, 2))
        first[b, ..., e] = carry[:, 0]
    # From here on the buffers are turned into the results in place.
    wide_u, du, ddelta = u.to(cut.wide), cut.whole(r), cut.whole(s)
    ddelta.addcmul_(wide_u, du)
    if delta_softplus:
        ddelta.mul_(step_slopes(d))
    du.mul_(d)
    dD = dz = None
    if D is not None:
        skip = D.to(cut.wide)[:, None]
        du.addcmul_(q, skip)
        dD = (q * wide_u).sum((0, 2))
    if z is not None:
        dz = cut.whole(y)
        if D is not None:
            dz.addcmul_(wide_u, skip)
        dz.mul_(silu_slope(z.to(cut.wide))).mul_(dout)
    return (
        token_major(du, u.dtype),
        token_major(ddelta, delta.dtype),
        cut.whole_state(dA),
        cut.whole_matrix(dB).to(B.dtype),
        cut.whole_matrix(dC).to(C.dtype),
        dD,
        None if dz is None or z is None else token_major(dz, z.dtype),
        None if delta_bias is None else ddelta.sum((0, 2)),
        None if initial_state is None else cut.whole_state(first),
    )


class _Walk:
    """The recursion over one block of samples and channels, with its buffers."""

    def __init__(self, steps: Tensor, inputs: Tensor, input_B: Tensor, decay: Tensor) -> None:
        self.steps, self.inputs, self.input_B = steps, inputs, input_B
        self.decay = decay  # (G, N, E)
        self.shape = (*steps.shape[:2], *decay.shape)  # (B, S, G, N, E)
        self.length = steps.shape[2]
        self._buffers: dict[str, Tensor] = {}

    def windows(self, backwards: bool = False) -> Iterator[tuple[int, int]]:
        """Yield (first token, number of tokens) of the windows of a segment."""
        size = CHUNK
        if not backwards:
            most = min(CHUNK, window_elements(self.steps) // max(1, math.prod(self.shape)))
            size = 1 << max(0, most.bit_length() - 1)  # a power of two
        starts = range(0, self.length, size)
        for t in reversed(starts) if backwards else starts:
            yield t, min(size, self.length - t)

    def run(self, h: Tensor, t: int, w: int) -> tuple[Tensor, Tensor]:
        """Return the states after tokens t .. t+w-1 from the one before, h, and the decays."""
        a = self._decays(t, w)
        h = h.clone()  # it may lie in the buffer that is now filled again
        hs = torch.mul(
            _window(self.input_B, t, w).unsqueeze(-1),
            _window(self.inputs, t, w).unsqueeze(-2),
            out=self._buffer("h", w),
        )  # (w, B, S, G, N, E)
        for a_t, h_t in zip(a.unbind(), hs.unbind(), strict=True):
            h = h_t.addcmul_(a_t, h)
        return hs, a

    def pull(self, a: Tensor, C_w: Tensor, q_w: Tensor, carry: Tensor) -> Tensor:
        """Return the gradients of the states of a window; carry is what comes from behind it."""
        g = torch.mul(C_w.unsqueeze(-1), q_w.unsqueeze(-2), out=self._buffer("g", len(a)))
        g[-1].add_(carry)
        decays, gradients = a.unbind(), g.unbind()
        for i in reversed(range(len(a) - 1)):
            gradients[i].addcmul_(decays[i + 1], gradients[i + 1])
        return g

    def enter_segments(self, first: Tensor) -> Tensor:
        """Return the state that enters each segment (B, S, G, N, E), from that of the sequence."""
        if self.shape[1] == 1:
            return first.unsqueeze(1)
        h = first.new_zeros(self.shape)
        for t, w in self.windows():
            h = self.run(h, t, w)[0][-1]
        return self._linked(first, h, 1)

    def enter_backwards(self, last: Tensor, q: Tensor, output_C: Tensor) -> Tensor:
        """Return the state's gradient that enters each segment from its end."""
        if self.shape[1] == 1:
            return last.unsqueeze(1)
        carry = last.new_zeros(self.shape)
        for t, w in self.windows(backwards=True):
            a = self._decays(t, w)
            carry = a[0] * self.pull(a, _window(output_C, t, w), _window(q, t, w), carry)[0]
        return self._linked(last, carry, -1)

    def _linked(self, first: Tensor, alone: Tensor, step: int) -> Tensor:
        """Return what enters each segment: the first, then what leaves the one walked before it.

        alone is what leaves each segment (B, S, G, N, E) if nothing enters it.
        """
        entering = [first]
        total = (self.steps.sum(2).unsqueeze(-2) * self.decay).exp_()  # decay over a whole segment
        pairs = list(zip(alone.unbind(1), total.unbind(1), strict=True))[::step]
        for local, decay in pairs[:-1]:
            entering.append(torch.addcmul(local, decay, entering[-1]))
        return torch.stack(entering[::step], 1)

    def _decays(self, t: int, w: int) -> Tensor:
        d_w = _window(self.steps, t, w).unsqueeze(-2)
        return torch.mul(d_w, self.decay, out=self._buffer("a", w)).exp_()

    def _buffer(self, name: str, w: int) -> Tensor:
        buffer = self._buffers.get(name)
        if buffer is None or len(buffer) < w:
            buffer = self._buffers[name] = self.steps.new_empty(w, *self.shape)
        return buffer[:w]


def _window(x: Tensor, t: int, w: int) -> Tensor:
    """Return tokens t .. t+w-1 of (B, S, T, ...) as (w, B, S, ...)."""
    return x[:, :, t : t + w].movedim(2, 0)


def _over_states(weights: Tensor, states: Tensor) -> Tensor:
    """Return sum_n of (w, B, S, G, N) times (w, B, S, G, N, E) as (B, S, w, G, E)."""
    return torch.matmul(weights.unsqueeze(-2), states).squeeze(-2).movedim(0, 2)


def _over_channels(states: Tensor, x: Tensor) -> Tensor:
    """Return sum_e of (w, B, S, G, N, E) times (w, B, S, G, E) as (B, S, w, G, N)."""
    return torch.matmul(states, x.unsqueeze(-1)).squeeze(-1).movedim(0, 2)
