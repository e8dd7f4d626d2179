/* Tokens that a walk meets apart: their rows are copied in and out a chunk ahead of the arithmetic.
 *
 * Rows far apart share few sets of a cache, which cannot hold a chunk of them for the blocks to read one
 * after another. So all channels of an item are copied together: while the blocks of a chunk are computed,
 * rows of the next are fetched and take the places of the results of the chunk before. */
#ifndef UMAMBA_CARRY_H
#define UMAMBA_CARRY_H

#include "rows.h"

#define MOST_CARRIED 6
#define MOST_PLACES 80 /* rows of a window */

/* n tokens walked one after another; those outside the sequence stand for zeros. */
typedef struct {
    int64_t before, inside, n; /* before: of the n, those that come before the sequence */
    Places places;             /* of those inside */
    int64_t tokens[MOST_PLACES];
} Window;

static void find_window(const Walk *walk, int64_t L, int64_t from, int64_t n, Window *w) {
    const int64_t first = larger(from, 0), last = smaller(from + n, L);
    w->n = n;
    w->before = first - from;
    w->inside = larger(last - first, 0);
    if (w->inside) w->places = find_places(walk, first, w->inside, w->tokens);
}

/* A tensor that is read and one that takes the results left in its rows; data is NULL if absent. */
typedef struct {
    const Tensor *in, *out;
    int64_t in_at, out_at; /* elements to token 0 and the item's first channel */
    int64_t columns, pitch;
    float *rows[2]; /* of chunks in turn */
} Carried;

/* Chunk c has a window of `halo` tokens more on either side; its results lie in the first rows. */
typedef struct {
    const Walk *walk;
    int64_t L, chunk, halo, n_blocks, n;
    Carried x[MOST_CARRIED];
    Window windows[3]; /* of chunk c at c % 3 */
    int64_t before, next; /* chunks, -1 if there is none */
} Carrier;

static float *add_carried(Carrier *k, const Tensor *in, int64_t in_at, const Tensor *out, int64_t out_at,
                          int64_t columns, int64_t pitch, float *scratch) {
    const int64_t size = (k->chunk + 2 * k->halo) * pitch;
    k->x[k->n++] = (Carried){in, out, in_at, out_at, columns, pitch, {scratch, scratch + size}};
    return scratch + 2 * size;
}

/* Fetches, or copies, the rows [from, to) of the results before and of the inputs next. */
INLINE void move_rows(Carrier *k, const int copies, int64_t from, int64_t to) {
    const Window *old = &k->windows[k->before >= 0 ? k->before % 3 : 0];
    const Window *new = &k->windows[k->next >= 0 ? k->next % 3 : 0];
    const int64_t n_old = k->before >= 0 ? smaller(to, old->n - 2 * k->halo) - from : 0;
    const int64_t n_new = k->next >= 0 ? smaller(to, new->n) - from : 0;
    const int64_t turn = larger(k->before, k->next) % 2;
    const int64_t first = larger(from, new->before), last = smaller(from + n_new, new->before + new->inside);
    for (int64_t i = 0; i < k->n; i++) {
        const Carried *x = &k->x[i];
        float *rows = x->rows[turn];
        const int64_t out_from = from + k->halo - old->before;
        if (!x->in->data) continue;
        if (!copies) {
            if (x->out && n_old > 0)
                fetch_rows(x->out, x->out_at, &old->places, out_from, n_old, x->columns);
            if (last > first)
                fetch_rows(x->in, x->in_at, &new->places, first - new->before, last - first, x->columns);
            continue;
        }
        if (x->out && n_old > 0)
            copy_out(x->out, x->out_at, &old->places, out_from, n_old, x->columns, x->pitch,
                     rows + from * x->pitch);
        if (n_new > last - first)
            memset(rows + from * x->pitch, 0, (size_t)larger(n_new * x->pitch, 0) * sizeof(float));
        if (last > first)
            copy_in(x->in, x->in_at, &new->places, first - new->before, last - first, x->columns,
                    x->pitch, rows + first * x->pitch);
    }
}

static void carry_between(Carrier *k, int64_t before, int64_t next) {
    k->before = before;
    k->next = next;
    if (next >= 0)
        find_window(k->walk, k->L, next * k->chunk - k->halo,
                    smaller(k->chunk, k->L - next * k->chunk) + 2 * k->halo, &k->windows[next % 3]);
}

/* The rows of the first chunk. */
static void carry_first(Carrier *k, int64_t chunk) {
    carry_between(k, -1, chunk);
    move_rows(k, 1, 0, k->chunk + 2 * k->halo);
}

/* The results of the last chunk. */
static void carry_last(Carrier *k, int64_t chunk) {
    carry_between(k, chunk, -1);
    move_rows(k, 1, 0, k->chunk + 2 * k->halo);
}

/* Before and after block j of a chunk: its share of the rows to be moved meanwhile. */
INLINE void fetch_share(Carrier *k, int64_t j) {
    const int64_t n = k->chunk + 2 * k->halo;
    move_rows(k, 0, n * j / k->n_blocks, n * (j + 1) / k->n_blocks);
}

static void move_share(Carrier *k, int64_t j) {
    const int64_t n = k->chunk + 2 * k->halo;
    move_rows(k, 1, n * j / k->n_blocks, n * (j + 1) / k->n_blocks);
}

/* Of tensor i, block j, in chunk c. */
INLINE Rows carried_rows(const Carrier *k, int i, int64_t c, int64_t j) {
    return (Rows){k->x[i].rows[c % 2] + j * LANES, k->x[i].pitch};
}

#endif
