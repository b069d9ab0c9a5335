// Attention of a tile's queries over one run of keys in bfloat16 with float32 sums, in AMX's tile registers.
//
// Up to 16 rows (query, head), neighbours in [query][head], are one tile register of queries; a run is multiplied from a
// copy of its keys and values in the order of the registers (`OrderedRuns`). Scores of 16 rows with 64 keys go through
// memory in the first cache; the softmax works on rows, keys on the lanes, and needs neither folding nor another order of
// its weights. A row that does not see a key of the run gives it weight 0, so that its value must be finite.

// Keys and values of a run where they lie; `ahead` rows that are wanted next, or null.
struct KeyRows {
    const uint16_t *data;
    int64_t stride;  // elements between rows
    const uint16_t *ahead;
};

// Runs of keys and values in the order of tile registers. Where several tiles may want a run, it is ordered once, by the
// first thread that wants it.
class OrderedRuns {
    Scratch memory;
    const int64_t rows, dim;
    const bool shared;  // also false where there is no memory for it
    uint8_t *states = nullptr;  // of a run: 0 not there, 1 being made, 2 there
    uint16_t *runs = nullptr;

  public:
    // `count` runs of up to `rows_` keys, a multiple of 32; 0 runs where there is nothing to share.
    OrderedRuns(int64_t count, int64_t rows_, int64_t dim_)
        : memory(count + 64 + count * 4 * rows_ * dim_ + 64), rows(rows_), dim(dim_), shared(count > 0 && memory.ok()) {
        if (!shared) return;
        states = memory.take<uint8_t>(count);
        runs = memory.take<uint16_t>(2 * count * rows * dim);  // pages of runs that nobody wants are never touched
        __builtin_memset(states, 0, count);
    }

    // Keys of run `i` (its values follow after `rows * dim`), of which `count` rows are there. `own` is room for a run
    // that is not shared, or that another thread is at work on.
    const uint16_t *get(int64_t i, const KeyRows &k, const KeyRows &v, int64_t count, uint16_t *own) {
        uint16_t *to = own;
        bool first = false;
        if (shared) {
            uint16_t *kept = runs + 2 * i * rows * dim;
            uint8_t seen = __atomic_load_n(states + i, __ATOMIC_ACQUIRE);
            if (seen == 2) return kept;
            first = seen == 0 && __atomic_compare_exchange_n(states + i, &seen, (uint8_t)1, false, __ATOMIC_RELAXED,
                                                             __ATOMIC_RELAXED);
            if (first) to = kept;
        }
        order_keys(k, count, to);
        order_values(v, count, to + rows * dim);
        if (first) __atomic_store_n(states + i, (uint8_t)2, __ATOMIC_RELEASE);
        return to;
    }

  private:
    // [dim / 32][rows / 16] tiles of 16 pairs of dimensions times 16 keys.
    void order_keys(const KeyRows &k, int64_t count, uint16_t *to) const {
        alignas(64) uint16_t part[16 * 32];  // where fewer than 16 keys are left
        for (int64_t t = 0; t < rows; t += 16)
            for (int64_t d = 0; d < dim; d += 32) {
                const uint16_t *tile = k.data + t * k.stride + d;
                int64_t stride = k.stride;
                if (k.ahead)
                    for (int64_t i = 0; i < 16; i++) __builtin_prefetch(k.ahead + (t + i) * stride + d, 0, 3);
                if (count - t < 16) {
                    for (int64_t i = 0; i < 16; i++)
                        if (t + i < count) __builtin_memcpy(part + 32 * i, tile + i * stride, 64);
                        else __builtin_memset(part + 32 * i, 0, 64);
                    tile = part, stride = 32;
                }
                transpose16((const char *)tile, 2 * stride, (uint32_t *)(to + d * rows + t * 32), 16, 16);
            }
    }

    // [rows / 32][dim / 16] tiles of 16 pairs of keys times 16 dimensions.
    void order_values(const KeyRows &v, int64_t count, uint16_t *to) const {
        alignas(64) static constexpr struct Order {
            uint16_t first[32], second[32];  // dimension i / 2 of the even key, then of the odd one
            constexpr Order() : first(), second() {
                for (int i = 0; i < 32; i++)
                    first[i] = (uint16_t)(i / 2 + i % 2 * 32), second[i] = (uint16_t)(first[i] + 16);
            }
        } order;
        const __m512i first = _mm512_load_si512(order.first), second = _mm512_load_si512(order.second);
        for (int64_t t = 0; t < rows; t += 2) {
            const uint16_t *from = v.data + t * v.stride, *ahead = v.ahead ? v.ahead + t * v.stride : nullptr;
            uint16_t *row = to + t / 32 * (32 * dim) + t % 32 * 16;
            for (int64_t d = 0; d < dim; d += 32, row += 1024) {
                if (ahead) {
                    __builtin_prefetch(ahead + d, 0, 3);
                    __builtin_prefetch(ahead + v.stride + d, 0, 3);
                }
                __m512i even = t < count ? _mm512_loadu_si512(from + d) : _mm512_setzero_si512();
                __m512i odd = t + 1 < count ? _mm512_loadu_si512(from + v.stride + d) : _mm512_setzero_si512();
                _mm512_store_si512(row, _mm512_permutex2var_epi16(even, first, odd));
                _mm512_store_si512(row + 512, _mm512_permutex2var_epi16(even, second, odd));
            }
        }
    }
};

