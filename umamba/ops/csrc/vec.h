/* Vectors of 4, 8 or 16 floats; exp2, log1p, sigmoid, sums over lanes and half types on them. */
#ifndef UMAMBA_VEC_H
#define UMAMBA_VEC_H

#include <stddef.h>
#include <stdlib.h>
#include <string.h>

#include "umamba.h"

#if defined(__AVX512F__)
#define LANES 16
#elif defined(__AVX2__)
#define LANES 8
#else
#define LANES 4
#endif
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#define INLINE static inline __attribute__((always_inline))
#define APART static __attribute__((noinline)) /* inner loops: registers of their own */
#define LOG2E 1.44269504088896341f
#define LN2 0.693147180559945309f

typedef float vf __attribute__((vector_size(4 * LANES)));
typedef float vfu __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t vi __attribute__((vector_size(4 * LANES)));

INLINE vf vload(const float *p) { return *(const vfu *)p; }
INLINE void vstore(float *p, vf x) { *(vfu *)p = x; }
/* Past the caches: p on a multiple of LANES floats. threads.c fences such stores. */
#if defined(__AVX512F__)
INLINE void vstream(float *p, vf x) { _mm512_stream_ps(p, (__m512)x); }
#elif defined(__AVX2__)
INLINE void vstream(float *p, vf x) { _mm256_stream_ps(p, (__m256)x); }
#else
INLINE void vstream(float *p, vf x) { vstore(p, x); }
#endif
INLINE void store_lanes(float *p, int64_t n, vf x) {
    if (n == LANES)
        vstore(p, x);
    else
        memcpy(p, &x, (size_t)n * sizeof(float));
}
INLINE vf vset(float x) { return x - (vf){0}; }

#if defined(__AVX512F__)
INLINE vf vfma(vf a, vf b, vf c) { return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }
/* The second operand survives a NaN, so a NaN in x is never hidden by a limit. */
INLINE vf at_least(vf limit, vf x) { return (vf)_mm512_max_ps((__m512)limit, (__m512)x); }
INLINE vf at_most(vf limit, vf x) { return (vf)_mm512_min_ps((__m512)limit, (__m512)x); }
INLINE vf vabs(vf x) { return (vf)_mm512_abs_ps((__m512)x); }
/* positive where x >= 0 (or NaN), else negative */
INLINE vf by_sign(vf x, vf positive, vf negative) {
    return (vf)_mm512_mask_mov_ps((__m512)positive, _mm512_movepi32_mask((__m512i)x),
                                  (__m512)negative);
}
INLINE vf reciprocal(vf x) { /* x in [1, 1e31): one Newton step from 14 bits */
    vf r = (vf)_mm512_rcp14_ps((__m512)x);
    return vfma(r, 1.0f - x * r, r);
}
/* mantissa * 2^n, n integral, with under- and overflow to 0 and infinity */
INLINE vf scale(vf mantissa, vf n) { return (vf)_mm512_scalef_ps((__m512)mantissa, (__m512)n); }
#else
INLINE vf vfma(vf a, vf b, vf c) { return a * b + c; }
INLINE vf vabs(vf x) { return (vf)((vi)x & 0x7fffffff); }
INLINE vf reciprocal(vf x) { return 1.0f / x; }
#if defined(__AVX2__)
INLINE vf at_least(vf limit, vf x) { return (vf)_mm256_max_ps((__m256)limit, (__m256)x); }
INLINE vf at_most(vf limit, vf x) { return (vf)_mm256_min_ps((__m256)limit, (__m256)x); }
INLINE vf by_sign(vf x, vf positive, vf negative) {
    return (vf)_mm256_blendv_ps((__m256)positive, (__m256)negative, (__m256)x);
}
#else
INLINE vf choose(vi mask, vf yes, vf no) { return (vf)(((vi)yes & mask) | ((vi)no & ~mask)); }
INLINE vf at_least(vf limit, vf x) { return choose(limit > x, limit, x); }
INLINE vf at_most(vf limit, vf x) { return choose(limit < x, limit, x); }
INLINE vf by_sign(vf x, vf positive, vf negative) { return choose((vi)x >> 31, negative, positive); }
#endif
#endif

/* 2^r for r in [-0.5, 0.5]. The constant is exactly 1, so that slow decays are not biased;
 * minimax in (2^r - 1) / r, relative error 4e-7 of that. */
INLINE vf exp2_fraction(vf r) {
    vf p = vfma(r, vset(1.3333544e-3f), vset(9.6662454e-3f));
    p = vfma(p, r, vset(5.5505004e-2f));
    p = vfma(p, r, vset(0.24022351f));
    p = vfma(p, r, vset(0.69314712f));
    return vfma(p, r, vset(1.0f));
}

