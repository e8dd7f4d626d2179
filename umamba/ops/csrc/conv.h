/* Causal depthwise convolution of at most MAX_TAPS taps with SiLU along a walk, forward and backward.
 *
 * One work item is a sample, a segment of tokens and a range of channels; nothing is carried between
 * segments: each reads the K-1 tokens walked before it (the backward also those after it) itself. */
#include "carry.h"

#define CONV_BLOCKS 16 /* channel blocks of an item */
#define CONV_CHUNK 64 /* tokens */
#define CONV_ROWS (CONV_CHUNK + 2 * (MAX_TAPS - 1))
#define CARRIED_ROWS (CONV_SEGMENT + 2 * (MAX_TAPS - 1)) /* a segment is a span */
#define CARRIED_SEGMENTS 8 /* of an item, at most */
#define CARRIED_BLOCKS 6

typedef struct {
    const Conv *s;
    float *scratch;
    int64_t scratch_size, n_segments, n_ranges;
    int64_t segments_per_item, items_per_sample, blocks_per_item;
    int apart; /* tokens are carried, a segment is a span */
} ConvJob;

/* n tokens on a line from step `from` on, zeros outside the sequence; offset is that of token 0. */
static Rows read_window(const Conv *s, const Tensor *x, int64_t offset, int64_t lanes, int64_t from,
                        int64_t n, float *scratch) {
    const int64_t first = larger(from, 0), last = smaller(from + n, s->L);
    const Places places = places_on_line(&s->walk, first);
    if (last - first == n) return read_rows(x, offset, &places, n, lanes, scratch);
    memset(scratch, 0, (size_t)(n * LANES) * sizeof(float));
    copy_in(x, offset, &places, larger(last - first, 0), lanes, LANES,
            scratch + (first - from) * LANES);
    return (Rows){scratch, LANES};
}

/* weight[k] of tap k and, at [K], the bias */
static void load_taps(const Conv *s, int64_t channel, int64_t lanes, float *taps) {
    for (int64_t k = 0; k <= s->K; k++)
        for (int64_t i = 0; i < LANES; i++) {
            float value = 0.0f;
            if (i < lanes && k < s->K) value = s->weight[(channel + i) * s->K + k];
            if (i < lanes && k == s->K && s->bias) value = s->bias[channel + i];
            taps[k * LANES + i] = value;
        }
}

/* x holds K-1 rows before the first output */
INLINE vf convolve(const int64_t K, const Rows x, int64_t t, const float *taps) {
    vf sum = vload(taps + K * LANES);
#pragma GCC unroll 8
    for (int64_t k = 0; k < K; k++)
        sum = vfma(vload(x.rows + (t + k) * x.stride), vload(taps + k * LANES), sum);
    return sum;
}

INLINE void conv_forward_block(const int64_t K, int64_t T, const Rows x, const Rows out,
                               const float *taps, Ahead *ahead) {
    for (int64_t t = 0; t < T; t++) {
        fetch_ahead(2, ahead);
        const vf sum = convolve(K, x, t, taps);
        vstore(out.rows + t * out.stride, sum * sigmoid(sum));
    }
}

typedef struct {
    int64_t b, first_token, last_token, first_channel, last_channel, part;
} ConvItem;

static ConvItem conv_item(const ConvJob *job, int64_t item) {
    const int64_t range = item % job->n_ranges, width = job->blocks_per_item * LANES;
    const int64_t b = item / job->n_ranges / job->items_per_sample;
    const int64_t segment = item / job->n_ranges % job->items_per_sample * job->segments_per_item;
    return (ConvItem){.b = b,
                      .first_token = segment * CONV_SEGMENT,
                      .last_token = smaller((segment + job->segments_per_item) * CONV_SEGMENT, job->s->L),
                      .first_channel = range * width,
                      .last_channel = smaller((range + 1) * width, job->s->D),
                      .part = b * job->n_segments + segment};
}

/* Before the chunk at t: at the first of a segment, the moves during that segment are planned. */
static void plan_moves(Carrier *k, const ConvItem *m, int64_t t, int64_t n_blocks) {
    if (t % CONV_SEGMENT) return;
    const int64_t segment = t / CONV_SEGMENT, left = m->last_token - t;
    carry_between(k, t > m->first_token ? segment - 1 : -1, left > CONV_SEGMENT ? segment + 1 : -1,
                  divide_up(smaller(left, CONV_SEGMENT), CONV_CHUNK) * n_blocks);
}

