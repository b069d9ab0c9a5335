// Linear layers for one to eight rows of bfloat16: bound by how fast the weights come from memory, so the weights are
// read once, in torch's own row-major layout, several rows side by side.

constexpr int64_t kFeatureChunk = 32;  // output features a thread takes at a time

#if MC_BF16
struct DotBf16 {
    static constexpr int STEP = 32;  // elements of one accumulation
    typedef bf16 x_t;
    static size_t scratch_floats(int64_t, int64_t) { return 0; }
    static const bf16 *prepare(const bf16 *x, int64_t, int64_t, int64_t &, float *) { return x; }

    template <int ROWS, int M>
    MC_INLINE void run(const bf16 *w, int64_t features, const bf16 *x, int64_t x_stride, const bf16 *ahead, float (*sums)[M]) {
        __m512 acc[ROWS][M];
        MC_UNROLL for (int r = 0; r < ROWS; r++) MC_UNROLL for (int m = 0; m < M; m++) acc[r][m] = _mm512_setzero_ps();
        int64_t k = 0;
        for (; k + 32 <= features; k += 32) {
            __m512bh xs[M];
            MC_UNROLL for (int m = 0; m < M; m++) xs[m] = (__m512bh)_mm512_loadu_si512(x + m * x_stride + k);
            MC_UNROLL for (int r = 0; r < ROWS; r++) {
                __builtin_prefetch(ahead + r * features + k, 0, 3);
                __m512bh row = (__m512bh)_mm512_loadu_si512(w + r * features + k);
                MC_UNROLL for (int m = 0; m < M; m++) acc[r][m] = _mm512_dpbf16_ps(acc[r][m], row, xs[m]);
            }
        }
        if (k < features) {
            __mmask32 tail = ~0u >> (32 - (features - k));
            MC_UNROLL for (int r = 0; r < ROWS; r++) {
                __m512bh row = (__m512bh)_mm512_maskz_loadu_epi16(tail, w + r * features + k);
                MC_UNROLL for (int m = 0; m < M; m++)
                    acc[r][m] = _mm512_dpbf16_ps(acc[r][m], row,
                                                 (__m512bh)_mm512_maskz_loadu_epi16(tail, x + m * x_stride + k));
            }
        }
        MC_UNROLL for (int r = 0; r < ROWS; r++) MC_UNROLL for (int m = 0; m < M; m++)
            sums[r][m] = _mm512_reduce_add_ps(acc[r][m]);
    }
};
typedef DotBf16 Dot;
#else
struct DotFp32 {
    typedef float x_t;
    static size_t scratch_floats(int64_t features, int64_t rows) { return rows * round_up(features, 2 * W); }

    // x in float32, 2 * W at a time: the even elements, then the odd ones, as the halves of a weight's words come.
    static const float *prepare(const bf16 *x, int64_t rows, int64_t features, int64_t &x_stride, float *to) {
        int64_t padded = round_up(features, 2 * W);
        for (int64_t m = 0; m < rows; m++)
            for (int64_t k = 0; k < padded; k++)
                to[m * padded + k / (2 * W) * 2 * W + k % 2 * W + k % (2 * W) / 2] = k < features ? to_float(x[m * x_stride + k]) : 0;
        x_stride = padded;
        return to;
    }

