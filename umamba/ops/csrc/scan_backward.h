/* Selective scan, backward: every gradient; one work item is a sample and a range of channels.
 *
 * Chunks are taken last to first. Within one, a few states at a time are recomputed from the saved
 * state (decays a and states h of the chunk stay in cache), then swept in reverse. dB and dC are folded
 * to partial sums over lanes, added over the channel blocks of the item, then over the items of a group
 * in index order by whoever finishes last. A window of chunks bounds the memory of these parts. */
#include "scan_forward.h"

#include <stdatomic.h>

#if LANES == 16
#define BACKWARD_STATES 4
#else
#define BACKWARD_STATES 2
#endif

/* What a block keeps per token of a chunk: (T, N_ROWS, LANES). GATE is d out / d z over y, DECAYS
 * sum_n A e / ln 2; the rest as in the formulas: q = dout * silu(z), r = sum_n g B. */
enum { STEP, STEP_U, Q, Y, R, DECAYS, SLOPE, GATE, N_ROWS };

INLINE float *row(float *rows, int64_t t, int k) { return rows + (t * N_ROWS + k) * LANES; }

/* One group of states over one chunk. history (T, 2, n_states, LANES): the decays and the states before
 * each token. sums (T, LANES): the folded dB and dC, added to those of the item's blocks before if `add`. */
INLINE void backward_group(const int n_states, const int need_y, const int first, int add, int64_t T,
                           float *rows, Rows Bc, Rows Cc, const float *A2, Rows initial,
                           float *history, float *carry, float *dA, float *sums, Ahead *ahead) {
    vf h[BACKWARD_STATES], g[BACKWARD_STATES], da[BACKWARD_STATES], rate[BACKWARD_STATES];
#pragma GCC unroll 4
    for (int i = 0; i < n_states; i++) {
        h[i] = vload(initial.rows + i * initial.stride);
        g[i] = vload(carry + i * LANES);
        rate[i] = vload(A2 + i * LANES);
        da[i] = (vf){0};
    }
    for (int64_t t = 0; t < T; t++) {
        const float *Bt = Bc.rows + t * Bc.stride, *Ct = Cc.rows + t * Cc.stride;
        const vf step = vload(row(rows, t, STEP)), step_u = vload(row(rows, t, STEP_U));
        vf y = need_y ? vload(row(rows, t, Y)) : (vf){0};
        if (first) fetch_ahead(4, ahead);
#pragma GCC unroll 4
        for (int i = 0; i < n_states; i++) {
            const vf a = exp2_product(step, rate[i]);
            vstore(history + (t * 2 * n_states + i) * LANES, a);
            vstore(history + ((t * 2 + 1) * n_states + i) * LANES, h[i]);
            h[i] = vfma(a, h[i], step_u * Bt[i]);
            if (need_y) y = vfma(h[i], vset(Ct[i]), y);
        }
        if (need_y) vstore(row(rows, t, Y), y);
    }
    for (int64_t t = T - 1; t >= 0; t--) {
        const float *Bt = Bc.rows + t * Bc.stride, *Ct = Cc.rows + t * Cc.stride;
        const vf step = vload(row(rows, t, STEP)), step_u = vload(row(rows, t, STEP_U));
        const vf q = vload(row(rows, t, Q));
        vf r = first ? (vf){0} : vload(row(rows, t, R));
        vf decays = first ? (vf){0} : vload(row(rows, t, DECAYS));
        vf db[BACKWARD_STATES], dc[BACKWARD_STATES];
        if (first) fetch_ahead(3, ahead + 1);
#pragma GCC unroll 4
        for (int i = 0; i < n_states; i++) {
            g[i] = vfma(q, vset(Ct[i]), g[i]);
            dc[i] = q * h[i];
            db[i] = step_u * g[i];
            r = vfma(g[i], vset(Bt[i]), r);
            g[i] *= vload(history + (t * 2 * n_states + i) * LANES);
            h[i] = vload(history + ((t * 2 + 1) * n_states + i) * LANES);
            const vf e = g[i] * h[i];
            decays = vfma(e, rate[i], decays);
            da[i] = vfma(step, e, da[i]);
        }
        vstore(row(rows, t, R), r);
        vstore(row(rows, t, DECAYS), decays);
        vf folded = fold(n_states, db, dc);
        if (add) folded += vload(sums + t * LANES);
        vstore(sums + t * LANES, folded);
    }
#pragma GCC unroll 4
    for (int i = 0; i < n_states; i++) {
        vstore(carry + i * LANES, g[i]);
        vstore(dA + i * LANES, vload(dA + i * LANES) + da[i]);
    }
}

