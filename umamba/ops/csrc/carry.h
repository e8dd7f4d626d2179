/* Tokens that a walk meets apart: their rows are copied in and out a span ahead of the arithmetic.
 *
 * A span is so many tokens walked one after another. Where the walk's lines lie side by side in memory, the
 * span holds the same stretch of several, and its rows are copied as they lie: neighbors of one page and of
 * one cache line together. While the chunks of a span are computed, the results of the span before leave
 * its places and the rows of the next take them; so all channels of an item are copied together. */
#ifndef UMAMBA_CARRY_H
#define UMAMBA_CARRY_H

#include "rows.h"

#define MOST_CARRIED 6
#define MOST_AHEAD 512 /* rows */
#define MOST_SPAN 1024 /* tokens */
#define MOST_LISTED (MOST_SPAN + 2 * MAX_TAPS)
#define CARRIED_FLOATS 32768 /* of a span: two take turns in a quarter of 1 MiB */

/* Tokens of a part of a walk as they lie in memory, and the steps from its first at which they are met. */
typedef struct {
    int64_t n;
    int64_t tokens[MOST_LISTED], steps[MOST_LISTED];
} List;

/* The steps [from, to) of the walk, counted from `base`. */
static void list_tokens(const Walk *w, int64_t from, int64_t to, int64_t base, List *list) {
    int64_t starts[MOST_LISTED];
    const int64_t first = from / w->n2, n_lines = to > from ? (to - 1) / w->n2 - first + 1 : 0;
    for (int64_t i = 0; i < n_lines; i++)
        starts[i] = w->start + (first + i) / w->n1 * w->s0 + (first + i) % w->n1 * w->s1;
    /* several lines at once only if their tokens are nearer than those of a line */
    const int together = n_lines > 2 && llabs(w->s1) < llabs(w->s2);
    list->n = 0;
    for (int64_t i = 0; i < n_lines; i += together ? n_lines : 1) {
        const int64_t last = together ? n_lines : i + 1;
        const int64_t begin = i ? 0 : from % w->n2, end = smaller(w->n2, to - (first + i) * w->n2);
        for (int64_t i2 = together ? 0 : begin; i2 < end; i2++)
            for (int64_t j = i; j < last; j++) {
                const int64_t step = (first + j) * w->n2 + i2;
                if (step < from || step >= to) continue;
                list->tokens[list->n] = starts[j] + i2 * w->s2;
                list->steps[list->n++] = step - base;
            }
    }
}

INLINE Places listed(const List *list, int64_t from) {
    return (Places){.tokens = list->tokens + from, .rows = list->steps + from};
}

/* A tensor that is read and one that takes the results left in its rows; data is NULL if absent. */
typedef struct {
    const Tensor *in, *out;
    int64_t in_at, out_at; /* elements to token 0 and the item's first channel */
    int64_t columns, pitch;
    float *rows[2]; /* of spans in turn */
} Carried;

/* The rows of a share: first some that leave, then some that come. */
typedef struct {
    Places out, in;
    int64_t n_out, n_in;
    int is_first; /* of those with rows to come */
} Share;

/* A span has `halo` tokens more on either side, zeros outside the sequence; its results lie in the first
 * rows. What is leaving, then what is coming is moved in n_shares between the blocks computed. */
typedef struct {
    const Walk *walk;
    int64_t L, span, halo, n;
    Carried x[MOST_CARRIED];
    int64_t turn, moved, n_shares;
    Share share;
    List leaving, coming;
    const char *ahead[MOST_AHEAD];
} Carrier;

/* The tokens of a span if a row is so long; the sums of results never show it. */
static int64_t find_span(const Walk *walk, int64_t n_floats) {
    const int64_t n = larger(smaller(CARRIED_FLOATS / n_floats, MOST_SPAN) / CHUNK, 1) * CHUNK;
    return n > walk->n2 && walk->n2 % CHUNK == 0 ? n - n % walk->n2 : n;
}

static void begin_carrier(Carrier *k, const Walk *walk, int64_t L, int64_t span, int64_t halo) {
    k->walk = walk;
    k->L = L;
    k->span = span;
    k->halo = halo;
    k->n = 0;
}

