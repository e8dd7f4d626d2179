/* Selective scan, backward: every gradient; one work item is a sample and a range of channels.
 *
 * Chunks are taken last to first. Within one, a few states at a time are recomputed from the saved
 * state (decays a and states h of the chunk stay in cache), then swept in reverse. dB and dC are kept as
 * vectors over the channel blocks of the item, summed over the lanes once, and over the items of a
 * group in index order by whoever finishes last. A window of chunks bounds the memory of those parts. */
#include "scan_forward.h"

#include <stdatomic.h>

#define WINDOW 32 /* chunks */
#define ROWS (CHUNK * LANES + 16) /* 4096 bytes apart, loads would wait for unrelated stores */

#if LANES == 16
#define BACKWARD_STATES 4
#else
#define BACKWARD_STATES 2
#endif

/* The arrays of one block and chunk, each (T, LANES). */
typedef struct {
    float *d, *du, *q, *y, *r, *decay_sum, *slope, *staged_u, *staged_delta, *staged_z, *staged_dout;
} BlockRows;

/* One group of states over one chunk. sum_b, sum_c: (T, n_states, LANES). */
INLINE void backward_group(const int n_states, const int need_y, const int add, int64_t T, int64_t N,
                           const BlockRows *m, const float *Bc, const float *Cc, const float *A2,
                           const float *initial, float *decays, float *before, float *carry, float *dA,
                           float *sum_b, float *sum_c) {
    vf h[BACKWARD_STATES], g[BACKWARD_STATES], da[BACKWARD_STATES];
#pragma GCC unroll 4
    for (int i = 0; i < n_states; i++) h[i] = vload(initial + i * LANES);
    for (int64_t t = 0; t < T; t++) {
        const vf dt = vload(m->d + t * LANES), dut = vload(m->du + t * LANES);
        vf y = need_y ? vload(m->y + t * LANES) : (vf){0};
#pragma GCC unroll 4
        for (int i = 0; i < n_states; i++) {
            const vf a = exp2_product(dt, vload(A2 + i * LANES));
            vstore(decays + (t * n_states + i) * LANES, a);
            vstore(before + (t * n_states + i) * LANES, h[i]);
            h[i] = vfma(a, h[i], dut * Bc[t * N + i]);
            if (need_y) y = vfma(h[i], vset(Cc[t * N + i]), y);
        }
        if (need_y) vstore(m->y + t * LANES, y);
    }
#pragma GCC unroll 4
    for (int i = 0; i < n_states; i++) {
        g[i] = vload(carry + i * LANES);
        da[i] = (vf){0};
    }
    for (int64_t t = T - 1; t >= 0; t--) {
        const vf dt = vload(m->d + t * LANES), dut = vload(m->du + t * LANES);
        const vf q = vload(m->q + t * LANES);
        vf r = vload(m->r + t * LANES), decay_sum = vload(m->decay_sum + t * LANES);
#pragma GCC unroll 4
        for (int i = 0; i < n_states; i++) {
            const int64_t at = (t * n_states + i) * LANES;
            const vf h_before = vload(before + at);
            g[i] = vfma(q, vset(Cc[t * N + i]), g[i]);
            vstore(sum_c + at, add ? vfma(q, h[i], vload(sum_c + at)) : q * h[i]);
            vstore(sum_b + at, add ? vfma(dut, g[i], vload(sum_b + at)) : dut * g[i]);
            r = vfma(g[i], vset(Bc[t * N + i]), r);
            g[i] *= vload(decays + at);
            const vf e = g[i] * h_before;
            decay_sum = vfma(e, vload(A2 + i * LANES), decay_sum);
            da[i] = vfma(dt, e, da[i]);
            h[i] = h_before;
        }
        vstore(m->r + t * LANES, r);
        vstore(m->decay_sum + t * LANES, decay_sum);
    }
#pragma GCC unroll 4
    for (int i = 0; i < n_states; i++) {
        vstore(carry + i * LANES, g[i]);
        vstore(dA + i * LANES, vload(dA + i * LANES) + da[i]);
    }
}

