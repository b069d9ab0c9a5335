// Products of bfloat16 weights in torch's own row-major layout with one to eight rows: bound by how fast the weights come
// from memory, so they are read once, several rows side by side.

// What is asked for ahead of the weights' stream: two pages. A weight is used once a step, so it is kept out of the outer
// caches, where Python's own code and objects would otherwise be pushed out by it; but on Intel's processors that
// costs more time than the products do (measured on a Xeon with AMX), so there it is asked for into the second cache.
constexpr int64_t kAheadBytes = 8192;
MC_INLINE void ask_ahead(const void *p) {
    if (mc_is_intel)
        __builtin_prefetch(p, 0, 2);
    else
        __builtin_prefetch(p, 0, 0);
}

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
                    ask_ahead((const char *)from + kAheadBytes);
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
                ask_ahead((const char *)from + kAheadBytes);
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

// One weight of a call; `scales` are those of packed ones.
struct Weight {
    const void *data, *scales;
    int64_t out_features;
};

// `run` computes the products of `count` outputs from `begin` on with M rows of x.
template <int M>
struct DenseProduct {
    static constexpr int kMaxChunk = 32;
    // Several rows of x do not stay in the first cache beside the weights: each pass over them serves two weight rows.
    static constexpr int ROWS = M > 4 ? 2 : 1;
    const mc_linear_args &a;
    const typename Dot::x_t *x = nullptr;
    int64_t x_stride = 0;

    explicit DenseProduct(const mc_linear_args &a_) : a(a_) {}
    int64_t chunk() const { return kMaxChunk; }
    size_t scratch_bytes() const { return 4 * Dot::scratch_floats(a.in_features, M) + 64; }
    size_t thread_bytes() const { return 0; }

    void prepare(const bf16 *input, int64_t stride, Scratch &memory) {
        x_stride = stride;
        x = Dot::prepare(input, M, a.in_features, x_stride, memory.take<float>(Dot::scratch_floats(a.in_features, M)));
    }

    template <int TO>
    void run(const Weight &w, int64_t begin, int64_t count, float *, float (*to)[TO]) const {
        const int64_t features = a.in_features;
        const bf16 *from = (const bf16 *)w.data + begin * features;
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
    }
};
