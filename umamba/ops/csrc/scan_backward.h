/* Selective scan, backward: every gradient; one work item is a sample and a range of channels.
 *
 * Chunks are taken last to first. Within one, a few states at a time are recomputed from the saved
 * state (decays a and states h of the chunk stay in cache), then swept in reverse. dB and dC are kept as
 * vectors over the channel blocks of the item, summed over the lanes once, and over the items of a
 * group in index order by whoever finishes last. A window of chunks bounds the memory of those parts. */
#include "scan_forward.h"

#include <stdatomic.h>

#define WINDOW 32 /* chunks */

#if LANES == 16
#define BACKWARD_STATES 4
#else
#define BACKWARD_STATES 2
#endif

/* The arrays of one block and chunk, each (T, LANES); gate is d out / d z over y. */
typedef struct {
    float *d, *du, *q, *y, *r, *decay_sum, *slope, *gate;
    float *staged_u, *staged_delta, *staged_z, *staged_dout;
} BlockRows;

/* One group of states over one chunk; sum_b, sum_c (T, LANES) take the folded dB and dC. */
INLINE void backward_group(const int n_states, const int need_y, const int add, int64_t T,
                           const BlockRows *rows, Rows Bc, Rows Cc, const float *A2,
                           const float *initial, float *decays, float *before, float *carry, float *dA,
                           float *sum_b, float *sum_c, const Ahead *ahead) {
    const BlockRows copy = *rows, *m = &copy; /* no store can change it */
    vf h[BACKWARD_STATES], g[BACKWARD_STATES], da[BACKWARD_STATES], rate[BACKWARD_STATES];
#pragma GCC unroll 4
    for (int i = 0; i < n_states; i++) {
        h[i] = vload(initial + i * LANES);
        rate[i] = vload(A2 + i * LANES);
    }
    for (int64_t t = 0; t < T; t++) {
        const float *Bt = Bc.rows + t * Bc.stride, *Ct = Cc.rows + t * Cc.stride;
        const vf dt = vload(m->d + t * LANES), dut = vload(m->du + t * LANES);
        vf y = need_y ? vload(m->y + t * LANES) : (vf){0};
        if (ahead) fetch_ahead(ahead, t);
#pragma GCC unroll 4
        for (int i = 0; i < n_states; i++) {
            const vf a = exp2_product(dt, rate[i]);
            vstore(decays + (t * n_states + i) * LANES, a);
            vstore(before + (t * n_states + i) * LANES, h[i]);
            h[i] = vfma(a, h[i], dut * Bt[i]);
            if (need_y) y = vfma(h[i], vset(Ct[i]), y);
        }
        if (need_y) vstore(m->y + t * LANES, y);
    }
#pragma GCC unroll 4
    for (int i = 0; i < n_states; i++) {
        g[i] = vload(carry + i * LANES);
        da[i] = (vf){0};
    }
    for (int64_t t = T - 1; t >= 0; t--) {
        const float *Bt = Bc.rows + t * Bc.stride, *Ct = Cc.rows + t * Cc.stride;
        const vf dt = vload(m->d + t * LANES), dut = vload(m->du + t * LANES);
        const vf q = vload(m->q + t * LANES);
        vf r = vload(m->r + t * LANES), decay_sum = vload(m->decay_sum + t * LANES);
        vf db[BACKWARD_STATES], dc[BACKWARD_STATES];
        if (ahead) fetch_ahead(ahead + 1, t);
#pragma GCC unroll 4
        for (int i = 0; i < n_states; i++) {
            g[i] = vfma(q, vset(Ct[i]), g[i]);
            dc[i] = q * h[i];
            db[i] = dut * g[i];
            r = vfma(g[i], vset(Bt[i]), r);
            g[i] *= vload(decays + (t * n_states + i) * LANES);
            h[i] = vload(before + (t * n_states + i) * LANES);
            const vf e = g[i] * h[i];
            decay_sum = vfma(e, rate[i], decay_sum);
            da[i] = vfma(dt, e, da[i]);
        }
        vstore(m->r + t * LANES, r);
        vstore(m->decay_sum + t * LANES, decay_sum);
        vf folded_b = fold(n_states, db), folded_c = fold(n_states, dc);
        if (add) {
            folded_b += vload(sum_b + t * LANES);
            folded_c += vload(sum_c + t * LANES);
        }
        vstore(sum_b + t * LANES, folded_b);
        vstore(sum_c + t * LANES, folded_c);
    }
#pragma GCC unroll 4
    for (int i = 0; i < n_states; i++) {
        vstore(carry + i * LANES, g[i]);
        vstore(dA + i * LANES, vload(dA + i * LANES) + da[i]);
    }
}

