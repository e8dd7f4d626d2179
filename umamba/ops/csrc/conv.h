/* Causal depthwise convolution of at most MAX_TAPS taps with SiLU along a walk, forward and backward.
 *
 * One work item is a sample, a segment of tokens and a range of channels; nothing is carried between
 * segments: each reads the K-1 tokens walked before it (the backward also those after it) itself. */
#include "rows.h"

#define CONV_BLOCKS 16 /* channel blocks of an item */
#define CONV_CHUNK 64 /* tokens */
#define CONV_ROWS (CONV_CHUNK + 2 * (MAX_TAPS - 1)) /* at most MOST_PLACES */

typedef struct {
    const Conv *s;
    float *scratch;
    int64_t scratch_size, n_segments, n_ranges;
} ConvJob;

/* n tokens walked one after another; those outside the sequence stand for zeros. */
typedef struct {
    int64_t before, inside, n; /* before: of the n, those that come before the sequence */
    Places places;             /* of those inside */
} Window;

static void find_window(const Conv *s, int64_t from, int64_t n, Window *w) {
    const int64_t first = larger(from, 0), last = smaller(from + n, s->L);
    w->n = n;
    w->before = first - from;
    w->inside = larger(last - first, 0);
    if (w->inside) find_places(&s->walk, first, w->inside, &w->places);
}

/* Of `lanes` channels; offset is that of token 0. */
static Rows read_window(const Tensor *x, int64_t offset, const Window *w, int64_t lanes,
                        float *scratch) {
    if (w->inside == w->n) return read_rows(x, offset, &w->places, w->n, lanes, scratch);
    memset(scratch, 0, (size_t)(w->n * LANES) * sizeof(float));
    copy_in(x, offset, &w->places, w->inside, lanes, LANES, scratch + w->before * LANES);
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
    const int64_t part = item / job->n_ranges, range = item % job->n_ranges;
    const int64_t segment = part % job->n_segments, width = CONV_BLOCKS * LANES;
    return (ConvItem){.b = part / job->n_segments,
                      .first_token = segment * CONV_SEGMENT,
                      .last_token = smaller((segment + 1) * CONV_SEGMENT, job->s->L),
                      .first_channel = range * width,
                      .last_channel = smaller((range + 1) * width, job->s->D),
                      .part = part};
}

static void conv_forward_item(void *context, int64_t item, int64_t worker) {
    const ConvJob *job = context;
    const Conv *s = job->s;
    const ConvItem m = conv_item(job, item);
    float *staged_x = job->scratch + worker * job->scratch_size;
    float *staged_out = staged_x + CONV_ROWS * LANES, *taps = staged_out + CONV_ROWS * LANES;
    Window seen = {0}, here = {0}, next = {0};
    for (int64_t t = m.first_token; t < m.last_token; t += CONV_CHUNK) {
        const int64_t T = smaller(CONV_CHUNK, m.last_token - t);
        find_window(s, t - (s->K - 1), T + s->K - 1, &seen);
        find_window(s, t, T, &here);
        find_window(s, t + CONV_CHUNK, CONV_CHUNK, &next);
        Ahead ahead = {.n_blocks = divide_up(m.last_channel - m.first_channel, LANES)};
#define AT(x) (s->x.batch * m.b + s->x.channel * channel)
        int64_t channel = m.first_channel;
        expect(&ahead, 0, &s->x, AT(x), &next.places);
        expect(&ahead, 1, &s->out, AT(out), &next.places);
        for (; channel < m.last_channel; channel += LANES) {
            const int64_t lanes = smaller(LANES, s->D - channel);
            const Rows x = read_window(&s->x, AT(x), &seen, lanes, staged_x);
            fetch_uneven(&s->x, AT(x), &next.places, CONV_CHUNK);
            fetch_uneven(&s->out, AT(out), &next.places, CONV_CHUNK);
            const Rows out = write_rows(&s->out, AT(out), &here.places, lanes, staged_out);
            load_taps(s, channel, lanes, taps);
            if (s->K == 4)
                conv_forward_block(4, T, x, out, taps, &ahead);
            else
                conv_forward_block(s->K, T, x, out, taps, &ahead);
            finish_rows(&s->out, out, AT(out), &here.places, T, lanes, staged_out);
        }
#undef AT
    }
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
    float *dweight = s->dweight + m.part * s->D * K, *dbias = s->dbias + m.part * s->D;
    Window seen = {0}, here = {0}, later = {0}, next = {0};
    for (int64_t t = m.first_token; t < m.last_token; t += CONV_CHUNK) {
        const int64_t T = smaller(CONV_CHUNK, m.last_token - t);
        find_window(s, t - (K - 1), T + 2 * (K - 1), &seen);
        find_window(s, t, T, &here);
        find_window(s, t, T + K - 1, &later);
        find_window(s, t + CONV_CHUNK, CONV_CHUNK, &next);
        Ahead ahead = {.n_blocks = divide_up(m.last_channel - m.first_channel, LANES)};
#define AT(x) (s->x.batch * m.b + s->x.channel * channel)
        int64_t channel = m.first_channel;
        expect(&ahead, 0, &s->x, AT(x), &next.places);
        expect(&ahead, 1, &s->dout, AT(dout), &next.places);
        expect(&ahead, 2, &s->dx, AT(dx), &next.places);
        for (; channel < m.last_channel; channel += LANES) {
            const int64_t lanes = smaller(LANES, s->D - channel);
            const Rows x = read_window(&s->x, AT(x), &seen, lanes, staged_x);
            const Rows dout = read_window(&s->dout, AT(dout), &later, lanes, staged_dout);
            fetch_uneven(&s->x, AT(x), &next.places, CONV_CHUNK);
            fetch_uneven(&s->dout, AT(dout), &next.places, CONV_CHUNK);
            fetch_uneven(&s->dx, AT(dx), &next.places, CONV_CHUNK);
            const Rows dx = write_rows(&s->dx, AT(dx), &here.places, lanes, staged_dx);
            load_taps(s, channel, lanes, taps);
            if (K == 4)
                conv_backward_block(4, T, x, dout, dx, taps, pre, sums, &ahead);
            else
                conv_backward_block(K, T, x, dout, dx, taps, pre, sums, &ahead);
            finish_rows(&s->dx, dx, AT(dx), &here.places, T, lanes, staged_dx);
            for (int64_t i = 0; i < lanes; i++) {
                for (int64_t k = 0; k < K; k++) {
                    float *total = dweight + (channel + i) * K + k;
                    *total = sums[k * LANES + i] + (t > m.first_token ? *total : 0.0f);
                }
                float *total = dbias + channel + i;
                *total = sums[K * LANES + i] + (t > m.first_token ? *total : 0.0f);
            }
        }
#undef AT
    }
}

static int run_conv(const Conv *s, void (*work)(void *, int64_t, int64_t)) {
    ConvJob job = {.s = s,
                   .n_segments = divide_up(s->L, CONV_SEGMENT),
                   .n_ranges = divide_up(s->D, CONV_BLOCKS * LANES)};
    const int64_t n_items = s->B * job.n_segments * job.n_ranges;
    const int64_t threads = smaller(s->n_threads, n_items);
    job.scratch_size = padded((4 * CONV_ROWS + 2 * (MAX_TAPS + 1)) * LANES);
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
