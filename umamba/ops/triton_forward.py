"""The Triton kernels of the scan's forward: one channel per lane, its N states in registers.

Letters: B batch, K directions, E channels of a direction, L tokens, N states, G groups of channels.
A program takes LANES channels of one sample, one direction (or several, one after another) and one
segment of the walk. With several segments, `scan_kernel` runs twice: first without `out`, from a
zero state, for the state at the end of each segment and the sum of its steps; `carry_kernel` makes
of these the states that enter the segments; then with `out`.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, disable-error-code="assignment"

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from umamba.ops.layout import CHUNK
from umamba.ops.triton_walk import (
    LOG2_E,
    begin_walk,
    next_token,
    previous_token,
    softplus,
    walk_table,
)

CHUNK_TOKENS = tl.constexpr(CHUNK)

# One compiled kernel serves all sizes and strides: specializing on them gains nothing measurable.
SIZES = (
    "batch", "E", "L", "per_group", "n_segments", "segment", "first_k", "n_k",
    "u_b", "u_k", "u_e", "u_l", "delta_b", "delta_k", "delta_e", "delta_l",
    "z_b", "z_k", "z_e", "z_l",
    "B_b", "B_k", "B_g", "B_n", "B_l", "C_b", "C_k", "C_g", "C_n", "C_l",
    "enter_b", "enter_k", "enter_s", "enter_e", "enter_n", "out_k",
)  # fmt: skip


def launch(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
    bias: Tensor | None, softplus: bool, initial: Tensor | None, walks: tuple[int, ...],
    out: Tensor, last: Tensor, states: Tensor | None, summed: bool, n_segments: int, lanes: int,
    window: int,
) -> None:  # fmt: skip
    """Fills out (K or 1, B, L, E), last (K, B, E, N) and states (K, B, n_chunks, E * N).

    Inputs as of triton_scan.forward; `summed`: out is the sum over K > 1 directions.
    """
    batch, K, E, L = delta.shape
    N, G = A.shape[-1], B.shape[2]
    A, D, bias = (None if x is None else x.float().contiguous() for x in (A, D, bias))
    u, z = (None if x is None else x.expand(-1, K, -1, -1) for x in (u, z))
    table = walk_table(walks, u.device)
    segment = math.ceil(math.ceil(L / CHUNK) / n_segments) * CHUNK
    tiles = math.ceil(E / lanes)
    sizes = (batch, E, L, E // G, n_segments, segment)
    strides = [s for x in (u, delta, u if z is None else z) for s in x.stride()]
    rows = (*B.stride(), *C.stride())
    options = {
        "WIDE_B": _wide(B), "WIDE_C": _wide(C), "INDEX": _index_type(u, delta, z, B, C, out),
        "SOFTPLUS": softplus, "N": N, "LANES": lanes, "num_warps": 1, "enable_fp_fusion": True,
    }  # fmt: skip

    enter, enter_strides = initial, (0, 0, 0, 0, 0)
    if n_segments > 1:
        enter = torch.empty(K, batch, n_segments, E, N, device=u.device)
        totals = torch.empty(K, batch, n_segments, E, device=u.device)
        scan_kernel[(tiles * n_segments * batch * K,)](
            u, delta, A, B, None, None, None, bias, None, table,
            None, None, None, enter, totals, *sizes, 0, 1, *strides, *rows, *enter_strides, 0,
            SUM=False, WINDOW=0, **options,
        )  # fmt: skip
        carry_kernel[(math.ceil(E * N / 128) * batch * K,)](
            A, initial, enter, totals, batch, E, n_segments,
            *((0, 0, 0, 0) if initial is None else initial.stride()), N=N, BLOCK=128, num_warps=4,
            enable_fp_fusion=True,
        )  # fmt: skip
        k, b, s, e, n = enter.stride()
        enter_strides = (b, k, s, e, n)
    elif initial is not None:
        b, k, e, n = initial.stride()
        enter_strides = (b, k, 0, e, n)

    # Directions of one sum follow one another: in a program, or, where another program has other
    # segments of the walk and so other tokens, in launches.
    if not summed:
        launches = [(0, 1, K)]  # first direction, directions of a program, programs
    elif n_segments == 1:
        launches = [(0, K, 1)]
    else:
        launches = [(k, 1, 1) for k in range(K)]
    for first, count, abreast in launches:
        scan_kernel[(tiles * n_segments * batch * abreast,)](
            u, delta, A, B, C, D, z, bias, enter, table, out, last, states, None, None,
            *sizes, first, count, *strides, *rows, *enter_strides, 0 if summed else out.stride(0),
            SUM=summed, WINDOW=window, **options,
        )  # fmt: skip


def _wide(x: Tensor) -> bool:
    """Return whether every four states of x (B, K, G, N, L) lie side by side and aligned."""
    whole = all(x.stride(i) % 4 == 0 for i in (0, 1, 2, 4) if x.shape[i] > 1)
    return x.shape[3] % 4 == 0 and x.stride(3) == 1 and whole and x.data_ptr() % 16 == 0


def _index_type(*tensors: Tensor | None) -> tl.dtype:
    """Return the type that holds all offsets within a sample and direction: int32 or int64."""
    farthest = max(
        sum(
            (size - 1) * abs(stride)
            for size, stride in zip(x.shape[2:], x.stride()[2:], strict=True)
        )
        for x in tensors
        if x is not None
    )
    return tl.int32 if farthest < 2**31 else tl.int64


@triton.jit(do_not_specialize=SIZES)
def scan_kernel(
    u, delta, A, B, C, D, z, bias, enter, table,  # inputs
    out, last, states, ends, sums,  # results
    batch, E, L, per_group, n_segments, segment, first_k, n_k,
    u_b, u_k, u_e, u_l, delta_b, delta_k, delta_e, delta_l, z_b, z_k, z_e, z_l,
    B_b, B_k, B_g, B_n, B_l, C_b, C_k, C_g, C_n, C_l,
    enter_b, enter_k, enter_s, enter_e, enter_n, out_k,
    SOFTPLUS: tl.constexpr, SUM: tl.constexpr, WIDE_B: tl.constexpr, WIDE_C: tl.constexpr,
    INDEX: tl.constexpr, N: tl.constexpr, WINDOW: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Walks `segment` tokens in each of the directions first_k + (0 .. n_k - 1).

    out (K, B, L, E) or, summed over the directions if SUM, (B, L, E); last (K, B, E, N);
    states (K, B, n_chunks, E, N); ends (K, B, n_segments, E, N) takes the end of segment j at
    j + 1; sums (K, B, n_segments, E). Absent tensors are None.
    """
    tiles = tl.cdiv(E, LANES)
    index = tl.program_id(0)
    tile, index = (index % tiles).to(tl.int64), index // tiles
    s, index = (index % n_segments).to(tl.int64), index // n_segments
    b, k_of_grid = (index % batch).to(tl.int64), (index // batch).to(tl.int64)
    lane = tile * LANES + tl.arange(0, LANES)
    real = lane < E
    e = tl.minimum(lane, E - 1)  # lanes past E repeat the last channel and store nothing
    u_lane, delta_lane, z_lane, out_lane = cast(e * u_e, e * delta_e, e * z_e, e, INDEX)
    g = (e.to(tl.int32) // per_group).to(tl.int64)
    start = s * segment
    end = tl.minimum(start + segment, L)
    B_lane, C_lane, first, final = cast(g * B_g, g * C_g, start, end, INDEX)
    n_chunks = tl.cdiv(L, CHUNK_TOKENS)

    for k in range(first_k + k_of_grid, first_k + k_of_grid + n_k):
        of_state = (k * E + e) * N
        rates, h = (), ()
        for n in tl.static_range(N):
            rates += (tl.load(A + of_state + n) * LOG2_E,)
            h += (tl.zeros([LANES], tl.float32),)
        if enter is not None:
            row = enter + k * enter_k + b * enter_b + s * enter_s + e * enter_e
            h = load_row(row, enter_n, N, False)
        shift = tl.zeros([LANES], tl.float32)
        if bias is not None:
            shift = tl.load(bias + k * E + e)
        if D is not None:
            skip = tl.load(D + k * E + e)
        u_k_b = u + b * u_b + k * u_k
        delta_k_b = delta + b * delta_b + k * delta_k
        B_k_b = B + b * B_b + k * B_k
        if out is not None:
            C_k_b = C + b * C_b + k * C_k
            out_k_b = out + k * out_k + b * L * E
        if z is not None:
            z_k_b = z + b * z_b + k * z_k
        total = tl.zeros([LANES], tl.float32)

        token, i1, i2, n1, n2, s0, s1, s2 = begin_walk(table, k, start)
        # In int32, where offsets fit, a token's address takes 2 instructions instead of 6.
        token, i1, i2, s0 = cast(token, i1, i2, s0, INDEX)
        n1, n2, s1, s2 = cast(n1, n2, s1, s2, INDEX)
        for begin in range(first, final, CHUNK_TOKENS):
            if states is not None:
                chunk = (k * batch + b) * n_chunks + begin // CHUNK_TOKENS
                kept = states + (chunk * E + e) * N
                store_row(kept, h, real, N)
            stop = tl.minimum(begin + CHUNK_TOKENS, final)
            # Groups of tokens would hold more registers, and fewer warps hide each other's loads.
            for _p in range(begin, stop):
                d = tl.load(delta_k_b + (token * delta_l + delta_lane)).to(tl.float32)
                value = tl.load(u_k_b + (token * u_l + u_lane)).to(tl.float32)
                if z is not None:
                    gate = tl.load(z_k_b + (token * z_l + z_lane)).to(tl.float32)
                if SUM:
                    at = out_k_b + (token * E + out_lane)
                    before = tl.load(at, mask=where_also(real, k > 0), other=0.0)
                here = token
                token, i1, i2 = next_token(token, i1, i2, n1, n2, s0, s1, s2)
                d += shift
                if SOFTPLUS:
                    d = softplus(d)
                total += d
                b_row = load_row(B_k_b + (here * B_l + B_lane), B_n, N, WIDE_B)
                h = advance(h, rates, d, d * value, b_row, N)
                if out is not None:
                    c_row = load_row(C_k_b + (here * C_l + C_lane), C_n, N, WIDE_C)
                    y = h[0] * c_row[0]
                    for n in tl.static_range(1, N):
                        y += h[n] * c_row[n]
                    if D is not None:
                        y += skip * value
                    if z is not None:
                        y = gated(y, gate)
                    if SUM:
                        y += before
                    tl.store(out_k_b + (here * E + out_lane), y, mask=real)
            if WINDOW > 1:
                # Back over the chunk, whose tokens are in the caches, with a state that starts anew
                # at the end of each window; out is float32, and every lane adds to what is its own.
                tl.debug_barrier()
                back = ()
                for _n in tl.static_range(N):
                    back += (tl.zeros([LANES], tl.float32),)
                behind, j1, j2 = token, i1, i2
                for done in range(0, stop - begin):
                    behind, j1, j2 = previous_token(behind, j1, j2, n1, n2, s0, s1, s2)
                    d = tl.load(delta_k_b + (behind * delta_l + delta_lane)).to(tl.float32) + shift
                    if SOFTPLUS:
                        d = softplus(d)
                    value = tl.load(u_k_b + (behind * u_l + u_lane)).to(tl.float32)
                    b_row = load_row(B_k_b + (behind * B_l + B_lane), B_n, N, WIDE_B)
                    c_row = load_row(C_k_b + (behind * C_l + C_lane), C_n, N, WIDE_C)
                    inside = tl.where((stop - done) % WINDOW == 0, 0.0, 1.0)
                    y = tl.zeros([LANES], tl.float32)
                    states_back = ()
                    for n in tl.static_range(N):
                        carried = tl.exp2(d * rates[n]) * (back[n] * inside)
                        y += c_row[n] * carried  # the token's own input is in the forward state
                        states_back += (carried + d * value * b_row[n],)
                    back = states_back
                    if z is not None:
                        y = gated(y, tl.load(z_k_b + (behind * z_l + z_lane)).to(tl.float32))
                    at = out_k_b + (behind * E + out_lane)
                    tl.store(at, tl.load(at, mask=real, other=0.0) + y, mask=real)
        if ends is not None:
            of_segment = ((k * batch + b) * n_segments + s) * E + e
            tl.store(sums + of_segment, total, mask=real)
            store_row(ends + (of_segment + E) * N, h, where_also(real, s + 1 < n_segments), N)
        if last is not None:
            store_row(last + ((k * batch + b) * E + e) * N, h, where_also(real, end == L), N)


@triton.jit(
    do_not_specialize=("batch", "E", "n_segments", "b_stride", "k_stride", "e_stride", "n_stride")
)
def carry_kernel(
    A, initial, ends, sums, batch, E, n_segments, b_stride, k_stride, e_stride, n_stride,
    N: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Makes of the ends of the segments, in place, the states that enter them.

    ends (K, B, n_segments, E, N) holds the end of segment j, from a zero state, at j + 1.
    """
    blocks = tl.cdiv(E * N, BLOCK)
    index = tl.program_id(0)
    block, kb = (index % blocks).to(tl.int64), (index // blocks).to(tl.int64)
    k, b = kb // batch, kb % batch
    i = block * BLOCK + tl.arange(0, BLOCK)
    real = i < E * N
    e, n = i // N, i % N
    rate = tl.load(A + k * E * N + i, mask=real, other=0.0) * LOG2_E
    state = tl.zeros([BLOCK], tl.float32)
    if initial is not None:
        at = initial + k * k_stride + b * b_stride + e * e_stride + n * n_stride
        state = tl.load(at, mask=real, other=0.0)
    ends += kb * n_segments * E * N + i
    sums += kb * n_segments * E + e
    AHEAD: tl.constexpr = 16  # segments whose loads are under way at once
    channels = E.to(tl.int64)
    row = channels * N
    tl.store(ends, state, mask=real)
    for first in range(0, n_segments - 1, AHEAD):
        end, decay = (), ()
        for j in tl.static_range(AHEAD):
            inside = where_also(real, first + j + 1 < n_segments)
            end += (tl.load(ends + (first + j + 1) * row, mask=inside, other=0.0),)
            decay += (
                tl.exp2(tl.load(sums + (first + j) * channels, mask=inside, other=0.0) * rate),
            )
        for j in tl.static_range(AHEAD):
            state = decay[j] * state + end[j]
            inside = where_also(real, first + j + 1 < n_segments)
            tl.store(ends + (first + j + 1) * row, state, mask=inside)


@triton.jit
def advance(h, rates, d, x, b_row, N: tl.constexpr):
    """Return the states after a token of step size d and input x = d * u."""
    states = ()
    for n in tl.static_range(N):
        states += (tl.exp2(d * rates[n]) * h[n] + x * b_row[n],)
    return states


@triton.jit
def gated(y, z):
    """Return y silu(z), in one division: that takes fewer registers."""
    return y * z / (1.0 + tl.exp2(-z * LOG2_E))


@triton.jit
def load_row(row, stride, N: tl.constexpr, WIDE: tl.constexpr):
    """Return the N values that begin at each lane's pointer as a tuple of float32 blocks.

    WIDE: the values lie side by side, N is a multiple of 4, and every four are aligned.
    """
    values = ()
    if WIDE:
        size: tl.constexpr = 4 * row.dtype.element_ty.primitive_bitwidth // 8  # bytes of four
        for n in tl.static_range(0, N, 4):
            four = row[:, None] + (n + tl.arange(0, 4))[None, :]
            four = tl.load(tl.max_contiguous(tl.multiple_of(four, (1, size)), (1, 4)))
            even, odd = tl.split(tl.reshape(four.to(tl.float32), [row.shape[0], 2, 2]))
            first, third = tl.split(even)
            second, fourth = tl.split(odd)
            values += (first, second, third, fourth)
    else:
        for n in tl.static_range(N):
            values += (tl.load(row + n * stride.to(tl.int64)).to(tl.float32),)
    return values


@triton.jit
def store_row(row, values, mask, N: tl.constexpr):
    """Stores the N blocks of the tuple side by side at each lane's pointer."""
    if N % 4 == 0:
        for n in tl.static_range(0, N, 4):
            even = tl.join(values[n], values[n + 2])
            odd = tl.join(values[n + 1], values[n + 3])
            four = tl.reshape(tl.join(even, odd), [row.shape[0], 4])
            target = row[:, None] + (n + tl.arange(0, 4))[None, :]
            target = tl.max_contiguous(tl.multiple_of(target, (1, 16)), (1, 4))
            tl.store(target, four, mask=mask[:, None])
    else:
        for n in tl.static_range(N):
            tl.store(row + n, values[n], mask=mask)


@triton.jit
def where_also(mask, condition):
    """Return the mask where the scalar condition holds too."""
    return tl.where(condition, mask, False)  # `&` with a scalar is no mask to the interpreter


@triton.jit
def cast(a, b, c, d, type: tl.constexpr):
    """Return the four numbers in the type."""
    return a.to(type), b.to(type), c.to(type), d.to(type)