template <int DIM>
struct EngineAmx {
    static constexpr bool kOrdersRuns = true;
    int dim_, group;
    float factor;
    TileShape tile;
    TileRegisters *registers;
    int64_t run_rows;     // of a run, those behind its keys included
    int64_t at_once;      // queries whose rows fill a tile register
    uint16_t *q;          // [rows][dim]
    float *o, *m, *l;     // [rows][dim], [rows], [rows][16]; maxima in the base-2 exponent's scale
    float *scores;        // [16][kTile]
    uint16_t *weights;    // [16][kTile]

    // The last query's tile register may reach 15 rows further.
    static int64_t padded_rows(int64_t group, int64_t num_queries) { return round_up(num_queries * group + 15, 16); }
    static size_t scratch_floats(int64_t dim, int64_t group, int64_t num_queries) {
        return padded_rows(group, num_queries) * (dim / 2 + dim + 1 + 16) + 16 * kTile + 8 * kTile;
    }

    void init(float *memory, int dim, int group_, float factor_, const TileShape &tile_, const bf16 *queries,
              int64_t head_stride, int64_t token_stride) {
        dim_ = dim, group = group_, tile = tile_, at_once = 16 / group;
        const int64_t rows = padded_rows(group, tile.num_queries), real = tile.num_queries * group;
        q = (uint16_t *)memory, o = memory + rows * dim / 2, m = o + rows * dim, l = m + rows, scores = l + 16 * rows;
        weights = (uint16_t *)(scores + 16 * kTile);
        // The maximum is taken before the factor, which must then be positive: a negative one turns the queries round.
        factor = factor_ < 0 ? -factor_ : factor_;
        const __m512i flip = _mm512_set1_epi16(factor_ < 0 ? (short)0x8000 : 0);
        for (int64_t r = 0; r < real; r++) {
            const bf16 *from = queries + r / group * token_stride + r % group * head_stride;
            for (int64_t d = 0; d < dim; d += 32)
                _mm512_store_si512(q + r * dim + d, _mm512_xor_si512(_mm512_loadu_si512(from + d), flip));
        }
        __builtin_memset(q + real * dim, 0, (rows - real) * dim * 2);
        __builtin_memset(o, 0, rows * dim * 4);
        __builtin_memset(l, 0, rows * 16 * 4);
        for (int64_t r = 0; r < rows; r++) m[r] = kNoScore;
    }

    // Adds a run of `count` keys in the order of `OrderedRuns` to the queries whose bit is set in `chosen`.
    void process(const uint16_t *keys, const uint16_t *values, int64_t first_key, int64_t count, uint64_t chosen) {
        chosen &= ~0ull >> (64 - tile.num_queries);
        while (chosen) {
            const int64_t first = __builtin_ctzll(chosen);
            const uint64_t window = chosen >> first & ((1ull << at_once) - 1);
            chosen &= ~(window << first);
            process_rows(keys, values, first, window == 1 ? 1 : at_once, window, first_key, count);
        }
    }

    MC_INLINE __m512 exp2_coarse(__m512 x) { return EngineBf16<1, 0>::exp2_coarse(x); }

    // `queries` of them from `first` on; those whose bit is not set in `window` do not see the run.
    void process_rows(const uint16_t *keys, const uint16_t *values, int64_t first, int64_t queries, uint64_t window,
                      int64_t first_key, int64_t count) {
        int low[16], high[16], most_keys = 0;
        for (int64_t i = 0; i < queries; i++) {
            low[i] = high[i] = 0;
            if (window >> i & 1) visible_keys(tile, first + i, first_key, count, low[i], high[i]);
            if (low[i] < high[i] && high[i] > most_keys) most_keys = high[i];
        }
        if (!most_keys) return;
        const int64_t dim = DIM ? DIM : dim_, row = first * group, rows = queries * group;
        const int tiles = (most_keys + 31) / 32 * 2;
        registers->set_rows((int)rows);
        TileProduct{(const char *)(q + row * dim), (const char *)keys, 2 * dim, 64, 64, 64 * run_rows, 1024, scores,
                    4 * kTile, dim / 32}.template run<false>(tiles);
        for (int64_t i = 0; i < queries; i++) {
            const bool whole = low[i] == 0 && high[i] >= 16 * tiles;
            for (int64_t h = i * group; h < (i + 1) * group; h++) {
                if (tiles == 4) whole ? weigh<4, false>(row, h, 0, 0) : weigh<4, true>(row, h, low[i], high[i]);
                else whole ? weigh<2, false>(row, h, 0, 0) : weigh<2, true>(row, h, low[i], high[i]);
            }
        }
        for (int64_t d = 0; d < dim; d += 64)
            TileProduct{(const char *)weights, (const char *)values + 64 * d, 2 * kTile, 64, 64, 64 * dim, 1024,
                        o + row * dim + d, 4 * dim, tiles / 2}.template run<true>(dim - d >= 64 ? 4 : 2);
    }

