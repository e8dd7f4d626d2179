"""The causal depthwise convolution with SiLU along walks, in Triton.

B batch, K directions, E channels of a direction, L tokens. Step p of a walk is its p-th token; the
tokens lie in raster order and are addressed in place. A program takes a tile of steps times
channels, the channels over the lanes, and reads the steps around its own again: they are in the
caches. Nothing is added atomically, so results are the same from run to run.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

import torch
import triton
import triton.language as tl
from torch import Tensor

from umamba.ops.layout import empty_walked
from umamba.ops.triton_walk import sigmoid, walk_table

STEPS = 16  # of a tile
TILES = 8  # of a program of the backward pass, which gives one partial sum of the weights' gradient
MAX_CHANNELS = 64  # of a tile


def conv_forward(x: Tensor, weight: Tensor, bias: Tensor | None, walks: tuple[int, ...]) -> Tensor:
    """Return silu(causal convolution) along each walk, (B, K, E, L), in memory (K, B, L, E).

    x (B, K, E, L), or (B, 1, E, L) for all directions, any strides; weight (K, E, taps), of which
    the last tap multiplies the current token and the earlier ones those walked before it; bias
    (K, E). The result has the type of x, the arithmetic is float32.
    """
    batch, length = x.shape[0], x.shape[3]
    directions, channels, taps = weight.shape
    out = empty_walked(x, directions)
    block = _channels_of_a_tile(channels)
    n_programs = triton.cdiv(length, STEPS) * triton.cdiv(channels, block) * batch * directions
    if n_programs:
        weight = weight.contiguous()
        _forward_kernel[(n_programs,)](
            *(x, weight, weight if bias is None else bias.contiguous(), out),
            *(walk_table(tuple(walks), x.device), batch, channels, length),
            *_strides(x),
            *(taps, bias is not None, STEPS, block),
            num_warps=_warps(block),
            enable_fp_fusion=True,
        )
    return out


def conv_backward(
    dout: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, walks: tuple[int, ...]
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return dx, dweight (K, E, taps) and dbias (K, E) or None, these two in float32.

    dout (B, K, E, L), any strides; the others as in conv_forward. dx has the shape and the type of
    x and lies in memory as (K or 1, B, L, E). Where x is shared, dx is the sum over the directions
    in their order, formed in float32: a token is met at another step of every walk, so each
    direction is a launch that adds to what the one before left.
    """
    batch, length = x.shape[0], x.shape[3]
    directions, channels, taps = weight.shape
    shared = x.shape[1] < directions
    weight = weight.contiguous()
    dx = empty_walked(x, x.shape[1])
    rounds_late = shared and x.dtype != torch.float32
    total = torch.empty_like(dx, dtype=torch.float32) if rounds_late else dx
    block = _channels_of_a_tile(channels)
    n_parts = batch * triton.cdiv(length, STEPS * TILES)
    rows = triton.next_power_of_2(taps + 1)
    parts = weight.new_empty(directions, n_parts, rows, channels)
    n_programs = n_parts * triton.cdiv(channels, block)
    launches = [(k, 1) for k in range(directions)] if shared else [(0, directions)]
    for first, n_walks in launches if n_programs else ():
        _backward_kernel[(n_programs * n_walks,)](
            *(dout, x, weight, weight if bias is None else bias.contiguous()),
            *(dx if first + n_walks == directions else total, total, parts),
            *(walk_table(tuple(walks), x.device), first, batch, channels, length),
            *_strides(dout),
            *_strides(x),
            *(taps, rows, bias is not None, first > 0, STEPS, TILES, block),
            num_warps=_warps(block),
            enable_fp_fusion=True,
        )
    dweight = parts[:, :, :taps].sum(1).transpose(1, 2).contiguous()
    return dx, dweight, None if bias is None else parts[:, :, taps].sum(1)


def _strides(x: Tensor) -> tuple[int, int, int, int]:
    """Return the strides of x (B, K or 1, E, L), that of a shared direction as zero."""
    batch, direction, channel, token = x.stride()
    return batch, direction if x.shape[1] > 1 else 0, channel, token


def _channels_of_a_tile(channels: int) -> int:
    return min(triton.next_power_of_2(max(channels, 1)), MAX_CHANNELS)


