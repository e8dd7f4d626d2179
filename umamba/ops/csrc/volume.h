/* Arithmetic of whole volumes: weighted sums of tiles, and linear resampling with its argmax. */
#ifndef VOLUME_H
#define VOLUME_H

#include <stdlib.h>
#include <string.h>

#include "umamba.h"

#define ROWS_OF_ITEM 32
/* Of a tile and its sums, rows of 512 bytes with gaps between them: measured 2, 4 and 8. */
#define ROWS_AHEAD 4

static void add_row(float *restrict sum, const float *restrict tile, const float *restrict weight,
                    int64_t n, int64_t step, int64_t n_held) {
    if (step == 1) {
        for (int64_t i = 0; i < n_held; i++) sum[i] += tile[i] * weight[i];
        for (int64_t i = n_held; i < n; i++) sum[i] = tile[i] * weight[i];
    } else {
        for (int64_t i = 0; i < n_held; i++) sum[i] += tile[i * step] * weight[i];
        for (int64_t i = n_held; i < n; i++) sum[i] = tile[i * step] * weight[i];
    }
}

/* An item is one channel; of a tile whose channels lie side by side, one plane of all channels. */
static void add_item(void *context, int64_t item, int64_t worker) {
    const AddTile *s = context;
    const int by_plane = s->t_x != 1;
    (void)worker;
    for (int64_t i = 0; i < (by_plane ? s->n_y : s->n_z * s->n_y); i++) {
        const int64_t z = by_plane ? item : i / s->n_y, y = by_plane ? i : i % s->n_y;
        const int64_t k0 = by_plane ? 0 : item, k1 = by_plane ? s->K : item + 1;
        for (int64_t k = k0; k < k1; k++) {
            float *sum = s->sum + k * s->s_k + z * s->s_z + y * s->s_y;
            const float *tile = s->tile + k * s->t_k + z * s->t_z + y * s->t_y;
            for (int64_t x = 0; x < s->n_x; x += 16) {
                __builtin_prefetch(sum + ROWS_AHEAD * s->s_y + x, 1);
                __builtin_prefetch(tile + ROWS_AHEAD * s->t_y + x, 0);
            }
            add_row(sum, tile, s->weight + z * s->w_z + y * s->w_y, s->n_x, s->t_x, s->n_held);
        }
    }
}

/* An item is one plane. */
static void add_weight_item(void *context, int64_t z, int64_t worker) {
    const AddTile *s = context;
    (void)worker;
    for (int64_t y = 0; y < s->n_y; y++) {
        float *restrict sum = s->sum + z * s->s_z + y * s->s_y;
        const float *restrict weight = s->weight + z * s->w_z + y * s->w_y;
        for (int64_t x = 0; x < s->n_held; x++) sum[x] += weight[x];
        for (int64_t x = s->n_held; x < s->n_x; x++) sum[x] = weight[x];
    }
}

static int add_tile(const AddTile *s) {
    if (!s->tile) {
        umamba_parallel(s->n_threads, s->n_z, add_weight_item, (void *)s);
        return STATUS_DONE;
    }
    umamba_parallel(s->n_threads, s->t_x != 1 ? s->n_z : s->K, add_item, (void *)s);
    return STATUS_DONE;
}

/* The nearest number of eleven significant bits, as half precision keeps them. */
static inline float rounded_to_half(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    bits = (bits + 0xfff + (bits >> 13 & 1)) & ~(uint32_t)0x1fff;
    memcpy(&value, &bits, 4);
    return value;
}

/* Row y of the input between two planes, resampled along x into `row`; `line` is scratch. */
static void resampled_row(const LinearArgmax *s, const float *lower, const float *upper,
                          const float *weights, float *restrict line, float *restrict row) {
    const float *source = lower;
    if (weights[1] != 0) {
        for (int64_t x = 0; x < s->n_x; x++) line[x] = weights[0] * lower[x] + weights[1] * upper[x];
        source = line;
    }
    if (!s->x_low) {
        memcpy(row, source, sizeof(float) * s->X);
        return;
    }
    const int32_t *restrict low = s->x_low, *restrict high = s->x_high;
    const float *restrict a = s->x_weight, *restrict b = s->x_weight + s->X;
    for (int64_t x = 0; x < s->X; x++) row[x] = a[x] * source[low[x]] + b[x] * source[high[x]];
}

