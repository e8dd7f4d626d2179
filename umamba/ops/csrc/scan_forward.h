/* Selective scan, forward: out and the saved states; one work item is a sample and a range of channels.
 *
 * Channels lie across the lanes, a group of states in registers, tokens in the inner loop; the channel
 * blocks of an item are inside the chunk loop, so that the chunk's rows of B and C stay in cache.
 * Letters: T tokens of a chunk, N states, block = LANES channels of one group. */
#include "carry.h"

/* Channel blocks never straddle a group; a group's last block may be partial. */
typedef struct {
    int64_t group, channel, lanes;
} Block;

/* Items of several blocks: neighbours in memory are then read one after another. */
typedef struct {
    int64_t blocks_per_group, blocks_per_item, items_per_group, n_items, n_chunks;
} Split;

#define MOST_BLOCKS 32

static Split split_channels(int64_t B, int64_t L, int64_t G, int64_t blocks_per_group,
                            int64_t blocks_per_item) {
    Split s = {.blocks_per_group = blocks_per_group, .n_chunks = divide_up(L, CHUNK)};
    s.blocks_per_item = smaller(smaller(blocks_per_item, MOST_BLOCKS), blocks_per_group);
    s.items_per_group = divide_up(blocks_per_group, s.blocks_per_item);
    s.n_items = B * G * s.items_per_group;
    return s;
}

INLINE Block block_at(int64_t D, int64_t G, int64_t group, int64_t j) {
    int64_t size = D / G;
    return (Block){group, group * size + j * LANES, smaller(LANES, size - j * LANES)};
}

/* (N, LANES) <-> the states of one block in a (B, D, N) array */
static void load_state(const float *x, int64_t N, int64_t lanes, float *out) {
    for (int64_t n = 0; n < N; n++)
        for (int64_t k = 0; k < LANES; k++)
            out[n * LANES + k] = x && k < lanes ? x[k * N + n] : 0.0f;
}

static void store_state(float *x, int64_t N, int64_t lanes, const float *in) {
    for (int64_t k = 0; k < lanes; k++)
        for (int64_t n = 0; n < N; n++) x[k * N + n] = in[n * LANES + k];
}

/* The constants of a block: rows of A * log2(e) for N states, then of the skip and of the bias. */
static void load_constants(const float *A, const float *skip, const float *bias, int64_t N, Block k,
                           float *out) {
    load_state(A + k.channel * N, N, k.lanes, out);
    for (int64_t i = 0; i < N * LANES; i++) out[i] *= LOG2E;
    load_state(skip ? skip + k.channel : NULL, 1, k.lanes, out + N * LANES);
    load_state(bias ? bias + k.channel : NULL, 1, k.lanes, out + (N + 1) * LANES);
}

INLINE void begin_block(const int with_softplus, int64_t T, Rows u, Rows delta, vf skip, vf bias,
                        float *d, float *du, float *y) {
    for (int64_t t = 0; t < T; t++) {
        const vf ut = vload(u.rows + t * u.stride);
        vf dt = vload(delta.rows + t * delta.stride) + bias, slope;
        if (with_softplus) dt = softplus(dt, &slope);
        vstore(d + t * LANES, dt);
        vstore(du + t * LANES, dt * ut);
        vstore(y + t * LANES, skip * ut);
    }
}

/* n_states states of a block over one chunk: y += sum_n C h. */
INLINE void forward_group(const int n_states, int64_t T, const float *d, const float *du, float *y,
                          Rows Bc, Rows Cc, const float *A2, float *state, Ahead *ahead) {
    vf h[8], rate[8];
#pragma GCC unroll 8
    for (int i = 0; i < n_states; i++) {
        h[i] = vload(state + i * LANES);
        rate[i] = vload(A2 + i * LANES);
    }
    for (int64_t t = 0; t < T; t++) {
        const float *Bt = Bc.rows + t * Bc.stride, *Ct = Cc.rows + t * Cc.stride;
        const vf dt = vload(d + t * LANES), dut = vload(du + t * LANES);
        vf even = vload(y + t * LANES), odd = (vf){0};
        if (ahead) fetch_ahead(4, ahead);
#pragma GCC unroll 8
        for (int i = 0; i < n_states; i++) {
            h[i] = vfma(exp2_product(dt, rate[i]), h[i], dut * Bt[i]);
            if (i % 2)
                odd = vfma(h[i], vset(Ct[i]), odd);
            else
                even = vfma(h[i], vset(Ct[i]), even);
        }
        vstore(y + t * LANES, even + odd);
    }
#pragma GCC unroll 8
    for (int i = 0; i < n_states; i++) vstore(state + i * LANES, h[i]);
}