/* Groups of states one after another; each takes (T, LANES) of the sums. */
APART void backward_states(int need_y, int add, int64_t T, int64_t N, float *rows, Rows Bc, Rows Cc,
                            const float *A2, Rows initial, float *history, float *carry,
                            float *dA, float *sums, Ahead *ahead) {
    int64_t n = 0;
#define GROUP(k, y, first)                                                                           \
    backward_group(k, y, first, add, T, rows, (Rows){Bc.rows + n, Bc.stride},                        \
                   (Rows){Cc.rows + n, Cc.stride}, A2 + n * LANES,                                   \
                   (Rows){initial.rows + n * initial.stride, initial.stride}, history,               \
                   carry + n * LANES, dA + n * LANES, sums, ahead)
#define GROUPS(k)                                             \
    for (; n + k <= N; n += k, sums += T * LANES) {       \
        if (need_y && n) GROUP(k, 1, 0);                      \
        else if (need_y) GROUP(k, 1, 1);                      \
        else if (n) GROUP(k, 0, 0);                           \
        else GROUP(k, 0, 1);                                  \
    }
#if BACKWARD_STATES == 4
    GROUPS(4)
#endif
    GROUPS(2)
    GROUPS(1)
#undef GROUPS
#undef GROUP
}

/* Likewise for a local_window; defined in scan_local.h. */
APART void local_backward_states(int need_y, int add, int64_t T, int64_t N, int64_t window, float *rows,
                                  Rows Bc, Rows Cc, const float *A2, Rows initial, float *history,
                                  float *carry, float *dA, float *sums, Ahead *ahead);

/* From the folded sums of all groups to rows of N. */
static void unfold_states(int64_t T, int64_t N, const float *sums, float *dB, float *dC) {
    int64_t n = 0;
#define GROUPS(k)                                           \
    for (; n + k <= N; n += k, sums += T * LANES) {     \
        unfold(k, sums, T, N, dB + n, dC + n);              \
    }
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
    int apart; /* tokens are carried in spans, which divide a window */
    int64_t span;
    atomic_llong *unfinished; /* per sample and group */
} BackwardJob;

/* dB or dC of the window: the items' parts in index order, in the place of the first. */
static void sum_parts(const BackwardJob *job, float *parts, const Tensor *x, int64_t offset) {
    const int64_t N = job->s->N, L = job->s->L, size = job->apart ? job->span : CHUNK;
    List list;
    for (int64_t t = job->first_chunk * CHUNK; t < smaller(job->last_chunk * CHUNK, L); t += size) {
        const int64_t T = smaller(size, L - t);
        float *total = parts + (t - job->first_chunk * CHUNK) * N;
        for (int64_t i = 1; i < job->split.items_per_group; i++)
            for (int64_t k = 0; k < T * N; k++) total[k] += total[i * job->part_size + k];
        Places places = places_on_line(&job->s->walk, t);
        if (job->apart) {
            list_tokens(&job->s->walk, t, t + T, t, &list);
            places = listed(&list, 0);
        }
        copy_out(x, offset, &places, T, N, N, total);
    }
}

/* The scratch of one worker. */
typedef struct {
    float *staged_b, *staged_c, *initial, *sums, *history, *rows;
    float *staged_u, *staged_delta, *staged_z, *staged_dout, *carried;
} Scratch;

