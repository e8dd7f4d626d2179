"""The backward of the selective scan in Triton: tiles of channels x states, one warp each.

B batch, K directions, E channels of a direction, L tokens, N states, G groups of channels that
share B and C, S segments; u, delta, z, A, B, C, D and the symbols of the formulas are those of
`reference.backward`. Tokens are addressed by walks (`triton_walk`), steps are counted along them.

A program owns one tile of channels over one segment of the steps. It takes the segment's chunks
from the last to the first: it walks a chunk forward from its saved state and keeps the state before
every few tokens in scratch memory, then comes back with the gradient of the state, computing the
few states of a group of tokens again in registers. Every sum is formed in a fixed order: what
several programs add to is written in parts and summed after them.
"""

import torch
import triton
from torch import Tensor

from umamba.ops.layout import CHUNK
from umamba.ops.triton_backward_kernels import carry_over, segment_carries, sweep
from umamba.ops.triton_walk import walk_table

# Tokens whose states are in registers at once, without and with windows; whose rows are.
GROUP, WINDOW_GROUP, PART = 4, 2, 16
# Programs of a launch, of which each has scratch memory.
MOST_PROGRAMS = 4096


def backward(
    dout: Tensor, dlast_state: Tensor | None, u: Tensor, delta: Tensor, A: Tensor, B: Tensor,
    C: Tensor, D: Tensor | None, z: Tensor | None, delta_bias: Tensor | None, delta_softplus: bool,
    initial_state: Tensor | None, states: Tensor, walks: tuple[int, ...], window: int = 0,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """Return (du, ddelta, dA, dB, dC, dD, dz, ddelta_bias, dinitial_state), None for absent inputs.

    dout (B, K or 1, E, L), dlast_state (B, K, E, N); u, z (B, K or 1, E, L); delta (B, K, E, L);
    A (K, E, N); B, C (B, K, G, N, L); D, delta_bias (K, E); initial_state (B, K, E, N); states
    (K, B, n_chunks, E * N) of the forward. The gradients have the shapes of their inputs; du, dz,
    ddelta, dB, dC their types, the others are float32.
    """
    batch, n_directions, channels, length = delta.shape
    n_groups, n_states = B.shape[2:4]
    assert length < 2**31  # tokens are kept as 32-bit integers
    block_N = triton.next_power_of_2(n_states)
    block_E = min(max(512 // block_N, 4), 64, max(triton.next_power_of_2(channels // n_groups), 4))
    n_tiles = triton.cdiv(channels // n_groups, block_E)
    shared = 1 in (u.shape[1], u.shape[1] if z is None else z.shape[1])
    n_launches = n_directions if shared else 1
    per_segment = n_groups * n_tiles * batch * n_directions
    n_segments, segment_chunks = segments(per_segment // n_launches, triton.cdiv(length, CHUNK))

    def parts(*size: int) -> Tensor:
        return torch.empty(size, dtype=torch.float32, device=u.device)

    def rows(x: Tensor) -> Tensor:
        dtype = x.dtype if x.shape[1] == n_directions else torch.float32
        return torch.empty(x.shape[1], batch, length, channels, dtype=dtype, device=x.device)

    du, ddelta, dz = rows(u), rows(delta), None if z is None else rows(z)
    dB, dC = (parts(n_tiles, n_directions, batch, n_groups, length, n_states) for _ in "BC")
    dA = parts(n_segments, batch, n_directions, channels, n_states)
    dD = None if D is None else parts(n_segments, batch, n_directions, channels)
    dbias = None if delta_bias is None else parts(n_segments, batch, n_directions, channels)
    dinitial = None
    if initial_state is not None:
        dinitial = parts(n_directions, batch, channels, n_states)
    weights = [_dense(x) for x in (A, D, delta_bias, states)]
    rate, bias = weights[0], weights[2]
    carries = None if dlast_state is None else _dense(dlast_state.transpose(0, 1))

    table = walk_table(tuple(walks), u.device)
    u_k, dout_k = (x.expand(-1, n_directions, -1, -1) for x in (u, dout))
    z_k = None if z is None else z.expand(-1, n_directions, -1, -1)
    z_strides = (0, 0, 0, 0) if z_k is None else z_k.stride()
    sizes = (batch, n_directions, channels, length, n_groups, n_tiles, n_segments, segment_chunks)
    blocks = {"N": n_states, "BLOCK_N": block_N, "BLOCK_E": block_E, "SOFTPLUS": delta_softplus}
    options = {"num_warps": 1, "enable_fp_fusion": True}
    if per_segment and n_segments > 1:
        dlast = carries
        carries = parts(n_segments, n_directions, batch, channels, n_states)
        totals = parts(n_segments, n_directions, batch, channels)
        segment_carries[(per_segment * (n_segments - 1),)](
            table, delta, z_k, dout_k, rate, C, bias, carries, totals,
            *delta.stride(), *z_strides, *dout_k.stride(), *C.stride(),
            *sizes, **blocks, CHUNK=CHUNK, **options,
        )  # fmt: skip
        n_carries = n_directions * batch * channels * n_states
        carry_over[(triton.cdiv(n_carries, 128),)](
            rate, dlast, carries, totals, n_segments, n_carries, batch, channels, N=n_states,
            BLOCK=128, UNROLL=8, **options,
        )  # fmt: skip
    n_programs = per_segment * n_segments
    per_launch = n_programs // n_launches
    group, n_kept = (WINDOW_GROUP, 2) if window > 1 else (GROUP, 1)
    size = CHUNK * (4 * block_E + 2 * block_N + n_kept * block_E * block_N // group)
    scratch = parts(min(per_launch, MOST_PROGRAMS), size)
    places = torch.empty(len(scratch), CHUNK, dtype=torch.int32, device=u.device)
    sums_u, sums_z = du.shape[0] == 1, dz is not None and dz.shape[0] == 1
    for k in range(n_launches):
        for first in range(k * per_launch, (k + 1) * per_launch, MOST_PROGRAMS):
            sweep[(min((k + 1) * per_launch - first, MOST_PROGRAMS),)](
                table, u_k, delta, z_k, dout_k, rate, B, C, *weights[1:], carries,
                du, ddelta, dz, dB, dC, dA, dD, dbias, dinitial, scratch, places,
                *u_k.stride(), *delta.stride(), *z_strides, *dout_k.stride(), *B.stride(),
                *C.stride(), *sizes, first, **blocks, SHARED_U=sums_u, SHARED_Z=sums_z,
                ADD_U=sums_u and k > 0, ADD_Z=sums_z and k > 0, CHUNK=CHUNK, GROUP=group,
                PART=PART, WINDOW=window, SCRATCH=size, **options,
            )  # fmt: skip

    def by_tokens(x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        return None if x is None else x.to(dtype).permute(1, 0, 3, 2)

    return (
        by_tokens(du, u.dtype),
        by_tokens(ddelta, delta.dtype),
        dA.sum((0, 1)),
        *(
            (x[0] if n_tiles == 1 else x.sum(0)).to(like.dtype).permute(1, 0, 2, 4, 3)
            for x, like in ((dB, B), (dC, C))
        ),
        None if dD is None else dD.sum((0, 1)),
        by_tokens(dz, u.dtype),
        None if dbias is None else dbias.sum((0, 1)),
        None if dinitial is None else dinitial.transpose(0, 1),
    )


def segments(n_programs: int, n_chunks: int) -> tuple[int, int]:
    """Return (segments, chunks of a segment) for so many programs per segment of a launch.

    One segment where the programs fill a large device; else as many as fill it, of at least 8
    chunks each. The shapes alone decide, not the device: results are the same bits on any.
    """
    wanted = 1 if n_programs >= 1024 else triton.cdiv(2048, max(n_programs, 1))
    segment_chunks = max(triton.cdiv(n_chunks, wanted), min(8, n_chunks), 1)
    return max(triton.cdiv(n_chunks, segment_chunks), 1), segment_chunks


def _dense(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.to(torch.float32).contiguous()
