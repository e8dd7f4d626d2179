/* Argument structures and entry points shared by every part of the CPU scan library. */
#ifndef UMAMBA_H
#define UMAMBA_H

#include <stdint.h>

#define CHUNK 32 /* tokens between two saved states; equals CHUNK in umamba/ops/layout.py */
#define MAX_TAPS 8

enum { DTYPE_F32 = 0, DTYPE_BF16 = 1, DTYPE_F16 = 2 };
enum { STATUS_DONE = 0, STATUS_NO_MEMORY = 1, STATUS_NO_ISA = 2 };

/* A tensor (batch, group, token, channel or state); strides in elements; data is NULL if absent.
 * add: results are added to the float32 elements there. */
typedef struct {
    void *data;
    int64_t batch, group, token, channel;
    int64_t dtype, add;
} Tensor;

/* Step p visits token start + i0 s0 + i1 s1 + i2 s2, where i2 = p % n2, i1 = p / n2 % n1,
 * i0 = p / (n1 n2). */
typedef struct {
    int64_t start, n0, s0, n1, s1, n2, s2;
} Walk;

/* One direction; tokens lie in raster order and are met along the walk.
 * Dense float32 arrays: A (D,N), skip and bias (D), initial and last (B,D,N),
 * states (B,n_chunks,N,D) before each chunk walked. local_window: tokens of a window of the
 * locally bidirectional scan, which divide CHUNK; 0 or 1 for the plain scan. */
typedef struct {
    int64_t B, D, L, N, G;
    int64_t softplus, local_window, n_threads;
    Walk walk;
    Tensor u, delta, z, Bm, Cm, out;
    const float *A, *skip, *bias, *initial;
    float *last, *states;
} ScanForward;

/* dA (B,D,N), dskip and dbias (B,D) hold one part per sample; the first ends as their sum. */
typedef struct {
    int64_t B, D, L, N, G;
    int64_t softplus, local_window, n_threads;
    Walk walk;
    Tensor u, delta, z, Bm, Cm, dout;
    Tensor du, ddelta, dz, dBm, dCm;
    const float *A, *skip, *bias, *states, *dlast;
    float *dA, *dskip, *dbias, *dinitial;
} ScanBackward;

/* weight (D,K), bias (D); dweight (parts,D,K) and dbias (parts,D) hold one part per CONV_SEGMENT tokens
 * of a sample; the first ends as their sum. dout, dx, dweight and dbias are absent in the forward. */
typedef struct {
    int64_t B, D, L, K, n_threads;
    Walk walk;
    Tensor x, out, dout, dx;
    const float *weight, *bias;
    float *dweight, *dbias;
} Conv;

#define CONV_SEGMENT 256

/* sum (K, n_z, n_y, n_x) += tile * weight in the first n_held of each row, = behind them; without a
 * tile (K = 1) the weight itself. Steps in elements along each axis; those of sum and weight along
 * x are 1. */
typedef struct {
    int64_t K, n_z, n_y, n_x, n_held, n_threads;
    int64_t s_k, s_z, s_y, t_k, t_z, t_y, t_x, w_z, w_y;
    float *sum;
    const float *tile, *weight;
} AddTile;

/* labels (Z, Y, X) = argmax over K of data (K, z, y, n_x) resampled linearly: output i of an axis is
 * weight[i] data[low[i]] + weight[i + extent] data[high[i]]. Where x_low is absent, X is n_x.
 * scratch and scratch_floats are the library's own. */
typedef struct {
    int64_t K, n_x, Z, Y, X, s_k, s_z, s_y, l_z, l_y, label_bytes, round_half, n_threads;
    const float *data, *z_weight, *y_weight, *x_weight;
    const int32_t *z_low, *z_high, *y_low, *y_high, *x_low, *x_high;
    void *labels, *scratch;
    int64_t scratch_floats;
} LinearArgmax;

typedef struct {
    int lanes;
    int (*scan_forward)(const ScanForward *);
    int (*scan_backward)(const ScanBackward *);
    int (*conv_forward)(const Conv *);
    int (*conv_backward)(const Conv *);
    int (*add_tile)(const AddTile *);
    int (*linear_argmax)(const LinearArgmax *);
} Kernels;

/* Runs work(context, item, worker) for every item; worker < n_threads, the caller is worker 0. */
void umamba_parallel(int64_t n_threads, int64_t n_items,
                     void (*work)(void *context, int64_t item, int64_t worker), void *context);

static inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
static inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

#endif