static int64_t lay_out(float *start, const ScanBackward *s, int64_t n_carried, Scratch *w) {
    const int64_t N = s->N, kept = s->local_window > 1 ? 3 : 2;
    int64_t size = 0;
#define TAKE(name, n_floats) w->name = start + size, size += padded(n_floats)
    TAKE(staged_b, CHUNK * N);
    TAKE(staged_c, CHUNK * N);
    TAKE(initial, N * LANES);
    TAKE(sums, (N / BACKWARD_STATES + 2) * CHUNK * LANES);
    TAKE(history, kept * BACKWARD_STATES * CHUNK * LANES);
    TAKE(rows, N_ROWS * CHUNK * LANES);
    TAKE(staged_u, CHUNK * LANES);
    TAKE(staged_delta, CHUNK * LANES);
    TAKE(staged_z, CHUNK * LANES);
    TAKE(staged_dout, CHUNK * LANES);
    TAKE(carried, n_carried);
#undef TAKE
    return size;
}

INLINE void begin_backward(const int with_softplus, const int gate, int64_t T, Rows u, Rows delta,
                           Rows dout, Rows z, vf skip, vf bias, float *rows) {
    for (int64_t t = 0; t < T; t++) {
        const vf ut = vload(u.rows + t * u.stride);
        vf step = vload(delta.rows + t * delta.stride) + bias, slope = vset(1.0f);
        vf q = vload(dout.rows + t * dout.stride);
        if (with_softplus) step = softplus(step, &slope);
        if (gate) {
            const vf zt = vload(z.rows + t * z.stride), sg = sigmoid(zt), silu = zt * sg;
            vstore(row(rows, t, GATE), q * vfma(silu, 1.0f - sg, sg));
            vstore(row(rows, t, Y), skip * ut);
            q *= silu;
        }
        vstore(row(rows, t, STEP), step);
        vstore(row(rows, t, STEP_U), step * ut);
        vstore(row(rows, t, Q), q);
        vstore(row(rows, t, SLOPE), slope);
    }
}