    // The weights of row `row + r` from its scores with 16 * TILES keys, of which it sees [low, high).
    template <int TILES, bool MASKED>
    MC_MEMBER void weigh(int64_t row, int64_t r, int low, int high) {
        const float *from = scores + r * kTile;
        __m512 x[TILES];
        __mmask16 seen[TILES];
        MC_UNROLL for (int t = 0; t < TILES; t++) x[t] = _mm512_load_ps(from + 16 * t);
        if (MASKED) {
            const uint64_t bits = high > low ? (~0ull >> (64 - (high - low))) << low : 0;
            const __m512 hidden = _mm512_set1_ps(factor > 1 ? -1e37f / factor : -1e37f);
            MC_UNROLL for (int t = 0; t < TILES; t++) {
                seen[t] = (__mmask16)(bits >> 16 * t);
                x[t] = _mm512_mask_mov_ps(hidden, seen[t], x[t]);
            }
        }
        __m512 largest = _mm512_max_ps(x[0], x[1]);
        if (TILES == 4) largest = _mm512_max_ps(largest, _mm512_max_ps(x[2], x[TILES - 1]));
        const __m512 by = _mm512_set1_ps(factor);
        __m512 most = _mm512_set1_ps(m[row + r]);
        largest = _mm512_mul_ps(largest, by);
        // Most of the time the old maximum is close enough.
        if (__builtin_expect(_mm512_cmp_ps_mask(largest, _mm512_add_ps(most, _mm512_set1_ps(8.0f)), _CMP_GT_OQ), 0))
            most = rescale(row + r, _mm512_reduce_max_ps(largest));
        __m512 sum = _mm512_load_ps(l + (row + r) * 16);
        MC_UNROLL for (int t = 0; t < TILES; t += 2) {
            __m512 first = exp2_coarse(_mm512_fmsub_ps(x[t], by, most));
            __m512 second = exp2_coarse(_mm512_fmsub_ps(x[t + 1], by, most));
            if (MASKED) first = _mm512_maskz_mov_ps(seen[t], first), second = _mm512_maskz_mov_ps(seen[t + 1], second);
            sum = _mm512_add_ps(sum, _mm512_add_ps(first, second));
            _mm512_store_si512(weights + r * kTile + 16 * t, (__m512i)_mm512_cvtne2ps_pbh(second, first));
        }
        _mm512_store_ps(l + (row + r) * 16, sum);
    }

    // Scales what row `r` has gathered to a new maximum, which it returns in all lanes.
    __attribute__((noinline)) __m512 rescale(int64_t r, float now) {
        const int64_t dim = DIM ? DIM : dim_;
        const __m512 shrink = exp2_coarse(_mm512_set1_ps(m[r] - now));
        for (int64_t d = 0; d < dim; d += 16)
            _mm512_store_ps(o + r * dim + d, _mm512_mul_ps(_mm512_load_ps(o + r * dim + d), shrink));
        _mm512_store_ps(l + r * 16, _mm512_mul_ps(_mm512_load_ps(l + r * 16), shrink));
        m[r] = now;
        return _mm512_set1_ps(now);
    }

    // Row (query, head) of the result, rounded.
    void write(int64_t query, int head, bf16 *to) const {
        const int64_t row = query * group + head;
        const float weight = _mm512_reduce_add_ps(_mm512_load_ps(l + row * 16));
        const __m512 inverse = _mm512_set1_ps(weight > 0 ? 1 / weight : 0);
        for (int64_t d = 0; d < dim_; d += 32) {
            __m512 first = _mm512_mul_ps(_mm512_load_ps(o + row * dim_ + d), inverse);
            __m512 second = _mm512_mul_ps(_mm512_load_ps(o + row * dim_ + d + 16), inverse);
            _mm512_storeu_si512(to + d, (__m512i)_mm512_cvtne2ps_pbh(second, first));
        }
    }

    // The same in float32, and the base-2 log-sum-exp of its scores.
    float result(int64_t query, int head, float *to) const {
        const int64_t row = query * group + head;
        const float weight = _mm512_reduce_add_ps(_mm512_load_ps(l + row * 16));
        const __m512 inverse = _mm512_set1_ps(weight > 0 ? 1 / weight : 0);
        for (int64_t d = 0; d < dim_; d += 16)
            _mm512_storeu_ps(to + d, _mm512_mul_ps(_mm512_load_ps(o + row * dim_ + d), inverse));
        return m[row] + log2_scalar(weight);
    }
};