/* As many states at once as the registers hold. */
APART void forward_states(int64_t T, int64_t N, const float *d, const float *du, float *y, Rows Bc,
                           Rows Cc, const float *A2, float *state, Ahead *ahead) {
    int64_t n = 0;
#define GROUP(k)                                                                            \
    for (; n + k <= N; n += k)                                                              \
        forward_group(k, T, d, du, y, (Rows){Bc.rows + n, Bc.stride},                       \
                      (Rows){Cc.rows + n, Cc.stride}, A2 + n * LANES, state + n * LANES,         \
                      n ? NULL : ahead);
#if LANES == 16
    GROUP(8)
#endif
    GROUP(4)
    GROUP(2)
    GROUP(1)
#undef GROUP
}

/* Likewise for a local_window; defined in scan_local.h. */
APART void local_forward_states(int64_t T, int64_t N, int64_t window, const float *d, const float *du,
                                 float *y, Rows Bc, Rows Cc, const float *A2, float *state,
                                 float *decays, Ahead *ahead);

typedef struct {
    const ScanForward *s;
    Split split;
    float *scratch;
    int64_t scratch_size;
    int apart; /* tokens are carried in spans */
    int64_t span;
} ForwardJob;

/* The saved states before chunk c: N rows, D apart. */
INLINE float *state_rows(const ScanForward *s, int64_t b, int64_t c, int64_t channel) {
    return s->states + (b * divide_up(s->L, CHUNK) + c) * s->N * s->D + channel;
}