    template <int ROWS, int M>
    MC_INLINE void run(const bf16 *w, int64_t features, const float *x, int64_t x_stride, const bf16 *ahead, float (*sums)[M]) {
        typedef vi vi_any __attribute__((aligned(2), may_alias));
        vf acc[ROWS][M];
        MC_UNROLL for (int r = 0; r < ROWS; r++) MC_UNROLL for (int m = 0; m < M; m++) acc[r][m] = vf{};
        int64_t k = 0;
        for (; k + 2 * W <= features; k += 2 * W) {
            MC_UNROLL for (int r = 0; r < ROWS; r++) {
                __builtin_prefetch(ahead + r * features + k, 0, 3);
                vi both = *(const vi_any *)(w + r * features + k);
                vf even = (vf)(both << 16), odd = (vf)(both & ((vi{} - 1) << 16));
                MC_UNROLL for (int m = 0; m < M; m++) {
                    acc[r][m] += even * load(x + m * x_stride + k);
                    acc[r][m] += odd * load(x + m * x_stride + k + W);
                }
            }
        }
        MC_UNROLL for (int r = 0; r < ROWS; r++) MC_UNROLL for (int m = 0; m < M; m++) {
            float sum = hsum(acc[r][m]);
            for (int64_t i = k; i < features; i++) sum += to_float(w[r * features + i]) * x[m * x_stride + k + (i - k) % 2 * W + (i - k) / 2];
            sums[r][m] = sum;
        }
    }
};
typedef DotFp32 Dot;
#endif

MC_INLINE float round_bf16(float x) {
    bf16 y;
    from_float(x, y);
    return to_float(y);
}

MC_INLINE float silu(float x) { return x / (1.0f + exp2_scalar(-x * kLog2E)); }

template <int M>
static int run_linear(const mc_linear_args &a) {
    constexpr int ROWS = M <= 2 ? 4 : 2;
    const int64_t features = a.in_features;
    Scratch memory(4 * Dot::scratch_floats(features, M));
    if (!memory.ok()) return MC_NO_MEMORY;
    int64_t x_stride = a.x_stride;
    const auto *x = Dot::prepare((const bf16 *)a.x, M, features, x_stride, (float *)memory.data);
    int64_t chunks[4] = {0};
    for (int64_t i = 0; i < a.num_weights; i++)
        chunks[i + 1] = chunks[i] + (a.out_features[i] + kFeatureChunk - 1) / kFeatureChunk;
    const int64_t total = chunks[a.num_weights];
    Counter counter;
    parallel_run(min64(a.num_threads, total), [&](int, int) {
        float sums[ROWS][M], gates[ROWS][M];
        for (int64_t c; (c = counter.next()) < total;) {
            int64_t i = 0, column = 0;
            while (c >= chunks[i + 1]) column += a.out_features[i++];
            const bf16 *w = (const bf16 *)a.weight[i], *gate = (const bf16 *)a.gate;
            int64_t begin = (c - chunks[i]) * kFeatureChunk, end = min64(begin + kFeatureChunk, a.out_features[i]);
            for (int64_t n = begin; n < end;) {
                int64_t rows = end - n >= ROWS ? ROWS : 1;
                const bf16 *from = w + n * features, *ahead = from + rows * features;
                if (n + 2 * rows > a.out_features[i]) ahead = from;
                if (rows == ROWS) Dot::template run<ROWS, M>(from, features, x, x_stride, ahead, sums);
                else Dot::template run<1, M>(from, features, x, x_stride, ahead, sums);
                if (gate) {
                    const bf16 *g = gate + n * features;
                    const bf16 *g_ahead = ahead == from ? g : g + rows * features;
                    if (rows == ROWS) Dot::template run<ROWS, M>(g, features, x, x_stride, g_ahead, gates);
                    else Dot::template run<1, M>(g, features, x, x_stride, g_ahead, gates);
                }
                for (int64_t r = 0; r < rows; r++)
                    for (int m = 0; m < M; m++) {
                        float y = sums[r][m];
                        if (gate) y = round_bf16(y) * round_bf16(silu(round_bf16(gates[r][m])));
                        from_float(y, ((bf16 *)a.out)[m * a.out_stride + column + n + r]);
                    }
                n += rows;
            }
        }
    });
    return MC_OK;
}

static int linear(const mc_linear_args &a) {
    switch (a.rows) {
        case 1: return run_linear<1>(a);
        case 2: return run_linear<2>(a);
        case 3: return run_linear<3>(a);
        case 4: return run_linear<4>(a);
        case 5: return run_linear<5>(a);
        case 6: return run_linear<6>(a);
        case 7: return run_linear<7>(a);
        case 8: return run_linear<8>(a);
    }
    return MC_UNSUPPORTED;
}
