// Attention of one query's heads over one run of keys in bfloat16 with float32 sums (AVX512-BF16).
//
// GP heads (the query group, padded to a power of two) times P = 16 / GP pairs of dimensions fill the 16 lanes: lane
// h * P + u holds pair i * P + u of head h, and the same 4 * P bytes of a key are broadcast to all heads. Keys and
// values are read where they lie, [token, dim]. After the products of 16 keys the P lanes of a head are folded, so that
// a vector holds GP heads x P keys; the order of keys in it (all even ones, then all odd ones, of a run of 2 * P) makes
// the rounded weights of keys 2j and 2j + 1 neighbours, which is what the product with the values wants.

template <int GP, int DIM>
struct EngineBf16 {
    typedef uint16_t key_t;
    static constexpr int P = 16 / GP;
    static constexpr int UNIT = P == 16 ? 32 : 16;
    static constexpr bool kConverts = false;
    static constexpr bool kAsksAhead = true;
    static constexpr bool kGroupIsQuery = true;
    static constexpr bool kOrdersRuns = false;
    static constexpr int VECTORS = UNIT / P;         // of scores of UNIT keys
    static constexpr int HEADS = GP < 8 ? GP : 8;    // heads of one pass over the values
    static constexpr int CHUNKS = 8 / HEADS < 4 ? 8 / HEADS : 4;  // times 32 dimensions
    int dim_, group;
    float factor;
    TileShape tile;
    int64_t num_groups, chunks, dim32, steps;
    uint32_t *q;     // [queries][steps][16]
    float *o;        // [queries][GP][dim32], dimensions permuted within 32: see `result`
    float *m, *l;    // [queries][16], in the base-2 exponent's scale
    uint32_t *weights;  // [kTile / (2 * P)][16] pairs of bfloat16

    static size_t scratch_floats(int64_t dim, int64_t, int64_t num_queries) {
        return num_queries * (dim / (2 * P) * 16 + GP * round_up(dim, 32) + 32) + kTile * 16;
    }

    void init(float *memory, int dim, int group_, float factor_, const TileShape &tile_, const bf16 *queries,
              int64_t head_stride, int64_t token_stride) {
        dim_ = dim, group = group_, tile = tile_;
        num_groups = tile.num_queries;
        steps = dim / (2 * P), dim32 = round_up(dim, 32), chunks = dim32 / 32;
        q = (uint32_t *)memory, o = memory + num_groups * steps * 16, m = o + num_groups * GP * dim32;
        l = m + num_groups * 16, weights = (uint32_t *)(l + num_groups * 16);
        // The maximum is taken before the factor, which must then be positive: a negative one turns the queries round.
        factor = factor_ < 0 ? -factor_ : factor_;
        uint32_t flip = factor_ < 0 ? 0x80008000u : 0;
        for (int64_t i = 0; i < num_groups; i++) {
            for (int h = 0; h < GP; h++) {
                const bf16 *from = queries + i * token_stride + h * head_stride;
                for (int64_t s = 0; s < steps; s++)
                    for (int u = 0; u < P; u++) {
                        uint32_t pair = 0;
                        if (h < group) __builtin_memcpy(&pair, from + 2 * (s * P + u), 4);
                        q[(i * steps + s) * 16 + h * P + u] = h < group ? pair ^ flip : 0;
                    }
            }
            for (int lane = 0; lane < 16; lane++) m[i * 16 + lane] = kNoScore, l[i * 16 + lane] = 0;
        }
        __builtin_memset(o, 0, num_groups * GP * dim32 * 4);
    }