/* 2^t; integers by adding 1.5 * 2^23, which rounds to the nearest. */
INLINE vf exp2_vector(vf t) {
    const vf magic = vset(12582912.0f);
#if defined(__AVX512F__)
    const vf n = (t + magic) - magic;
    return scale(exp2_fraction(t - n), n);
#else
    t = at_most(vset(127.0f), at_least(vset(-126.0f), t));
    const vf shifted = t + magic;
    const vf p = exp2_fraction(t - (shifted - magic));
    return (vf)(((vi)shifted << 23) + (vi)p);
#endif
}

/* 2^(x*y) for |x*y| < 1e14; x*y is not rounded. With 16 lanes a register holds 2^(k/16), k = 0..15, so that
 * a polynomial of degree 3 does: relative error 1e-7 of 2^(x*y) - 1 where that is small. */
INLINE vf exp2_product(vf x, vf y) {
#if defined(__AVX512F__)
    const vf powers = {1.0f, 1.04427373f, 1.09050775f, 1.13878858f, 1.18920708f, 1.24185777f,
                       1.29683959f, 1.35425556f, 1.41421354f, 1.47682619f, 1.54221082f, 1.61049032f,
                       1.68179286f, 1.75625217f, 1.8340081f, 1.91520655f};
    const vf magic = vset(786432.0f), shifted = vfma(x, y, magic), n = shifted - magic;
    const vf r = (vf)_mm512_fmsub_ps((__m512)x, (__m512)y, (__m512)n);
    const vf power = (vf)_mm512_permutexvar_ps((__m512i)shifted, (__m512)powers);
    const vf p = vfma(vfma(r, vset(5.5505086e-2f), vset(0.24023356f)), r, vset(0.69314718f));
    return scale(vfma(power * r, p, power), n);
#else
    return exp2_vector(x * y);
#endif
}

/* log(1 + e) for e in [0, 1], relative error 3e-8 before rounding. */
INLINE vf log1p_unit(vf e) {
    vf p = vfma(e, vset(5.3661742e-3f), vset(-3.0071408e-2f));
    p = vfma(p, e, vset(7.9214096e-2f));
    p = vfma(p, e, vset(-0.13754657f));
    p = vfma(p, e, vset(0.19154082f));
    p = vfma(p, e, vset(-0.24857281f));
    p = vfma(p, e, vset(0.33321339f));
    p = vfma(p, e, vset(-0.49999648f));
    p = vfma(p, e, vset(1.0f));
    return p * e;
}

/* The limits here keep powers and Newton steps finite; nothing that matters lies beyond them. */
INLINE vf sigmoid(vf x) {
    return reciprocal(1.0f + exp2_vector(at_most(vset(100.0f), x * -LOG2E)));
}

/* softplus(x); its derivative goes to *slope */
INLINE vf softplus(vf x, vf *slope) {
    const vf e = exp2_vector(at_least(vset(-200.0f), vabs(x) * -LOG2E));
    *slope = reciprocal(1.0f + e) * by_sign(x, vset(1.0f), e);
    return at_least(vset(0.0f), x) + log1p_unit(e);
}

/* Two times n vectors (n = 1, 2 or 4) folded into one. In it the i-th LANES/n lanes belong to b[i] and
 * c[i]: of every four lanes, the first two are partial sums of b[i], the others of c[i].
 * With four lanes: whole sums b[0], b[1], c[0], c[1]. */
INLINE vf fold(const int n, const vf *b, const vf *c) {
#if defined(__AVX512F__)
    __m512 x[2];
    for (int k = 0; k < 2; k++) {
        const vf *v = k ? c : b;
        __m512 half[2];
        for (int i = 0; i < n / 2; i++) {
            const __m512 low = (__m512)v[2 * i], high = (__m512)v[2 * i + 1];
            half[i] = _mm512_add_ps(_mm512_mask_blend_ps(0xff00, low, high),
                                    _mm512_shuffle_f32x4(low, high, 0x4e));
        }
        if (n == 4)
            x[k] = _mm512_add_ps(_mm512_shuffle_f32x4(half[0], half[1], 0x88),
                                 _mm512_shuffle_f32x4(half[0], half[1], 0xdd));
        else
            x[k] = n == 2 ? half[0] : (__m512)v[0];
    }
    return (vf)_mm512_add_ps(_mm512_mask_blend_ps(0xcccc, x[0], x[1]),
                             _mm512_shuffle_ps(x[0], x[1], 0x4e));
#elif defined(__AVX2__)
    __m256 x[2];
    for (int k = 0; k < 2; k++) {
        const vf *v = k ? c : b;
        x[k] = (__m256)v[0];
        if (n == 2)
            x[k] = _mm256_add_ps(_mm256_blend_ps((__m256)v[0], (__m256)v[1], 0xf0),
                                 _mm256_permute2f128_ps((__m256)v[0], (__m256)v[1], 0x21));
    }
    return (vf)_mm256_add_ps(_mm256_blend_ps(x[0], x[1], 0xcc), _mm256_shuffle_ps(x[0], x[1], 0x4e));
#else
    vf sums = {0};
    for (int i = 0; i < n; i++) {
        sums[i] = (b[i][0] + b[i][1]) + (b[i][2] + b[i][3]);
        sums[2 + i] = (c[i][0] + c[i][1]) + (c[i][2] + c[i][3]);
    }
    return sums;
#endif
}

