"""The scan of Mamba-2 (state space duality): its definition as a loop, and its chunked form.

B batch, L tokens, H heads, P channels of a head, N states, G groups of heads that share B and C;
c chunks, T tokens of a chunk (t receives, s gives), K heads of a group.
arXiv 2405.21060; the function of state-spaces/mamba, mamba_chunk_scan_combined. Everything here is
made of differentiable torch operations: autograd has the gradients.
"""

import torch
from torch import Tensor
from torch.nn import functional

from umamba.ops.dispatch import without_autocast

CHUNK = 64  # tokens; a larger one costs more memory, a smaller one more steps from chunk to chunk


def ssd_scan(
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    initial_state: Tensor | None = None,
    *,
    chunk_size: int = CHUNK,
) -> tuple[Tensor, Tensor]:
    """Return out (B, L, H, P) and the state after the last token (B, H, P, N).

    For each head, with one decay for its P x N state:
        S_t = exp(delta_t A) S_(t-1) + delta_t x_t B_t^T
        out_t = S_t C_t + D x_t

    x (B, L, H, P); delta (B, L, H), the step sizes themselves; A (H,), negative to be stable; B, C
    (B, L, G, N), where head h takes group h // (H / G); D (H,) or (H, P); initial_state
    (B, H, P, N). out has the type of x; states and sums are float32, or float64 if any of x, delta,
    B, C is. chunk_size changes the memory and the time, not the result.
    Raises ValueError for shapes that do not agree.
    """
    _check(x, delta, A, B, C, D, initial_state)
    if chunk_size < 1:
        raise ValueError(f"chunk_size is {chunk_size}; a chunk has at least one token")
    with without_autocast(x.device):
        return _chunked(x, delta, A, B, C, D, initial_state, chunk_size)


