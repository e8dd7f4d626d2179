"""The selective scan: the public function, its checks, and the two operators behind it.

B batch, D channels, L tokens, N states, G groups of channels that share B and C.
"""

from types import ModuleType
from typing import Any, Literal, overload

import torch
from torch import Tensor

from umamba.ops.dispatch import choose, takes_window, without_autocast
from umamba.ops.layout import CHUNK, empty_tokens
from umamba.ops.reference import wide_type


@overload
def selective_scan(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = ...,
    z: Tensor | None = ..., delta_bias: Tensor | None = ..., delta_softplus: bool = ...,
    initial_state: Tensor | None = ..., reverse: bool = ...,
    return_last_state: Literal[False] = ...,
) -> Tensor: ...  # fmt: skip


@overload
def selective_scan(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = ...,
    z: Tensor | None = ..., delta_bias: Tensor | None = ..., delta_softplus: bool = ...,
    initial_state: Tensor | None = ..., reverse: bool = ...,
    *, return_last_state: Literal[True],
) -> tuple[Tensor, Tensor]: ...  # fmt: skip


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    initial_state: Tensor | None = None,
    reverse: bool = False,
    return_last_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Return out (B, D, L), and with `return_last_state` the last state (B, D, N) beside it.

    For each channel and state n (Mamba, arXiv 2312.00752; state-spaces/mamba, selective_scan_fn):
        d_t = delta_t + delta_bias, through softplus if asked
        h_t = exp(d_t A_n) h_(t-1) + d_t B_tn u_t
        out_t = (sum_n C_tn h_t + D u_t) * silu(z_t)

    u, delta, z (B, D, L); A (D, N), real, negative to be stable; B, C (B, G, N, L) or (B, N, L),
    where channel d takes group d // (D / G); D, delta_bias (D,); initial_state (B, D, N) enters
    before the first token walked. With `reverse` the walk goes from the last token to the first and
    "last" means after token 0.

    Any strides are taken; out lies channel-last in memory. u, delta and z are promoted to one type,
    the one of out; state and sums are float32 (float64 if any of u, delta, z, B, C is float64), and
    so is the last state. Gradients flow into every tensor, from the last state too.
    Raises ValueError for shapes that do not agree, complex A, and tensors on different devices.
    """
    tensors = (u, delta, A, B, C, D, z, delta_bias)
    out, last_state = run_scan(*tensors, delta_softplus, initial_state, reverse, window=0)
    return (out, last_state) if return_last_state else out


def run_scan(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
    delta_bias: Tensor | None, delta_softplus: bool, initial_state: Tensor | None, reverse: bool,
    window: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return out and last state: of selective_scan without a window, of local_scan with one.

    A window needs a backend that takes it (dispatch.takes_window).
    """
    B, C = [x.unsqueeze(1) if x.ndim == 3 else x for x in (B, C)]
    _check(u, delta, A, B, C, D, z, delta_bias, initial_state)
    dtype = result_type(u, delta, B, C, z)
    wide = wide_type(dtype)
    if wide == torch.float64:
        B, C = B.to(wide), C.to(wide)
    D, bias, initial = [None if x is None else x.to(wide) for x in (D, delta_bias, initial_state)]
    z = None if z is None else z.to(dtype)
    leading = (u.to(dtype), delta.to(dtype), A.to(wide), B, C, D, z, bias)
    needs_states = torch.is_grad_enabled() and any(
        x is not None and x.requires_grad for x in (*leading, initial)
    )
    out, last_state, _ = torch.ops.umamba.selective_scan_fwd(
        *leading, delta_softplus, initial, reverse, needs_states, window
    )
    return out, last_state


def result_type(u: Tensor, delta: Tensor, B: Tensor, C: Tensor, z: Tensor | None) -> torch.dtype:
    """Return the type of out."""
    dtype = torch.promote_types(u.dtype, delta.dtype)
    if z is not None:
        dtype = torch.promote_types(dtype, z.dtype)
    return torch.float64 if torch.float64 in (B.dtype, C.dtype) else dtype


def _check(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
    delta_bias: Tensor | None, initial_state: Tensor | None,
) -> None:  # fmt: skip
    """Raises ValueError with the argument's name, its shape and the shape it should have."""
    if A.is_complex():
        raise ValueError("A is complex; the scan takes a real A of shape (D, N)")
    if u.ndim != 3 or A.ndim != 2 or B.ndim != 4 or C.ndim != 4:
        raise ValueError(
            "u must be (B, D, L), A (D, N), B and C (B, G, N, L) or (B, N, L); they are "
            f"{tuple(u.shape)}, {tuple(A.shape)}, {tuple(B.shape)} and {tuple(C.shape)}"
        )
    batch, channels, length = u.shape
    n_states, n_groups = A.shape[1], B.shape[1]
    if n_groups < 1 or channels % n_groups:
        raise ValueError(f"u has {channels} channels, not a multiple of the {n_groups} groups of B")
    sequence, matrix = (batch, channels, length), (batch, n_groups, n_states, length)
    expected = {
        "u": (u, sequence),
        "delta": (delta, sequence),
        "A": (A, (channels, n_states)),
        "B": (B, matrix),
        "C": (C, matrix),
        "D": (D, (channels,)),
        "z": (z, sequence),
        "delta_bias": (delta_bias, (channels,)),
        "initial_state": (initial_state, (batch, channels, n_states)),
    }
    for name, (tensor, shape) in expected.items():
        if tensor is None:
            continue
        if tuple(tensor.shape) != shape:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}, but u {tuple(u.shape)}, A "
                f"{tuple(A.shape)} and B {tuple(B.shape)} need {shape}"
            )
        if not tensor.is_floating_point():
            raise ValueError(f"{name} is {tensor.dtype}; the scan takes floating-point tensors")
        if tensor.device != u.device:
            raise ValueError(f"{name} is on {tensor.device} and u on {u.device}; move one of them")