/* The sums that fold() left in n_rows vectors: out_b[row * pitch + i] and out_c likewise, i < n. */
INLINE void unfold(const int n, const float *rows, int64_t n_rows, int64_t pitch, float *out_b,
                   float *out_c) {
    int64_t t = 0;
#if defined(__AVX512F__)
    const __m512i order = _mm512_set_epi32(15, 11, 7, 3, 14, 10, 6, 2, 13, 9, 5, 1, 12, 8, 4, 0);
    for (; n == 4 && t + 2 <= n_rows; t += 2) {
        const __m512 x = _mm512_loadu_ps(rows + t * LANES), y = _mm512_loadu_ps(rows + (t + 1) * LANES);
        const __m512 sums = _mm512_permutexvar_ps(
            order, _mm512_add_ps(_mm512_shuffle_ps(x, y, 0x88), _mm512_shuffle_ps(x, y, 0xdd)));
        _mm_storeu_ps(out_b + t * pitch, _mm512_castps512_ps128(sums));
        _mm_storeu_ps(out_c + t * pitch, _mm512_extractf32x4_ps(sums, 1));
        _mm_storeu_ps(out_b + (t + 1) * pitch, _mm512_extractf32x4_ps(sums, 2));
        _mm_storeu_ps(out_c + (t + 1) * pitch, _mm512_extractf32x4_ps(sums, 3));
    }
#endif
    for (; t < n_rows; t++)
        for (int i = 0; i < n; i++) {
#if LANES == 4
            out_b[t * pitch + i] = rows[t * LANES + i];
            out_c[t * pitch + i] = rows[t * LANES + 2 + i];
#else
            const float *part = rows + t * LANES + i * (LANES / n);
            float sum_b = 0.0f, sum_c = 0.0f;
            for (int k = 0; k < LANES / n; k += 4) {
                sum_b += part[k] + part[k + 1];
                sum_c += part[k + 2] + part[k + 3];
            }
            out_b[t * pitch + i] = sum_b;
            out_c[t * pitch + i] = sum_c;
#endif
        }
}

INLINE float half_to_float(uint16_t h) {
    /* subnormals go through an integer: as float32 bits they would be flushed to zero */
    uint32_t magnitude = h & 0x7fff, bits = magnitude << 13;
    float f = (float)magnitude * 0x1p-24f;
    if (magnitude >= 0x0400) {
        bits += magnitude >= 0x7c00 ? 0x70000000u : 0x38000000u;
        memcpy(&f, &bits, 4);
    }
    return h & 0x8000 ? -f : f;
}

INLINE uint16_t float_to_half(float f) {
    uint32_t bits, sign, out;
    memcpy(&bits, &f, 4);
    sign = bits >> 16 & 0x8000;
    bits &= 0x7fffffff;
    if (bits >= 0x47800000u) { /* overflow, infinity, NaN */
        out = bits > 0x7f800000u ? 0x7e00 : 0x7c00;
    } else if (bits < 0x38800000u) { /* subnormal: the addition of 0.5 rounds at 2^-24 */
        float tiny;
        memcpy(&tiny, &bits, 4);
        tiny += 0.5f;
        memcpy(&out, &tiny, 4);
        out -= 0x3f000000u;
    } else {
        out = (bits + 0xc8000fffu + (bits >> 13 & 1)) >> 13;
    }
    return (uint16_t)(sign | out);
}

INLINE float bf16_to_float(uint16_t h) {
    uint32_t bits = (uint32_t)h << 16;
    float f;
    memcpy(&f, &bits, 4);
    return f;
}

INLINE uint16_t float_to_bf16(float f) {
    uint32_t bits;
    memcpy(&bits, &f, 4);
    if ((bits & 0x7fffffff) > 0x7f800000u) return (uint16_t)(bits >> 16 | 0x40);
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

/* Scratch arrays start a whole number of cache lines apart. */
INLINE int64_t padded(int64_t n_floats) { return divide_up(n_floats, 16) * 16; }
static float *allocate(int64_t n_floats) {
    return aligned_alloc(64, (size_t)padded(n_floats) * sizeof(float));
}

/* x[0] += x[1] + ... in index order, whatever the number of threads that made the parts */
static void sum_into_first(float *x, int64_t n_parts, int64_t size) {
    for (int64_t i = 1; x && i < n_parts; i++)
        for (int64_t k = 0; k < size; k++) x[k] += x[i * size + k];
}

#endif