/* sums: rows of dA for N states, then of dskip and dbias, over the chunks so far. Block j of the item. */
static void backward_block(const BackwardJob *job, int64_t b, Block k, int64_t c, int64_t j,
                           const Scratch *w, const Carrier *carrier, Rows Bc, Rows Cc,
                           const float *A2, float *carry, float *sums, Ahead *ahead) {
    const ScanBackward *s = job->s;
    float *rows = w->rows;
    const int64_t N = s->N, D = s->D, T = smaller(CHUNK, s->L - c * CHUNK);
    const int gate = s->z.data != NULL;
    const Tensor states = {.data = (void *)s->states, .token = D, .channel = 1, .dtype = DTYPE_F32};
    const Places each = {.step = 1}, here = places_on_line(&s->walk, c * CHUNK);
    const Rows initial = read_rows(&states, (b * job->split.n_chunks + c) * N * D + k.channel, &each,
                                   N, k.lanes, w->initial);

#define AT(x) (s->x.batch * b + s->x.channel * k.channel)
#define READ(i, x, scratch)                               \
    (job->apart ? carried_rows(carrier, i, c * CHUNK, j) : read_rows(&s->x, AT(x), &here, T, k.lanes, scratch))
#define WRITE(x, input, scratch) \
    (job->apart ? input : write_rows(&s->x, AT(x), &here, k.lanes, scratch))
#define FINISH(x, r, scratch) finish_rows(&s->x, r, AT(x), &here, T, k.lanes, scratch)
    const Rows u = READ(0, u, w->staged_u), delta = READ(1, delta, w->staged_delta);
    const Rows z = gate ? READ(2, z, w->staged_z) : u, dout = READ(3, dout, w->staged_dout);
    const vf skip = vload(A2 + N * LANES), bias = vload(A2 + (N + 1) * LANES);
    if (s->softplus && gate)
        begin_backward(1, 1, T, u, delta, dout, z, skip, bias, rows);
    else
        begin_backward((int)s->softplus, gate, T, u, delta, dout, z, skip, bias, rows);

    if (s->local_window > 1)
        local_backward_states(gate, j > 0, T, N, s->local_window, rows, Bc, Cc, A2, initial, w->history,
                              carry, sums, w->sums, ahead);
    else
        backward_states(gate, j > 0, T, N, rows, Bc, Cc, A2, initial, w->history, carry, sums, w->sums,
                        ahead);

    /* an input is not read again after its token, so its rows may take the gradient */
    const Rows du = WRITE(du, u, w->staged_u), ddelta = WRITE(ddelta, delta, w->staged_delta);
    const Rows dz = gate ? WRITE(dz, z, w->staged_z) : du;
    vf dskip = {0}, dbias = {0};
    for (int64_t t = 0; t < T; t++) {
        const vf ut = vload(u.rows + t * u.stride), q = vload(row(rows, t, Q));
        const vf r = vload(row(rows, t, R)), step = vload(row(rows, t, STEP));
        const vf change = vfma(ut, r, vload(row(rows, t, DECAYS)) * LN2) * vload(row(rows, t, SLOPE));
        dskip = vfma(q, ut, dskip);
        dbias += change;
        if (gate) vstore(dz.rows + t * dz.stride, vload(row(rows, t, GATE)) * vload(row(rows, t, Y)));
        vstore(du.rows + t * du.stride, vfma(step, r, skip * q));
        vstore(ddelta.rows + t * ddelta.stride, change);
    }
    FINISH(du, du, w->staged_u);
    FINISH(ddelta, ddelta, w->staged_delta);
    if (gate) FINISH(dz, dz, w->staged_z);
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
    const int64_t width = (N + 2) * LANES; /* of a block's constants, and of its sums */
    float *constants = job->constants + item * per_item * width;
    float *sums = job->sums + item * per_item * width;
    float *gradients = job->carry + item * per_item * N * LANES;
    Scratch w;
    lay_out(job->scratch + worker * job->scratch_size, s, 0, &w);

    for (int64_t j = 0; j < n_blocks && job->last_chunk == job->split.n_chunks; j++) {
        const Block k = block_at(D, s->G, group, first + j);
        load_constants(s->A, s->skip, s->bias, N, k, constants + j * width);
        load_state(s->dlast ? s->dlast + (b * D + k.channel) * N : NULL, N, k.lanes,
                   gradients + j * N * LANES);
        memset(sums + j * width, 0, (size_t)width * sizeof(float));
    }

#define AT(x) (s->x.batch * b + s->x.group * group)
#define FIRST(x) (AT(x) + block_at(D, s->G, group, first).channel * s->x.channel)
    const int64_t pitch = n_blocks * LANES, columns = smaller(pitch, D / s->G - first * LANES);
    const int64_t per_span = job->span / CHUNK;
    Carrier carrier;
    if (job->apart) {
        begin_carrier(&carrier, &s->walk, L, job->span, 0);
        float *end = w.carried;
#define CARRY(x, dx) end = add_carried(&carrier, &s->x, FIRST(x), &s->dx, FIRST(dx), columns, pitch, end)
        CARRY(u, du);
        CARRY(delta, ddelta);
        CARRY(z, dz);
#undef CARRY
        end = add_carried(&carrier, &s->dout, FIRST(dout), NULL, 0, columns, pitch, end);
        end = add_carried(&carrier, &s->Bm, AT(Bm), NULL, 0, N, N, end);
        add_carried(&carrier, &s->Cm, AT(Cm), NULL, 0, N, N, end);
        carry_alone(&carrier, -1, (job->last_chunk - 1) / per_span);
    }
    for (int64_t c = job->last_chunk - 1; c >= job->first_chunk; c--) {
        const int64_t T = smaller(CHUNK, L - c * CHUNK), part = (c - job->first_chunk) * CHUNK * N;
        const Places here = places_on_line(&s->walk, c * CHUNK);
        const Places next = places_on_line(&s->walk, (c - 1) * CHUNK);
        Rows Bc, Cc;
        Ahead ahead[2] = {{.n_blocks = n_blocks}, {.n_blocks = n_blocks}};
        if (job->apart) {
            Bc = carried_rows(&carrier, 4, c * CHUNK, 0);
            Cc = carried_rows(&carrier, 5, c * CHUNK, 0);
            const int64_t span = c / per_span, first_of = span * per_span;
            if (c + 1 == smaller(first_of + per_span, job->last_chunk))
                carry_between(&carrier, c + 1 < job->last_chunk ? span + 1 : -1,
                              first_of > job->first_chunk ? span - 1 : -1, (c + 1 - first_of) * n_blocks);
        } else {
            Bc = read_states(&s->Bm, AT(Bm), &here, T, N, w.staged_b);
            Cc = read_states(&s->Cm, AT(Cm), &here, T, N, w.staged_c);
            expect(&ahead[0], 0, &s->u, FIRST(u), &next);
            expect(&ahead[0], 1, &s->delta, FIRST(delta), &next);
            expect(&ahead[0], 2, &s->z, FIRST(z), &next);
            expect(&ahead[0], 3, &s->dout, FIRST(dout), &next);
            expect(&ahead[1], 0, &s->du, FIRST(du), &next);
            expect(&ahead[1], 1, &s->ddelta, FIRST(ddelta), &next);
            expect(&ahead[1], 2, &s->dz, FIRST(dz), &next);
        }
        for (int64_t j = 0; j < n_blocks; j++) {
            if (job->apart) {
                expect_share(&carrier, &ahead[0], 2 * T);
                ahead[1] = ahead[0]; /* the second half of the list */
                ahead[0].n_listed = smaller(ahead[0].n_listed, T * ahead[0].n_rows);
                ahead[1].listed += ahead[0].n_listed;
                ahead[1].n_listed -= ahead[0].n_listed;
            }
            backward_block(job, b, block_at(D, s->G, group, first + j), c, j, &w, &carrier, Bc, Cc,
                           constants + j * width, gradients + j * N * LANES, sums + j * width, ahead);
            if (job->apart) move_share(&carrier);
        }
        unfold_states(T, N, w.sums, job->part_b + item * job->part_size + part,
                      job->part_c + item * job->part_size + part);
    }
    if (job->apart) carry_alone(&carrier, job->first_chunk / per_span, -1);
    for (int64_t j = 0; j < n_blocks && job->first_chunk == 0; j++) {
        const Block k = block_at(D, s->G, group, first + j);
        const float *total = sums + j * width;
        store_state(s->dA + (b * D + k.channel) * N, N, k.lanes, total);
        if (s->dskip) store_state(s->dskip + b * D + k.channel, 1, k.lanes, total + N * LANES);
        if (s->dbias) store_state(s->dbias + b * D + k.channel, 1, k.lanes, total + (N + 1) * LANES);
        if (s->dinitial)
            store_state(s->dinitial + (b * D + k.channel) * N, N, k.lanes, gradients + j * N * LANES);
    }
    if (atomic_fetch_sub(job->unfinished + place, 1) == 1) {
        const int64_t at = place * job->split.items_per_group * job->part_size;
        sum_parts(job, job->part_b + at, &s->dBm, AT(dBm));
        sum_parts(job, job->part_c + at, &s->dCm, AT(dCm));
    }
#undef AT
#undef FIRST
}

