// Block selection: score the pooled keys for a tile of queries, pool the scores to blocks, keep the best blocks.
// Pooled keys lie on the vector's lanes (a chunk of them is transposed once for the whole tile), so that the sum over
// the query group and the softmax run down the lanes. Only [queries of the tile, blocks] is ever stored.

constexpr int kChunk = 64;  // pooled keys transposed at a time, at most (one block may take more)

struct SelectFp32 {
    typedef float word;
    static constexpr int kPerWord = 1;
    static constexpr int HEADS = W >= 16 ? 8 : 4;
    static constexpr bool kTileRegisters = false;
    template <class T>
    MC_INLINE void copy_row(const T *from, word *to, int64_t dim) { convert_row(from, to, dim); }
    template <class T>
    MC_INLINE word key_word(const T *row, int64_t d) { return to_float(row[d]); }
    MC_INLINE vf multiply_add(vf sum, vf keys, word query) { return sum + keys * query; }
};

#if MC_BF16
struct SelectBf16 {
    typedef uint32_t word;
    static constexpr int kPerWord = 2;
    static constexpr int HEADS = 8;
    static constexpr bool kTileRegisters = false;
    MC_INLINE void copy_row(const bf16 *from, word *to, int64_t dim) { __builtin_memcpy(to, from, dim * 2); }
    MC_INLINE word key_word(const bf16 *row, int64_t d) {
        word x;
        __builtin_memcpy(&x, row + 2 * d, 4);
        return x;
    }
    MC_INLINE vf multiply_add(vf sum, vf keys, word query) {
        return (vf)_mm512_dpbf16_ps((__m512)sum, (__m512bh)keys, (__m512bh)_mm512_set1_epi32((int)query));
    }
};
#endif

#if MC_AMX
struct SelectAmx : SelectBf16 {
    static constexpr bool kTileRegisters = true;
};
#endif

#if defined(__AVX512F__)
// Rows of 4-byte words, 16 by 16 (`columns` of them where fewer are left), to columns.
static void transpose16(const char *from, int64_t stride_bytes, uint32_t *to, int64_t to_stride, int64_t columns) {
    __m512i a[16], b[16];
    const __mmask16 mask = columns >= 16 ? 0xFFFF : (__mmask16)((1u << columns) - 1);
    MC_UNROLL for (int i = 0; i < 16; i++) a[i] = _mm512_maskz_loadu_epi32(mask, from + i * stride_bytes);
    MC_UNROLL for (int i = 0; i < 16; i += 2) {
        b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
        b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
    }
    MC_UNROLL for (int i = 0; i < 16; i += 4) {
        a[i] = _mm512_unpacklo_epi64(b[i], b[i + 2]);
        a[i + 1] = _mm512_unpackhi_epi64(b[i], b[i + 2]);
        a[i + 2] = _mm512_unpacklo_epi64(b[i + 1], b[i + 3]);
        a[i + 3] = _mm512_unpackhi_epi64(b[i + 1], b[i + 3]);
    }
    MC_UNROLL for (int i = 0; i < 4; i++) {  // a[4 r + i] lane group c: column 4 c + i of rows 4 r .. 4 r + 3
        __m512i x = _mm512_shuffle_i32x4(a[i], a[4 + i], 0x88), y = _mm512_shuffle_i32x4(a[i], a[4 + i], 0xDD);
        __m512i z = _mm512_shuffle_i32x4(a[8 + i], a[12 + i], 0x88), u = _mm512_shuffle_i32x4(a[8 + i], a[12 + i], 0xDD);
        b[i] = _mm512_shuffle_i32x4(x, z, 0x88);
        b[8 + i] = _mm512_shuffle_i32x4(x, z, 0xDD);
        b[4 + i] = _mm512_shuffle_i32x4(y, u, 0x88);
        b[12 + i] = _mm512_shuffle_i32x4(y, u, 0xDD);
    }
    MC_UNROLL for (int i = 0; i < 16; i++)
        if (i < columns) _mm512_storeu_si512(to + i * to_stride, b[i]);
}
#endif