    MC_INLINE __m512bh broadcast_key(const char *p) {
        if (P == 1) return (__m512bh)_mm512_set1_epi32(*(const int __attribute__((may_alias, aligned(2))) *)p);
        if (P == 2) return (__m512bh)_mm512_set1_epi64(*(const long long __attribute__((may_alias, aligned(2))) *)p);
        if (P == 4) return (__m512bh)_mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)p));
        if (P == 8) return (__m512bh)_mm512_broadcast_i64x4(_mm256_loadu_si256((const __m256i *)p));
        return (__m512bh)_mm512_loadu_si512(p);
    }

    // Lane sums of x (even blocks of S lanes) and y (odd ones): out lane r of 2S is x's pair sum for r < S, else y's.
    template <int S>
    MC_INLINE __m512 fold(__m512 x, __m512 y) {
        alignas(64) static constexpr struct Index {
            int first[16], second[16];
            constexpr Index() : first(), second() {
                for (int lane = 0; lane < 16; lane++) {
                    int r = lane % (2 * S);
                    first[lane] = r < S ? lane : 16 + lane - S;
                    second[lane] = r < S ? lane + S : 16 + lane;
                }
            }
        } index;
        __m512 a = _mm512_permutex2var_ps(x, _mm512_load_si512(index.first), y);
        __m512 b = _mm512_permutex2var_ps(x, _mm512_load_si512(index.second), y);
        return _mm512_add_ps(a, b);
    }

    template <int LINES>
    MC_INLINE void ask(const char *&ahead) {
        MC_UNROLL for (int i = 0; i < LINES; i++) __builtin_prefetch(ahead + 64 * i, 0, 3);
        ahead += 64 * LINES;
    }

    // Products of 16 keys (rows `stride` bytes apart): acc[t] of key t. With AHEAD the memory at `ahead` is asked for
    // on the way, line by line: a burst of requests would stall the arithmetic.
    template <bool AHEAD>
    MC_INLINE void dots(const uint32_t *qg, const char *k, int64_t stride, int64_t dim, const char *&ahead, __m512 *acc) {
        MC_UNROLL for (int t = 0; t < 16; t++) acc[t] = _mm512_setzero_ps();
        const char *row[4] = {k, k + 4 * stride, k + 8 * stride, k + 12 * stride};
        int64_t stride3 = 3 * stride;
        const int64_t steps = dim / (2 * P);
        auto step = [&]() __attribute__((always_inline)) {
            __m512bh x = (__m512bh)_mm512_loadu_si512(qg);
            qg += 16;
            MC_UNROLL for (int t = 0; t < 4; t++) {
                acc[4 * t] = _mm512_dpbf16_ps(acc[4 * t], x, broadcast_key(row[t]));
                acc[4 * t + 1] = _mm512_dpbf16_ps(acc[4 * t + 1], x, broadcast_key(row[t] + stride));
                acc[4 * t + 2] = _mm512_dpbf16_ps(acc[4 * t + 2], x, broadcast_key(row[t] + 2 * stride));
                acc[4 * t + 3] = _mm512_dpbf16_ps(acc[4 * t + 3], x, broadcast_key(row[t] + stride3));
                row[t] += 4 * P;
            }
        };
        for (int64_t s = 0; s < steps; s++) {
            if (AHEAD) ask<P>(ahead);
            step();
        }
    }

    // Scores of UNIT keys as UNIT / P vectors: run r of 2 * P keys gives its even keys, then its odd ones.
    template <bool AHEAD>
    MC_INLINE void score_unit(const uint32_t *qg, const char *k, int64_t stride, int64_t dim, const char *&ahead, __m512 *to) {
        __m512 acc[16];
        if (P == 16) {
            for (int odd = 0; odd < 2; odd++) {
                dots<AHEAD>(qg, k + odd * stride, 2 * stride, dim, ahead, acc);
                MC_UNROLL for (int t = 0; t < 8; t++) acc[t] = fold<1>(acc[2 * t], acc[2 * t + 1]);
                MC_UNROLL for (int t = 0; t < 4; t++) acc[t] = fold<2>(acc[2 * t], acc[2 * t + 1]);
                MC_UNROLL for (int t = 0; t < 2; t++) acc[t] = fold<4>(acc[2 * t], acc[2 * t + 1]);
                to[odd] = fold<8>(acc[0], acc[1]);
            }
            return;
        }
        dots<AHEAD>(qg, k, stride, dim, ahead, acc);
        MC_UNROLL for (int v = 0; v < VECTORS; v++) {
            // key u of vector v
            #define MC_KEY(u) acc[(v / 2 * 2 * P + 2 * (u) + v % 2) & 15]
            if (P == 1) to[v] = MC_KEY(0);
            if (P == 2) to[v] = fold<1>(MC_KEY(0), MC_KEY(1));
            if (P == 4) to[v] = fold<2>(fold<1>(MC_KEY(0), MC_KEY(1)), fold<1>(MC_KEY(2), MC_KEY(3)));
            if (P == 8)
                to[v] = fold<4>(fold<2>(fold<1>(MC_KEY(0), MC_KEY(1)), fold<1>(MC_KEY(2), MC_KEY(3))),
                                fold<2>(fold<1>(MC_KEY(4), MC_KEY(5)), fold<1>(MC_KEY(6), MC_KEY(7))));
            #undef MC_KEY
        }
    }

    // The largest score of each head, in all of its lanes.
    MC_INLINE __m512 largest_of(const __m512 *x) {
        __m512 most[VECTORS];
        MC_UNROLL for (int v = 0; v < VECTORS; v++) most[v] = x[v];
        MC_UNROLL for (int step = 1; step < VECTORS; step *= 2)
            MC_UNROLL for (int v = 0; v + step < VECTORS; v += 2 * step) most[v] = _mm512_max_ps(most[v], most[v + step]);
        __m512 m = most[0];
        if (P >= 2) m = _mm512_max_ps(m, _mm512_permute_ps(m, 0xB1));
        if (P >= 4) m = _mm512_max_ps(m, _mm512_permute_ps(m, 0x4E));
        if (P >= 8) m = _mm512_max_ps(m, _mm512_shuffle_f32x4(m, m, 0xB1));
        if (P >= 16) m = _mm512_max_ps(m, _mm512_shuffle_f32x4(m, m, 0x4E));
        return m;
    }

    template <int C, bool AHEAD>
    MC_INLINE void add_values(const uint32_t *p, const char *v, int64_t stride, int runs, __mmask32 last, int64_t dim32,
                              const char *&ahead, float *to) {
        __m512 acc[HEADS][C][2];
        MC_UNROLL for (int h = 0; h < HEADS; h++) {
            MC_UNROLL for (int c = 0; c < C; c++) {
                acc[h][c][0] = _mm512_loadu_ps(to + h * dim32 + 32 * c);
                acc[h][c][1] = _mm512_loadu_ps(to + h * dim32 + 32 * c + 16);
            }
        }
        for (int r = 0; r < runs; r++, p += 16) {
            MC_UNROLL for (int u = 0; u < P; u++, v += 2 * stride) {
                MC_UNROLL for (int c = 0; c < C; c++) {
                    if (AHEAD) ask<(2 * HEADS + GP - 1) / GP>(ahead);  // all passes together: the whole run
                    __mmask32 mask = c == C - 1 ? last : ~(__mmask32)0;
                    __m512i a = _mm512_maskz_loadu_epi16(mask, v + 64 * c);
                    __m512i b = _mm512_maskz_loadu_epi16(mask, v + stride + 64 * c);
                    __m512bh even = (__m512bh)_mm512_unpacklo_epi16(a, b), odd = (__m512bh)_mm512_unpackhi_epi16(a, b);
                    MC_UNROLL for (int h = 0; h < HEADS; h++) {
                        __m512bh weight = (__m512bh)_mm512_set1_epi32((int)p[h * P + u]);
                        acc[h][c][0] = _mm512_dpbf16_ps(acc[h][c][0], even, weight);
                        acc[h][c][1] = _mm512_dpbf16_ps(acc[h][c][1], odd, weight);
                    }
                }
            }
        }
        MC_UNROLL for (int h = 0; h < HEADS; h++) {
            MC_UNROLL for (int c = 0; c < C; c++) {
                _mm512_storeu_ps(to + h * dim32 + 32 * c, acc[h][c][0]);
                _mm512_storeu_ps(to + h * dim32 + 32 * c + 16, acc[h][c][1]);
            }
        }
    }

    // 2 ** x, relative error 8e-5: a twenty-fifth of the rounding to bfloat16 that follows. VSCALEF takes the floor of x
    // itself. Coefficients: least maximum relative error of degree 3 on [0, 1).
    MC_INLINE __m512 exp2_coarse(__m512 x) {
        __m512 f = _mm512_reduce_ps(x, 0x09), r = _mm512_set1_ps(0.07802452004f);  // x - floor(x)
        r = _mm512_fmadd_ps(r, f, _mm512_set1_ps(0.2260671591f));
        r = _mm512_fmadd_ps(r, f, _mm512_set1_ps(0.6958335392f));
        r = _mm512_fmadd_ps(r, f, _mm512_set1_ps(0.9999252186f));
        return _mm512_scalef_ps(r, x);
    }

    // Scales everything query `g` has gathered to a new maximum: its sums, and the weights of this run's first units.
    __attribute__((noinline)) void rescale(int64_t g, int units, __m512 shrink) {
        alignas(64) float by[16];
        _mm512_store_ps(by, shrink);
        float *og = o + g * GP * dim32;
        for (int h = 0; h < GP; h++)
            for (int64_t d = 0; d < dim32; d += 16)
                _mm512_storeu_ps(og + h * dim32 + d,
                                 _mm512_mul_ps(_mm512_loadu_ps(og + h * dim32 + d), _mm512_set1_ps(by[h * P])));
        for (int i = 0; i < units * VECTORS * 8; i++) {  // a lane's weights are two bfloat16 side by side
            float first = bits_float(weights[i] << 16) * by[i % 16], second = bits_float(weights[i] & 0xffff0000u) * by[i % 16];
            bf16 low, high;
            from_float(first, low);
            from_float(second, high);
            weights[i] = low.bits | (uint32_t)high.bits << 16;
        }
    }

    // Adds `count` keys (at most kTile, readable up to a multiple of UNIT) to query `g`. With AHEAD it also asks for the
    // run of keys and values, each in one piece, that comes later.
    template <bool AHEAD>
    MC_INLINE void process_run(EngineBf16 &e, int64_t g, const uint16_t *keys, int64_t k_stride, const uint16_t *values,
                               int64_t v_stride, int64_t first_key, int count, const char *k_ahead, const char *v_ahead) {
        int low, high;
        visible_keys(e.tile, g, first_key, count, low, high);
        if (low >= high) return;
        const int64_t dim = DIM ? DIM : e.dim_, steps = dim / (2 * P), dim32 = round_up(dim, 32);
        const int units = (high + UNIT - 1) / UNIT;
        const uint32_t *qg = e.q + g * steps * 16;
        uint32_t *weights = e.weights;
        const __m512 factor = _mm512_set1_ps(e.factor), hidden = _mm512_set1_ps(e.factor > 1 ? -1e37f / e.factor : -1e37f);
        alignas(64) static constexpr struct Order {
            int key[16];        // of a lane, in a run of 2 * P
            uint16_t word[32];  // even and odd keys' weights side by side
            constexpr Order() : key(), word() {
                for (int lane = 0; lane < 16; lane++) key[lane] = 2 * (lane % P);
                for (int i = 0; i < 32; i++) word[i] = (uint16_t)(i / 2 + i % 2 * 16);
            }
        } order;
        const __m512i pairs = _mm512_loadu_si512(order.word);
        __m512 most = _mm512_loadu_ps(e.m + 16 * g), sum = _mm512_loadu_ps(e.l + 16 * g), sum1 = _mm512_setzero_ps();
        // Unit by unit, so that the exponentials of one overlap with the products of the next.
        for (int unit = 0; unit < units; unit++) {
            __m512 x[VECTORS];
            score_unit<AHEAD>(qg, (const char *)(keys + unit * UNIT * k_stride), 2 * k_stride, dim, k_ahead, x);
            const bool edge = low > unit * UNIT || high < (unit + 1) * UNIT;
            __mmask16 seen[VECTORS];
            if (edge)
                MC_UNROLL for (int v = 0; v < VECTORS; v++) {
                    __m512i key = _mm512_add_epi32(_mm512_loadu_si512(order.key),
                                                   _mm512_set1_epi32(unit * UNIT + v / 2 * 2 * P + v % 2));
                    seen[v] = _mm512_cmplt_epi32_mask(key, _mm512_set1_epi32(high)) &
                              _mm512_cmpge_epi32_mask(key, _mm512_set1_epi32(low));
                    x[v] = _mm512_mask_mov_ps(hidden, seen[v], x[v]);
                }
            __m512 largest = _mm512_mul_ps(largest_of(x), factor);
            // Most of the time the old maximum is close enough.
            if (__builtin_expect(_mm512_cmp_ps_mask(largest, _mm512_add_ps(most, _mm512_set1_ps(8.0f)), _CMP_GT_OQ), 0)) {
                __m512 now = _mm512_max_ps(most, largest), shrink = exp2_coarse(_mm512_sub_ps(most, now));
                e.rescale(g, unit, shrink);
                sum = _mm512_mul_ps(sum, shrink);
                sum1 = _mm512_mul_ps(sum1, shrink);
                most = now;
                _mm512_storeu_ps(e.m + 16 * g, most);
            }
            auto weigh = [&](auto masked) __attribute__((always_inline)) {
                constexpr bool MASKED = decltype(masked)::value;  // a hidden key weighs nothing, whatever the factor
                MC_UNROLL for (int v = 0; v < VECTORS; v += 2) {
                    __m512 even = exp2_coarse(_mm512_fmsub_ps(x[v], factor, most));
                    __m512 odd = exp2_coarse(_mm512_fmsub_ps(x[v + 1], factor, most));
                    if (MASKED) even = _mm512_maskz_mov_ps(seen[v], even), odd = _mm512_maskz_mov_ps(seen[v + 1], odd);
                    sum = _mm512_add_ps(sum, even);
                    sum1 = _mm512_add_ps(sum1, odd);
                    __m512i both = (__m512i)_mm512_cvtne2ps_pbh(odd, even);
                    _mm512_storeu_si512(weights + (unit * VECTORS + v) * 8, _mm512_permutexvar_epi16(pairs, both));
                }
            };
            if (edge) weigh(Constant<true>());
            else weigh(Constant<false>());
        }
        _mm512_storeu_ps(e.l + 16 * g, _mm512_add_ps(sum, sum1));

        const int runs = units * UNIT / (2 * P);
        const __mmask32 tail = dim % 32 ? 0xFFFFu : ~(__mmask32)0;
        const int64_t chunks = dim32 / 32;
        for (int h = 0; h < GP; h += HEADS) {
            float *to = e.o + (g * GP + h) * dim32;
            int64_t c = 0;
            for (; c + CHUNKS <= chunks; c += CHUNKS)
                add_values<CHUNKS, AHEAD>(weights + h * P, (const char *)(values + 32 * c), 2 * v_stride, runs,
                                        c + CHUNKS == chunks ? tail : ~(__mmask32)0, dim32, v_ahead, to + 32 * c);
            if (CHUNKS > 1)
                for (; c < chunks; c++)
                    add_values<1, AHEAD>(weights + h * P, (const char *)(values + 32 * c), 2 * v_stride, runs,
                                       c + 1 == chunks ? tail : ~(__mmask32)0, dim32, v_ahead, to + 32 * c);
        }
    }

    // The run to ask for meanwhile begins at `next_k` and `next_v`; null for none.
    void process(int64_t g, const uint16_t *k, int64_t k_stride, const uint16_t *v, int64_t v_stride, int64_t first_key,
                 int count, uint64_t, const void *next_k, const void *next_v) {
        if (next_k)
            process_run<true>(*this, g, k, k_stride, v, v_stride, first_key, count, (const char *)next_k,
                              (const char *)next_v);
        else
            process_run<false>(*this, g, k, k_stride, v, v_stride, first_key, count, nullptr, nullptr);
    }

    // The weight of all keys of a head, and its sums as float32 in the dimensions' own order, 32 at a time.
    MC_INLINE float weight_of(const EngineBf16 &e, int64_t query, int head) {
        float weight = 0;
        for (int u = 0; u < P; u++) weight += e.l[query * 16 + head * P + u];
        return weight;
    }
    MC_INLINE void ordered(const float *from, __m512 inverse, __m512 &low, __m512 &high) {
        // unpacklo/hi put dimensions 8i .. 8i + 3 into the first 16 sums, 8i + 4 .. 8i + 7 into the second
        const __m512i first = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
        const __m512i second = _mm512_setr_epi32(8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31);
        __m512 x = _mm512_mul_ps(_mm512_loadu_ps(from), inverse), y = _mm512_mul_ps(_mm512_loadu_ps(from + 16), inverse);
        low = _mm512_permutex2var_ps(x, first, y);
        high = _mm512_permutex2var_ps(x, second, y);
    }

    // Row (query, head) of the result, rounded.
    void write(int64_t query, int head, bf16 *to) const {
        float weight = weight_of(*this, query, head);
        __m512 inverse = _mm512_set1_ps(weight > 0 ? 1 / weight : 0), low, high;
        const float *from = o + (query * GP + head) * dim32;
        for (int d = 0; d < dim_; d += 32) {
            ordered(from + d, inverse, low, high);
            __m512i both = (__m512i)_mm512_cvtne2ps_pbh(high, low);
            _mm512_mask_storeu_epi16(to + d, dim_ - d >= 32 ? ~0u : 0xFFFFu, both);
        }
    }

    // The same in float32, and the base-2 log-sum-exp of its scores.
    float result(int64_t query, int head, float *to) const {
        float weight = weight_of(*this, query, head);
        __m512 inverse = _mm512_set1_ps(weight > 0 ? 1 / weight : 0), low, high;
        const float *from = o + (query * GP + head) * dim32;
        for (int d = 0; d < dim_; d += 32) {
            ordered(from + d, inverse, low, high);
            _mm512_storeu_ps(to + d, low);
            if (dim_ - d >= 32) _mm512_storeu_ps(to + d + 16, high);
        }
        return m[query * 16 + head * P] + log2_scalar(weight);
    }
};
