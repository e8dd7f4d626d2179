"""The locally bidirectional scan of LBMamba: a selective scan that sees a few tokens ahead.

B batch, D channels, L tokens, N states, G groups of channels that share B and C, M window, W
windows. arXiv 2506.15976; the function of the kernel in cvlab-stonybrook/LBMamba@52155516.
`reference.local_scan` is its definition.
"""

import torch
from torch import Tensor
from torch.nn import functional

from umamba.ops.dispatch import takes_window, without_autocast
from umamba.ops.reference import step_sizes
from umamba.ops.selective_scan import result_type, scan_sequence, selective_scan

# parity: the official window is the number of tokens that one thread of the CUDA kernel takes,
# which its launch chooses by the length of the sequence.
WINDOWS = ((128, 4), (256, 8))
LONG_WINDOW = 16


def window_of(length: int) -> int:
    """Return the official window of a sequence: 4 up to 128 tokens, 8 up to 256, then 16."""
    return next((window for most, window in WINDOWS if length <= most), LONG_WINDOW)


def local_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    reverse: bool = False,
    window: int | None = None,
) -> Tensor:
    """Return out (B, D, L); the arguments are those of selective_scan.

    With hF_t the state of selective_scan, a_t = exp(d_t A) and b_t = d_t B_t u_t:
        hB_t = a_t hB_(t+1) + b_t, which starts from zero behind the last token of each window
        out_t = (sum_n C_tn (hF_t + hB_t - b_t) + D u_t) * silu(z_t)

    window: tokens of a window, counted from the first one walked; the last may be shorter. None
    takes the official one for this length, so that the function depends on it.
    Every backend serves: hB is the state of a scan in the other direction whose sequences are the
    windows. The C library takes windows that divide 32 in the one pass of selective_scan, Triton
    those of 4, 8 or 16 tokens.
    """
    size = window_of(u.shape[-1]) if window is None else window
    if size < 1:
        raise ValueError(f"window is {size}; a window has at least one token")
    dtype = result_type(u, delta, B, C, z)
    if takes_window(u.device, dtype, A.shape[-1], size):
        tensors = (u, delta, A, B, C, D, z, delta_bias)
        return scan_sequence(*tensors, delta_softplus, None, reverse, size)[0]
    with without_autocast(u.device):
        wide = torch.promote_types(dtype, torch.float32)
        u, delta, B, C = (x.to(wide) for x in (u, delta, B, C))
        d = step_sizes(delta, delta_bias, delta_softplus)
        ahead = selective_scan(u, d, A, B, C, D, reverse=reverse)
        # The tokens that fill up a window give nothing, and the walk back meets them first.
        u_w, d_w, B_w, C_w = (_windows(x, size, reverse) for x in (u, d, B, C))
        back = selective_scan(u_w, d_w, A, B_w, C_w, reverse=not reverse)
        y = ahead + _whole(back, u.shape, reverse) - _own_inputs(d * u, B, C)
        return (y if z is None else y * functional.silu(z.to(wide))).to(dtype)


def _windows(x: Tensor, size: int, reverse: bool) -> Tensor:
    """Return x (B, ..., L) as (BW, ..., M), the last window walked filled up with zeros."""
    n_windows = -(-x.shape[-1] // size)
    missing = n_windows * size - x.shape[-1]
    tokens = x.movedim(-1, 1)  # (B, L, ...), as it lies in memory
    if missing:
        ends = (missing, 0) if reverse else (0, missing)
        tokens = functional.pad(tokens, (0, 0) * (x.ndim - 2) + ends)
    return tokens.unflatten(1, (n_windows, size)).flatten(0, 1).movedim(1, -1)


def _whole(x: Tensor, shape: torch.Size, reverse: bool) -> Tensor:
    """Return x (BW, D, M) as (B, D, L): the inverse of _windows."""
    batch, channels, length = shape
    filled = -(-length // x.shape[-1]) * x.shape[-1]
    tokens = x.movedim(-1, 1).reshape(batch, filled, channels)
    kept = tokens[:, filled - length :] if reverse else tokens[:, :length]
    return kept.movedim(1, -1)


def _own_inputs(inputs: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """Return sum_n C_n B_n inputs (B, D, L): what every token gives to its own result."""
    weights = (B * C).sum(-2)  # (B, G, L) or (B, L)
    if weights.ndim == 2:
        weights = weights.unsqueeze(1)
    grouped = inputs.unflatten(1, (weights.shape[1], -1))
    return (grouped * weights.unsqueeze(2)).flatten(1, 2)