// One stream of pooled keys of a row and head.
template <class T>
struct Stream {
    const T *data;
    int64_t stride, size, step;  // elements between keys; tokens of a window and between two
    int64_t count;               // keys that any query of the tile sees
    int64_t visible(int64_t position) const { return position + 1 < size ? 0 : (position + 1 - size) / step + 1; }
};

template <int N>
struct Number { static constexpr int value = N; };

template <class S, class T>
struct Selector {
    typedef typename S::word word;
    int64_t dim, group, words, chunk, width;  // keys of a chunk, and rounded up to whole vectors
    int64_t blocks_per_chunk, per_block, carry;
    float factor;
    const mc_attention_args *args;
    word *queries, *keys;            // [tile][group][words], [words][width]
    float *scores, *maxima, *sums;   // [group][width], [tile][group][W] twice
    float *lse, *window;             // [tile][group], [tile][the carried weights and `width` new ones], and a row to work in
    TileRegisters &registers;
    const char *next_keys = nullptr, *next_end = nullptr;  // what is asked for while a chunk is worked on

    static void geometry(const mc_attention_args &a, int64_t &chunk, int64_t &per_block, int64_t &carry) {
        per_block = a.block_size / a.kernel_stride;
        carry = a.kernel_size / a.kernel_stride - 1;
        chunk = max64(1, kChunk / per_block) * per_block;
    }

    static size_t scratch_floats(const mc_attention_args &a, int64_t num_queries) {
        int64_t chunk, per_block, carry, group = a.query_heads / a.heads;
        geometry(a, chunk, per_block, carry);
        int64_t width = round_up(chunk, 2 * W);
        return num_queries * group * (a.dim + 2 * W + 1) + a.dim * width + group * width +
               num_queries * (2 * carry + per_block + width) + width + 256;
    }

    Selector(const mc_attention_args &a, float *memory, int64_t num_queries, TileRegisters &registers_)
        : args(&a), registers(registers_) {
        dim = a.dim, group = a.query_heads / a.heads, words = dim / S::kPerWord;
        geometry(a, chunk, per_block, carry);
        width = round_up(chunk, 2 * W), blocks_per_chunk = chunk / per_block;
        factor = (float)(a.scale * 1.4426950408889634);
        queries = (word *)memory;
        keys = queries + round_up(num_queries * group * words, 16);
        scores = (float *)(keys + words * width);
        maxima = scores + group * width, sums = maxima + num_queries * group * W;
        lse = sums + num_queries * group * W, window = lse + round_up(num_queries * group, 16);
    }

    void load_queries(const T *from, int64_t head_stride, int64_t token_stride, int64_t num_queries) {
        for (int64_t i = 0; i < num_queries; i++)
            for (int64_t h = 0; h < group; h++)
                S::copy_row(from + i * token_stride + h * head_stride, queries + (i * group + h) * words, dim);
    }

    // Asks memory for a chunk that is transposed later.
    void fetch(const Stream<T> &s, int64_t first) const {
        prefetch_rows(s.data + first * s.stride, s.stride * sizeof(T), dim * sizeof(T), min64(width, s.count - first));
    }

    // Transposes `count` keys to [words][width], the rest of the lanes 0.
    void load_keys(const Stream<T> &s, int64_t first, int64_t count) {
        const T *from = s.data + first * s.stride;
        next_keys = next_end = nullptr;
        if (first + count < s.count) {
            next_keys = (const char *)(s.data + (first + count) * s.stride);
            next_end = next_keys + min64(width, s.count - first - count) * dim * sizeof(T);
            if (in_tiles() || s.stride != dim) {  // nobody asks on the way, or not in one piece
                fetch(s, first + count);
                next_keys = nullptr;
            }
        }
        int64_t j0 = 0;
#if defined(__AVX512F__)
        if (sizeof(T) == 4 || S::kPerWord == 2) {
            for (; j0 + 16 <= count; j0 += 16)
                for (int64_t d = 0; d < words; d += 16)
                    transpose16((const char *)(from + j0 * s.stride) + 4 * d, s.stride * sizeof(T),
                                (uint32_t *)keys + d * width + j0, width, words - d);
        }
#endif
        for (int64_t d = 0; d < words; d++) {
            for (int64_t j = j0; j < count; j++) keys[d * width + j] = S::key_word(from + j * s.stride, d);
            for (int64_t j = count; j < width; j++) keys[d * width + j] = 0;
        }
    }

