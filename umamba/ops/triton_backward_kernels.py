"""The kernels of the scan's backward in Triton; what they do is told in `triton_scan_backward`.

B batch, K directions, E channels of a direction, L tokens, N states, G groups of channels that
share B and C. Every kernel runs on one warp. The symbols are those of `reference.backward`.
"""

# mypy: ignore-errors
# (Triton's functions carry no types of Python's)

import triton
import triton.language as tl

from umamba.ops.triton_walk import LOG2_E, begin_walk, previous_token, sigmoid, softplus


@triton.jit
def _place(pid, B, G, n_tiles, n_segments, E, BLOCK_E: tl.constexpr):
    """Return (k, segment, b, group, tile, places in the group, its width) of a program."""
    tile = pid % n_tiles
    group = pid // n_tiles % G
    rest = pid // n_tiles // G
    b = rest % B
    segment = rest // B % n_segments
    k = rest // B // n_segments
    return k, segment, b, group, tile, tile * BLOCK_E + tl.arange(0, BLOCK_E), E // G


@triton.jit
def _load(pointers, mask):
    return tl.load(pointers, mask=mask, other=0.0).to(tl.float32)


# One kernel serves all values of these; E and G tell it how addresses are aligned.
_SIZES = ("n_batch", "n_directions", "L", "n_tiles", "n_segments", "segment_chunks", "first")


