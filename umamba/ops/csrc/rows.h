/* Rows of tensors met along a walk: where tokens lie, scratch copies, what is fetched ahead. */
#ifndef UMAMBA_ROWS_H
#define UMAMBA_ROWS_H

#include "vec.h"

/* Where some tokens lie: first + i * step, or tokens[i] if those are listed, whose rows of a scratch copy are
 * then rows[i]. */
typedef struct {
    int64_t first, step;
    const int64_t *tokens, *rows;
} Places;

INLINE int64_t place(const Places *p, int64_t i) { return p->tokens ? p->tokens[i] : p->first + i * p->step; }
INLINE int64_t place_copied(const Places *p, int64_t i) { return p->tokens ? p->rows[i] : i; }

/* Whether neighbors in the walk are neighbors in memory: their rows are then used where they lie. */
INLINE int is_line(const Walk *w, int64_t L) { return w->n2 == L && (w->s2 == 1 || w->s2 == -1); }

INLINE Places places_on_line(const Walk *w, int64_t from) {
    return (Places){.first = w->start + from * w->s2, .step = w->s2};
}

INLINE char *element(const Tensor *x, int64_t offset) {
    return (char *)x->data + offset * (x->dtype == DTYPE_F32 ? 4 : 2);
}

/* Copies n_rows of n_columns with any strides to rows of `pitch` floats, zeros to the right. */
#define COPY_IN(type, convert)                                                             \
    for (int64_t i = 0; i < n_rows; i++) {                                                 \
        const type *from = (const type *)element(x, offset) + place(places, i) * x->token; \
        float *to = out + place_copied(places, i) * pitch;                                                       \
        if (column == 1)                                                                   \
            for (int64_t k = 0; k < n_columns; k++) to[k] = convert(from[k]);              \
        else                                                                               \
            for (int64_t k = 0; k < n_columns; k++) to[k] = convert(from[k * column]);     \
        for (int64_t k = n_columns; k < pitch; k++) to[k] = 0.0f;                          \
    }
static void copy_in(const Tensor *x, int64_t offset, const Places *places, int64_t n_rows,
                    int64_t n_columns, int64_t pitch, float *out) {
    const int64_t column = x->channel;
    if (x->dtype == DTYPE_F32 && column == 1 && n_columns == pitch && pitch % LANES == 0) {
        const float *from = (const float *)element(x, offset);
        for (int64_t i = 0; i < n_rows; i++) {
            const float *row = from + place(places, i) * x->token;
            float *to = out + place_copied(places, i) * pitch;
            for (int64_t k = 0; k < pitch; k += LANES) vstore(to + k, vload(row + k));
        }
    } else if (x->dtype == DTYPE_F32) {
        COPY_IN(float, )
    } else if (x->dtype == DTYPE_BF16) {
        COPY_IN(uint16_t, bf16_to_float)
    } else {
        COPY_IN(uint16_t, half_to_float)
    }
}

/* Whether rows are whole cache lines, written without being read first. */
INLINE int streams(const Tensor *x, int64_t offset, int64_t n_columns) {
    return x->dtype == DTYPE_F32 && !x->add && ((uintptr_t)element(x, offset) | (uintptr_t)x->token * 4
                                                | (uintptr_t)n_columns * 4) % 64 == 0;
}

#define COPY_OUT(type, convert)                                                \
    for (int64_t i = 0; i < n_rows; i++) {                                     \
        type *to = (type *)element(x, offset) + place(places, i) * x->token;   \
        const float *from = in + place_copied(places, i) * pitch;                  \
        for (int64_t k = 0; k < n_columns; k++) to[k] = convert(k);            \
    }
#define SUM(k) (to[k] + from[k])
#define SAME(k) from[k]
#define BF16(k) float_to_bf16(from[k])
#define HALF(k) float_to_half(from[k])
static void copy_out(const Tensor *x, int64_t offset, const Places *places, int64_t n_rows,
                     int64_t n_columns, int64_t pitch, const float *in) {
    if (x->dtype == DTYPE_F32 && n_columns % LANES == 0) {
        float *to = (float *)element(x, offset);
        const int streamed = places->tokens && streams(x, offset, n_columns);
        for (int64_t i = 0; i < n_rows; i++) {
            float *there = to + place(places, i) * x->token;
            const float *row = in + place_copied(places, i) * pitch;
            for (int64_t k = 0; k < n_columns; k += LANES) {
                if (streamed)
                    vstream(there + k, vload(row + k));
                else
                    vstore(there + k, x->add ? vload(there + k) + vload(row + k) : vload(row + k));
            }
        }
    } else if (x->dtype == DTYPE_F32 && x->add) {
        COPY_OUT(float, SUM)
    } else if (x->dtype == DTYPE_F32) {
        COPY_OUT(float, SAME)
    } else if (x->dtype == DTYPE_BF16) {
        COPY_OUT(uint16_t, BF16)
    } else {
        COPY_OUT(uint16_t, HALF)
    }
}

