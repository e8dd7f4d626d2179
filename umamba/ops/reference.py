"""The definition of the selective scan and of the causal convolution: loops over time, in PyTorch.

B batch, D channels, L tokens, N states, G groups of channels that share B and C, K taps, t time.
Slow and plain on purpose: every other backend is tested against these functions in float64. The
symbols are those of Mamba (arXiv 2312.00752), with the gradients written out.
"""

import torch
from torch import Tensor
from torch.nn import functional

from umamba.ops.layout import CHUNK, empty_tokens


def why_unavailable() -> str | None:
    """Return None: this backend always works."""
    return None


def supports(device: torch.device, dtype: torch.dtype, d_state: int) -> str | None:
    """Return None: every device and floating type is taken; float64 is computed in float64."""
    return None


def forward(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
    delta_bias: Tensor | None, delta_softplus: bool, initial_state: Tensor | None, reverse: bool,
    save_states: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return out (B, D, L), last_state (B, D, N) and the states before each chunk.

    u, delta, z (B, D, L); A (D, N); B, C (B, G, N, L); D, delta_bias (D,); initial_state (B, D, N).
    states is (B, ceil(L / CHUNK), N, D) in walk order, empty unless `save_states`.
    """
    wide = wide_type(u.dtype)
    batch, channels, length = u.shape
    d = step_sizes(delta, delta_bias, delta_softplus)
    x, decay = u.to(wide), A.to(wide)
    B, C = (_per_channel(m, channels, wide) for m in (B, C))  # (B, D, N, L)
    h = _initial(initial_state, u, A)
    out = empty_tokens(u)
    states = []
    for step, t in enumerate(_walk(length, reverse)):
        if step % CHUNK == 0:
            states.append(h.transpose(1, 2))
        d_t, u_t = d[:, :, t, None], x[:, :, t, None]  # (B, D, 1)
        h = torch.exp(d_t * decay) * h + d_t * u_t * B[..., t]  # (B, D, N)
        y = (C[..., t] * h).sum(-1)
        if D is not None:
            y = y + D.to(wide) * x[:, :, t]
        if z is not None:
            y = y * functional.silu(z[:, :, t].to(wide))
        out[:, :, t] = y.to(u.dtype)
    saved = h.new_empty((batch, len(states), A.shape[1], channels) if save_states else (0,))
    if save_states and states:
        torch.stack(states, 1, out=saved)
    return out, h.clone(), saved


def backward(
    dout: Tensor, dlast_state: Tensor | None, u: Tensor, delta: Tensor, A: Tensor, B: Tensor,
    C: Tensor, D: Tensor | None, z: Tensor | None, delta_bias: Tensor | None, delta_softplus: bool,
    initial_state: Tensor | None, states: Tensor, reverse: bool,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """Return (du, ddelta, dA, dB, dC, dD, dz, ddelta_bias, dinitial_state), None for absent inputs.

    du, ddelta, dz, dB and dC have the type of their inputs, the others that of the computation.
    """
    wide = wide_type(u.dtype)
    batch, channels, length = u.shape
    n_states, n_groups = A.shape[1], B.shape[1]
    d = step_sizes(delta, delta_bias, delta_softplus)
    x, decay = u.to(wide), A.to(wide)
    wide_B, wide_C = (_per_channel(m, channels, wide) for m in (B, C))
    q = dout.to(wide)
    if z is not None:
        q = q * functional.silu(z.to(wide))

    order = _walk(length, reverse)
    h = [_initial(initial_state, u, A)]  # h[step] enters token order[step]
    for t in order:
        d_t, u_t = d[:, :, t, None], x[:, :, t, None]
        h.append(torch.exp(d_t * decay) * h[-1] + d_t * u_t * wide_B[..., t])

    du, dd, y = torch.zeros_like(x), torch.zeros_like(x), torch.zeros_like(x)
    dA = torch.zeros_like(decay)
    dB = torch.zeros(batch, n_groups, length, n_states, dtype=wide, device=u.device)
    dC = torch.zeros_like(dB)
    carry = torch.zeros_like(h[0]) if dlast_state is None else dlast_state.to(wide)
    for step in reversed(range(length)):
        t = order[step]
        d_t, u_t, q_t = d[:, :, t, None], x[:, :, t, None], q[:, :, t, None]
        g = wide_C[..., t] * q_t + carry  # (B, D, N)
        a = torch.exp(d_t * decay)
        e = g * a * h[step]
        r = (g * wide_B[..., t]).sum(-1)  # (B, D)
        y[:, :, t] = (wide_C[..., t] * h[step + 1]).sum(-1)
        du[:, :, t] = d[:, :, t] * r
        dd[:, :, t] = x[:, :, t] * r + (decay * e).sum(-1)
        dA += (d_t * e).sum(0)
        dB[:, :, t] = (g * d_t * u_t).unflatten(1, (n_groups, -1)).sum(2)
        dC[:, :, t] = (q_t * h[step + 1]).unflatten(1, (n_groups, -1)).sum(2)
        carry = a * g

    dD = dz = None
    if D is not None:
        skip = D.to(wide)[:, None]
        du, y, dD = du + skip * q, y + skip * x, (q * x).sum((0, 2))
    if z is not None:
        dz = token_major(dout.to(wide) * y * silu_slope(z.to(wide)), z.dtype)
    ddelta = dd * step_slopes(d) if delta_softplus else dd
    return (
        token_major(du, u.dtype),
        token_major(ddelta, delta.dtype),
        dA,
        dB.to(B.dtype).transpose(2, 3),
        dC.to(C.dtype).transpose(2, 3),
        dD,
        dz,
        None if delta_bias is None else ddelta.sum((0, 2)),
        None if initial_state is None else carry.clone(),
    )


def local_scan(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
    delta_bias: Tensor | None, delta_softplus: bool, reverse: bool, window: int,
) -> Tensor:  # fmt: skip
    """Return out (B, D, L) of the locally bidirectional scan (LBMamba, arXiv 2506.15976).

    The state of `forward`, which goes through the whole sequence, plus one that walks the other way
    and starts anew in every `window` tokens, counted from the first one walked. A token's own input
    counts once, and both states decay by the step of the token that receives them. Arguments as in
    `forward`; differentiable.
    """
    wide = wide_type(u.dtype)
    d = step_sizes(delta, delta_bias, delta_softplus)
    x, channels = u.to(wide), u.shape[1]
    B, C = (_per_channel(m, channels, wide) for m in (B, C))  # (B, D, N, L)
    decays = torch.exp(d.unsqueeze(2) * A.to(wide).unsqueeze(-1))
    a, b = decays.unbind(-1), ((d * x).unsqueeze(2) * B).unbind(-1)  # (B, D, N) per token
    order = _walk(u.shape[2], reverse)
    ahead, back = {}, {}
    h = _initial(None, u, A)
    for t in order:
        ahead[t] = h = a[t] * h + b[t]
    for start in range(0, len(order), window):
        h = torch.zeros_like(h)
        for t in reversed(order[start : start + window]):
            back[t] = h = a[t] * h + b[t]
    states = [ahead[t] + back[t] - b[t] for t in sorted(order)]
    y = (torch.stack(states, -1) * C).sum(2) if states else torch.zeros_like(x)
    if D is not None:
        y = y + D.to(wide)[:, None] * x
    return token_major(y if z is None else y * functional.silu(z.to(wide)), u.dtype)


def conv_forward(x: Tensor, weight: Tensor, bias: Tensor | None, reverse: bool) -> Tensor:
    """Return silu(causal depthwise convolution) of x (B, D, L); weight (D, K), bias (D,).

    Tap K-1 multiplies the current token, the earlier taps those walked before it; with `reverse`
    the walk goes from the last token to the first.
    """
    tokens = x.transpose(1, 2).to(wide_type(x.dtype))  # (B, L, D)
    value = functional.silu(_convolve(tokens, weight, bias, reverse))
    return token_major(value.transpose(1, 2), x.dtype)


def conv_backward(
    dout: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, reverse: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return (dx, dweight, dbias): dx in the type of x, the others in that of the computation."""
    wide = wide_type(x.dtype)
    tokens = x.transpose(1, 2).to(wide)  # (B, L, D)
    value = _convolve(tokens, weight, bias, reverse)
    slope = silu_slope(value).mul_(dout.transpose(1, 2))
    taps, length = weight.shape[1], x.shape[2]
    dx, dweight = torch.zeros_like(tokens), []
    for k in range(taps):
        here, there = _shifted(taps - 1 - k, length, reverse)
        dx[:, there] += slope[:, here] * weight[:, k].to(wide)
        dweight.append((slope[:, here] * tokens[:, there]).sum((0, 1)))
    dbias = None if bias is None else slope.sum((0, 1))
    return token_major(dx.transpose(1, 2), x.dtype), torch.stack(dweight, 1), dbias


def wide_type(dtype: torch.dtype) -> torch.dtype:
    """Return the type of the computation: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def step_sizes(delta: Tensor, bias: Tensor | None, softplus: bool) -> Tensor:
    """Return the step sizes of delta (B, D, L)."""
    wide = wide_type(delta.dtype)
    s = delta.to(wide) if bias is None else delta.to(wide) + bias.to(wide)[:, None]
    # torch takes s itself above 20, which is not exact enough in float64.
    return functional.softplus(s, threshold=40) if softplus else s


def step_slopes(d: Tensor) -> Tensor:
    """Return the derivative of the softplus whose value is d: sigmoid(s) = 1 - exp(-d)."""
    return -torch.expm1(-d)


def silu_slope(z: Tensor) -> Tensor:
    """Return the derivative of silu at z."""
    gate = torch.sigmoid(z)
    return gate * (1 + z * (1 - gate))


def token_major(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return x (B, D, L) in the type, with its memory laid out (B, L, D)."""
    return x.transpose(1, 2).to(dtype).contiguous().transpose(1, 2)


def _walk(length: int, reverse: bool) -> range:
    """Return the tokens in the order in which the state meets them."""
    return range(length - 1, -1, -1) if reverse else range(length)


def _per_channel(matrix: Tensor, channels: int, wide: torch.dtype) -> Tensor:
    """Return (B, G, N, L) as (B, D, N, L): channel d takes group d // (D / G)."""
    return matrix.to(wide).repeat_interleave(channels // matrix.shape[1], dim=1)


def _initial(state: Tensor | None, u: Tensor, A: Tensor) -> Tensor:
    wide = wide_type(u.dtype)
    if state is not None:
        return state.to(wide)
    return torch.zeros(u.shape[0], *A.shape, dtype=wide, device=u.device)


def _convolve(tokens: Tensor, weight: Tensor, bias: Tensor | None, reverse: bool) -> Tensor:
    """Return the causal convolution of tokens (B, L, D) before the SiLU."""
    taps, length = weight.shape[1], tokens.shape[1]
    value = torch.zeros_like(tokens)
    if bias is not None:
        value += bias.to(tokens.dtype)
    for k in range(taps):
        here, there = _shifted(taps - 1 - k, length, reverse)
        value[:, here] += tokens[:, there] * weight[:, k].to(tokens.dtype)
    return value


def _shifted(lag: int, length: int, reverse: bool) -> tuple[slice, slice]:
    """Return the tokens that have one walked `lag` steps before them, and those earlier tokens."""
    late, early = slice(min(lag, length), length), slice(0, max(length - lag, 0))
    return (early, late) if reverse else (late, early)