static void backward_states(int need_y, int add, int64_t T, int64_t N, const BlockRows *m,
                            const float *Bc, const float *Cc, const float *A2, const float *initial,
                            float *decays, float *before, float *carry, float *dA, float *sum_b,
                            float *sum_c) {
    int64_t n = 0;
#define GROUP(k, y, a)                                                                             \
    backward_group(k, y, a, T, N, m, Bc + n, Cc + n, A2 + n * LANES, initial + n * LANES, decays,  \
                   before, carry + n * LANES, dA + n * LANES, sum_b + n * T * LANES,               \
                   sum_c + n * T * LANES)
#define GROUPS(k)                            \
    for (; n + k <= N; n += k) {             \
        if (need_y && add) GROUP(k, 1, 1);   \
        else if (need_y) GROUP(k, 1, 0);     \
        else if (add) GROUP(k, 0, 1);        \
        else GROUP(k, 0, 0);                 \
    }
#if BACKWARD_STATES == 4
    GROUPS(4)
#endif
    GROUPS(2)
    GROUPS(1)
#undef GROUPS
#undef GROUP
}

/* Over the lanes, and from groups of states to rows of N: out[t][n]. */
static void sum_blocks(int64_t T, int64_t N, const float *sums, float *flat, float *out) {
    for (int64_t k = 0; k < T * N; k += LANES) vstore(flat + k, sum_lanes(sums + k * LANES));
    int64_t width = BACKWARD_STATES;
    for (int64_t first = 0; first < N; first += width) {
        while (first + width > N) width /= 2;
        for (int64_t t = 0; t < T; t++)
            for (int64_t i = 0; i < width; i++)
                out[t * N + first + i] = flat[first * T + t * width + i];
    }
}

typedef struct {
    const ScanBackward *s;
    Split split;
    int64_t first_chunk, last_chunk; /* the window: [first, last) */
    float *scratch, *part_b, *part_c, *carry, *dA;
    int64_t scratch_size, part_size;
    atomic_llong *unfinished; /* per sample and group */
} BackwardJob;

/* dB or dC of the window: the items' parts in index order. */
static void sum_parts(const BackwardJob *job, const float *parts, const Tensor *x, int64_t offset,
                      int64_t step, float *row) {
    const int64_t N = job->s->N, L = job->s->L;
    for (int64_t c = job->first_chunk; c < job->last_chunk; c++) {
        const int64_t T = smaller(CHUNK, L - c * CHUNK);
        const float *part = parts + (c - job->first_chunk) * CHUNK * N;
        float *total = row;
        for (int64_t k = 0; k < T * N; k++) total[k] = part[k];
        for (int64_t i = 1; i < job->split.items_per_group; i++)
            for (int64_t k = 0; k < T * N; k++) total[k] += part[i * job->part_size + k];
        copy_out(element(x, offset + step * c * CHUNK), x->dtype, step, T, N, N, total);
    }
}

