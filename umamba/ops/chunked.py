"""Backend in pure PyTorch that walks all chunks of a sequence at once; always there, any device.

B batch, D channels, L tokens, N states, G groups, P = D / G channels of a group, J chunks of CHUNK
tokens.  Three steps: each chunk's end state from a zero start; a carry from chunk to chunk, whose decay
is exp(A * sum of d); then each chunk from its true start.  The backward does the same in reverse and
recomputes the states of a few chunks at a time, so its memory is bounded.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from umamba.ops.layout import CHUNK, empty_tokens
from umamba.ops.reference import (
    compute_dtype,
    conv_backward,
    conv_forward,
    start_state,
    states_shape,
    step_size,
)

__all__ = ["backward", "conv_backward", "conv_forward", "forward", "supports", "why_unavailable"]

WORKING_ELEMENTS = 2**24
"""Elements of recomputed states that the backward holds at once."""


def why_unavailable() -> str | None:
    """None: it needs nothing but torch."""
    return None


def supports(device: torch.device, dtype: torch.dtype, d_state: int) -> str | None:
    """None: any device, dtype and number of states."""
    return None


def forward(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    initial_state: Tensor | None,
    reverse: bool,
    save_states: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `reference.forward`."""
    wide = compute_dtype(u, delta, A, B, C)
    groups = B.shape[1]
    d = _cut(step_size(delta, delta_bias, delta_softplus, wide), reverse, groups)
    x = _cut(u.to(wide), reverse, groups)
    b, c = (_cut_groups(t.to(wide), reverse) for t in (B, C))
    a = _rates(A.to(wide), groups)
    starts, last = _starts(
        d, x, b, a, _grouped_state(start_state(initial_state, u, A.shape[1], wide), groups)
    )
    y = torch.empty_like(x)
    state = starts.clone()
    for t in range(CHUNK):
        state.mul_(_decay(d, a, t)).addcmul_(b[t].unsqueeze(-1), (d[t] * x[t]).unsqueeze(2))
        y[t] = _contract(c[t], state)
    result = _join(y, u.shape[2], reverse)
    if D is not None:
        result = result + D.to(wide)[:, None] * u.to(wide)
    if z is not None:
        result = result * F.silu(z.to(wide))
    out = empty_tokens(*u.shape, dtype=u.dtype, device=u.device)
    out.copy_(result)
    states = starts.flatten(3).contiguous() if save_states else starts.new_empty(0)
    assert tuple(states.shape) == states_shape(u, A, save_states)
    return out, last.flatten(2).transpose(1, 2).contiguous(), states


def backward(
    dout: Tensor,
    dlast_state: Tensor | None,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    initial_state: Tensor | None,
    states: Tensor,
    reverse: bool,
) -> tuple[Tensor | None, ...]:
    """As `reference.backward`."""
    wide = compute_dtype(u, delta, A, B, C)
    groups, length = B.shape[1], u.shape[2]
    batch, channels, n_states = u.shape[0], u.shape[1], A.shape[1]
    upstream, gate = dout.to(wide), None
    if z is not None:
        gate = torch.sigmoid(z.to(wide))
        upstream = upstream * z.to(wide) * gate
    d = _cut(step_size(delta, delta_bias, delta_softplus, wide), reverse, groups)
    x = _cut(u.to(wide), reverse, groups)
    q = _cut(upstream, reverse, groups)
    b, c = (_cut_groups(t.to(wide), reverse) for t in (B, C))
    a = _rates(A.to(wide), groups)
    starts = states.to(wide).unflatten(3, (groups, -1))
    ends = torch.zeros_like(starts[:, 0])
    if dlast_state is not None:
        ends = _grouped_state(dlast_state.to(wide), groups)
    incoming, dinitial = _carry_back(d, q, c, a, ends)

    y, r, s = torch.empty_like(x), torch.empty_like(x), torch.empty_like(x)
    db, dc = torch.empty_like(b), torch.empty_like(c)
    da = torch.zeros_like(a)
    for part in _parts(starts):
        history = [starts[:, part]]
        for t in range(CHUNK):
            step = (d[t, :, part] * x[t, :, part]).unsqueeze(2) * b[t, :, part].unsqueeze(-1)
            history.append(torch.addcmul(step, history[-1], _decay(d[:, :, part], a, t)))
        carry = incoming[:, part].clone()
        for t in reversed(range(CHUNK)):
            here = history.pop()
            y[t, :, part] = _contract(c[t, :, part], here)
            g = carry.addcmul_(c[t, :, part].unsqueeze(-1), q[t, :, part].unsqueeze(2))
            dc[t, :, part] = (here * q[t, :, part].unsqueeze(2)).sum(-1)
            db[t, :, part] = (g * (d[t, :, part] * x[t, :, part]).unsqueeze(2)).sum(-1)
            r[t, :, part] = _contract(b[t, :, part], g)
            carry = g.mul_(_decay(d[:, :, part], a, t))
            e = carry * history[-1]
            s[t, :, part] = (e * a).sum(2)
            da += (e * d[t, :, part].unsqueeze(2)).sum((0, 1))

    r, s, y = (_join(t, length, reverse) for t in (r, s, y))
    x, d = u.to(wide), _join(d, length, reverse)
    du = d * r
    dd = x * r + s
    dD = dz = None
    if D is not None:
        du = du + D.to(wide)[:, None] * upstream
        dD = (upstream * x).sum((0, 2))
        y = y + D.to(wide)[:, None] * x
    if z is not None:
        assert gate is not None
        dz = dout.to(wide) * y * gate * (1 + z.to(wide) * (1 - gate))
    if delta_softplus:
        dd = dd * -torch.expm1(-d)  # the derivative of softplus is 1 - exp(-softplus)
    dA = da.reshape(n_states, channels).t()
    dB, dC = (_join_groups(t, length, reverse).to(o.dtype) for t, o in ((db, B), (dc, C)))
    return (
        du.to(u.dtype),
        dd.to(delta.dtype),
        dA.contiguous(),
        dB,
        dC,
        dD,
        None if z is None or dz is None else dz.to(z.dtype),
        None if delta_bias is None else dd.sum((0, 2)),
        None
        if initial_state is None
        else dinitial.reshape(batch, n_states, channels).transpose(1, 2).contiguous(),
    )


