"""The selective scan: the public function, its checks, and the two operators behind it.

B batch, D channels, L tokens, N states, G groups of channels that share B and C; K directions and
E channels of each in the operators, whose tokens stay in place (see walks).
"""

from collections.abc import Sequence
from types import ModuleType
from typing import Any, Literal, overload

import torch
from torch import Tensor

from umamba.ops.dispatch import choose, takes_window, without_autocast
from umamba.ops.layout import empty_matrix, empty_saved, empty_state, empty_walked
from umamba.ops.reference import wide_type
from umamba.ops.walks import scan_backward, scan_forward, sequence_walk, takes_walks


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
    out, last_state = scan_sequence(*tensors, delta_softplus, initial_state, reverse, window=0)
    return (out, last_state) if return_last_state else out


def scan_sequence(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
    delta_bias: Tensor | None, delta_softplus: bool, initial_state: Tensor | None, reverse: bool,
    window: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return out and last state: of selective_scan without a window, of local_scan with one.

    A window needs a backend that takes it (dispatch.takes_window).
    """
    B, C = [x.unsqueeze(1) if x.ndim == 3 else x for x in (B, C)]
    _check(u, delta, A, B, C, D, z, delta_bias, initial_state)
    samples = [None if x is None else x.unsqueeze(1) for x in (u, delta, B, C, z, initial_state)]
    u, delta, B, C, z, initial_state = samples  # type: ignore[assignment]
    D, delta_bias = [None if x is None else x.unsqueeze(0) for x in (D, delta_bias)]
    out, last_state = scan_walks(
        *(u, delta, A.unsqueeze(0), B, C, D, z, delta_bias, delta_softplus, initial_state),
        sequence_walk(u.shape[-1], reverse),
        window=window,
    )
    return out.squeeze(1), last_state.squeeze(1)


def scan_walks(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
    delta_bias: Tensor | None, delta_softplus: bool, initial_state: Tensor | None,
    walks: Sequence[int], *, merged: bool = False, window: int = 0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return out and last state (B, K, E, N) of K scans along walks through the same tokens.

    u, z (B, K, E, L), or (B, 1, E, L) for all directions; delta (B, K, E, L); A (K, E, N); B, C
    (B, K, G, N, L); D, delta_bias (K, E); initial_state (B, K, E, N); walks: see ops.walks. out is
    (B, K, E, L), with `merged` (B, 1, E, L), the sum over the directions in their order; it lies
    channel-last in memory. For the rest see selective_scan.
    """
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
        *leading, delta_softplus, initial, walks, merged, needs_states, window
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
    if window and not takes_window(u.device, u.dtype, A.shape[2], window):
        raise ValueError(
            f"the scan backend chosen now takes no windows of {window} tokens; run the backward "
            "where the forward ran, inside or outside of use_backend"
        )
    return choose(u.device, u.dtype, A.shape[2])


@torch.library.custom_op(
    "umamba::selective_scan_fwd",
    mutates_args=(),
    schema=(
        "(Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, "
        "Tensor? delta_bias, bool delta_softplus, Tensor? initial_state, SymInt[] walks, "
        "bool merged, bool save_states, SymInt window) -> (Tensor, Tensor, Tensor)"
    ),
)
def _scan_forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    u, _, A, *_, window = arguments
    backend = _backend(u, A, window)
    with without_autocast(u.device):
        if takes_walks(backend):
            return backend.forward(*arguments)
        return scan_forward(backend, *arguments[:-1])


@_scan_forward.register_fake
def _(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    u, delta, A, *_, merged, save_states, _ = arguments
    batch, n_directions, _, length = delta.shape
    out = empty_walked(u, 1 if merged else n_directions)
    return out, empty_state(A, batch), empty_saved(A, batch, length, save_states)


@torch.library.custom_op(
    "umamba::selective_scan_bwd",
    mutates_args=(),
    schema=(
        "(Tensor dout, Tensor? dlast_state, Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, "
        "Tensor? D, Tensor? z, Tensor? delta_bias, bool delta_softplus, Tensor? initial_state, "
        "Tensor states, SymInt[] walks, SymInt window) -> "
        "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
    ),
)
def _scan_backward(*arguments: Any) -> tuple[Tensor, ...]:
    """The backend's gradients; an operator cannot return None, so absent ones are empty tensors."""
    _, _, u, _, A, *_, window = arguments
    backend = _backend(u, A, window)
    with without_autocast(u.device):
        if takes_walks(backend):
            gradients = backend.backward(*arguments)
        else:
            gradients = scan_backward(backend, *arguments[:-1])
    return tuple(A.new_empty(0) if gradient is None else gradient for gradient in gradients)


@_scan_backward.register_fake
def _(*arguments: Any) -> tuple[Tensor, ...]:
    _, _, u, delta, A, B, C, D, z, delta_bias, _, initial_state, *_ = arguments
    nothing = A.new_empty(0)

    def plain(x: Tensor | None) -> Tensor:
        return nothing.clone() if x is None else A.new_empty(x.shape)

    return (
        *(empty_walked(u, u.shape[1]), empty_walked(delta, delta.shape[1]), plain(A)),
        *(empty_matrix(B), empty_matrix(C), plain(D)),
        nothing.clone() if z is None else empty_walked(z, z.shape[1]),
        plain(delta_bias),
        nothing if initial_state is None else empty_state(A, u.shape[0]),
    )


def _save_for_backward(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    *tensors, softplus, initial_state, walks, _, _, window = inputs
    _, _, states = output
    # Absent gradients stay None: zeros for the states would cost as much as the states.
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, initial_state, states)
    ctx.delta_softplus, ctx.walks, ctx.window = softplus, walks, window
    ctx.out_shape = output[0].shape


def _differentiate(ctx, dout, dlast_state, dstates):  # type: ignore[no-untyped-def]
    *inputs, initial_state, states = ctx.saved_tensors
    if dout is None:
        dout = inputs[0].new_zeros(ctx.out_shape)
    gradients = torch.ops.umamba.selective_scan_bwd(
        *(dout, dlast_state, *inputs, ctx.delta_softplus, initial_state, states),
        *(ctx.walks, ctx.window),
    )
    present = [
        None if x is None else dx for x, dx in zip((*inputs, initial_state), gradients, strict=True)
    ]
    *leading, dinitial = present
    return (*leading, None, dinitial, None, None, None, None)


_scan_forward.register_autograd(_differentiate, setup_context=_save_for_backward)
