"""Backend that is the definition of the selective scan: a loop over tokens, readable and slow.

B batch, D channels, L tokens, N states, G groups of channels that share B and C.  Float32 inside, or
float64 where an input is float64.  Every other backend must agree with this one.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from umamba.ops.layout import CHUNK, empty_tokens


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
    """The scan: out (B, D, L), last_state (B, D, N), states (B, ceil(L / CHUNK), N, D).

    u, delta, z (B, D, L); A (D, N); B, C (B, G, N, L); D, delta_bias (D); initial_state (B, D, N).
    With d = delta + delta_bias, through softplus if asked, and per channel and state
        h_t = exp(d_t A) h_(t-1) + d_t u_t B_t,   out_t = (sum_n C_t h_t + D u_t) silu(z_t).
    `reverse` walks from the last token to the first.  states holds h before each chunk of the walk,
    if `save_states`; else it is empty.
    """
    wide = compute_dtype(u, delta, A, B, C)
    batch, channels, length = u.shape
    x, d = u.to(wide), step_size(delta, delta_bias, delta_softplus, wide)
    a_rate = A.to(wide)
    b, c = (expand_groups(t, channels, wide) for t in (B, C))
    state = start_state(initial_state, u, A.shape[1], wide)
    out = empty_tokens(batch, channels, length, u.dtype, u.device)
    saved = []
    for position, t in enumerate(walk(length, reverse)):
        if save_states and position % CHUNK == 0:
            saved.append(state.transpose(1, 2))
        decay = torch.exp(d[..., t, None] * a_rate)
        state = decay * state + (d[..., t] * x[..., t])[..., None] * b[..., t]
        y = (c[..., t] * state).sum(-1)
        if D is not None:
            y = y + D.to(wide) * x[..., t]
        if z is not None:
            y = y * F.silu(z[..., t].to(wide))
        out[..., t] = y.to(u.dtype)
    states = torch.stack(saved, 1) if saved else state.new_empty(states_shape(u, A, save_states))
    return out, state.clone(), states


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
    """du, ddelta, dA, dB, dC, dD, dz, ddelta_bias, dinitial_state; None where there is no input.

    By the chain rule, token by token from the end of the walk, with q = dout silu(z) and
        g_t = C_t q_t + exp(d_(t+1) A) g_(t+1)          the gradient of h_t
        e_t = g_t exp(d_t A) h_(t-1)                    the gradient of d_t A
    """
    wide = compute_dtype(u, delta, A, B, C)
    channels, groups, n_states = u.shape[1], B.shape[1], A.shape[1]
    x, d = u.to(wide), step_size(delta, delta_bias, delta_softplus, wide)
    a_rate = A.to(wide)
    b, c = (expand_groups(t, channels, wide) for t in (B, C))
    gate = torch.ones_like(x) if z is None else F.silu(z.to(wide))
    q = dout.to(wide) * gate
    order = list(walk(u.shape[2], reverse))
    history = [start_state(initial_state, u, n_states, wide)]
    for t in order:
        decay = torch.exp(d[..., t, None] * a_rate)
        history.append(decay * history[-1] + (d[..., t] * x[..., t])[..., None] * b[..., t])
    y, r, s = torch.empty_like(x), torch.empty_like(x), torch.empty_like(x)
    db, dc = torch.empty_like(b), torch.empty_like(c)
    da = torch.zeros_like(a_rate)
    g = torch.zeros_like(history[0]) if dlast_state is None else dlast_state.to(wide)
    for t in reversed(order):
        here = history.pop()
        g = g + c[..., t] * q[..., t, None]
        y[..., t] = (c[..., t] * here).sum(-1)
        r[..., t] = (g * b[..., t]).sum(-1)
        dc[..., t] = q[..., t, None] * here
        db[..., t] = g * (d[..., t] * x[..., t])[..., None]
        g = g * torch.exp(d[..., t, None] * a_rate)
        e = g * history[-1]
        s[..., t] = (e * a_rate).sum(-1)
        da += (e * d[..., t, None]).sum(0)
    du, dd = d * r, x * r + s
    dD = None
    if D is not None:
        du, y = du + D.to(wide)[:, None] * q, y + D.to(wide)[:, None] * x
        dD = (q * x).sum((0, 2))
    dz = None
    if z is not None:
        sigmoid = torch.sigmoid(z.to(wide))
        dz = (dout.to(wide) * y * sigmoid * (1 + z.to(wide) * (1 - sigmoid))).to(z.dtype)
    if delta_softplus:
        dd = dd * -torch.expm1(-d)  # the derivative of softplus is 1 - exp(-softplus)
    dB, dC = (
        t.unflatten(1, (groups, -1)).sum(2).to(given.dtype) for t, given in ((db, B), (dc, C))
    )
    dbias = None if delta_bias is None else dd.sum((0, 2))
    dinitial = None if initial_state is None else g.clone()
    return du.to(u.dtype), dd.to(delta.dtype), da, dB, dC, dD, dz, dbias, dinitial


def conv_forward(x: Tensor, weight: Tensor, bias: Tensor | None, reverse: bool) -> Tensor:
    """silu of the causal depthwise convolution of x (B, D, L); weight (D, K), bias (D,) or None.

    The last tap multiplies the current token, the earlier ones those walked before it.
    """
    out = empty_tokens(*x.shape, dtype=x.dtype, device=x.device)
    return out.copy_(F.silu(_convolve(x, weight, bias, reverse)))


def conv_backward(
    dout: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, reverse: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """dx, dweight, dbias of `conv_forward`."""
    before = _convolve(x, weight, bias, reverse)
    sigmoid = torch.sigmoid(before)
    inner = dout.to(before.dtype) * sigmoid * (1 + before * (1 - sigmoid))
    taps, length = weight.shape[1], x.shape[2]
    dx, dweight = torch.zeros_like(before), torch.zeros_like(weight, dtype=before.dtype)
    for tap in range(max(0, taps - length), taps):
        lag = taps - 1 - tap
        early, late = slice(0, length - lag), slice(lag, length)
        source, target = (late, early) if reverse else (early, late)
        dx[..., source] += inner[..., target] * weight[:, tap, None].to(before.dtype)
        dweight[:, tap] = (inner[..., target] * x[..., source].to(before.dtype)).sum((0, 2))
    return dx.to(x.dtype), dweight, None if bias is None else inner.sum((0, 2))


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None, reverse: bool) -> Tensor:
    wide = compute_dtype(x, weight)
    taps = weight.shape[1]
    kernel = (weight.flip(-1) if reverse else weight).to(wide).unsqueeze(1)
    padded = F.pad(x.to(wide), (0, taps - 1) if reverse else (taps - 1, 0))
    return F.conv1d(padded, kernel, None if bias is None else bias.to(wide), groups=x.shape[1])


def walk(length: int, reverse: bool) -> range:
    """The tokens in the order of the walk."""
    return range(length - 1, -1, -1) if reverse else range(length)


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 where any of the tensors is, else float32."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def step_size(delta: Tensor, bias: Tensor | None, softplus: bool, wide: torch.dtype) -> Tensor:
    """d (B, D, L): delta plus its bias, through softplus if asked."""
    d = delta.to(wide)
    if bias is not None:
        d = d + bias.to(wide)[:, None]
    return F.softplus(d) if softplus else d


def expand_groups(t: Tensor, channels: int, wide: torch.dtype) -> Tensor:
    """B or C of shape (B, G, N, L) as (B, D, N, L)."""
    return t.to(wide).repeat_interleave(channels // t.shape[1], 1)


def start_state(initial: Tensor | None, u: Tensor, n_states: int, wide: torch.dtype) -> Tensor:
    """The state (B, D, N) before the walk."""
    if initial is not None:
        return initial.to(wide)
    return u.new_zeros(u.shape[0], u.shape[1], n_states, dtype=wide)


def states_shape(u: Tensor, A: Tensor, save_states: bool) -> tuple[int, ...]:
    """The shape of the saved states, for every backend."""
    return (u.shape[0], -(-u.shape[2] // CHUNK), A.shape[1], u.shape[1]) if save_states else (0,)