static float *add_carried(Carrier *k, const Tensor *in, int64_t in_at, const Tensor *out, int64_t out_at,
                          int64_t columns, int64_t pitch, float *scratch) {
    const int64_t size = (k->span + 2 * k->halo) * pitch;
    k->x[k->n++] = (Carried){in, out, in_at, out_at, columns, pitch, {scratch, scratch + size}};
    return scratch + 2 * size;
}

static Share take_share(Carrier *k) {
    const int64_t from = k->moved, n = divide_up(k->leaving.n + k->coming.n - from, k->n_shares--);
    const int64_t n_out = larger(smaller(n, k->leaving.n - from), 0);
    const int64_t in_from = larger(from - k->leaving.n, 0);
    k->moved += n;
    return (Share){.out = listed(&k->leaving, from),
                   .in = listed(&k->coming, in_from),
                   .n_out = n_out,
                   .n_in = n - n_out,
                   .is_first = n > n_out && !in_from};
}

/* Lists the rows of this share for n_fetches on the way to its move. */
static void expect_share(Carrier *k, Ahead *ahead, int64_t n_fetches) {
    const Share share = k->share = take_share(k);
    int64_t n = 0;
    for (int64_t i = 0; i < k->n; i++) {
        const Carried *x = &k->x[i];
        if (!x->in->data) continue;
        for (int64_t j = 0; x->out && !streams(x->out, x->out_at, x->columns) && j < share.n_out && n < MOST_AHEAD; j++)
            k->ahead[n++] = element(x->out, x->out_at + share.out.tokens[j] * x->out->token);
        for (int64_t j = 0; j < share.n_in && n < MOST_AHEAD; j++)
            k->ahead[n++] = element(x->in, x->in_at + share.in.tokens[j] * x->in->token);
    }
    ahead->listed = k->ahead;
    ahead->n_listed = n;
    ahead->n_rows = divide_up(n, n_fetches);
    ahead->n_lines = divide_up(k->x[0].columns * (k->x[0].in->dtype == DTYPE_F32 ? 4 : 2), 64);
}

static void move_share(Carrier *k) {
    const Share share = k->share;
    const int64_t n_rows = k->span + 2 * k->halo;
    for (int64_t i = 0; i < k->n; i++) {
        const Carried *x = &k->x[i];
        float *rows = x->rows[k->turn];
        if (!x->in->data) continue;
        if (x->out) copy_out(x->out, x->out_at, &share.out, share.n_out, x->columns, x->pitch, rows);
        if (share.is_first && k->coming.n < n_rows)
            memset(rows, 0, (size_t)(n_rows * x->pitch) * sizeof(float));
        copy_in(x->in, x->in_at, &share.in, share.n_in, x->columns, x->pitch, rows);
    }
}

/* While a span is computed, the results of span `leaving` leave and the rows of span `coming` come; -1 for
 * none. Both take turns at the same place. */
static void carry_between(Carrier *k, int64_t leaving, int64_t coming, int64_t n_shares) {
    const int64_t out = leaving * k->span, in = coming * k->span - k->halo;
    k->turn = larger(leaving, coming) % 2;
    k->moved = k->leaving.n = k->coming.n = 0;
    k->n_shares = n_shares;
    if (leaving >= 0) list_tokens(k->walk, out, smaller(out + k->span, k->L), out, &k->leaving);
    if (coming >= 0)
        list_tokens(k->walk, larger(in, 0), smaller(in + k->span + 2 * k->halo, k->L), in, &k->coming);
}

/* The rows of the first span, or the results of the last. */
static void carry_alone(Carrier *k, int64_t leaving, int64_t coming) {
    carry_between(k, leaving, coming, 1);
    k->share = take_share(k);
    move_share(k);
}

/* Of tensor i, block j, from step `from` of the walk on. */
INLINE Rows carried_rows(const Carrier *k, int i, int64_t from, int64_t j) {
    const Carried *x = &k->x[i];
    return (Rows){x->rows[from / k->span % 2] + from % k->span * x->pitch + j * LANES, x->pitch};
}

#endif