def _backend(u: Tensor, A: Tensor, window: int) -> ModuleType:
    if window and not takes_window(u.device, u.dtype, A.shape[1], window):
        raise ValueError(
            f"the scan backend chosen now takes no windows of {window} tokens; run the backward "
            "where the forward ran, inside or outside of use_backend"
        )
    return choose(u.device, u.dtype, A.shape[1])


@torch.library.custom_op(
    "umamba::selective_scan_fwd",
    mutates_args=(),
    schema=(
        "(Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, "
        "Tensor? delta_bias, bool delta_softplus, Tensor? initial_state, bool reverse, "
        "bool save_states, int window) -> (Tensor, Tensor, Tensor)"
    ),
)
def _scan_forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    u, _, A, *_ = arguments
    *plain, window = arguments
    with without_autocast(u.device):
        return _backend(u, A, window).forward(*(arguments if window else plain))


@_scan_forward.register_fake
def _(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    u, _, A, *_, save_states, _ = arguments
    batch, channels, length = u.shape
    n_chunks = (length + CHUNK - 1) // CHUNK
    last_state = A.new_empty(batch, channels, A.shape[1])
    states = A.new_empty((batch, n_chunks, A.shape[1], channels) if save_states else (0,))
    return empty_tokens(u), last_state, states


@torch.library.custom_op(
    "umamba::selective_scan_bwd",
    mutates_args=(),
    schema=(
        "(Tensor dout, Tensor? dlast_state, Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, "
        "Tensor? D, Tensor? z, Tensor? delta_bias, bool delta_softplus, Tensor? initial_state, "
        "Tensor states, bool reverse, int window) -> "
        "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
    ),
)
def _scan_backward(*arguments: Any) -> tuple[Tensor, ...]:
    """The backend's gradients; an operator cannot return None, so absent ones are empty tensors."""
    _, _, u, _, A, *_ = arguments
    *plain, window = arguments
    with without_autocast(u.device):
        gradients = _backend(u, A, window).backward(*(arguments if window else plain))
    return tuple(A.new_empty(0) if gradient is None else gradient for gradient in gradients)


@_scan_backward.register_fake
def _(*arguments: Any) -> tuple[Tensor, ...]:
    _, _, u, delta, A, B, C, D, z, delta_bias, _, initial_state, *_ = arguments

    def tokens(x: Tensor | None) -> Tensor:
        return A.new_empty(0) if x is None else empty_tokens(x)

    def matrix(x: Tensor) -> Tensor:  # token-major
        batch, n_groups, n_states, length = x.shape
        return x.new_empty(batch, n_groups, length, n_states).transpose(2, 3)

    def plain(x: Tensor | None) -> Tensor:
        return A.new_empty(0) if x is None else A.new_empty(x.shape)

    leading = (tokens(u), tokens(delta), plain(A), matrix(B), matrix(C))
    return (*leading, plain(D), tokens(z), plain(delta_bias), plain(initial_state))


def _save_for_backward(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    u, delta, A, B, C, D, z, delta_bias, softplus, initial_state, reverse, _, window = inputs
    _, _, states = output
    # Absent gradients stay None: zeros for the states would cost as much as the states.
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(u, delta, A, B, C, D, z, delta_bias, initial_state, states)
    ctx.delta_softplus, ctx.reverse, ctx.window = softplus, reverse, window


def _differentiate(ctx, dout, dlast_state, dstates):  # type: ignore[no-untyped-def]
    u, delta, A, B, C, D, z, delta_bias, initial_state, states = ctx.saved_tensors
    if dout is None:
        dout = torch.zeros_like(u)
    gradients = torch.ops.umamba.selective_scan_bwd(
        *(dout, dlast_state, u, delta, A, B, C, D, z, delta_bias),
        *(ctx.delta_softplus, initial_state, states, ctx.reverse, ctx.window),
    )
    inputs = (u, delta, A, B, C, D, z, delta_bias, initial_state)
    present = [None if x is None else dx for x, dx in zip(inputs, gradients, strict=True)]
    *leading, dinitial = present
    return (*leading, None, dinitial, None, None, None)


_scan_forward.register_autograd(_differentiate, setup_context=_save_for_backward)