def _warps(block: int) -> int:
    """Return the warps of a tile: four elements to a thread, or fewer."""
    return max(1, STEPS * block // 128)


@triton.jit
def _tokens(table, k, p):
    """Return the tokens (int64) of a block of steps p (int32) of walk k."""
    # In 32 bits, unlike triton_walk.begin_walk: every read of a tile divides anew here.
    walk = table + k * 7
    n1, n2 = tl.load(walk + 3).to(tl.int32), tl.load(walk + 5).to(tl.int32)
    s0, s1 = tl.load(walk + 2).to(tl.int32), tl.load(walk + 4).to(tl.int32)
    start, s2 = tl.load(walk).to(tl.int32), tl.load(walk + 6).to(tl.int32)
    line = p // n2
    plane = line // n1
    token = start + plane * s0 + (line - plane * n1) * s1 + (p - line * n2) * s2
    return token.to(tl.int64)


@triton.jit
def _rows(x, table, k, p, length, stride_token, channel, stride_channel, in_channels):
    """Return x at steps p and channels, in float32; zero at steps that no walk has."""
    inside = (p >= 0) & (p < length)
    tokens = _tokens(table, k, tl.where(inside, p, 0))
    offsets = tokens[:, None] * stride_token + channel[None, :] * stride_channel
    return tl.load(x + offsets, inside[:, None] & in_channels[None, :], 0.0).to(tl.float32)


@triton.jit
def _forward_kernel(
    x, weight, bias, out, table, batch, channels, length,
    x_batch, x_direction, x_channel, x_token,
    TAPS: tl.constexpr, HAS_BIAS: tl.constexpr, STEPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: STEPS steps times BLOCK channels of one walk of one sample."""
    blocks = tl.cdiv(channels, BLOCK)
    program = tl.program_id(0)
    part = program // blocks
    n_parts = tl.cdiv(length, STEPS)
    sequence = part // n_parts  # direction-major
    k, b = (sequence // batch).to(tl.int64), (sequence % batch).to(tl.int64)
    channel = ((program % blocks) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    in_channels = channel < channels
    p = (part % n_parts) * STEPS + tl.arange(0, STEPS)
    x += b * x_batch + k * x_direction
    weight += (k * channels + channel) * TAPS
    value = tl.zeros([STEPS, BLOCK], tl.float32)
    for tap in tl.static_range(TAPS):
        w = tl.load(weight + tap, in_channels, 0.0)
        value += w[None, :] * _rows(
            x, table, k, p + (tap - TAPS + 1), length, x_token, channel, x_channel, in_channels
        )
    if HAS_BIAS:
        value += tl.load(bias + k * channels + channel, in_channels, 0.0)[None, :]
    value = value * sigmoid(value)
    inside = p < length
    tokens = _tokens(table, k, tl.where(inside, p, 0))
    out += (k * batch + b) * length * channels
    offsets = tokens[:, None] * channels + channel[None, :]
    tl.store(out + offsets, value.to(out.dtype.element_ty), inside[:, None] & in_channels[None, :])


@triton.jit(do_not_specialize=["first"])
def _backward_kernel(
    dout, x, weight, bias, dx, total, parts, table, first, batch, channels, length,
    dout_batch, dout_direction, dout_channel, dout_token,
    x_batch, x_direction, x_channel, x_token,
    TAPS: tl.constexpr, ROWS: tl.constexpr, HAS_BIAS: tl.constexpr, ADDS: tl.constexpr,
    STEPS: tl.constexpr, TILES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: TILES tiles of STEPS steps times BLOCK channels of one walk of one sample.

    dx of a step needs the slopes of the TAPS - 1 steps after it, too. Row `tap` of the parts is the
    gradient of that tap, row TAPS that of the bias.
    """
    blocks = tl.cdiv(channels, BLOCK)
    program = tl.program_id(0)
    part = program // blocks
    n_parts = tl.cdiv(length, STEPS * TILES)
    sequence = part // n_parts  # direction-major
    k, b = (first + sequence // batch).to(tl.int64), (sequence % batch).to(tl.int64)
    channel = ((program % blocks) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    in_channels = channel < channels
    dout += b * dout_batch + k * dout_direction
    x += b * x_batch + k * x_direction
    weight += (k * channels + channel) * TAPS
    start = ((0 if ADDS else k) * batch + b) * length * channels
    sums = tl.zeros([ROWS, BLOCK], tl.float32)
    row = tl.arange(0, ROWS)[:, None]
    for tile in range(TILES):
        p = ((part % n_parts) * TILES + tile) * STEPS + tl.arange(0, STEPS)
        gradient = tl.zeros([STEPS, BLOCK], tl.float32)
        for ahead in tl.static_range(TAPS):
            value = tl.zeros([STEPS, BLOCK], tl.float32)
            for tap in tl.static_range(TAPS):
                w = tl.load(weight + tap, in_channels, 0.0)
                value += w[None, :] * _rows(
                    *(x, table, k, p + (ahead + tap - TAPS + 1), length),
                    *(x_token, channel, x_channel, in_channels),
                )
            if HAS_BIAS:
                value += tl.load(bias + k * channels + channel, in_channels, 0.0)[None, :]
            gate = sigmoid(value)
            slope = gate * (1.0 + value * (1.0 - gate))
            slope *= _rows(
                dout, table, k, p + ahead, length, dout_token, channel, dout_channel, in_channels
            )
            gradient += tl.load(weight + (TAPS - 1 - ahead), in_channels, 0.0)[None, :] * slope
            if ahead == 0:
                for tap in tl.static_range(TAPS):
                    product = slope * _rows(
                        *(x, table, k, p + (tap - TAPS + 1), length),
                        *(x_token, channel, x_channel, in_channels),
                    )
                    sums += tl.where(row == tap, tl.sum(product, 0)[None, :], 0.0)
                sums += tl.where(row == TAPS, tl.sum(slope, 0)[None, :], 0.0)
        inside = p < length
        tokens = _tokens(table, k, tl.where(inside, p, 0))
        offsets = start + tokens[:, None] * channels + channel[None, :]
        mask = inside[:, None] & in_channels[None, :]
        if ADDS:
            gradient += tl.load(total + offsets, mask, 0.0)
        tl.store(dx + offsets, gradient.to(dx.dtype.element_ty), mask)
    parts += ((k * batch + b) * n_parts + part % n_parts) * ROWS * channels
    tl.store(parts + row * channels + channel[None, :], sums, in_channels[None, :])
