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
    static constexpr int HEADS = GP < 8 ? GP : 8;    // heads of one pass over the values
    static constexpr int CHUNKS = 8 / HEADS < 4 ? 8 / HEADS : 4;  // times 32 dimensions
    int dim_, group;
    float factor;
    TileShape tile;
    int64_t num_groups, chunks, dim32, steps;
    uint32_t *q;     // [queries][steps][16]
    float *o;        // [queries][GP][dim32], dimensions permuted within 32: see `result`
    float *m, *l;    // [queries][16], in the base-2 exponent's scale
    float *scores;   // [kTile / P][16], then the weights in place

    static size_t scratch_floats(int64_t dim, int64_t, int64_t num_queries) {
        return num_queries * (dim / (2 * P) * 16 + GP * round_up(dim, 32) + 32) + kTile * 16;
    }

    void init(float *memory, int dim, int group_, float factor_, const TileShape &tile_, const bf16 *queries,
              int64_t head_stride, int64_t token_stride) {
        dim_ = dim, group = group_, tile = tile_;
        num_groups = tile.num_queries;
        steps = dim / (2 * P), dim32 = round_up(dim, 32), chunks = dim32 / 32;
        q = (uint32_t *)memory, o = memory + num_groups * steps * 16, m = o + num_groups * GP * dim32;
        l = m + num_groups * 16, scores = l + num_groups * 16;
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

    uint64_t queries_of(int64_t g) const { return 1ull << g; }

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

    // Products of 16 keys (rows `stride` bytes apart): acc[t] of key t. With AHEAD the same rows of the run that comes
    // later, `ahead` bytes from here, are asked for on the way: a burst of requests would stall the arithmetic.
    template <bool AHEAD>
    MC_INLINE void dots(const uint32_t *qg, const char *k, int64_t stride, int64_t dim, int64_t ahead, __m512 *acc) {
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
        if (!AHEAD) {
            for (int64_t s = 0; s < steps; s++) step();
            return;
        }
        const char *next = k + ahead;  // one cache line of each of the 16 rows for every 64 bytes of a key
        for (int64_t s = 0; s < steps;) {
            const char *line = next;
            for (int i = 0; i < 16 / P && s < steps; i++, s++) {
                MC_UNROLL for (int r = 0; r < P; r++) {
                    __builtin_prefetch(line, 0, 3);
                    line += stride;
                }
                step();
            }
            next += 64;
        }
    }

    // Scores of UNIT keys into UNIT / P vectors: run r of 2 * P keys gives its even keys, then its odd ones.
    template <bool AHEAD>
    MC_INLINE void score_unit(const uint32_t *qg, const char *k, int64_t stride, int64_t dim, int64_t ahead, float *to) {
        __m512 acc[16];
        if (P == 16) {
            for (int odd = 0; odd < 2; odd++) {
                dots<AHEAD>(qg, k + odd * stride, 2 * stride, dim, ahead, acc);
                MC_UNROLL for (int t = 0; t < 8; t++) acc[t] = fold<1>(acc[2 * t], acc[2 * t + 1]);
                MC_UNROLL for (int t = 0; t < 4; t++) acc[t] = fold<2>(acc[2 * t], acc[2 * t + 1]);
                MC_UNROLL for (int t = 0; t < 2; t++) acc[t] = fold<4>(acc[2 * t], acc[2 * t + 1]);
                _mm512_storeu_ps(to + 16 * odd, fold<8>(acc[0], acc[1]));
            }
            return;
        }
        dots<AHEAD>(qg, k, stride, dim, ahead, acc);
        MC_UNROLL for (int v = 0; v < UNIT / P; v++) {
            // key u of vector v
            #define MC_KEY(u) acc[(v / 2 * 2 * P + 2 * (u) + v % 2) & 15]
            __m512 x;
            if (P == 1) x = MC_KEY(0);
            if (P == 2) x = fold<1>(MC_KEY(0), MC_KEY(1));
            if (P == 4) x = fold<2>(fold<1>(MC_KEY(0), MC_KEY(1)), fold<1>(MC_KEY(2), MC_KEY(3)));
            if (P == 8)
                x = fold<4>(fold<2>(fold<1>(MC_KEY(0), MC_KEY(1)), fold<1>(MC_KEY(2), MC_KEY(3))),
                            fold<2>(fold<1>(MC_KEY(4), MC_KEY(5)), fold<1>(MC_KEY(6), MC_KEY(7))));
            #undef MC_KEY
            _mm512_storeu_ps(to + 16 * v, x);
        }
    }

    template <int C, bool AHEAD>
    MC_INLINE void add_values(const uint32_t *p, const char *v, int64_t stride, int runs, __mmask32 last, int64_t dim32,
                              int64_t ahead, float *to) {
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
                    if (AHEAD) {
                        __builtin_prefetch(v + ahead + 64 * c, 0, 3);
                        __builtin_prefetch(v + ahead + stride + 64 * c, 0, 3);
                    }
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

    // 2 ** x, relative error 7e-5: a fiftieth of the rounding to bfloat16 that follows.
    MC_INLINE __m512 exp2_coarse(__m512 x) {
        __m512 n = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
        __m512 f = _mm512_sub_ps(x, n), r = _mm512_set1_ps(0.05517166493f);
        r = _mm512_fmadd_ps(r, f, _mm512_set1_ps(0.2426111219f));
        r = _mm512_fmadd_ps(r, f, _mm512_set1_ps(0.6932609862f));
        r = _mm512_fmadd_ps(r, f, _mm512_set1_ps(0.9999280736f));
        return _mm512_scalef_ps(r, n);
    }

    // Scales everything query `g` has gathered to a new maximum.
    __attribute__((noinline)) void rescale(int64_t g, __m512 shrink) {
        alignas(64) float by[16];
        _mm512_store_ps(by, shrink);
        float *og = o + g * GP * dim32;
        for (int h = 0; h < GP; h++)
            for (int64_t d = 0; d < dim32; d += 16)
                _mm512_storeu_ps(og + h * dim32 + d,
                                 _mm512_mul_ps(_mm512_loadu_ps(og + h * dim32 + d), _mm512_set1_ps(by[h * P])));
    }

    // Adds `count` keys (at most kTile, readable up to a multiple of UNIT) to query `g`. With AHEAD it also asks for the
    // run of keys and values that lies so many bytes further.
    template <bool AHEAD>
    MC_INLINE void process_run(EngineBf16 &e, int64_t g, const uint16_t *keys, int64_t k_stride, const uint16_t *values,
                               int64_t v_stride, int64_t first_key, int count, int64_t k_ahead, int64_t v_ahead) {
        int low, high;
        visible_keys(e.tile, g, first_key, count, low, high);
        if (low >= high) return;
        const int64_t dim = DIM ? DIM : e.dim_, steps = dim / (2 * P), dim32 = round_up(dim, 32);
        const int units = (high + UNIT - 1) / UNIT, vectors = units * UNIT / P;
        const uint32_t *qg = e.q + g * steps * 16;
        float *scores = e.scores;
        for (int unit = 0; unit < units; unit++)
            score_unit<AHEAD>(qg, (const char *)(keys + unit * UNIT * k_stride), 2 * k_stride, dim, k_ahead,
                              scores + unit * UNIT / P * 16);
        const __m512 factor = _mm512_set1_ps(e.factor);
        if (low > 0 || high < units * UNIT) {
            alignas(64) int offset[16];
            for (int lane = 0; lane < 16; lane++) offset[lane] = 2 * (lane % P);
            const __m512i lane_key = _mm512_load_si512(offset);
            const __m512 hidden = _mm512_set1_ps(e.factor > 1 ? -1e37f / e.factor : -1e37f);
            for (int v = 0; v < vectors; v++) {
                __m512i key = _mm512_add_epi32(lane_key, _mm512_set1_epi32(v / 2 * 2 * P + v % 2));
                __mmask16 seen = _mm512_cmplt_epi32_mask(key, _mm512_set1_epi32(high)) &
                                 _mm512_cmpge_epi32_mask(key, _mm512_set1_epi32(low));
                _mm512_storeu_ps(scores + 16 * v, _mm512_mask_loadu_ps(hidden, seen, scores + 16 * v));
            }
        }
        __m512 largest = _mm512_loadu_ps(scores), largest1 = _mm512_loadu_ps(scores + 16);
        for (int v = 2; v < vectors; v += 2) {
            largest = _mm512_max_ps(largest, _mm512_loadu_ps(scores + 16 * v));
            largest1 = _mm512_max_ps(largest1, _mm512_loadu_ps(scores + 16 * v + 16));
        }
        largest = _mm512_max_ps(largest, largest1);
        if (P >= 2) largest = _mm512_max_ps(largest, _mm512_permute_ps(largest, 0xB1));
        if (P >= 4) largest = _mm512_max_ps(largest, _mm512_permute_ps(largest, 0x4E));
        if (P >= 8) largest = _mm512_max_ps(largest, _mm512_shuffle_f32x4(largest, largest, 0xB1));
        if (P >= 16) largest = _mm512_max_ps(largest, _mm512_shuffle_f32x4(largest, largest, 0x4E));
        largest = _mm512_mul_ps(largest, factor);
        __m512 most = _mm512_loadu_ps(e.m + 16 * g), sum = _mm512_loadu_ps(e.l + 16 * g);
        if (_mm512_cmp_ps_mask(largest, _mm512_add_ps(most, _mm512_set1_ps(8.0f)), _CMP_GT_OQ)) {
            __m512 now = _mm512_max_ps(most, largest), shrink = exp2_coarse(_mm512_sub_ps(most, now));
            e.rescale(g, shrink);
            sum = _mm512_mul_ps(sum, shrink);
            most = now;
            _mm512_storeu_ps(e.m + 16 * g, most);
        }
        alignas(64) static constexpr struct Interleave {
            uint16_t word[32];
            constexpr Interleave() : word() {
                for (int i = 0; i < 32; i++) word[i] = (uint16_t)(i / 2 + i % 2 * 16);
            }
        } interleave;
        const __m512i order = _mm512_load_si512(interleave.word);
        uint32_t *weights = (uint32_t *)scores;
        __m512 sum1 = _mm512_setzero_ps();
        for (int v = 0; v < vectors; v += 2) {
            __m512 even = exp2_coarse(_mm512_fmsub_ps(_mm512_loadu_ps(scores + 16 * v), factor, most));
            __m512 odd = exp2_coarse(_mm512_fmsub_ps(_mm512_loadu_ps(scores + 16 * v + 16), factor, most));
            sum = _mm512_add_ps(sum, even);
            sum1 = _mm512_add_ps(sum1, odd);
            __m512i both = (__m512i)_mm512_cvtne2ps_pbh(odd, even);
            _mm512_storeu_si512(weights + 8 * v, _mm512_permutexvar_epi16(order, both));
        }
        _mm512_storeu_ps(e.l + 16 * g, _mm512_add_ps(sum, sum1));

        const int runs = units * UNIT / (2 * P);
        const __mmask32 tail = dim % 32 ? 0xFFFFu : ~(__mmask32)0;
        const int64_t chunks = dim32 / 32;
        auto add = [&](int h, auto first) __attribute__((always_inline)) {
            constexpr bool ASK = AHEAD && decltype(first)::value;  // the first heads ask for all
            float *to = e.o + (g * GP + h) * dim32;
            int64_t c = 0;
            for (; c + CHUNKS <= chunks; c += CHUNKS)
                add_values<CHUNKS, ASK>(weights + h * P, (const char *)(values + 32 * c), 2 * v_stride, runs,
                                        c + CHUNKS == chunks ? tail : ~(__mmask32)0, dim32, v_ahead, to + 32 * c);
            if (CHUNKS > 1)
                for (; c < chunks; c++)
                    add_values<1, ASK>(weights + h * P, (const char *)(values + 32 * c), 2 * v_stride, runs,
                                       c + 1 == chunks ? tail : ~(__mmask32)0, dim32, v_ahead, to + 32 * c);
        };
        add(0, Constant<true>());
        for (int h = HEADS; h < GP; h += HEADS) add(h, Constant<false>());
    }

    // The run to ask for meanwhile begins at `next_k` and `next_v`; null for none.
    void process(int64_t g, const uint16_t *k, int64_t k_stride, const uint16_t *v, int64_t v_stride, int64_t first_key,
                 int count, uint64_t, const void *next_k, const void *next_v) {
        if (next_k)
            process_run<true>(*this, g, k, k_stride, v, v_stride, first_key, count, (const char *)next_k - (const char *)k,
                              (const char *)next_v - (const char *)v);
        else
            process_run<false>(*this, g, k, k_stride, v, v_stride, first_key, count, 0, 0);
    }

    float result(int64_t query, int head, float *to) const {
        float weight = 0;
        for (int u = 0; u < P; u++) weight += l[query * 16 + head * P + u];
        float inverse = weight > 0 ? 1 / weight : 0;
        const float *from = o + (query * GP + head) * dim32;
        // unpacklo/hi put dimensions 8i .. 8i + 3 into the first 16 sums, 8i + 4 .. 8i + 7 into the second
        for (int d = 0; d < dim_; d++)
            to[d] = from[d / 32 * 32 + d / 4 % 2 * 16 + d % 32 / 8 * 4 + d % 4] * inverse;
        return m[query * 16 + head * P] + log2_scalar(weight);
    }
};