    // Products of HEADS heads with two vectors of keys, given to `finish`. With AHEAD the memory at `next` is asked for
    // on the way.
    template <int HEADS, bool AHEAD, class Finish>
    MC_INLINE void dots(const word *q, int64_t words, const word *k, int64_t width, const char *&next, const Finish &finish) {
        vf acc[HEADS][2];
        MC_UNROLL for (int h = 0; h < HEADS; h++) acc[h][0] = acc[h][1] = vf{};
        for (int64_t d = 0; d < words; d++) {
            if (AHEAD) {
                __builtin_prefetch(next, 0, 3);
                __builtin_prefetch(next + 64, 0, 3);
                next += 128;
            }
            vf a = load((const float *)(k + d * width)), b = load((const float *)(k + d * width) + W);
            MC_UNROLL for (int h = 0; h < HEADS; h++) {
                acc[h][0] = S::multiply_add(acc[h][0], a, q[h * words + d]);
                acc[h][1] = S::multiply_add(acc[h][1], b, q[h * words + d]);
            }
        }
        finish(acc);
    }

    // What becomes of the products of heads h .. h + HEADS with keys j .. j + 2 W.
    template <int HEADS>
    struct KeepScores {  // in the exponent's base 2
        float *to, factor;
        int64_t width;
        MC_INLINE void run(const KeepScores &x, const vf (*acc)[2]) {
            MC_UNROLL for (int h = 0; h < HEADS; h++) {
                store(x.to + h * x.width, acc[h][0] * x.factor);
                store(x.to + h * x.width + W, acc[h][1] * x.factor);
            }
        }
        __attribute__((always_inline)) void operator()(const vf (*acc)[2]) const { run(*this, acc); }
    };
    template <int HEADS>
    struct AddWeights {  // exp2(score - lse), summed over the heads
        float *to, factor;
        const float *minus;
        MC_INLINE vf weight(vf product, float factor, float minus) {
            return exp2_of<4>(vmin(product * factor - splat(minus), splat(kMaxExponent)));
        }
        MC_INLINE void run(const AddWeights &x, const vf (*acc)[2]) {
            vf first = load(x.to), second = load(x.to + W);
            MC_UNROLL for (int h = 0; h < HEADS; h++) {
                first += weight(acc[h][0], x.factor, x.minus[h]);
                second += weight(acc[h][1], x.factor, x.minus[h]);
            }
            store(x.to, first);
            store(x.to + W, second);
        }
        __attribute__((always_inline)) void operator()(const vf (*acc)[2]) const { run(*this, acc); }
    };

    // All heads of query `i` against `count` loaded keys: their scores kept, or with `weights` (which must be 0 before)
    // their weights added up. Without tile registers the first query of a tile asks for the next keys on the way.
    void score_query(int64_t i, int64_t count, float *weights = nullptr) {
        if (next_keys && next_keys < next_end)
            weights ? score_heads<true, true>(i, count, weights) : score_heads<true, false>(i, count, weights);
        else
            weights ? score_heads<false, true>(i, count, weights) : score_heads<false, false>(i, count, weights);
    }

    // The heads of a query are the rows of one tile register.
    bool in_tiles() const { return S::kTileRegisters && group <= 16; }

#if MC_AMX
    template <bool WEIGHTS>
    void score_tiles(int64_t i, int64_t count, float *weights) {
        const float *minus = lse + i * group;
        registers.set_rows((int)group);
        for (int64_t j = 0; j < count; j += 4 * W) {
            const int tiles = (int)min64(4, (count - j + W - 1) / W);
            TileProduct{(const char *)(queries + i * group * words), (const char *)(keys + j), 4 * words, 64, 4 * width,
                        64 * width, 64, scores + j, 4 * width, words / 16}.template run<false>(tiles);
            for (int64_t t = j; t < j + tiles * W; t += W) {
                vf sum = vf{};
                for (int64_t h = 0; h < group; h++) {
                    float *at = scores + h * width + t;
                    if (WEIGHTS) sum += AddWeights<1>::weight(load(at), factor, minus[h]);
                    else store(at, load(at) * factor);
                }
                if (WEIGHTS) store(weights + t, sum);
            }
        }
    }
#endif