static void compare_row(const LinearArgmax *s, const float *restrict first, const float *restrict second,
                        float a, float b, int32_t k, float *restrict best, int32_t *restrict label) {
    for (int64_t x = 0; x < s->X; x++) {
        float value = a * first[x] + b * second[x];
        if (s->round_half) value = rounded_to_half(value);
        const int larger = value > best[x];
        best[x] = larger ? value : best[x];
        label[x] = larger ? k : label[x];
    }
}

/* An item is one plane of the output and up to ROWS_OF_ITEM of its rows. */
static void argmax_item(void *context, int64_t item, int64_t worker) {
    const LinearArgmax *s = context;
    const int64_t groups = divide_up(s->Y, ROWS_OF_ITEM), z = item / groups;
    const int64_t y0 = item % groups * ROWS_OF_ITEM, y1 = smaller(y0 + ROWS_OF_ITEM, s->Y);
    float *best = (float *)s->scratch + worker * s->scratch_floats;
    int32_t *label = (int32_t *)(best + ROWS_OF_ITEM * s->X);
    float *rows[2] = {(float *)(label + ROWS_OF_ITEM * s->X), NULL};
    rows[1] = rows[0] + s->X;
    float *line = rows[1] + s->X;
    const float z_weight[2] = {s->z_weight[z], s->z_weight[z + s->Z]};
    for (int64_t i = 0; i < (y1 - y0) * s->X; i++) best[i] = -__builtin_inff();
    memset(label, 0, sizeof(int32_t) * (y1 - y0) * s->X);
    for (int64_t k = 0; k < s->K; k++) {
        const float *lower = s->data + k * s->s_k + s->z_low[z] * s->s_z;
        const float *upper = s->data + k * s->s_k + s->z_high[z] * s->s_z;
        int64_t held[2] = {-1, -1};
        for (int64_t y = y0; y < y1; y++) {
            const float b = s->y_weight[y + s->Y];
            const int64_t wanted[2] = {s->y_low[y], b != 0 ? s->y_high[y] : s->y_low[y]};
            if (held[0] != wanted[0] && held[1] == wanted[0]) {
                float *swapped = rows[0];
                rows[0] = rows[1], rows[1] = swapped;
                held[1] = held[0], held[0] = wanted[0];
            }
            for (int i = 0; i < 2; i++)
                if (held[i] != wanted[i] && !(i && wanted[1] == wanted[0])) {
                    const int64_t offset = wanted[i] * s->s_y;
                    resampled_row(s, lower + offset, upper + offset, z_weight, line, rows[i]);
                    held[i] = wanted[i];
                }
            const float *second = wanted[1] == wanted[0] ? rows[0] : rows[1];
            compare_row(s, rows[0], second, s->y_weight[y], b, (int32_t)k,
                        best + (y - y0) * s->X, label + (y - y0) * s->X);
        }
    }
    for (int64_t y = y0; y < y1; y++) {
        const int32_t *from = label + (y - y0) * s->X;
        const int64_t offset = z * s->l_z + y * s->l_y;
        if (s->label_bytes == 1)
            for (int64_t x = 0; x < s->X; x++) ((uint8_t *)s->labels)[offset + x] = (uint8_t)from[x];
        else
            for (int64_t x = 0; x < s->X; x++) ((uint16_t *)s->labels)[offset + x] = (uint16_t)from[x];
    }
}

static int linear_argmax(const LinearArgmax *given) {
    LinearArgmax s = *given;
    s.scratch_floats = (2 * ROWS_OF_ITEM + 2) * s.X + s.n_x + 16;
    s.scratch = malloc(sizeof(float) * s.scratch_floats * larger(1, s.n_threads));
    if (!s.scratch) return STATUS_NO_MEMORY;
    umamba_parallel(s.n_threads, s.Z * divide_up(s.Y, ROWS_OF_ITEM), argmax_item, &s);
    free(s.scratch);
    return STATUS_DONE;
}

#endif
