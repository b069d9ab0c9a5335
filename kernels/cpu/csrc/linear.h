// Linear layers for one to eight rows of bfloat16: bound by how fast the weights come from memory, so the weights are
// read once, in torch's own row-major layout, several rows side by side.

constexpr int64_t kFeatureChunk = 32;  // output features a thread takes at a time

// What is asked for ahead of the weights' stream: two pages. A weight is used once a step, so it is kept out of the outer
// caches, where Python's own code and objects would otherwise be pushed out by it.
constexpr int64_t kAheadBytes = 8192;
constexpr int kAheadLocality = 0;

#if MC_BF16
struct DotBf16 {
    typedef bf16 x_t;
    static size_t scratch_floats(int64_t, int64_t) { return 0; }
    static const bf16 *prepare(const bf16 *x, int64_t, int64_t, int64_t &, float *) { return x; }

    // Products of ROWS rows of weights with M rows of x.
    template <int ROWS, int M>
    MC_INLINE void run(const bf16 *w, int64_t features, const bf16 *x, int64_t x_stride, float (*sums)[M]) {
        constexpr int PARTS = M == 1 ? 4 : M <= 3 ? 2 : 1;  // independent sums, to hide the latency of an addition
        __m512 acc[PARTS][ROWS][M];
        MC_UNROLL for (int p = 0; p < PARTS; p++) MC_UNROLL for (int r = 0; r < ROWS; r++)
            MC_UNROLL for (int m = 0; m < M; m++) acc[p][r][m] = _mm512_setzero_ps();
        int64_t k = 0;
        for (; k + 32 * PARTS <= features; k += 32 * PARTS) {
            MC_UNROLL for (int p = 0; p < PARTS; p++) {
                __m512bh row[ROWS];
                MC_UNROLL for (int r = 0; r < ROWS; r++) {
                    const bf16 *from = w + r * features + k + 32 * p;
                    __builtin_prefetch((const char *)from + kAheadBytes, 0, kAheadLocality);
                    row[r] = (__m512bh)_mm512_loadu_si512(from);
                }
                MC_UNROLL for (int m = 0; m < M; m++) {
                    __m512bh column = (__m512bh)_mm512_loadu_si512(x + m * x_stride + k + 32 * p);
                    MC_UNROLL for (int r = 0; r < ROWS; r++) acc[p][r][m] = _mm512_dpbf16_ps(acc[p][r][m], row[r], column);
                }
            }
        }
        for (; k < features; k += 32) {
            __mmask32 tail = features - k >= 32 ? ~0u : ~0u >> (32 - (features - k));
            MC_UNROLL for (int r = 0; r < ROWS; r++) {
                __m512bh row = (__m512bh)_mm512_maskz_loadu_epi16(tail, w + r * features + k);
                MC_UNROLL for (int m = 0; m < M; m++)
                    acc[0][r][m] = _mm512_dpbf16_ps(acc[0][r][m], row,
                                                    (__m512bh)_mm512_maskz_loadu_epi16(tail, x + m * x_stride + k));
            }
        }
        MC_UNROLL for (int r = 0; r < ROWS; r++) MC_UNROLL for (int m = 0; m < M; m++) {
            MC_UNROLL for (int p = 1; p < PARTS; p++) acc[0][r][m] = _mm512_add_ps(acc[0][r][m], acc[p][r][m]);
            sums[r][m] = _mm512_reduce_add_ps(acc[0][r][m]);
        }
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
    MC_INLINE void run(const bf16 *w, int64_t features, const float *x, int64_t x_stride, float (*sums)[M]) {
        typedef vi vi_any __attribute__((aligned(2), may_alias));
        vf acc[2][ROWS][M];
        MC_UNROLL for (int r = 0; r < ROWS; r++) MC_UNROLL for (int m = 0; m < M; m++) acc[0][r][m] = acc[1][r][m] = vf{};
        int64_t k = 0;
        for (; k + 2 * W <= features; k += 2 * W) {
            MC_UNROLL for (int r = 0; r < ROWS; r++) {
                const bf16 *from = w + r * features + k;
                __builtin_prefetch((const char *)from + kAheadBytes, 0, kAheadLocality);
                vi both = *(const vi_any *)from;
                vf even = (vf)((vu)both << 16), odd = (vf)((vu)both & 0xffff0000u);
                MC_UNROLL for (int m = 0; m < M; m++) {
                    acc[0][r][m] += even * load(x + m * x_stride + k);
                    acc[1][r][m] += odd * load(x + m * x_stride + k + W);
                }
            }
        }
        MC_UNROLL for (int r = 0; r < ROWS; r++) MC_UNROLL for (int m = 0; m < M; m++) {
            sums[r][m] = hsum(acc[0][r][m] + acc[1][r][m]);
            for (int64_t i = k; i < features; i++)
                sums[r][m] += to_float(w[r * features + i]) * x[m * x_stride + k + (i - k) % 2 * W + (i - k) / 2];
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

MC_INLINE vf round_bf16(vf x) {  // to nearest, ties to even; finite numbers and infinity
    vu u = (vu)x;
    vu rounded = (u + 0x7fff + ((u >> 16) & 1)) & 0xffff0000u;
    return x != x ? x : (vf)rounded;
}

template <int M>
static int run_linear(const mc_linear_args &a) {
    // Several rows of x do not stay in the first cache beside the weights: each pass over them serves two weight rows.
    constexpr int ROWS = M > 4 ? 2 : 1;
    const int64_t features = a.in_features;
    Scratch memory(4 * Dot::scratch_floats(features, M) + (a.norm_weight ? 2 * M * features : 0) + 192 +
                   Stretches::bytes(a.num_threads));
    if (!memory.ok()) return MC_NO_MEMORY;
    int64_t x_stride = a.x_stride;
    const bf16 *input = (const bf16 *)a.x;
    if (a.norm_weight) {
        bf16 *normed = memory.take<bf16>(M * features);
        for (int m = 0; m < M; m++)
            norm_row(input + m * a.x_stride, (const bf16 *)a.norm_weight, (float)a.norm_eps, features, normed + m * features);
        input = normed, x_stride = features;
    }
    const auto *x = Dot::prepare(input, M, features, x_stride, memory.take<float>(Dot::scratch_floats(features, M)));
    int64_t chunks[4] = {0};
    for (int64_t i = 0; i < a.num_weights; i++)
        chunks[i + 1] = chunks[i] + (a.out_features[i] + kFeatureChunk - 1) / kFeatureChunk;
    const int64_t total = chunks[a.num_weights];
    const int64_t num_threads = min64(a.num_threads, total);
    Stretches work(memory, total, num_threads);
    parallel_run(num_threads, [&](int thread, int) {
        float products[M][kFeatureChunk], gates[M][kFeatureChunk];
        work.run(thread, [&](int64_t c) __attribute__((always_inline)) {
            int64_t i = 0, column = 0;
            while (c >= chunks[i + 1]) column += a.out_features[i++];
            int64_t begin = (c - chunks[i]) * kFeatureChunk, count = min64(kFeatureChunk, a.out_features[i] - begin);
            auto multiply = [&](const void *weight, float (*to)[kFeatureChunk]) __attribute__((always_inline)) {
                const bf16 *from = (const bf16 *)weight + begin * features;
                float sums[ROWS][M];
                for (int64_t n = 0; n < count;) {
                    int64_t rows = count - n >= ROWS ? ROWS : 1;
                    if (rows == ROWS)
                        Dot::template run<ROWS, M>(from + n * features, features, x, x_stride, sums);
                    else
                        Dot::template run<1, M>(from + n * features, features, x, x_stride, sums);
                    for (int64_t r = 0; r < rows; r++, n++)
                        for (int m = 0; m < M; m++) to[m][n] = sums[r][m];
                }
            };
            multiply(a.weight[i], products);
            if (a.gate) multiply(a.gate, gates);
            for (int m = 0; m < M; m++) {
                if (a.gate)
                    for (int64_t n = 0; n < kFeatureChunk; n += W)
                        store(products[m] + n, round_bf16(load(products[m] + n)) *
                                                   round_bf16(silu(round_bf16(load(gates[m] + n)))));
                bf16 *to = (bf16 *)a.out + m * a.out_stride + column + begin;
                const bf16 *residual = nullptr;
                if (a.residual) residual = (const bf16 *)a.residual + m * a.residual_stride + column + begin;
                for (int64_t n = 0; n < count; n++) {
                    float y = products[m][n];
                    if (residual) y = to_float(residual[n]) + round_bf16(round_bf16(y) * (float)a.residual_scale);
                    from_float(y, to[n]);
                }
            }
        });
    });
    for (int m = 0; a.rope_heads && m < M; m++) {
        int64_t at = m % a.rope_rows * a.head_dim;
        rotate_row((bf16 *)a.out + m * a.out_stride, a.cosine + at, a.sine + at, a.rope_heads, a.head_dim);
    }
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