    template <bool AHEAD, bool WEIGHTS>
    void score_heads(int64_t i, int64_t count, float *weights) {
#if MC_AMX
        if constexpr (S::kTileRegisters)
            if (in_tiles()) return score_tiles<WEIGHTS>(i, count, weights);
#endif
        const word *q = queries + i * group * words;
        const float *minus = lse + i * group;
        const char *next = next_keys;
        for (int64_t j = 0; j < count; j += 2 * W) {
            auto heads = [&](int64_t h, auto number) __attribute__((always_inline)) {
                constexpr int HEADS = decltype(number)::value;
                if (WEIGHTS)
                    dots<HEADS, AHEAD>(q + h * words, words, keys + j, width, next,
                                       AddWeights<HEADS>{weights + j, factor, minus + h});
                else
                    dots<HEADS, AHEAD>(q + h * words, words, keys + j, width, next,
                                       KeepScores<HEADS>{scores + h * width + j, factor, width});
            };
            int64_t h = 0;
            for (; h + S::HEADS <= group; h += S::HEADS) heads(h, Number<S::HEADS>());
            if (h + 4 <= group && S::HEADS > 4) heads(h, Number<4>()), h += 4;
            for (; h < group; h++) heads(h, Number<1>());
        }
        next_keys = next;
    }

    // log2-sum-exp2 over the keys of one stream that each query sees, for the queries whose bit is set.
    void find_lse(const Stream<T> &s, int64_t first_position, int64_t num_queries, uint64_t which) {
        for (int64_t i = 0; i < num_queries * group * W; i++) maxima[i] = kNoScore, sums[i] = 0;
        int64_t most = 0;
        for (int64_t i = 0; i < num_queries; i++)
            if (which >> i & 1) most = s.visible(first_position + i);
        for (int64_t first = 0; first < most; first += width) {
            int64_t count = min64(width, most - first);
            load_keys(s, first, count);
            for (int64_t i = 0; i < num_queries; i++) {
                int64_t seen = min64(count, s.visible(first_position + i) - first);
                if (!(which >> i & 1) || seen <= 0) continue;
                score_query(i, seen);
                for (int64_t h = 0; h < group; h++) {
                    float *row = scores + h * width;
                    int64_t end = round_up(seen, W);
                    for (int64_t j = seen; j < end; j++) row[j] = -1e37f;
                    float *at = maxima + (i * group + h) * W, *sum_at = sums + (i * group + h) * W;
                    vf old = load(at), now = old;
                    for (int64_t j = 0; j < end; j += W) now = vmax(now, load(row + j));
                    vf sum = load(sum_at) * exp2_of<4>(old - now);
                    for (int64_t j = 0; j < end; j += W) sum += exp2_of<4>(load(row + j) - now);
                    store(at, now);
                    store(sum_at, sum);
                }
            }
        }
        for (int64_t i = 0; i < num_queries * group; i++) {
            if (!(which >> (i / group) & 1)) continue;
            vf largest = load(maxima + i * W);
            float top = hmax(largest);
            lse[i] = top + log2_scalar(hsum(load(sums + i * W) * exp2_of<4>(largest - splat(top))));
        }
    }