static void forward_item(void *context, int64_t item, int64_t worker) {
    const ForwardJob *job = context;
    const ScanForward *s = job->s;
    const int64_t N = s->N, D = s->D, L = s->L;
    const int64_t b = item / (s->G * job->split.items_per_group);
    const int64_t group = item / job->split.items_per_group % s->G;
    const int64_t first = item % job->split.items_per_group * job->split.blocks_per_item;
    const int64_t n_blocks = smaller(job->split.blocks_per_item, job->split.blocks_per_group - first);

    float *staged_b = job->scratch + worker * job->scratch_size, *staged_c = staged_b + CHUNK * N;
    float *d = staged_c + CHUNK * N, *du = d + CHUNK * LANES, *y = du + CHUNK * LANES;
    float *staged_u = y + CHUNK * LANES, *staged_delta = staged_u + CHUNK * LANES;
    float *state = staged_delta + CHUNK * LANES, *constants = state + n_blocks * N * LANES;
    float *decays = constants + n_blocks * (N + 2) * LANES;

    for (int64_t j = 0; j < n_blocks; j++) {
        const Block k = block_at(D, s->G, group, first + j);
        load_state(s->initial ? s->initial + (b * D + k.channel) * N : NULL, N, k.lanes,
                   state + j * N * LANES);
        for (int64_t n = 0; n < N && s->states; n++)
            store_lanes(state_rows(s, b, 0, k.channel) + n * D, k.lanes,
                        vload(state + (j * N + n) * LANES));
        load_constants(s->A, s->skip, s->bias, N, k, constants + j * (N + 2) * LANES);
    }

#define AT(x) (s->x.batch * b + s->x.group * group)
#define FIRST(x) (AT(x) + block_at(D, s->G, group, first).channel * s->x.channel)
    const int64_t size = D / s->G, pitch = n_blocks * LANES, columns = smaller(pitch, size - first * LANES);
    const int64_t per_span = job->span / CHUNK;
    Carrier carrier;
    if (job->apart) {
        begin_carrier(&carrier, &s->walk, L, job->span, 0);
        float *end = decays + s->local_window * 8 * LANES;
        end = add_carried(&carrier, &s->u, FIRST(u), &s->out, FIRST(out), columns, pitch, end);
        end = add_carried(&carrier, &s->delta, FIRST(delta), NULL, 0, columns, pitch, end);
        end = add_carried(&carrier, &s->z, FIRST(z), NULL, 0, columns, pitch, end);
        end = add_carried(&carrier, &s->Bm, AT(Bm), NULL, 0, N, N, end);
        add_carried(&carrier, &s->Cm, AT(Cm), NULL, 0, N, N, end);
        carry_alone(&carrier, -1, 0);
    }
    for (int64_t c = 0; c < job->split.n_chunks; c++) {
        const int64_t T = smaller(CHUNK, L - c * CHUNK);
        const Places here = places_on_line(&s->walk, c * CHUNK);
        const Places next = places_on_line(&s->walk, (c + 1) * CHUNK);
        Rows Bc, Cc;
        Ahead ahead = {.n_blocks = n_blocks};
        if (job->apart) {
            Bc = carried_rows(&carrier, 3, c * CHUNK, 0);
            Cc = carried_rows(&carrier, 4, c * CHUNK, 0);
            if (c % per_span == 0) {
                const int64_t left = job->split.n_chunks - c, span = c / per_span;
                carry_between(&carrier, span - 1, left > per_span ? span + 1 : -1,
                              smaller(per_span, left) * n_blocks);
            }
        } else {
            Bc = read_states(&s->Bm, AT(Bm), &here, T, N, staged_b);
            Cc = read_states(&s->Cm, AT(Cm), &here, T, N, staged_c);
            expect(&ahead, 0, &s->u, FIRST(u), &next);
            expect(&ahead, 1, &s->delta, FIRST(delta), &next);
            expect(&ahead, 2, &s->z, FIRST(z), &next);
            expect(&ahead, 3, &s->out, FIRST(out), &next);
        }
        for (int64_t j = 0; j < n_blocks; j++) {
            const Block k = block_at(D, s->G, group, first + j);
            const int64_t out_at = AT(out) + k.channel;
            float *h = state + j * N * LANES, *A2 = constants + j * (N + 2) * LANES;
            float *next_state = NULL;
            if (s->states && c + 1 < job->split.n_chunks)
                next_state = state_rows(s, b, c + 1, k.channel);
            for (int64_t n = 0; n < N && next_state; n++)
                __builtin_prefetch(next_state + n * D, 1, 2);
            if (job->apart) expect_share(&carrier, &ahead, T);
#define READ(i, x, scratch)                               \
    (job->apart ? carried_rows(&carrier, i, c * CHUNK, j)         \
                : read_rows(&s->x, AT(x) + k.channel * s->x.channel, &here, T, k.lanes, scratch))
            const Rows u = READ(0, u, staged_u), delta = READ(1, delta, staged_delta);
            const vf skip = vload(A2 + N * LANES), bias = vload(A2 + (N + 1) * LANES);
            if (s->softplus)
                begin_block(1, T, u, delta, skip, bias, d, du, y);
            else
                begin_block(0, T, u, delta, skip, bias, d, du, y);
            if (s->local_window > 1)
                local_forward_states(T, N, s->local_window, d, du, y, Bc, Cc, A2, h, decays, &ahead);
            else
                forward_states(T, N, d, du, y, Bc, Cc, A2, h, &ahead);

            /* u is not read again: its rows may take the result */
            const Rows out = job->apart ? u : write_rows(&s->out, out_at, &here, k.lanes, y);
            if (s->z.data) {
                const Rows z = READ(2, z, staged_u);
                for (int64_t t = 0; t < T; t++) {
                    const vf zt = vload(z.rows + t * z.stride);
                    vstore(out.rows + t * out.stride, vload(y + t * LANES) * zt * sigmoid(zt));
                }
            } else if (out.rows != y) {
                for (int64_t t = 0; t < T; t++)
                    vstore(out.rows + t * out.stride, vload(y + t * LANES));
            }
            finish_rows(&s->out, out, out_at, &here, T, k.lanes, y);
            for (int64_t n = 0; n < N && next_state; n++)
                store_lanes(next_state + n * D, k.lanes, vload(h + n * LANES));
            if (job->apart) move_share(&carrier);
#undef READ
        }
    }
    if (job->apart) carry_alone(&carrier, (job->split.n_chunks - 1) / per_span, -1);
#undef AT
#undef FIRST
    for (int64_t j = 0; j < n_blocks; j++) {
        const Block k = block_at(D, s->G, group, first + j);
        store_state(s->last + (b * D + k.channel) * N, N, k.lanes, state + j * N * LANES);
    }
}

static int scan_forward(const ScanForward *s) {
    /* channels do not meet in the forward: the split may suit the threads and never shows */
    const int64_t blocks = divide_up(s->D / s->G, LANES), total = s->B * s->G * blocks;
    const int64_t rounds = divide_up(divide_up(total, MOST_BLOCKS), s->n_threads);
    ForwardJob job = {.s = s, .split = split_channels(s->B, s->L, s->G, blocks,
                                                      divide_up(total, rounds * s->n_threads))};
    const int64_t threads = smaller(s->n_threads, job.split.n_items);
    const int64_t carried = 3 * job.split.blocks_per_item * LANES + 2 * s->N;
    job.apart = !is_line(&s->walk, s->L);
    job.span = find_span(&s->walk, carried);
    job.scratch_size = padded(2 * CHUNK * s->N + 5 * CHUNK * LANES
                              + job.split.blocks_per_item * (2 * s->N + 2) * LANES
                              + s->local_window * 8 * LANES + (job.apart ? 2 * job.span * carried : 0));
    job.scratch = allocate(threads * job.scratch_size);
    if (!job.scratch) return STATUS_NO_MEMORY;
    umamba_parallel(threads, job.split.n_items, forward_item, &job);
    free(job.scratch);
    return STATUS_DONE;
}