/* Rows of floats, `stride` floats apart: the tensor's own memory or a scratch copy of it. */
typedef struct {
    float *rows;
    int64_t stride;
} Rows;

/* n_tokens of one channel block, as walked, evenly; offset is that of token 0. */
INLINE Rows read_rows(const Tensor *x, int64_t offset, const Places *places, int64_t n_tokens,
                      int64_t n_channels, float *scratch) {
    if (x->dtype == DTYPE_F32 && x->channel == 1 && n_channels == LANES)
        return (Rows){(float *)element(x, offset + places->first * x->token), places->step * x->token};
    copy_in(x, offset, places, n_tokens, n_channels, LANES, scratch);
    return (Rows){scratch, LANES};
}

/* n_tokens rows of all states, likewise. */
INLINE Rows read_states(const Tensor *x, int64_t offset, const Places *places, int64_t n_tokens,
                        int64_t n_states, float *scratch) {
    if (x->dtype == DTYPE_F32 && x->channel == 1)
        return (Rows){(float *)element(x, offset + places->first * x->token), places->step * x->token};
    copy_in(x, offset, places, n_tokens, n_states, n_states, scratch);
    return (Rows){scratch, n_states};
}

/* Where results of a block are written; finish_rows copies them out when that is scratch. */
INLINE Rows write_rows(const Tensor *x, int64_t offset, const Places *places, int64_t n_channels,
                       float *scratch) {
    if (x->dtype == DTYPE_F32 && n_channels == LANES && !x->add)
        return (Rows){(float *)element(x, offset + places->first * x->token), places->step * x->token};
    return (Rows){scratch, LANES};
}

INLINE void finish_rows(const Tensor *x, Rows r, int64_t offset, const Places *places,
                        int64_t n_tokens, int64_t n_channels, const float *scratch) {
    if (r.rows == scratch) copy_out(x, offset, places, n_tokens, n_channels, LANES, r.rows);
}

/* Up to 4 tensors of which the next chunk is fetched while this one is computed, row by row as it lies in
 * memory: the channel blocks jump from row to row, too far apart for the processor to see them coming.
 * Or, if `listed`, rows anywhere: so many of so many cache lines each time. */
typedef struct {
    const char *const *listed;
    int64_t n_listed, n_rows, n_lines;
    const char *rows[4];
    int64_t down[4], across[4]; /* bytes from row to row, and from block to block */
    int64_t block, n_blocks;
} Ahead;

INLINE void expect(Ahead *ahead, int i, const Tensor *x, int64_t offset, const Places *next) {
    const int64_t size = x->dtype == DTYPE_F32 ? 4 : 2;
    ahead->rows[i] = x->data ? element(x, offset + next->first * x->token) : (const char *)ahead;
    ahead->down[i] = next->step * x->token * size;
    ahead->across[i] = LANES * x->channel * size;
}

/* One block of one row of each of the first n. */
INLINE void fetch_ahead(const int n, Ahead *ahead) {
    if (ahead->listed) {
        const int64_t n_rows = smaller(ahead->n_rows, ahead->n_listed);
        for (int64_t i = 0; i < n_rows; i++)
            for (int64_t k = 0; k < ahead->n_lines; k++)
                __builtin_prefetch(ahead->listed[i] + k * 64, 0, 2);
        ahead->listed += n_rows;
        ahead->n_listed -= n_rows;
        return;
    }
#pragma GCC unroll 4
    for (int i = 0; i < n; i++)
        __builtin_prefetch(ahead->rows[i] + ahead->block * ahead->across[i], 0, 2);
    if (++ahead->block < ahead->n_blocks) return;
    ahead->block = 0;
#pragma GCC unroll 4
    for (int i = 0; i < n; i++) ahead->rows[i] += ahead->down[i];
}

#endif