/* Groups of states one after another; each takes (T, LANES) of sum_b and sum_c. */
static void backward_states(int need_y, int add, int64_t T, int64_t N, const BlockRows *m, Rows Bc,
                            Rows Cc, const float *A2, const float *initial, float *decays,
                            float *before, float *carry, float *dA, float *sum_b, float *sum_c,
                            const Ahead *ahead) {
    int64_t n = 0;
#define GROUP(k, y, a)                                                                              \
    backward_group(k, y, a, T, m, (Rows){Bc.rows + n, Bc.stride}, (Rows){Cc.rows + n, Cc.stride},   \
                   A2 + n * LANES, initial + n * LANES, decays, before, carry + n * LANES,          \
                   dA + n * LANES, sum_b, sum_c, n ? NULL : ahead)
#define GROUPS(k)                                                           \
    for (; n + k <= N; n += k, sum_b += T * LANES, sum_c += T * LANES) {    \
        if (need_y && add) GROUP(k, 1, 1);                                  \
        else if (need_y) GROUP(k, 1, 0);                                    \
        else if (add) GROUP(k, 0, 1);                                       \
        else GROUP(k, 0, 0);                                                \
    }
#if BACKWARD_STATES == 4
    GROUPS(4)
#endif
    GROUPS(2)
    GROUPS(1)
#undef GROUPS
#undef GROUP
}

/* From the folded sums of all groups to rows of N. */
static void unfold_states(int64_t T, int64_t N, const float *sums, float *out) {
    int64_t n = 0;
#define GROUPS(k) \
    for (; n + k <= N; n += k, sums += T * LANES) unfold(k, sums, T, N, out + n);
#if BACKWARD_STATES == 4
    GROUPS(4)
#endif
    GROUPS(2)
    GROUPS(1)
#undef GROUPS
}

