/* The locally bidirectional scan of LBMamba (arXiv 2506.15976): its groups of states over one chunk.
 *
 * Beside h, which goes through the sequence, a state walks the other way in each window. With a_t the decay
 * and b_t = step_t u_t B_t the input of a token:
 *     r_t = a_t back_(t+1), 0 at a window's last token; back_t = r_t + b_t
 * and h_t + r_t takes the place of h_t in the result. The gradient of back walks with h: what enters token t is
 *     p_t = a_(t-1) (q_(t-1) C_(t-1) + p_(t-1)), 0 at a window's first token.
 * A window divides CHUNK, so none lies in two chunks; only the last of a sequence may be shorter. */

/* As forward_group; decays (window, n_states, LANES) is scratch. */
INLINE void local_forward_group(const int n_states, int64_t T, int64_t window, const float *d,
                                const float *du, float *y, Rows Bc, Rows Cc, const float *A2,
                                float *state, float *decays, Ahead *ahead) {
    vf h[8], back[8], rate[8];
#pragma GCC unroll 8
    for (int i = 0; i < n_states; i++) {
        h[i] = vload(state + i * LANES);
        rate[i] = vload(A2 + i * LANES);
    }
    for (int64_t start = 0; start < T; start += window) {
        const int64_t stop = smaller(start + window, T);
#pragma GCC unroll 8
        for (int i = 0; i < n_states; i++) back[i] = (vf){0};
        for (int64_t t = stop - 1; t >= start; t--) {
            const float *Bt = Bc.rows + t * Bc.stride, *Ct = Cc.rows + t * Cc.stride;
            const vf dt = vload(d + t * LANES), dut = vload(du + t * LANES);
            vf even = vload(y + t * LANES), odd = (vf){0};
            if (ahead) fetch_ahead(4, ahead);
#pragma GCC unroll 8
            for (int i = 0; i < n_states; i++) {
                const vf a = exp2_product(dt, rate[i]), r = a * back[i];
                vstore(decays + ((t - start) * n_states + i) * LANES, a);
                back[i] = vfma(dut, vset(Bt[i]), r);
                if (i % 2)
                    odd = vfma(r, vset(Ct[i]), odd);
                else
                    even = vfma(r, vset(Ct[i]), even);
            }
            vstore(y + t * LANES, even + odd);
        }
        for (int64_t t = start; t < stop; t++) {
            const float *Bt = Bc.rows + t * Bc.stride, *Ct = Cc.rows + t * Cc.stride;
            const vf dut = vload(du + t * LANES);
            vf even = vload(y + t * LANES), odd = (vf){0};
#pragma GCC unroll 8
            for (int i = 0; i < n_states; i++) {
                const vf a = vload(decays + ((t - start) * n_states + i) * LANES);
                h[i] = vfma(a, h[i], dut * Bt[i]);
                if (i % 2)
                    odd = vfma(h[i], vset(Ct[i]), odd);
                else
                    even = vfma(h[i], vset(Ct[i]), even);
            }
            vstore(y + t * LANES, even + odd);
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < n_states; i++) vstore(state + i * LANES, h[i]);
}

APART void local_forward_states(int64_t T, int64_t N, int64_t window, const float *d, const float *du,
                                 float *y, Rows Bc, Rows Cc, const float *A2, float *state,
                                 float *decays, Ahead *ahead) {
    int64_t n = 0;
#define GROUP(k)                                                                              \
    for (; n + k <= N; n += k)                                                                \
        local_forward_group(k, T, window, d, du, y, (Rows){Bc.rows + n, Bc.stride},           \
                            (Rows){Cc.rows + n, Cc.stride}, A2 + n * LANES, state + n * LANES, \
                            decays, n ? NULL : ahead);
#if LANES == 16
    GROUP(8)
#endif
    GROUP(4)
    GROUP(2)
    GROUP(1)
#undef GROUP
}

/* As backward_group; history (T, 3, n_states, LANES) also holds p. */
INLINE void local_backward_group(const int n_states, int need_y, int first, int add, int64_t T,
                                 int64_t window, float *rows, Rows Bc, Rows Cc, const float *A2,
                                 Rows initial, float *history, float *carry, float *dA, float *sums,
                                 Ahead *ahead) {
#define KEPT(t, k, i) (history + (((t) * 3 + k) * n_states + i) * LANES)
    vf h[BACKWARD_STATES], g[BACKWARD_STATES], da[BACKWARD_STATES], rate[BACKWARD_STATES];
    vf p[BACKWARD_STATES], back[BACKWARD_STATES];
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
        const vf q = vload(row(rows, t, Q));
        if (first) fetch_ahead(4, ahead);
        if (t % window == 0) {
#pragma GCC unroll 4
            for (int i = 0; i < n_states; i++) p[i] = (vf){0};
        }
#pragma GCC unroll 4
        for (int i = 0; i < n_states; i++) {
            const vf a = exp2_product(step, rate[i]);
            vstore(KEPT(t, 0, i), a);
            vstore(KEPT(t, 1, i), h[i]);
            vstore(KEPT(t, 2, i), p[i]);
            h[i] = vfma(a, h[i], step_u * Bt[i]);
            p[i] = a * vfma(q, vset(Ct[i]), p[i]);
        }
    }
    for (int64_t t = T - 1; t >= 0; t--) {
        const float *Bt = Bc.rows + t * Bc.stride, *Ct = Cc.rows + t * Cc.stride;
        const vf step = vload(row(rows, t, STEP)), step_u = vload(row(rows, t, STEP_U));
        const vf q = vload(row(rows, t, Q));
        vf y = need_y ? vload(row(rows, t, Y)) : (vf){0};
        vf sum = first ? (vf){0} : vload(row(rows, t, R));
        vf decays = first ? (vf){0} : vload(row(rows, t, DECAYS));
        vf db[BACKWARD_STATES], dc[BACKWARD_STATES];
        if (first) fetch_ahead(3, ahead + 1);
        if (t == T - 1 || (t + 1) % window == 0) {
#pragma GCC unroll 4
            for (int i = 0; i < n_states; i++) back[i] = (vf){0};
        }
#pragma GCC unroll 4
        for (int i = 0; i < n_states; i++) {
            const vf a = vload(KEPT(t, 0, i)), before = vload(KEPT(t, 2, i));
            const vf own = q * Ct[i], r = a * back[i], seen = h[i] + r;
            back[i] = vfma(step_u, vset(Bt[i]), r);
            y = vfma(seen, vset(Ct[i]), y);
            dc[i] = q * seen;
            g[i] += own;
            const vf dinput = g[i] + before;
            db[i] = step_u * dinput;
            sum = vfma(dinput, vset(Bt[i]), sum);
            g[i] *= a;
            h[i] = vload(KEPT(t, 1, i));
            const vf e = vfma(g[i], h[i], (own + before) * r);
            decays = vfma(e, rate[i], decays);
            da[i] = vfma(step, e, da[i]);
        }
        if (need_y) vstore(row(rows, t, Y), y);
        vstore(row(rows, t, R), sum);
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
#undef KEPT
}

APART void local_backward_states(int need_y, int add, int64_t T, int64_t N, int64_t window, float *rows,
                                  Rows Bc, Rows Cc, const float *A2, Rows initial, float *history,
                                  float *carry, float *dA, float *sums, Ahead *ahead) {
    int64_t n = 0;
#define GROUPS(k)                                                                               \
    for (; n + k <= N; n += k, sums += T * LANES)                                               \
        local_backward_group(k, need_y, n == 0, add, T, window, rows,                           \
                             (Rows){Bc.rows + n, Bc.stride}, (Rows){Cc.rows + n, Cc.stride},    \
                             A2 + n * LANES,                                                    \
                             (Rows){initial.rows + n * initial.stride, initial.stride}, history, \
                             carry + n * LANES, dA + n * LANES, sums, ahead);
#if BACKWARD_STATES == 4
    GROUPS(4)
#endif
    GROUPS(2)
    GROUPS(1)
#undef GROUPS
}
