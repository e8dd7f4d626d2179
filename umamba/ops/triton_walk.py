"""What the Triton kernels share: the walk over the tokens, softplus and sigmoid.

A walk is 7 integers (start, n0, s0, n1, s1, n2, s2), in tokens: step p visits the token
start + i0 * s0 + i1 * s1 + i2 * s2 with i2 = p % n2, i1 = (p // n2) % n1, i0 = p // (n1 * n2).
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2_E = tl.constexpr(1.4426950408889634)


@functools.lru_cache(maxsize=256)
def walk_table(walks: tuple[int, ...], device: torch.device) -> Tensor:
    """Return the walks of K directions as a tensor (K, 7) on the device, made once."""
    return torch.tensor(walks, dtype=torch.int64).view(-1, 7).to(device)


@triton.jit
def begin_walk(table, k, p):
    """Return (token, i1, i2, n1, n2, s0, s1, s2) at step p of walk k: where it is and its strides.

    p is a scalar or a block of steps. All results are int64; token is the index of the token.
    """
    row = table + k * 7
    n1, n2 = tl.load(row + 3), tl.load(row + 5)
    s0, s1, s2 = tl.load(row + 2), tl.load(row + 4), tl.load(row + 6)
    # Steps fit 32 bits; a 64-bit division is a call that would push the registers to the stack.
    step = (p + tl.zeros([], tl.int64)).to(tl.int32)
    line = step // n2.to(tl.int32)
    i0 = (line // n1.to(tl.int32)).to(tl.int64)
    i1 = line - i0 * n1
    i2 = step - line * n2
    return tl.load(row) + i0 * s0 + i1 * s1 + i2 * s2, i1, i2, n1, n2, s0, s1, s2


@triton.jit
def next_token(token, i1, i2, n1, n2, s0, s1, s2):
    """Return (token, i1, i2) of the following step; past the last step token has no meaning."""
    line_ends = i2 + 1 == n2
    token += tl.where(line_ends, s1 - (n2 - 1) * s2, s2)
    i1 = tl.where(line_ends, i1 + 1, i1)
    plane_ends = i1 == n1
    token += tl.where(plane_ends, s0 - n1 * s1, 0)
    return token, tl.where(plane_ends, 0, i1), tl.where(line_ends, 0, i2 + 1)


@triton.jit
def previous_token(token, i1, i2, n1, n2, s0, s1, s2):
    """Return (token, i1, i2) of the step before; before the first step token has no meaning."""
    line_starts = i2 == 0
    token -= tl.where(line_starts, s1 - (n2 - 1) * s2, s2)
    i1 = tl.where(line_starts, i1 - 1, i1)
    plane_starts = i1 < 0
    token -= tl.where(plane_starts, s0 - n1 * s1, 0)
    return token, tl.where(plane_starts, n1 - 1, i1), tl.where(line_starts, n2 - 1, i2 - 1)


@triton.jit
def softplus(s):
    """Return log(1 + exp(s)), exact to a few roundings and without overflow."""
    x = tl.exp2(-tl.abs(s) * LOG2_E)
    # log(1 + x) / x on [0, 1], minimax of degree 7: relative error 2e-7
    ratio = -0.0085392061 * x + 0.0440896232
    ratio = ratio * x - 0.107681701
    ratio = ratio * x + 0.177452406
    ratio = ratio * x - 0.244954625
    ratio = ratio * x + 0.332754797
    ratio = ratio * x - 0.499974054
    ratio = ratio * x + 0.999999806
    return tl.maximum(s, 0.0) + ratio * x


@triton.jit
def sigmoid(z):
    """Return 1 / (1 + exp(-z))."""
    return 1.0 / (1.0 + tl.exp2(-z * LOG2_E))