static void backward_block(const BackwardJob *job, int64_t b, Block k, int64_t c, int add,
                           const BlockRows *m, const float *Bc, const float *Cc, float *A2,
                           float *decays, float *before, float *carry, float *dA, float *sum_b,
                           float *sum_c) {
    const ScanBackward *s = job->s;
    const int64_t N = s->N, D = s->D, T = smaller(CHUNK, s->L - c * CHUNK);
    const int64_t t0 = token_at(c * CHUNK, s->L, s->reverse), sign = s->reverse ? -1 : 1;
    const int gate = s->z.data != NULL;
    float skip[LANES] __attribute__((aligned(64))), bias[LANES] __attribute__((aligned(64)));
    float sums[LANES] __attribute__((aligned(64)));
    float initial[64 * LANES] __attribute__((aligned(64)));
    load_channels(s->skip ? s->skip + k.channel : NULL, k.lanes, 0.0f, skip);
    load_channels(s->bias ? s->bias + k.channel : NULL, k.lanes, 0.0f, bias);
    load_state(s->A + k.channel * N, N, k.lanes, A2);
    for (int64_t i = 0; i < N * LANES; i++) A2[i] *= LOG2E;
    copy_in(s->states + ((b * job->split.n_chunks + c) * N) * D + k.channel, DTYPE_F32, D, 1, N, k.lanes,
            LANES, initial);

#define AT(x) (s->x.batch * b + s->x.channel * k.channel + s->x.token * t0)
#define READ(x, scratch) read_rows(&s->x, AT(x), sign * s->x.token, T, k.lanes, scratch)
#define WRITE(x, scratch) write_rows(&s->x, AT(x), sign * s->x.token, k.lanes, scratch)
#define FINISH(x, r, scratch) finish_rows(&s->x, r, AT(x), sign * s->x.token, T, k.lanes, scratch)
    const Rows u = READ(u, m->staged_u), delta = READ(delta, m->staged_delta);
    const Rows dout = READ(dout, m->staged_dout);
    const Rows z = gate ? READ(z, m->staged_z) : dout;
    const vf vskip = vload(skip), vbias = vload(bias);
    for (int64_t t = 0; t < T; t++) {
        const vf ut = vload(u.rows + t * u.stride);
        vf dt = vload(delta.rows + t * delta.stride) + vbias, slope = vset(1.0f);
        vf q = vload(dout.rows + t * dout.stride);
        if (s->softplus) dt = softplus(dt, &slope);
        if (gate) {
            const vf zt = vload(z.rows + t * z.stride);
            q *= zt * sigmoid(zt);
        }
        vstore(m->d + t * LANES, dt);
        vstore(m->slope + t * LANES, slope);
        vstore(m->du + t * LANES, dt * ut);
        vstore(m->q + t * LANES, q);
        vstore(m->y + t * LANES, vskip * ut);
        vstore(m->r + t * LANES, (vf){0});
        vstore(m->decay_sum + t * LANES, (vf){0});
    }

    backward_states(gate, add, T, N, m, Bc, Cc, A2, initial, decays, before, carry, dA, sum_b, sum_c);

    const Rows du = WRITE(du, m->du), ddelta = WRITE(ddelta, m->d);
    vf dskip = {0}, dbias = {0};
    for (int64_t t = 0; t < T; t++) {
        const vf ut = vload(u.rows + t * u.stride), q = vload(m->q + t * LANES);
        const vf r = vload(m->r + t * LANES);
        const vf change = vfma(ut, r, vload(m->decay_sum + t * LANES) * LN2) * vload(m->slope + t * LANES);
        dskip = vfma(q, ut, dskip);
        dbias += change;
        vstore(du.rows + t * du.stride, vfma(vload(m->d + t * LANES), r, vskip * q));
        vstore(ddelta.rows + t * ddelta.stride, change);
    }
    FINISH(du, du, m->du);
    FINISH(ddelta, ddelta, m->d);
    if (gate) {
        const Rows dz = WRITE(dz, m->r);
        for (int64_t t = 0; t < T; t++) {
            const vf zt = vload(z.rows + t * z.stride), sg = sigmoid(zt);
            const vf slope = sg * vfma(zt, 1.0f - sg, vset(1.0f));
            vstore(dz.rows + t * dz.stride,
                   vload(dout.rows + t * dout.stride) * vload(m->y + t * LANES) * slope);
        }
        FINISH(dz, dz, m->r);
    }
#undef AT
#undef READ
#undef WRITE
#undef FINISH
    vstore(sums, dskip);
    for (int64_t i = 0; i < k.lanes && s->dskip; i++) s->dskip[b * D + k.channel + i] += sums[i];
    vstore(sums, dbias);
    for (int64_t i = 0; i < k.lanes && s->dbias; i++) s->dbias[b * D + k.channel + i] += sums[i];
}