@triton.jit(do_not_specialize=_SIZES)
def sweep(
    table, u, delta, z, dout, A, B, C, D, bias, states, carries,
    du, ddelta, dz, dB, dC, dA, dD, dbias, dinitial, scratch, places,
    u_b, u_k, u_e, u_l, delta_b, delta_k, delta_e, delta_l, z_b, z_k, z_e, z_l,
    dout_b, dout_k, dout_e, dout_l, B_b, B_k, B_g, B_n, B_l, C_b, C_k, C_g, C_n, C_l,
    n_batch, n_directions, E, L, G, n_tiles, n_segments, segment_chunks, first,
    N: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr, SOFTPLUS: tl.constexpr,
    ADD_U: tl.constexpr, ADD_Z: tl.constexpr, SHARED_U: tl.constexpr, SHARED_Z: tl.constexpr,
    CHUNK: tl.constexpr, GROUP: tl.constexpr, PART: tl.constexpr, WINDOW: tl.constexpr,
    SCRATCH: tl.constexpr,
):  # fmt: skip
    """All gradients of a tile of channels over a segment of the steps."""
    slot = tl.program_id(0).to(tl.int64)
    k, segment, b, group, tile, inside, width = _place(
        slot + first, n_batch, G, n_tiles, n_segments, E, BLOCK_E
    )
    e = group * width + inside
    # States are [BLOCK_N // QUAD, QUAD]: so each lane holds neighbours.
    QUAD: tl.constexpr = 4 if BLOCK_N > 4 else BLOCK_N
    n_flat = tl.arange(0, BLOCK_N)
    n = tl.arange(0, BLOCK_N // QUAD)[:, None] * QUAD + tl.arange(0, QUAD)[None, :]
    local_e = tl.arange(0, BLOCK_E)[:, None, None]
    mask = (inside < width)[:, None, None] & (n < N)[None, :, :]
    tile_offsets = e[:, None, None] * N + n[None, :, :]
    kb = k * n_batch + b
    u += b * u_b + k * u_k
    delta += b * delta_b + k * delta_k
    dout += b * dout_b + k * dout_k
    B += b * B_b + k * B_k + group * B_g
    C += b * C_b + k * C_k + group * C_g
    ddelta += kb * L * E
    du += (b if SHARED_U else kb) * L * E
    if z is not None:
        z += b * z_b + k * z_k
        dz += (b if SHARED_Z else kb) * L * E
    part = ((tile * n_directions * n_batch + kb) * G + group) * L * N
    dB += part
    dC += part
    # Scratch: per token (d, d u or y, q or r, sum_e) of the channels; per token B or dB, C or dC;
    # the states, and the p, before each group of tokens.
    ROWS: tl.constexpr = CHUNK * BLOCK_E
    COLS: tl.constexpr = CHUNK * BLOCK_N
    TILE: tl.constexpr = BLOCK_E * BLOCK_N
    scratch += slot * SCRATCH
    places += slot * CHUNK
    cols = scratch + 4 * ROWS
    kept = cols + 2 * COLS + local_e * BLOCK_N + n[None, :, :]
    kept_p = kept + CHUNK // GROUP * TILE
    t = tl.arange(0, PART)
    four = tl.arange(0, 4)[None, None, :]
    block_of_4 = (t[:, None] * BLOCK_E + tl.arange(0, BLOCK_E)[None, :])[:, :, None] * 4 + four
    n_block = t[:, None] * BLOCK_N + n_flat[None, :]
    # Every lane of a row of lanes reads the same: what it multiplies is in its own registers.
    lane = tl.arange(0, BLOCK_N // QUAD)
    e_of_4 = (tl.arange(0, BLOCK_E)[:, None] + 0 * lane[None, :])[:, :, None] * 4 + four
    y_of_4 = tl.arange(0, BLOCK_E) * 4 + 1
    sums_of_4 = tl.arange(0, BLOCK_E)[:, None] * 4 + 2 + tl.arange(0, 2)[None, :]

    rate = tl.load(A + k * E * N + tile_offsets, mask=mask, other=0.0) * LOG2_E
    carry = tl.zeros([BLOCK_E, BLOCK_N // QUAD, QUAD], tl.float32)
    if carries is not None:
        right = carries + (segment * n_directions * n_batch + kb) * E * N + tile_offsets
        carry = tl.load(right, mask=mask, other=0.0)
    sum_A = tl.zeros([BLOCK_E, BLOCK_N // QUAD, QUAD], tl.float32)
    sum_D = tl.zeros([BLOCK_E], tl.float32)
    sum_bias = tl.zeros([BLOCK_E], tl.float32)

    n_chunks = (L + CHUNK - 1) // CHUNK
    start = segment * segment_chunks
    stop = tl.minimum(start + segment_chunks, n_chunks)
    for done in range(0, stop - start):
        chunk = stop - 1 - done
        n_groups = tl.minimum((L - chunk * CHUNK + GROUP - 1) // GROUP, CHUNK // GROUP)
        n_parts = tl.minimum((L - chunk * CHUNK + PART - 1) // PART, CHUNK // PART)
        steps = chunk * CHUNK + tl.arange(0, CHUNK)
        walked, _, _, _, _, _, _, _ = begin_walk(table, k, steps)
        tl.store(places + tl.arange(0, CHUNK), walked.to(tl.int32))
        h = tl.load(states + (kb * n_chunks + chunk) * E * N + tile_offsets, mask=mask, other=0.0)
        tl.debug_barrier()
        for i in range(0, n_parts):
            in_L = chunk * CHUNK + i * PART + t < L
            token = tl.load(places + i * PART + t)[:, None].to(tl.int64)
            e_mask = in_L[:, None] & (inside < width)[None, :]
            n_mask = in_L[:, None] & (n_flat < N)[None, :]
            d = _load(delta + token * delta_l + e[None, :] * delta_e, e_mask)
            if bias is not None:
                d += tl.load(bias + k * E + e, mask=inside < width, other=0.0)[None, :]
            if SOFTPLUS:
                d = softplus(d)
            d = tl.where(e_mask, d, 0.0)
            q = _load(dout + token * dout_l + e[None, :] * dout_e, e_mask)
            if z is not None:
                z_rows = _load(z + token * z_l + e[None, :] * z_e, e_mask)
                q *= z_rows * sigmoid(z_rows)
            du_rows = d * _load(u + token * u_l + e[None, :] * u_e, e_mask)
            rows = tl.join(tl.join(d, q), tl.join(du_rows, tl.zeros_like(d)))
            rows = tl.reshape(rows, [PART, BLOCK_E, 4])
            tl.store(scratch + i * (4 * PART * BLOCK_E) + block_of_4, rows)
            col = cols + i * (PART * BLOCK_N) + n_block
            tl.store(col, _load(B + token * B_l + n_flat[None, :] * B_n, n_mask))
            tl.store(col + COLS, _load(C + token * C_l + n_flat[None, :] * C_n, n_mask))
        tl.debug_barrier()

        p = tl.zeros([BLOCK_E, BLOCK_N // QUAD, QUAD], tl.float32)
        for i in range(0, n_groups):
            tl.store(kept + i * TILE, h)
            if WINDOW > 1:
                p *= tl.where(i * GROUP % WINDOW == 0, 0.0, 1.0)
                tl.store(kept_p + i * TILE, p)
            for j in tl.static_range(GROUP):
                at = i * GROUP + j
                d_t, du_t, q_t = _columns(scratch + at * (4 * BLOCK_E) + e_of_4)
                col = cols + at * BLOCK_N + n
                a = tl.exp2(rate * d_t)
                h = a * h + du_t * tl.load(col)[None, :, :]
                if WINDOW > 1:
                    p = a * (tl.load(col + COLS)[None, :, :] * q_t + p)
        tl.debug_barrier()

        back = tl.zeros([BLOCK_E, BLOCK_N // QUAD, QUAD], tl.float32)
        for behind in range(0, n_groups):
            i = n_groups - 1 - behind
            h = tl.load(kept + i * TILE)
            hs, decays, ps = (h,), (), ()
            if WINDOW > 1:
                p = tl.load(kept_p + i * TILE)
                back *= tl.where((i + 1) * GROUP % WINDOW == 0, 0.0, 1.0)
            for j in tl.static_range(GROUP):
                at = i * GROUP + j
                d_t, du_t, q_t = _columns(scratch + at * (4 * BLOCK_E) + e_of_4)
                col = cols + at * BLOCK_N + n
                a = tl.exp2(rate * d_t)
                h = a * h + du_t * tl.load(col)[None, :, :]
                hs += (h,)
                decays += (a,)
                if WINDOW > 1:
                    ps += (p,)
                    p = a * (tl.load(col + COLS)[None, :, :] * q_t + p)
            for j in tl.static_range(GROUP - 1, -1, -1):
                at = i * GROUP + j
                row = scratch + at * (4 * BLOCK_E)
                d_t, du_t, q_t = _columns(row + e_of_4)
                col = cols + at * BLOCK_N + n
                B_t, C_t = tl.load(col)[None, :, :], tl.load(col + COLS)[None, :, :]
                tl.debug_barrier()
                g = C_t * q_t + carry
                carry = g * decays[j]
                gradient_e = carry * hs[j]
                seen, dinput = hs[j + 1], g
                if WINDOW > 1:
                    own = C_t * q_t + ps[j]
                    passed = decays[j] * back
                    back = passed + du_t * B_t
                    gradient_e += own * passed
                    seen += passed
                    dinput += ps[j]
                sum_A += gradient_e * d_t
                if z is not None:
                    tl.store(row + y_of_4, tl.sum(tl.sum(seen * C_t, 2), 1))
                r = tl.sum(tl.sum(dinput * B_t, 2), 1)
                sum_e = tl.sum(tl.sum(gradient_e * rate, 2), 1)
                tl.store(row + sums_of_4, tl.join(r, sum_e))
                tl.store(col, tl.sum(dinput * du_t, 0))
                tl.store(col + COLS, tl.sum(seen * q_t, 0))
        tl.debug_barrier()

        for i in range(0, n_parts):
            in_L = chunk * CHUNK + i * PART + t < L
            token = tl.load(places + i * PART + t)[:, None].to(tl.int64)
            e_mask = in_L[:, None] & (inside < width)[None, :]
            n_mask = in_L[:, None] & (n_flat < N)[None, :]
            rows = tl.load(scratch + i * (4 * PART * BLOCK_E) + block_of_4)
            d_r, y_e = tl.split(tl.reshape(rows, [PART, BLOCK_E, 2, 2]))
            d, r = tl.split(d_r)
            y, sum_e = tl.split(y_e)
            u_rows = _load(u + token * u_l + e[None, :] * u_e, e_mask)
            q = _load(dout + token * dout_l + e[None, :] * dout_e, e_mask)
            at = token * E + e[None, :]
            if D is not None:
                skip = tl.load(D + k * E + e, mask=inside < width, other=0.0)[None, :]
            if z is not None:
                z_rows = _load(z + token * z_l + e[None, :] * z_e, e_mask)
                gate = sigmoid(z_rows)
                if D is not None:
                    y += skip * u_rows
                dz_rows = q * y * gate * (1.0 + z_rows * (1.0 - gate))
                q *= z_rows * gate
                if ADD_Z:
                    dz_rows += _load(dz + at, e_mask)
                tl.store(dz + at, dz_rows, mask=e_mask)
            # rate is A * log2(e)
            dd = u_rows * r + sum_e * (1.0 / LOG2_E)
            if SOFTPLUS:
                s = _load(delta + token * delta_l + e[None, :] * delta_e, e_mask)
                if bias is not None:
                    s += tl.load(bias + k * E + e, mask=inside < width, other=0.0)[None, :]
                dd *= sigmoid(s)
            du_rows = d * r
            if D is not None:
                du_rows += skip * q
                sum_D += tl.sum(q * u_rows, 0)
            if bias is not None:
                sum_bias += tl.sum(tl.where(e_mask, dd, 0.0), 0)
            if ADD_U:
                du_rows += _load(du + at, e_mask)
            tl.store(du + at, du_rows, mask=e_mask)
            tl.store(ddelta + at, dd, mask=e_mask)
            at = token * N + n_flat[None, :]
            col = cols + i * (PART * BLOCK_N) + n_block
            tl.store(dB + at, tl.load(col), mask=n_mask)
            tl.store(dC + at, tl.load(col + COLS), mask=n_mask)
        tl.debug_barrier()

    part = (segment * n_batch + b) * n_directions + k
    tl.store(dA + part * E * N + tile_offsets, sum_A, mask=mask)
    if D is not None:
        tl.store(dD + part * E + e, sum_D, mask=inside < width)
    if bias is not None:
        tl.store(dbias + part * E + e, sum_bias, mask=inside < width)
    if dinitial is not None:  # noqa: SIM102 (Triton 3.3 evaluates both sides of `and`)
        if segment == 0:
            tl.store(dinitial + kb * E * N + tile_offsets, carry, mask=mask)


@triton.jit
def _columns(pointers):
    """Return (d, d u, q) of a token's channels, each [BLOCK_E, lanes, 1]."""
    rows = tl.load(pointers)
    d_q, du_ = tl.split(tl.reshape(rows, [rows.shape[0], rows.shape[1], 2, 2]))
    d, q = tl.split(d_q)
    du, _ = tl.split(du_)
    return d[:, :, None], du[:, :, None], q[:, :, None]


@triton.jit(do_not_specialize=_SIZES[:-1])
def segment_carries(
    table, delta, z, dout, A, C, bias, carries, totals,
    delta_b, delta_k, delta_e, delta_l, z_b, z_k, z_e, z_l,
    dout_b, dout_k, dout_e, dout_l, C_b, C_k, C_g, C_n, C_l,
    n_batch, n_directions, E, L, G, n_tiles, n_segments, segment_chunks,
    N: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr, SOFTPLUS: tl.constexpr,
    CHUNK: tl.constexpr,
):  # fmt: skip
    """What every segment but the first passes back from its own tokens, and its sum of steps."""
    pid = tl.program_id(0).to(tl.int64)
    k, segment, b, group, _, inside, width = _place(
        pid, n_batch, G, n_tiles, n_segments - 1, E, BLOCK_E
    )
    e, mask_e = group * width + inside, inside < width
    segment += 1
    n = tl.arange(0, BLOCK_N)
    mask = mask_e[:, None] & (n < N)[None, :]
    tile_offsets = e[:, None] * N + n[None, :]
    delta += b * delta_b + k * delta_k + e * delta_e
    dout += b * dout_b + k * dout_k + e * dout_e
    C += b * C_b + k * C_k + group * C_g + n * C_n
    if z is not None:
        z += b * z_b + k * z_k + e * z_e
    rate = tl.load(A + k * E * N + tile_offsets, mask=mask, other=0.0) * LOG2_E
    shift = tl.zeros([BLOCK_E], tl.float32)
    if bias is not None:
        shift = tl.load(bias + k * E + e, mask=mask_e, other=0.0)
    carry = tl.zeros([BLOCK_E, BLOCK_N], tl.float32)
    total = tl.zeros([BLOCK_E], tl.float32)
    start = segment * segment_chunks * CHUNK
    stop = tl.minimum(start + segment_chunks * CHUNK, L)
    step = stop
    token, i1, i2, n1, n2, s0, s1, s2 = begin_walk(table, k, step)
    for _four in range(0, (stop - start + 3) // 4):
        for _token in tl.static_range(4):
            token, i1, i2 = previous_token(token, i1, i2, n1, n2, s0, s1, s2)
            step -= 1
            in_segment = step >= start
            row_mask = inside < tl.where(in_segment, width, 0)
            d = _load(delta + token * delta_l, row_mask) + shift
            if SOFTPLUS:
                d = softplus(d)
            d = tl.where(in_segment, d, 0.0)
            q = _load(dout + token * dout_l, row_mask)
            if z is not None:
                z_t = _load(z + token * z_l, row_mask)
                q = q * z_t * sigmoid(z_t)
            C_t = _load(C + token * C_l, n < tl.where(in_segment, N, 0))
            carry = tl.exp2(rate * d[:, None]) * (C_t[None, :] * q[:, None] + carry)
            total += d
    part = (segment * n_directions + k) * n_batch + b
    tl.store(carries + part * E * N + tile_offsets, carry, mask=mask)
    tl.store(totals + part * E + e, total, mask=mask_e)


@triton.jit(do_not_specialize=("n_segments", "n_carries", "n_batch"))
def carry_over(
    A, dlast, carries, totals, n_segments, n_carries, n_batch, E,
    N: tl.constexpr, BLOCK: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """Replaces what each segment passes back by what it receives, from the last to the first."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = i < n_carries
    k = i // (n_batch * E * N)
    rate = tl.load(A + k * E * N + i % (E * N), mask=mask, other=0.0) * LOG2_E
    carry = tl.zeros([BLOCK], tl.float32)
    if dlast is not None:
        carry = tl.load(dlast + i, mask=mask, other=0.0)
    carries += i
    totals += i // N
    for done in range(0, n_segments, UNROLL):
        own, sums = (), ()
        for j in tl.static_range(UNROLL):
            segment = (n_segments - 1 - done - j).to(tl.int64)
            loaded = i < tl.where(segment > 0, n_carries, 0)
            own += (tl.load(carries + segment * n_carries, mask=loaded, other=0.0),)
            sums += (tl.load(totals + segment * (n_carries // N), mask=loaded, other=0.0),)
        for j in tl.static_range(UNROLL):
            segment = (n_segments - 1 - done - j).to(tl.int64)
            stored = i < tl.where(segment >= 0, n_carries, 0)
            tl.store(carries + segment * n_carries, carry, mask=stored)
            carry = tl.exp2(rate * sums[j]) * carry + own[j]