    // Block scores of blocks [begin, end) into to[query * row + block]: the largest weight, summed over the group,
    // among the pooled keys that touch the block.
    void score_blocks(const Stream<T> &s, int64_t first_position, int64_t num_queries, int64_t begin, int64_t end,
                      float *to, int64_t row) {
        int64_t back = (carry + per_block - 1) / per_block;  // blocks whose keys reach into the first one
        int64_t last_seen = s.visible(first_position + num_queries - 1);
        int64_t span = 2 * carry + per_block + width;  // the last starts read a little beyond the weights
        float *best = window + num_queries * span;
        for (int64_t i = 0; i < num_queries * span; i++) window[i] = 0;
        for (int64_t block = max64(0, begin - back); block < end; block += blocks_per_chunk) {
            int64_t first = block * per_block, blocks = min64(blocks_per_chunk, end - block);
            int64_t count = max64(0, min64(blocks * per_block, last_seen - first));
            if (count > 0) load_keys(s, first, count);
            for (int64_t i = 0; i < num_queries; i++) {
                float *w = window + i * span;
                for (int64_t j = 0; j < carry; j++) w[j] = w[chunk + j];
                int64_t seen = max64(0, min64(count, s.visible(first_position + i) - first));
                for (int64_t j = 0; j < width; j++) w[carry + j] = 0;
                if (seen > 0) score_query(i, seen, w + carry);
                for (int64_t j = seen; j < width; j++) w[carry + j] = 0;
                // The largest of each run of per_block + carry weights, for every start; blocks take every per_block-th.
                const int64_t starts = blocks * per_block;
                for (int64_t j = 0; j < starts; j++) best[j] = w[j];
                for (int64_t d = 1; d < per_block + carry; d++)
                    for (int64_t j = 0; j < starts; j++) best[j] = w[j + d] > best[j] ? w[j + d] : best[j];
                for (int64_t b = max64(0, begin - block); b < blocks; b++) to[i * row + block + b] = best[b * per_block];
            }
        }
    }

    // Both passes for one tile: scores of blocks [begin, end).
    void run(const Stream<T> &fine, const Stream<T> &coarse, int64_t first_position, int64_t num_queries,
             int64_t begin, int64_t end, float *to, int64_t row) {
        uint64_t all = ~0ull >> (64 - num_queries), sees_coarse = 0;
        for (int64_t i = 0; i < num_queries; i++)
            if (args->lse_approx && coarse.visible(first_position + i) > 0) sees_coarse |= 1ull << i;
        if (fine.count > begin * per_block) fetch(fine, begin * per_block);
        if (sees_coarse) find_lse(coarse, first_position, num_queries, sees_coarse);
        if (all & ~sees_coarse) find_lse(fine, first_position, num_queries, all & ~sees_coarse);
        score_blocks(fine, first_position, num_queries, begin, end, to, row);
    }
};

// How many of `count` non-negative floats, as ordered integers, are at least `limit`.
MC_INLINE int64_t count_at_least(const int32_t *x, int64_t count, int32_t limit) {
    int32_t total = 0;
    for (int64_t i = 0; i < count; i++) total += x[i] >= limit;
    return total;
}

// Sets bit `query` of masks[block] for each block the query attends to, and lists them in ascending order, padded
// with -1: the first `init_blocks`, the local window, and of the others the best by score, ties to the lower index.
static void choose_blocks(const mc_attention_args &a, const float *scores, int64_t own_block, int64_t query,
                          uint64_t *masks, int32_t *list) {
    const int64_t local = a.window_size / a.block_size, budget = a.topk + local;
    const uint64_t bit = 1ull << query;
    int64_t count = 0;
    auto take_all = [&](int64_t begin, int64_t end) {
        for (int64_t b = begin; b < end; b++) masks[b] |= bit, list[count++] = (int32_t)b;
    };
    if (own_block < budget) {
        take_all(0, own_block + 1);
    } else {
        const int64_t begin = a.init_blocks, end = own_block - local;  // the blocks that compete
        const int64_t room = budget - a.init_blocks - local - 1;
        const int32_t *ranked = (const int32_t *)scores + begin;
        int32_t limit = 0;  // the largest number that at least `room` scores reach, or one that exactly so many reach
        for (int digit = 30; digit >= 0; digit--) {
            int32_t trial = limit | 1 << digit;
            int64_t reach = count_at_least(ranked, end - begin, trial);
            if (reach >= room) limit = trial;
            if (reach == room) break;
        }
        int64_t ties = room - (limit == INT32_MAX ? 0 : count_at_least(ranked, end - begin, limit + 1));
        take_all(0, begin);
        const int64_t last = count + room;
        for (int64_t b = begin; b < end && count < last; b++) {  // without branches: which way they go is a coin toss
            int32_t score = ranked[b - begin];
            int64_t equal = score == limit, chosen = (score > limit) | (equal & (ties > 0));
            ties -= equal;
            list[count] = (int32_t)b;
            count += chosen;
            masks[b] |= (uint64_t)chosen << query;
        }
        take_all(end, own_block + 1);
    }
    while (count < budget) list[count++] = -1;
}