typedef struct {
    const ScanBackward *s;
    Split split;
    int64_t first_chunk, last_chunk; /* the window: [first, last) */
    float *scratch, *part_b, *part_c, *constants, *sums, *carry;
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

/* The scratch of one worker. */
typedef struct {
    float *staged_b, *staged_c, *initial, *sum_b, *sum_c, *decays, *before, *row;
    BlockRows rows;
} Scratch;

static int64_t lay_out(float *p, int64_t N, Scratch *m) {
    const int64_t groups = N / BACKWARD_STATES + 2, histories = BACKWARD_STATES * CHUNK * LANES;
    float *start = p, **rows = (float **)&m->rows;
#define TAKE(name, size) m->name = p, p += padded(size) + 16
    TAKE(staged_b, CHUNK * N);
    TAKE(staged_c, CHUNK * N);
    TAKE(row, CHUNK * N);
    TAKE(initial, N * LANES);
    TAKE(sum_b, groups * CHUNK * LANES);
    TAKE(sum_c, groups * CHUNK * LANES);
    TAKE(decays, histories);
    TAKE(before, histories);
#undef TAKE
    for (size_t i = 0; i < sizeof(BlockRows) / sizeof(float *); i++, p += CHUNK * LANES + 16) rows[i] = p;
    return p - start;
}

INLINE void begin_backward(const int with_softplus, const int gate, int64_t T, Rows u, Rows delta,
                           Rows dout, Rows z, vf skip, vf bias, const BlockRows *m) {
    for (int64_t t = 0; t < T; t++) {
        const vf ut = vload(u.rows + t * u.stride);
        vf dt = vload(delta.rows + t * delta.stride) + bias, slope = vset(1.0f);
        vf q = vload(dout.rows + t * dout.stride);
        if (with_softplus) dt = softplus(dt, &slope);
        if (gate) {
            const vf zt = vload(z.rows + t * z.stride), sg = sigmoid(zt), silu = zt * sg;
            vstore(m->gate + t * LANES, q * vfma(silu, 1.0f - sg, sg));
            q *= silu;
        }
        vstore(m->d + t * LANES, dt);
        vstore(m->slope + t * LANES, slope);
        vstore(m->du + t * LANES, dt * ut);
        vstore(m->q + t * LANES, q);
        vstore(m->y + t * LANES, skip * ut);
        vstore(m->r + t * LANES, (vf){0});
        vstore(m->decay_sum + t * LANES, (vf){0});
    }
}

/* sums: rows of dA for N states, then of dskip and dbias, over the chunks so far. */
static void backward_block(const BackwardJob *job, int64_t b, Block k, int64_t c, int add,
                           const Scratch *w, Rows Bc, Rows Cc, const float *A2, float *carry,
                           float *sums, int64_t ahead_channels, int64_t ahead_tokens) {
    const ScanBackward *s = job->s;
    const BlockRows *m = &w->rows;
    const int64_t N = s->N, D = s->D, T = smaller(CHUNK, s->L - c * CHUNK);
    const int64_t t0 = token_at(c * CHUNK, s->L, s->reverse), sign = s->reverse ? -1 : 1;
    const int gate = s->z.data != NULL;
    copy_in(s->states + ((b * job->split.n_chunks + c) * N) * D + k.channel, DTYPE_F32, D, 1, N, k.lanes,
            LANES, w->initial);

#define AT(x) (s->x.batch * b + s->x.channel * k.channel + s->x.token * t0)
#define READ(x, scratch) read_rows(&s->x, AT(x), sign * s->x.token, T, k.lanes, scratch)
#define WRITE(x, scratch) write_rows(&s->x, AT(x), sign * s->x.token, k.lanes, scratch)
#define FINISH(x, r, scratch) finish_rows(&s->x, r, AT(x), sign * s->x.token, T, k.lanes, scratch)
    const Rows u = READ(u, m->staged_u), delta = READ(delta, m->staged_delta);
    const Rows dout = READ(dout, m->staged_dout);
    const Rows z = gate ? READ(z, m->staged_z) : dout;
    const vf skip = vload(A2 + N * LANES), bias = vload(A2 + (N + 1) * LANES);
    Ahead ahead[2] = {nothing_ahead, nothing_ahead};
#define EXPECT(i, x)                                                                            \
    expect(ahead, i, &s->x,                                                                     \
           AT(x) + ahead_channels * s->x.channel + ahead_tokens * sign * s->x.token,            \
           sign * s->x.token)
    EXPECT(0, u);
    EXPECT(1, delta);
    EXPECT(2, z);
    EXPECT(3, dout);
#undef EXPECT
    expect(ahead + 1, 0, &s->du, AT(du), sign * s->du.token);
    expect(ahead + 1, 1, &s->ddelta, AT(ddelta), sign * s->ddelta.token);
    expect(ahead + 1, 2, &s->dz, AT(dz), sign * s->dz.token);
    if (s->softplus && gate)
        begin_backward(1, 1, T, u, delta, dout, z, skip, bias, m);
    else
        begin_backward((int)s->softplus, gate, T, u, delta, dout, z, skip, bias, m);

    backward_states(gate, add, T, N, m, Bc, Cc, A2, w->initial, w->decays, w->before, carry, sums,
                    w->sum_b, w->sum_c, ahead);

    const Rows du = WRITE(du, m->du), ddelta = WRITE(ddelta, m->d);
    const Rows dz = gate ? WRITE(dz, m->r) : du;
    vf dskip = {0}, dbias = {0};
    for (int64_t t = 0; t < T; t++) {
        const vf ut = vload(u.rows + t * u.stride), q = vload(m->q + t * LANES);
        const vf r = vload(m->r + t * LANES), dt = vload(m->d + t * LANES);
        const vf change = vfma(ut, r, vload(m->decay_sum + t * LANES) * LN2) * vload(m->slope + t * LANES);
        dskip = vfma(q, ut, dskip);
        dbias += change;
        if (gate) vstore(dz.rows + t * dz.stride, vload(m->gate + t * LANES) * vload(m->y + t * LANES));
        vstore(du.rows + t * du.stride, vfma(dt, r, skip * q));
        vstore(ddelta.rows + t * ddelta.stride, change);
    }
    FINISH(du, du, m->du);
    FINISH(ddelta, ddelta, m->d);
    if (gate) FINISH(dz, dz, m->r);
#undef AT
#undef READ
#undef WRITE
#undef FINISH
    sums += N * LANES;
    vstore(sums, vload(sums) + dskip);
    vstore(sums + LANES, vload(sums + LANES) + dbias);
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
    const int64_t width = (N + 2) * LANES; /* of a block's constants, and of its sums */
    float *constants = job->constants + item * per_item * width;
    float *sums = job->sums + item * per_item * width;
    float *carry = job->carry + item * per_item * N * LANES;
    Scratch w;
    lay_out(job->scratch + worker * job->scratch_size, N, &w);

    for (int64_t j = 0; j < n_blocks && job->last_chunk == job->split.n_chunks; j++) {
        const Block k = block_at(D, s->G, group, first + j);
        load_constants(s->A, s->skip, s->bias, N, k, constants + j * width);
        load_state(s->dlast ? s->dlast + (b * D + k.channel) * N : NULL, N, k.lanes,
                   carry + j * N * LANES);
        memset(sums + j * width, 0, (size_t)width * sizeof(float));
    }

#define AT(x) (s->x.batch * b + s->x.group * group + s->x.token * start)
    for (int64_t c = job->last_chunk - 1; c >= job->first_chunk; c--) {
        const int64_t T = smaller(CHUNK, L - c * CHUNK), part = (c - job->first_chunk) * CHUNK * N;
        const int64_t step_b = sign * s->Bm.token, step_c = sign * s->Cm.token;
        const Rows Bc = read_states(&s->Bm, AT(Bm) + step_b * c * CHUNK, step_b, T, N, w.staged_b);
        const Rows Cc = read_states(&s->Cm, AT(Cm) + step_c * c * CHUNK, step_c, T, N, w.staged_c);
        for (int64_t j = 0; j < n_blocks; j++) {
            const int last = j == n_blocks - 1; /* then the next block is the first of chunk c - 1 */
            backward_block(job, b, block_at(D, s->G, group, first + j), c, j > 0, &w, Bc, Cc,
                           constants + j * width, carry + j * N * LANES, sums + j * width,
                           last ? -j * LANES : LANES, last ? -CHUNK : 0);
        }
        unfold_states(T, N, w.sum_b, job->part_b + item * job->part_size + part);
        unfold_states(T, N, w.sum_c, job->part_c + item * job->part_size + part);
    }
    for (int64_t j = 0; j < n_blocks && job->first_chunk == 0; j++) {
        const Block k = block_at(D, s->G, group, first + j);
        const float *total = sums + j * width;
        store_state(s->dA + (b * D + k.channel) * N, N, k.lanes, total);
        if (s->dskip) store_state(s->dskip + b * D + k.channel, 1, k.lanes, total + N * LANES);
        if (s->dbias) store_state(s->dbias + b * D + k.channel, 1, k.lanes, total + (N + 1) * LANES);
        if (s->dinitial)
            store_state(s->dinitial + (b * D + k.channel) * N, N, k.lanes, carry + j * N * LANES);
    }
    if (atomic_fetch_sub(job->unfinished + place, 1) == 1) {
        const int64_t at = place * job->split.items_per_group * job->part_size;
        sum_parts(job, job->part_b + at, &s->dBm, AT(dBm), sign * s->dBm.token, w.row);
        sum_parts(job, job->part_c + at, &s->dCm, AT(dCm), sign * s->dCm.token, w.row);
    }
#undef AT
}

static int scan_backward(const ScanBackward *s) {
    BackwardJob job = {.s = s, .split = split_channels(s->B, s->D, s->L, s->G, 2)};
    const int64_t N = s->N, threads = smaller(s->n_threads, job.split.n_items);
    const int64_t n_blocks = job.split.n_items * job.split.blocks_per_item;
    const int64_t width = (N + 2) * LANES;
    Scratch w;
    job.part_size = smaller(WINDOW, job.split.n_chunks) * CHUNK * N;
    job.scratch_size = lay_out(NULL, N, &w);
    job.scratch = allocate(threads * job.scratch_size);
    job.part_b = allocate(2 * job.split.n_items * job.part_size);
    job.constants = allocate(n_blocks * (2 * width + N * LANES));
    job.unfinished = malloc((size_t)(s->B * s->G) * sizeof *job.unfinished);
    const int enough = job.scratch && job.part_b && job.constants && job.unfinished;
    if (enough) {
        job.part_c = job.part_b + job.split.n_items * job.part_size;
        job.sums = job.constants + n_blocks * width;
        job.carry = job.sums + n_blocks * width;
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
    free(job.constants);
    free(job.unfinished);
    return enough ? STATUS_DONE : STATUS_NO_MEMORY;
}