def _starts(d: Tensor, x: Tensor, b: Tensor, a: Tensor, first: Tensor) -> tuple[Tensor, Tensor]:
    """The state before each chunk (B, J, N, G, P), and the one after the last token (B, N, G, P)."""
    ends = torch.zeros_like(first).unsqueeze(1).repeat(1, d.shape[2], 1, 1, 1)
    for t in range(CHUNK):
        ends.mul_(_decay(d, a, t)).addcmul_(b[t].unsqueeze(-1), (d[t] * x[t]).unsqueeze(2))
    total = torch.exp(d.sum(0).unsqueeze(2) * a)
    starts = torch.empty_like(ends)
    state = first
    for j in range(d.shape[2]):
        starts[:, j] = state
        state = total[:, j] * state + ends[:, j]
    return starts, state


def _carry_back(d: Tensor, q: Tensor, c: Tensor, a: Tensor, last: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient that enters each chunk from behind (B, J, N, G, P), and that of the first state."""
    local = torch.zeros_like(last).unsqueeze(1).repeat(1, d.shape[2], 1, 1, 1)
    for t in reversed(range(CHUNK)):
        local.addcmul_(c[t].unsqueeze(-1), q[t].unsqueeze(2)).mul_(_decay(d, a, t))
    total = torch.exp(d.sum(0).unsqueeze(2) * a)
    incoming = torch.empty_like(local)
    carry = last
    for j in reversed(range(d.shape[2])):
        incoming[:, j] = carry
        carry = total[:, j] * carry + local[:, j]
    return incoming, carry


def _decay(d: Tensor, a: Tensor, t: int) -> Tensor:
    return (d[t].unsqueeze(2) * a).exp_()


def _contract(weights: Tensor, state: Tensor) -> Tensor:
    """Sum over the states: (B, J, N, G) and (B, J, N, G, P) -> (B, J, G, P)."""
    if weights.shape[3] == 1:
        return torch.matmul(weights.transpose(2, 3), state.squeeze(3))
    return (weights.unsqueeze(-1) * state).sum(2)


def _parts(starts: Tensor) -> list[slice]:
    """Runs of chunks whose recomputed states fit the working memory."""
    batch, n_chunks = starts.shape[:2]
    per_chunk = CHUNK * batch * starts[0, 0].numel()
    step = max(1, WORKING_ELEMENTS // max(1, per_chunk))
    return [slice(j, min(j + step, n_chunks)) for j in range(0, n_chunks, step)]


def _rates(A: Tensor, groups: int) -> Tensor:
    """A (D, N) as (N, G, P)."""
    return A.t().reshape(A.shape[1], groups, -1).contiguous()


def _grouped_state(state: Tensor, groups: int) -> Tensor:
    """A state (B, D, N) as (B, N, G, P)."""
    return state.transpose(1, 2).unflatten(2, (groups, -1)).contiguous()


def _cut(t: Tensor, reverse: bool, groups: int) -> Tensor:
    """(B, D, L) as (CHUNK, B, J, G, P); what is beyond L is zero: no decay and no input."""
    t = _pad(t, reverse)
    return (
        t.reshape(t.shape[0], groups, -1, t.shape[2] // CHUNK, CHUNK)
        .permute(4, 0, 3, 1, 2)
        .contiguous()
    )


def _cut_groups(t: Tensor, reverse: bool) -> Tensor:
    """(B, G, N, L) as (CHUNK, B, J, N, G)."""
    t = _pad(t, reverse)
    return t.unflatten(3, (-1, CHUNK)).permute(4, 0, 3, 2, 1).contiguous()


def _pad(t: Tensor, reverse: bool) -> Tensor:
    if reverse:
        t = t.flip(-1)
    return F.pad(t, (0, -t.shape[-1] % CHUNK))


def _join(t: Tensor, length: int, reverse: bool) -> Tensor:
    """The inverse of `_cut`: (CHUNK, B, J, G, P) as (B, D, L)."""
    joined = t.permute(1, 3, 4, 2, 0).flatten(3).flatten(1, 2)[..., :length]
    return joined.flip(-1) if reverse else joined


def _join_groups(t: Tensor, length: int, reverse: bool) -> Tensor:
    """The inverse of `_cut_groups`: (CHUNK, B, J, N, G) as (B, G, N, L)."""
    joined = t.permute(1, 4, 3, 2, 0).flatten(3)[..., :length]
    return joined.flip(-1) if reverse else joined