static void conv_forward_item(void *context, int64_t item, int64_t worker) {
    const ConvJob *job = context;
    const Conv *s = job->s;
    const ConvItem m = conv_item(job, item);
    float *staged_x = job->scratch + worker * job->scratch_size;
    float *staged_out = staged_x + CONV_ROWS * LANES, *taps = staged_out + CONV_ROWS * LANES;
    const int64_t width = m.last_channel - m.first_channel, n_blocks = divide_up(width, LANES);
#define AT(x) (s->x.batch * m.b + s->x.channel * channel)
    int64_t channel = m.first_channel;
    Carrier carrier;
    if (job->apart) {
        begin_carrier(&carrier, &s->walk, s->L, CONV_SEGMENT, s->K - 1);
        add_carried(&carrier, &s->x, AT(x), &s->out, AT(out), width, n_blocks * LANES,
                    taps + 2 * (MAX_TAPS + 1) * LANES);
        carry_alone(&carrier, -1, m.first_token / CONV_SEGMENT);
    }
    for (int64_t t = m.first_token; t < m.last_token; t += CONV_CHUNK) {
        const int64_t T = smaller(CONV_CHUNK, m.last_token - t);
        const Places here = places_on_line(&s->walk, t), next = places_on_line(&s->walk, t + CONV_CHUNK);
        Ahead ahead = {.n_blocks = n_blocks};
        channel = m.first_channel;
        if (job->apart) {
            plan_moves(&carrier, &m, t, n_blocks);
        } else {
            expect(&ahead, 0, &s->x, AT(x), &next);
            expect(&ahead, 1, &s->out, AT(out), &next);
        }
        for (int64_t j = 0; j < n_blocks; j++, channel += LANES) {
            const int64_t lanes = smaller(LANES, s->D - channel);
            if (job->apart) expect_share(&carrier, &ahead, T);
            const Rows x = job->apart ? carried_rows(&carrier, 0, t, j)
                                      : read_window(s, &s->x, AT(x), lanes, t - (s->K - 1),
                                                    T + s->K - 1, staged_x);
            /* a token's row is not read again after the result that lies there is known */
            const Rows out = job->apart ? x : write_rows(&s->out, AT(out), &here, lanes, staged_out);
            load_taps(s, channel, lanes, taps);
            if (s->K == 4)
                conv_forward_block(4, T, x, out, taps, &ahead);
            else
                conv_forward_block(s->K, T, x, out, taps, &ahead);
            finish_rows(&s->out, out, AT(out), &here, T, lanes, staged_out);
            if (job->apart) move_share(&carrier);
        }
    }
    if (job->apart) carry_alone(&carrier, (m.last_token - 1) / CONV_SEGMENT, -1);
#undef AT
}

/* pre: T + K - 1 gradients before the SiLU, from which dx, dweight and dbias follow. */
INLINE void conv_backward_block(const int64_t K, int64_t T, const Rows x, const Rows dout, const Rows dx,
                                const float *taps, float *pre, float *sums, Ahead *ahead) {
    vf dtaps[MAX_TAPS + 1];
#pragma GCC unroll 9
    for (int64_t k = 0; k <= K; k++) dtaps[k] = (vf){0};
    for (int64_t t = 0; t < T + K - 1; t++) {
        const vf sum = convolve(K, x, t, taps), sg = sigmoid(sum);
        fetch_ahead(3, ahead);
        const vf g = vload(dout.rows + t * dout.stride) * sg * vfma(sum, 1.0f - sg, vset(1.0f));
        vstore(pre + t * LANES, g);
    }
    for (int64_t t = 0; t < T; t++) {
        const vf g = vload(pre + t * LANES);
        vf sum = {0};
        dtaps[K] += g;
#pragma GCC unroll 8
        for (int64_t k = 0; k < K; k++) {
            dtaps[k] = vfma(g, vload(x.rows + (t + k) * x.stride), dtaps[k]);
            sum = vfma(vload(pre + (t + K - 1 - k) * LANES), vload(taps + k * LANES), sum);
        }
        vstore(dx.rows + t * dx.stride, sum);
    }
#pragma GCC unroll 9
    for (int64_t k = 0; k <= K; k++) vstore(sums + k * LANES, dtaps[k]);
}