def ssd_reference(
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return what ssd_scan returns, by the definition: a loop over the tokens."""
    _check(x, delta, A, B, C, D, initial_state)
    wide = _wide_type(x, delta, B, C)
    wide_x, d, A = x.to(wide), delta.to(wide), A.to(wide)
    heads_of_a_group = x.shape[2] // B.shape[2]
    B, C = (m.to(wide).repeat_interleave(heads_of_a_group, dim=2) for m in (B, C))  # (B, L, H, N)
    state = _initial(initial_state, x, B)
    out = []
    for t in range(x.shape[1]):
        x_t, d_t = wide_x[:, t], d[:, t, :, None]  # (B, H, P), (B, H, 1)
        inflow = (d_t * x_t)[..., None] * B[:, t, :, None]  # (B, H, P, N)
        state = torch.exp(d_t * A[:, None])[..., None] * state + inflow
        out.append((state * C[:, t, :, None]).sum(-1))
    y = torch.stack(out, 1) if out else torch.zeros_like(wide_x)
    return _with_skip(y, wide_x, D).to(x.dtype), state


def _chunked(
    x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None,
    initial_state: Tensor | None, chunk_size: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """ssd_scan without its checks.

    Within a chunk every token gives to every later one by a matrix product; what comes from before
    the chunk is its entering state, decayed. Only these states go from chunk to chunk.
    """
    wide = _wide_type(x, delta, B, C)
    length, n_groups = x.shape[1], B.shape[2]
    size = max(1, min(chunk_size, length))
    n_chunks = max(1, -(-length // size))

    def cut(tokens: Tensor) -> Tensor:
        """(B, L, ...) -> (B, c, T, ...); tokens beyond L are zero: no step, nothing changes."""
        padding = (0, 0) * (tokens.ndim - 2) + (0, n_chunks * size - length)
        return functional.pad(tokens.to(wide), padding).unflatten(1, (n_chunks, size))

    wide_x, wide_delta = x.to(wide), delta.to(wide)
    inputs = cut(wide_delta[..., None] * wide_x).unflatten(3, (n_groups, -1))  # (B, c, T, G, K, P)
    B, C = cut(B), cut(C)  # (B, c, T, G, N)
    exponents = cut(wide_delta * A.to(wide)).unflatten(3, (n_groups, -1))
    exponents = exponents.permute(0, 1, 3, 4, 2)  # (B, c, G, K, T)
    decays = torch.exp(_sums_between(exponents))  # (B, c, G, K, s, t)

    scores = torch.einsum("bcsgn,bctgn->bcgst", B, C).unsqueeze(3)  # (B, c, G, 1, s, t)
    inside = torch.einsum("bcgkst,bcsgkp->bctgkp", scores * decays, inputs)
    to_end = decays[..., -1].movedim(-1, 2)  # (B, c, T, G, K)
    given = torch.einsum("bcsgn,bcsgkp->bcgkpn", B, inputs * to_end[..., None])
    kept = torch.exp(exponents.sum(-1))[..., None, None]  # (B, c, G, K, 1, 1)
    state = _initial(initial_state, x, B).unflatten(1, (n_groups, -1))  # (B, G, K, P, N)
    entering = []
    for given_c, kept_c in zip(given.unbind(1), kept.unbind(1), strict=True):
        entering.append(state)
        state = kept_c * state + given_c
    from_start = torch.exp(exponents.cumsum(-1)).movedim(-1, 2)  # (B, c, T, G, K)
    before = torch.einsum("bctgn,bcgkpn->bctgkp", C, torch.stack(entering, 1))
    y = inside + before * from_start[..., None]
    y = y.flatten(3, 4).flatten(1, 2)[:, :length]  # (B, L, H, P)
    return _with_skip(y, wide_x, D).to(x.dtype), state.flatten(1, 2)


def _sums_between(x: Tensor) -> Tensor:
    """Return [..., s, t] = x_(s+1) + ... + x_t for s <= t, -inf for s > t, of x (..., T).

    Summed anew for each s: a difference of two sums from the start would lose small x behind large.
    """
    size = x.shape[-1]
    every = torch.ones(size, size, dtype=torch.bool, device=x.device)
    after = x.unsqueeze(-2).expand(*x.shape, size).masked_fill(~every.triu(1), 0)
    return after.cumsum(-1).masked_fill(~every.triu(), float("-inf"))


def _with_skip(y: Tensor, x: Tensor, D: Tensor | None) -> Tensor:
    if D is None:
        return y
    return y + (D if D.ndim == 2 else D[:, None]).to(y.dtype) * x


def _initial(state: Tensor | None, x: Tensor, B: Tensor) -> Tensor:
    if state is not None:
        return state.to(B.dtype)
    batch, _, heads, channels = x.shape
    return B.new_zeros(batch, heads, channels, B.shape[-1])


def _wide_type(*tensors: Tensor) -> torch.dtype:
    """Return the type of the computation: float64 if any of them is, else float32."""
    is_double = any(tensor.dtype == torch.float64 for tensor in tensors)
    return torch.float64 if is_double else torch.float32


def _check(
    x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None,
    initial_state: Tensor | None,
) -> None:  # fmt: skip
    """Raises ValueError with the argument's name, its shape and the shape it should have."""
    if x.ndim != 4 or B.ndim != 4:
        raise ValueError(
            "x must be (B, L, H, P) and B (B, L, G, N); they are "
            f"{tuple(x.shape)} and {tuple(B.shape)}"
        )
    batch, length, heads, channels = x.shape
    n_groups, n_states = B.shape[2:]
    if n_groups < 1 or heads % n_groups:
        raise ValueError(f"x has {heads} heads, not a multiple of the {n_groups} groups of B")
    matrix = (batch, length, n_groups, n_states)
    expected = {
        "delta": (delta, (batch, length, heads)),
        "A": (A, (heads,)),
        "B": (B, matrix),
        "C": (C, matrix),
        "D": (D, (heads,) if D is None or D.ndim == 1 else (heads, channels)),
        "initial_state": (initial_state, (batch, heads, channels, n_states)),
    }
    for name, (tensor, shape) in expected.items():
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}, but x {tuple(x.shape)} and B "
                f"{tuple(B.shape)} need {shape}"
            )