static int scan_backward(const ScanBackward *s) {
    /* a function of the shape: the sums of dB and dC must not depend on the number of threads */
    const int64_t blocks = divide_up(s->D / s->G, LANES), total = s->B * s->G * blocks;
    BackwardJob job = {.s = s, .split = split_channels(s->B, s->L, s->G, blocks,
                                                       larger(divide_up(total, 8), 2))};
    /* Chunks that all items finish before any goes on: small, so that one item finds in cache what
     * another has read; threads pay for a meeting. Never shows in a result. */
    const int64_t carried = 4 * job.split.blocks_per_item * LANES + 2 * s->N;
    job.apart = !is_line(&s->walk, s->L);
    job.span = find_span(&s->walk, carried);
    const int64_t window = job.apart ? 4 * job.span / CHUNK : s->n_threads == 1 ? 8 : 32;
    const int64_t N = s->N, threads = smaller(s->n_threads, job.split.n_items);
    const int64_t n_blocks = job.split.n_items * job.split.blocks_per_item;
    const int64_t width = (N + 2) * LANES;
    Scratch w;
    job.part_size = smaller(window, job.split.n_chunks) * CHUNK * N;
    job.scratch_size = lay_out(NULL, s, job.apart ? 2 * job.span * carried : 0, &w);
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
            job.first_chunk = (job.last_chunk - 1) / window * window;
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