static void backward_item(void *context, int64_t item, int64_t worker) {
    const BackwardJob *job = context;
    const ScanBackward *s = job->s;
    const int64_t N = s->N, D = s->D, L = s->L, per_item = job->split.blocks_per_item;
    const int64_t place = item / job->split.items_per_group; /* sample and group */
    const int64_t b = place / s->G, group = place % s->G;
    const int64_t first = item % job->split.items_per_group * per_item;
    const int64_t n_blocks = smaller(per_item, job->split.blocks_per_group - first);
    const int64_t sign = s->reverse ? -1 : 1, start = token_at(0, L, s->reverse);
    float *carry = job->carry + item * per_item * N * LANES;
    float *dA = job->dA + item * per_item * N * LANES;

    float *p = job->scratch + worker * job->scratch_size;
    float *Bc = p, *Cc = Bc + CHUNK * N, *A2 = Cc + CHUNK * N;
    float *sum_b = A2 + N * LANES, *sum_c = sum_b + CHUNK * N * LANES + 16;
    float *decays = sum_c + CHUNK * N * LANES + 16;
    float *before = decays + BACKWARD_STATES * CHUNK * LANES + 16;
    float *flat = before + BACKWARD_STATES * CHUNK * LANES + 16, *rows = flat + CHUNK * N;
    const BlockRows m = {rows,            rows + ROWS,     rows + 2 * ROWS, rows + 3 * ROWS,
                         rows + 4 * ROWS, rows + 5 * ROWS, rows + 6 * ROWS, rows + 7 * ROWS,
                         rows + 8 * ROWS, rows + 9 * ROWS, rows + 10 * ROWS};

    if (job->last_chunk == job->split.n_chunks)
        for (int64_t j = 0; j < n_blocks; j++) {
            const Block k = block_at(D, s->G, group, first + j);
            load_state(s->dlast ? s->dlast + (b * D + k.channel) * N : NULL, N, k.lanes,
                       carry + j * N * LANES);
            memset(dA + j * N * LANES, 0, (size_t)(N * LANES) * sizeof(float));
            for (int64_t i = 0; i < k.lanes; i++) {
                if (s->dskip) s->dskip[b * D + k.channel + i] = 0.0f;
                if (s->dbias) s->dbias[b * D + k.channel + i] = 0.0f;
            }
        }

#define AT(x) (s->x.batch * b + s->x.group * group + s->x.token * start)
    for (int64_t c = job->last_chunk - 1; c >= job->first_chunk; c--) {
        const int64_t T = smaller(CHUNK, L - c * CHUNK);
        const int64_t step_b = sign * s->Bm.token, step_c = sign * s->Cm.token;
        copy_in(element(&s->Bm, AT(Bm) + step_b * c * CHUNK), s->Bm.dtype, step_b, s->Bm.channel, T, N,
                N, Bc);
        copy_in(element(&s->Cm, AT(Cm) + step_c * c * CHUNK), s->Cm.dtype, step_c, s->Cm.channel, T, N,
                N, Cc);
        for (int64_t j = 0; j < n_blocks; j++)
            backward_block(job, b, block_at(D, s->G, group, first + j), c, j > 0, &m, Bc, Cc,
                           A2, decays, before, carry + j * N * LANES, dA + j * N * LANES, sum_b, sum_c);

        float *part_b = job->part_b + item * job->part_size + (c - job->first_chunk) * CHUNK * N;
        float *part_c = job->part_c + item * job->part_size + (c - job->first_chunk) * CHUNK * N;
        sum_blocks(T, N, sum_b, flat, part_b);
        sum_blocks(T, N, sum_c, flat, part_c);
    }
    if (job->first_chunk == 0)
        for (int64_t j = 0; j < n_blocks; j++) {
            const Block k = block_at(D, s->G, group, first + j);
            store_state(s->dA + (b * D + k.channel) * N, N, k.lanes, dA + j * N * LANES);
            if (s->dinitial)
                store_state(s->dinitial + (b * D + k.channel) * N, N, k.lanes, carry + j * N * LANES);
        }
    if (atomic_fetch_sub(job->unfinished + place, 1) == 1) {
        const int64_t at = place * job->split.items_per_group * job->part_size;
        sum_parts(job, job->part_b + at, &s->dBm, AT(dBm), sign * s->dBm.token, flat);
        sum_parts(job, job->part_c + at, &s->dCm, AT(dCm), sign * s->dCm.token, flat);
    }
#undef AT
}

static int scan_backward(const ScanBackward *s) {
    BackwardJob job = {.s = s, .split = split_channels(s->B, s->D, s->L, s->G, 2)};
    const int64_t N = s->N, threads = smaller(s->n_threads, job.split.n_items);
    const int64_t carried = job.split.n_items * job.split.blocks_per_item * N * LANES;
    job.part_size = smaller(WINDOW, job.split.n_chunks) * CHUNK * N;
    job.scratch_size = padded(3 * CHUNK * N + N * LANES + 2 * CHUNK * N * LANES
                              + 2 * BACKWARD_STATES * CHUNK * LANES + 11 * ROWS + 64);
    job.scratch = allocate(threads * job.scratch_size);
    job.part_b = allocate(2 * job.split.n_items * job.part_size);
    job.carry = allocate(2 * carried);
    job.unfinished = malloc((size_t)(s->B * s->G) * sizeof *job.unfinished);
    const int enough = job.scratch && job.part_b && job.carry && job.unfinished;
    if (enough) {
        job.part_c = job.part_b + job.split.n_items * job.part_size;
        job.dA = job.carry + carried;
        for (job.last_chunk = job.split.n_chunks; job.last_chunk > 0; job.last_chunk = job.first_chunk) {
            job.first_chunk = larger(0, job.last_chunk - WINDOW);
            for (int64_t i = 0; i < s->B * s->G; i++) job.unfinished[i] = job.split.items_per_group;
            umamba_parallel(threads, job.split.n_items, backward_item, &job);
        }
        sum_into_first(s->dA, s->B, s->D * N);
        sum_into_first(s->dskip, s->B, s->D);
        sum_into_first(s->dbias, s->B, s->D);
    }
    free(job.scratch);
    free(job.part_b);
    free(job.carry);
    free(job.unfinished);
    return enough ? STATUS_DONE : STATUS_NO_MEMORY;
}