static void conv_backward_item(void *context, int64_t item, int64_t worker) {
    const ConvJob *job = context;
    const Conv *s = job->s;
    const ConvItem m = conv_item(job, item);
    float *staged_x = job->scratch + worker * job->scratch_size;
    float *staged_dout = staged_x + CONV_ROWS * LANES, *pre = staged_dout + CONV_ROWS * LANES;
    float *staged_dx = pre + CONV_ROWS * LANES, *taps = staged_dx + CONV_ROWS * LANES;
    float *sums = taps + (MAX_TAPS + 1) * LANES;
    const int64_t K = s->K;
    const int64_t width = m.last_channel - m.first_channel, n_blocks = divide_up(width, LANES);
#define AT(x) (s->x.batch * m.b + s->x.channel * channel)
    int64_t channel = m.first_channel;
    Carrier carrier;
    if (job->apart) {
        begin_carrier(&carrier, &s->walk, s->L, CONV_SEGMENT, K - 1);
        float *end = sums + (MAX_TAPS + 1) * LANES;
        end = add_carried(&carrier, &s->x, AT(x), &s->dx, AT(dx), width, n_blocks * LANES, end);
        add_carried(&carrier, &s->dout, AT(dout), NULL, 0, width, n_blocks * LANES, end);
        carry_alone(&carrier, -1, m.first_token / CONV_SEGMENT);
    }
    for (int64_t t = m.first_token; t < m.last_token; t += CONV_CHUNK) {
        const int64_t T = smaller(CONV_CHUNK, m.last_token - t);
        const Places here = places_on_line(&s->walk, t), next = places_on_line(&s->walk, t + CONV_CHUNK);
        const int64_t part = m.part + (t - m.first_token) / CONV_SEGMENT;
        float *dweight = s->dweight + part * s->D * K, *dbias = s->dbias + part * s->D;
        Ahead ahead = {.n_blocks = n_blocks};
        channel = m.first_channel;
        if (job->apart) {
            plan_moves(&carrier, &m, t, n_blocks);
        } else {
            expect(&ahead, 0, &s->x, AT(x), &next);
            expect(&ahead, 1, &s->dout, AT(dout), &next);
            expect(&ahead, 2, &s->dx, AT(dx), &next);
        }
        for (int64_t j = 0; j < n_blocks; j++, channel += LANES) {
            const int64_t lanes = smaller(LANES, s->D - channel);
            if (job->apart) expect_share(&carrier, &ahead, T);
            Rows x, dout, dx;
            if (job->apart) {
                dx = x = carried_rows(&carrier, 0, t, j);
                dout = carried_rows(&carrier, 1, t, j);
                dout.rows += (K - 1) * dout.stride;
            } else {
                x = read_window(s, &s->x, AT(x), lanes, t - (K - 1), T + 2 * (K - 1), staged_x);
                dout = read_window(s, &s->dout, AT(dout), lanes, t, T + K - 1, staged_dout);
                dx = write_rows(&s->dx, AT(dx), &here, lanes, staged_dx);
            }
            load_taps(s, channel, lanes, taps);
            if (K == 4)
                conv_backward_block(4, T, x, dout, dx, taps, pre, sums, &ahead);
            else
                conv_backward_block(K, T, x, dout, dx, taps, pre, sums, &ahead);
            finish_rows(&s->dx, dx, AT(dx), &here, T, lanes, staged_dx);
            for (int64_t i = 0; i < lanes; i++) {
                for (int64_t k = 0; k < K; k++) {
                    float *total = dweight + (channel + i) * K + k;
                    *total = sums[k * LANES + i] + (t % CONV_SEGMENT ? *total : 0.0f);
                }
                float *total = dbias + channel + i;
                *total = sums[K * LANES + i] + (t % CONV_SEGMENT ? *total : 0.0f);
            }
            if (job->apart) move_share(&carrier);
        }
    }
    if (job->apart) carry_alone(&carrier, (m.last_token - 1) / CONV_SEGMENT, -1);
#undef AT
}

static int run_conv(const Conv *s, void (*work)(void *, int64_t, int64_t)) {
    ConvJob job = {.s = s,
                   .n_segments = divide_up(s->L, CONV_SEGMENT),
                   .segments_per_item = 1,
                   .blocks_per_item = CONV_BLOCKS,
                   .apart = !is_line(&s->walk, s->L)};
    if (job.apart) {
        job.segments_per_item = smaller(CARRIED_SEGMENTS, divide_up(job.n_segments, 8));
        job.blocks_per_item = CARRIED_BLOCKS;
    }
    job.items_per_sample = divide_up(job.n_segments, job.segments_per_item);
    job.n_ranges = divide_up(s->D, job.blocks_per_item * LANES);
    const int64_t n_items = s->B * job.items_per_sample * job.n_ranges;
    const int64_t threads = smaller(s->n_threads, n_items);
    const int64_t carried = 2 * 2 * CARRIED_ROWS * CARRIED_BLOCKS * LANES;
    job.scratch_size =
        padded((4 * CONV_ROWS + 2 * (MAX_TAPS + 1)) * LANES + (job.apart ? carried : 0));
    job.scratch = allocate(threads * job.scratch_size);
    if (!job.scratch) return STATUS_NO_MEMORY;
    umamba_parallel(threads, n_items, work, &job);
    sum_into_first(s->dweight, s->B * job.n_segments, s->D * s->K);
    sum_into_first(s->dbias, s->B * job.n_segments, s->D);
    free(job.scratch);
    return STATUS_DONE;
}

static int conv_forward(const Conv *s) { return run_conv(s, conv_forward_item); }
static int conv_backward(const Conv *s) { return run_conv(s, conv_backward_item); }
