// Packed weights: how the codes in a 32-bit word become numbers, and products with one to eight rows, straight from the
// layouts in which checkpoints hold them.
//
//   ternary  [N, K / 4] bytes, column 4j + i of a row in bits 2i, 2i + 1 of byte j, as code + 1
//   int8     [N, K] bytes, two's complement
//   int4     [K / 8, N] words, column 8j + i in bits 4i .. 4i + 3 of word j, as code + 8 (GPTQ)
//
// In the first two a vector takes W words of one row, so it holds neighbouring columns; in the last it takes one word of
// each of W outputs. Either way the k-th field of all its words is decoded at once. Inputs are brought into the order
// that this asks for, once a call.

// Bits of a code; a word has 32 / BITS columns.
enum { TERNARY = 2, INT4 = 4, INT8 = 8 };

// Codes as float32, a column a field.
struct Fp32Engine {
    typedef vf codes_t;
    typedef vf input_t;
    static constexpr int COLUMNS = 1;  // of a field

    template <int BITS>
    MC_INLINE vf decode(vu words, int field) {
#if MC_WIDTH == 16 && defined(__AVX512F__)
        // The table's index is the lowest four bits: one code of four bits, or two of two, the upper one without a shift.
        const vf low = {-1, 0, 1, 2, -1, 0, 1, 2, -1, 0, 1, 2, -1, 0, 1, 2};
        const vf high = {-1, -1, -1, -1, 0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2};
        const vf four = {-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7};
        if (BITS == TERNARY)
            return (vf)_mm512_permutexvar_ps((__m512i)(words >> (4 * (field / 2))), (__m512)(field % 2 ? high : low));
        if (BITS == INT4) return (vf)_mm512_permutexvar_ps((__m512i)(words >> (4 * field)), (__m512)four);
#elif MC_WIDTH == 8 && defined(__AVX2__)
        const vf low = {-1, 0, 1, 2, -1, 0, 1, 2};
        if (BITS == TERNARY) return (vf)_mm256_permutevar8x32_ps((__m256)low, (__m256i)(words >> (2 * field)));
#endif
        if (BITS == TERNARY) return __builtin_convertvector((vi)(words >> (2 * field) & 3), vf) - splat(1);
        // To the top and back with the sign; four-bit codes have an offset of 8 for a sign.
        if (BITS == INT4) words ^= 0x88888888u;
        return __builtin_convertvector((vi)(words << (32 - BITS - BITS * field)) >> (32 - BITS), vf);
    }
    MC_INLINE vf madd(vf sum, vf codes, vf input) { return sum + codes * input; }
    MC_INLINE vf load_input(const uint32_t *p) { return load((const float *)p); }
    MC_INLINE vf splat_input(const uint32_t *p) { return splat(*(const float *)p); }

    // The input's part of a field: column `field` of the word.
    template <class X>
    MC_INLINE uint32_t element(const X *x, int64_t available, int64_t field, int64_t) {
        return field < available ? float_bits(to_float(x[field])) : 0;
    }
};

#if MC_BF16
// Codes as bfloat16: a field decodes the lower and the upper half of each word at once, columns `field` and
// `field + 16 / BITS`, which VDPBF16PS multiplies with a pair of inputs. All codes are exact.
struct Bf16Engine {
    typedef __m512bh codes_t;
    typedef __m512bh input_t;
    static constexpr int COLUMNS = 2;

    template <int BITS>
    MC_INLINE __m512bh decode(vu words, int field) {
        static_assert(BITS != INT8, "eight bits are no index of a table");
        typedef uint16_t table_t __attribute__((vector_size(64)));
        // The index is the lowest five bits: the tables repeat.
#define MC_LOW 0xbf80, 0, 0x3f80, 0x4000
#define MC_HIGH 0xbf80, 0xbf80, 0xbf80, 0xbf80, 0, 0, 0, 0, 0x3f80, 0x3f80, 0x3f80, 0x3f80, 0x4000, 0x4000, 0x4000, 0x4000
#define MC_FOUR 0xc100, 0xc0e0, 0xc0c0, 0xc0a0, 0xc080, 0xc040, 0xc000, 0xbf80, \
                0, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0
        const table_t low = {MC_LOW, MC_LOW, MC_LOW, MC_LOW, MC_LOW, MC_LOW, MC_LOW, MC_LOW};
        const table_t high = {MC_HIGH, MC_HIGH}, four = {MC_FOUR, MC_FOUR};
#undef MC_LOW
#undef MC_HIGH
#undef MC_FOUR
        __m512i index = _mm512_srli_epi16((__m512i)words, BITS == INT4 ? 4 * field : 4 * (field / 2));
        table_t table = BITS == INT4 ? four : field % 2 ? high : low;
        return (__m512bh)_mm512_permutexvar_epi16(index, (__m512i)table);
    }
    MC_INLINE vf madd(vf sum, __m512bh codes, __m512bh input) {
        return (vf)_mm512_dpbf16_ps((__m512)sum, codes, input);
    }
    MC_INLINE __m512bh load_input(const uint32_t *p) { return (__m512bh)_mm512_loadu_si512(p); }
    MC_INLINE __m512bh splat_input(const uint32_t *p) { return (__m512bh)_mm512_set1_epi32(*(const int *)p); }

    MC_INLINE uint32_t element(const bf16 *x, int64_t available, int64_t field, int64_t fields) {
        uint32_t low = field < available ? x[field].bits : 0;
        return field + fields < available ? low | (uint32_t)x[field + fields].bits << 16 : low;
    }
};
typedef Bf16Engine CodeEngine;
#else
typedef Fp32Engine CodeEngine;
#endif

template <class E, int BITS>
constexpr int kFields = 32 / BITS / E::COLUMNS;  // of a word, each with an element of the input, four bytes

// The elements of one row of x, word after word, as many as fill `words` words; zeros after the last column.
template <class E, int BITS, class X>
static void order_input(const X *x, int64_t columns, int64_t words, uint32_t *to) {
    constexpr int FIELDS = kFields<E, BITS>, COLUMNS = 32 / BITS;
    int64_t whole = columns / COLUMNS;
    for (int64_t w = 0; w < whole; w++)
        for (int f = 0; f < FIELDS; f++) to[w * FIELDS + f] = E::element(x + w * COLUMNS, COLUMNS, f, FIELDS);
    for (int64_t w = whole; w < words; w++)
        for (int f = 0; f < FIELDS; f++)
            to[w * FIELDS + f] = E::element(x + w * COLUMNS, columns - w * COLUMNS, f, FIELDS);
}

// Scales as float32.
static void convert_scales(const void *from, int64_t type, int64_t begin, int64_t count, float *to) {
    if (type == MC_FLOAT32)
        __builtin_memcpy(to, (const float *)from + begin, count * 4);
    else if (type == MC_BFLOAT16)
        convert_row((const bf16 *)from + begin, to, count);
    else
        convert_row((const fp16 *)from + begin, to, count);
}

MC_INLINE float scale_at(const void *scales, int64_t type, int64_t i) {
    float scale;
    convert_scales(scales, type, i, 1, &scale);
    return scale;
}

typedef vu vu_any __attribute__((aligned(1), may_alias));

// The next words, and zeros after the last of `available` bytes.
MC_INLINE vu load_words(const char *from, int64_t available) {
    if (available >= (int64_t)sizeof(vu)) return *(const vu_any *)from;
#if MC_WIDTH == 16 && defined(__AVX512BW__)
    __mmask64 mask = available <= 0 ? 0 : ~0ull >> (64 - available);
    return (vu)_mm512_maskz_loadu_epi8(mask, from);
#else
    vu words = {};
    if (available > 0) __builtin_memcpy(&words, from, available);
    return words;
#endif
}

MC_INLINE vf pick_lanes(vf x, vi from) {
#if MC_WIDTH == 16 && defined(__AVX512F__)
    return (vf)_mm512_permutexvar_ps((__m512i)from, (__m512)x);
#elif MC_WIDTH == 8 && defined(__AVX2__)
    return (vf)_mm256_permutevar8x32_ps((__m256)x, (__m256i)from);
#else
    vf y;
    for (int i = 0; i < W; i++) y[i] = x[from[i]];
    return y;
#endif
}

MC_INLINE float sum_lanes(vf x) {
#if MC_WIDTH == 16 && defined(__AVX512F__)
    return _mm512_reduce_add_ps((__m512)x);
#else
    for (int step = W / 2; step; step /= 2)
        for (int i = 0; i < step; i++) x[i] += x[i + step];
    return x[0];
#endif
}

// Which scales of a row belong to a vector of codes, whose lanes hold `lane_columns` columns each. A group has whole
// vectors of columns, or a vector whole groups. Worked out once: a division takes longer than a vector's products.
struct GroupOfLane {
    bool whole;                     // one scale for the row, applied at its end
    int64_t per_group, per_block;   // vectors of a group, groups of a vector
    vi lanes;                       // group of each lane, in the vector
    int64_t group = 0, left;        // while going through a row

    GroupOfLane(int64_t columns, int64_t group_size, int64_t lane_columns)
        : whole(group_size == columns), per_group(group_size / (W * lane_columns)),
          per_block(W * lane_columns / group_size), left(per_group) {
        for (int i = 0; i < W; i++) lanes[i] = per_group ? 0 : (int)(i * lane_columns / group_size);
    }
    MC_MEMBER vf scale(const float *scales, int64_t block) const {
        if (whole) return splat(1);
        return per_group ? splat(scales[group]) : pick_lanes(load(scales + block * per_block), lanes);
    }
    MC_MEMBER void next() {
        if (--left == 0) group++, left = per_group;
    }
};

// `DenseProduct` for row-major codes.
template <class E, int BITS, int M>
struct RowMajorProduct {
    static constexpr int kMaxChunk = 32, FIELDS = kFields<E, BITS>;
    static constexpr int64_t SPAN = W * 32 / BITS;  // columns of a vector
    const mc_linear_args &a;
    const int64_t blocks, groups, row_bytes;
    const GroupOfLane first;
    const uint32_t *x = nullptr;  // [M, blocks, FIELDS, W]

    explicit RowMajorProduct(const mc_linear_args &a_)
        : a(a_), blocks((a.in_features + SPAN - 1) / SPAN), groups(a.in_features / a.group_size),
          row_bytes(a.in_features * BITS / 8), first(a.in_features, a.group_size, 32 / BITS) {}
    int64_t chunk() const { return kMaxChunk; }
    size_t scratch_bytes() const { return (size_t)(M + 1) * blocks * FIELDS * W * 4 + 128; }
    size_t thread_bytes() const { return (groups + W + 16) * 4 * ROWS; }

    void prepare(const bf16 *input, int64_t stride, Scratch &memory) {
        uint32_t *to = memory.take<uint32_t>(M * blocks * FIELDS * W), *row = memory.take<uint32_t>(blocks * FIELDS * W);
        x = to;
        for (int m = 0; m < M; m++) {
            order_input<E, BITS>(input + m * stride, a.in_features, blocks * W, row);
            for (int64_t b = 0; b < blocks; b++, to += FIELDS * W)
                for (int lane = 0; lane < W; lane++)
                    for (int f = 0; f < FIELDS; f++) to[f * W + lane] = row[(b * W + lane) * FIELDS + f];
        }
    }

    // Several rows of x do not stay in the first cache beside the weights: each pass over them serves two outputs.
    static constexpr int ROWS = M > 4 ? 2 : 1;

    template <int R, int TO>
    MC_MEMBER void run_rows(const char *data, const float *scales, int64_t scale_stride, float (*to)[TO], int64_t n) const {
        constexpr int PARTS = M * R == 1 ? 2 : 1;  // independent sums, to hide the latency of an addition
        GroupOfLane at = first;
        vf total[R][M];
        MC_UNROLL for (int r = 0; r < R; r++) MC_UNROLL for (int m = 0; m < M; m++) total[r][m] = vf{};
        auto block = [&](int64_t b, int64_t available) __attribute__((always_inline)) {
            vu words[R];
            MC_UNROLL for (int r = 0; r < R; r++) {
                const char *from = data + r * row_bytes + b * sizeof(vu);
                ask_ahead(from + kAheadBytes);
                words[r] = load_words(from, available);
            }
            vf part[PARTS][R][M];
            MC_UNROLL for (int p = 0; p < PARTS; p++) MC_UNROLL for (int r = 0; r < R; r++)
                MC_UNROLL for (int m = 0; m < M; m++) part[p][r][m] = vf{};
            MC_UNROLL for (int f = 0; f < FIELDS; f++) {
                typename E::codes_t codes[R];
                MC_UNROLL for (int r = 0; r < R; r++) codes[r] = E::template decode<BITS>(words[r], f);
                MC_UNROLL for (int m = 0; m < M; m++) {
                    auto input = E::load_input(x + ((m * blocks + b) * FIELDS + f) * W);
                    MC_UNROLL for (int r = 0; r < R; r++) part[f % PARTS][r][m] = E::madd(part[f % PARTS][r][m], codes[r], input);
                }
            }
            MC_UNROLL for (int r = 0; r < R; r++) {
                const vf scale = at.scale(scales + r * scale_stride, b);
                MC_UNROLL for (int m = 0; m < M; m++) {
                    MC_UNROLL for (int p = 1; p < PARTS; p++) part[0][r][m] += part[p][r][m];
                    total[r][m] += part[0][r][m] * scale;
                }
            }
            at.next();
        };
        int64_t b = 0;
        for (; (b + 1) * (int64_t)sizeof(vu) <= row_bytes; b++) block(b, sizeof(vu));
        if (b < blocks) block(b, row_bytes - b * sizeof(vu));
        MC_UNROLL for (int r = 0; r < R; r++) {
            float scale = at.whole ? scales[r * scale_stride] : 1;
            MC_UNROLL for (int m = 0; m < M; m++) to[m][n + r] = sum_lanes(total[r][m]) * scale;
        }
    }

    // `own`: thread_bytes() of this thread's.
    template <int TO>
    void run(const Weight &w, int64_t begin, int64_t count, float *own, float (*to)[TO]) const {
        const char *data = (const char *)w.data + begin * row_bytes;
        const int64_t stride = groups + W;
        for (int64_t n = 0; n < count;) {
            const int64_t rows = count - n >= ROWS ? ROWS : 1;
            for (int64_t r = 0; r < rows; r++) {
                convert_scales(w.scales, a.scale_type, (begin + n + r) * groups, groups, own + r * stride);
                store(own + r * stride + groups, vf{});  // of the columns after the last, which are zero
            }
            if (rows == ROWS)
                run_rows<ROWS>(data + n * row_bytes, own, stride, to, n);
            else
                run_rows<1>(data + n * row_bytes, own, stride, to, n);
            n += rows;
        }
    }
};

#if defined(__AVX512VNNI__)
// Ternary codes as bytes 0, 1 and 2 times inputs as two bytes each, in integers: VPDPBUSD takes four codes a lane where
// VDPBF16PS takes two, and a shift and a mask decode four. A lane has 16 neighbouring columns; their inputs are rounded
// to 16 bits of the largest of them, 2^-16 of it, a 128th of bfloat16's own step. Codes are one too large, so each lane
// begins with minus the sum of its inputs.
template <int M>
struct TernaryByteProduct {
    static constexpr int kMaxChunk = 32, LANE = 16;
    static constexpr int64_t SPAN = W * LANE;  // columns of a vector
    const mc_linear_args &a;
    const int64_t blocks, groups, row_bytes;
    const GroupOfLane first;
    const char *x = nullptr;          // [blocks, M, 4 fields, low and high, 64] bytes
    const int32_t *start = nullptr;   // [blocks, M, W]
    const float *x_scale = nullptr;   // [blocks, M, W]

    explicit TernaryByteProduct(const mc_linear_args &a_)
        : a(a_), blocks((a.in_features + SPAN - 1) / SPAN), groups(a.in_features / a.group_size),
          row_bytes(a.in_features / 4), first(a.in_features, a.group_size, LANE) {}
    int64_t chunk() const { return kMaxChunk; }
    size_t scratch_bytes() const { return (size_t)M * blocks * (512 + 8 * W) + 192; }
    size_t thread_bytes() const { return (groups + W + 16) * 4; }

    void prepare(const bf16 *input, int64_t stride, Scratch &memory) {
        char *bytes = memory.take<char>(M * blocks * 512);
        int32_t *sums = memory.take<int32_t>(M * blocks * W);
        float *scales = memory.take<float>(M * blocks * W);
        x = bytes, start = sums, x_scale = scales;
        const __m512i by_field = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
        for (int64_t b = 0; b < blocks; b++)
            for (int m = 0; m < M; m++, bytes += 512, sums += W, scales += W)
                for (int lane = 0; lane < W; lane++) {
                    const int64_t first = b * SPAN + lane * LANE, available = max64(0, min64(LANE, a.in_features - first));
                    const __m256i halves = _mm256_maskz_loadu_epi16((1u << available) - 1, input + m * stride + first);
                    const __m512 values = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
                    const float largest = _mm512_reduce_max_ps(_mm512_abs_ps(values));
                    // Infinity and NaN, also where the maximum dropped it: all outputs are NaN.
                    const bool finite = !_mm512_cmp_ps_mask(_mm512_sub_ps(values, values), values, _CMP_UNORD_Q);
                    const float step = largest / 32512;  // inputs below 3e-33 become 0
                    const __m512 inverse = _mm512_set1_ps(finite && step >= 1e-37f ? 1 / step : 0);
                    const __m512i whole = _mm512_cvtps_epi32(_mm512_maskz_mul_ps(finite ? 0xffff : 0, values, inverse));
                    const __m512i high = _mm512_srai_epi32(_mm512_add_epi32(whole, _mm512_set1_epi32(128)), 8);
                    const __m512i low = _mm512_sub_epi32(whole, _mm512_slli_epi32(high, 8));
                    alignas(16) char parts[2][16];
                    _mm_store_si128((__m128i *)parts[0], _mm512_cvtepi32_epi8(_mm512_permutexvar_epi32(by_field, low)));
                    _mm_store_si128((__m128i *)parts[1], _mm512_cvtepi32_epi8(_mm512_permutexvar_epi32(by_field, high)));
                    for (int f = 0; f < 4; f++)
                        for (int part = 0; part < 2; part++)
                            __builtin_memcpy(bytes + (2 * f + part) * 64 + 4 * lane, parts[part] + 4 * f, 4);
                    sums[lane] = -_mm512_reduce_add_epi32(whole);
                    scales[lane] = finite ? step : __builtin_nanf("");
                }
    }

    template <int TO>
    MC_MEMBER void run_row(const char *data, const float *scales, float (*to)[TO], int64_t n) const {
        GroupOfLane at = first;
        const __m512i three = _mm512_set1_epi8(3);
        vf total[M];
        MC_UNROLL for (int m = 0; m < M; m++) total[m] = vf{};
        auto block = [&](int64_t b, int64_t available) __attribute__((always_inline)) {
            const char *from = data + b * sizeof(vu), *field = x + b * (M * 512);
            ask_ahead(from + kAheadBytes);
            const __m512i words = (__m512i)load_words(from, available);
            const vf scale = at.scale(scales, b);
            MC_UNROLL for (int m = 0; m < M; m++) {
                const int64_t lanes = (b * M + m) * W;
                __m512i low = _mm512_loadu_si512(start + lanes), high = _mm512_setzero_si512();
                MC_UNROLL for (int f = 0; f < 4; f++, field += 128) {
                    const __m512i codes = _mm512_and_si512(_mm512_srli_epi16(words, 2 * f), three);
                    low = _mm512_dpbusd_epi32(low, codes, _mm512_loadu_si512(field));
                    high = _mm512_dpbusd_epi32(high, codes, _mm512_loadu_si512(field + 64));
                }
                const __m512i sum = _mm512_add_epi32(low, _mm512_slli_epi32(high, 8));
                total[m] += (vf)_mm512_cvtepi32_ps(sum) * (load(x_scale + lanes) * scale);
            }
            at.next();
        };
        int64_t b = 0;
        for (; (b + 1) * (int64_t)sizeof(vu) <= row_bytes; b++) block(b, sizeof(vu));
        if (b < blocks) block(b, row_bytes - b * sizeof(vu));
        MC_UNROLL for (int m = 0; m < M; m++) to[m][n] = sum_lanes(total[m]) * (at.whole ? scales[0] : 1);
    }

    template <int TO>
    void run(const Weight &w, int64_t begin, int64_t count, float *own, float (*to)[TO]) const {
        store(own + groups, vf{});  // of the columns after the last, which are zero
        for (int64_t n = 0; n < count; n++) {
            const float *scales = own;
            // Loads go beyond the row's last scale; the rows after it have room for that.
            if (a.scale_type == MC_FLOAT32 && (begin + n + 1) * groups + W <= w.out_features * groups)
                scales = (const float *)w.scales + (begin + n) * groups;
            else
                convert_scales(w.scales, a.scale_type, (begin + n) * groups, groups, own);
            run_row((const char *)w.data + (begin + n) * row_bytes, scales, to, n);
        }
    }
};
template <int M>
using TernaryProduct = TernaryByteProduct<M>;
#else
template <int M>
using TernaryProduct = RowMajorProduct<CodeEngine, TERNARY, M>;
#endif

// The same for GPTQ's layout: neighbouring outputs lie side by side, so sums stay on their lanes. A few word rows at a
// time are gone through from end to end of the chunk, so that memory is read in long runs.
template <class E, int M>
struct OutputMajorProduct {
    static constexpr int FIELDS = kFields<E, INT4>, kMaxChunk = M <= 4 ? 512 : 256;
    static constexpr int64_t PASS = 4;  // word rows at a time
    const mc_linear_args &a;
    const int64_t words, group_words, chunk_size;
    const uint32_t *x = nullptr;  // [M, words, FIELDS]

    explicit OutputMajorProduct(const mc_linear_args &a_)
        : a(a_), words(a.in_features / 8), group_words(a.group_size / 8), chunk_size(choose_chunk(a_)) {}
    static int64_t choose_chunk(const mc_linear_args &a) {
        int64_t total = 0;
        for (int64_t i = 0; i < a.num_weights; i++) total += a.out_features[i];
        return max64(64, min64(kMaxChunk, total / (2 * max64(1, a.num_threads)) / 64 * 64));
    }
    int64_t chunk() const { return chunk_size; }
    size_t scratch_bytes() const { return (size_t)M * words * FIELDS * 4 + 64; }
    size_t thread_bytes() const { return (size_t)(2 * M + 1) * chunk_size * 4; }

    void prepare(const bf16 *input, int64_t stride, Scratch &memory) {
        uint32_t *to = memory.take<uint32_t>(M * words * FIELDS);
        x = to;
        for (int m = 0; m < M; m++) order_input<E, INT4>(input + m * stride, a.in_features, words, to + m * words * FIELDS);
    }

    // `rows` word rows from `word` on over V vectors of outputs; sums [M, chunk_size].
    template <int V, bool FIRST>
    MC_MEMBER void tile(const uint32_t *from, int64_t stride, int64_t available, int64_t word, int64_t rows,
                        const char *ahead, float *sums) const {
        vf acc[V][M];
        MC_UNROLL for (int v = 0; v < V; v++) MC_UNROLL for (int m = 0; m < M; m++)
            acc[v][m] = FIRST ? vf{} : load(sums + m * chunk_size + v * W);
        for (int64_t j = 0; j < rows; j++, from += stride, ahead += 4 * stride) {
            vu row[V];
            MC_UNROLL for (int v = 0; v < V; v++) {
                if (v * W * 4 % 64 == 0) ask_ahead(ahead + v * W * 4);
                row[v] = load_words((const char *)(from + v * W), 4 * (available - v * W));
            }
            MC_UNROLL for (int f = 0; f < FIELDS; f++) {
                typename E::codes_t codes[V];
                MC_UNROLL for (int v = 0; v < V; v++) codes[v] = E::template decode<INT4>(row[v], f);
                MC_UNROLL for (int m = 0; m < M; m++) {
                    auto input = E::splat_input(x + (m * words + word + j) * FIELDS + f);
                    MC_UNROLL for (int v = 0; v < V; v++) acc[v][m] = E::madd(acc[v][m], codes[v], input);
                }
            }
        }
        MC_UNROLL for (int v = 0; v < V; v++) MC_UNROLL for (int m = 0; m < M; m++)
            store(sums + m * chunk_size + v * W, acc[v][m]);
    }

    template <int TO>
    void run(const Weight &w, int64_t begin, int64_t count, float *own, float (*to)[TO]) const {
        constexpr int V = M <= 2 ? 4 : 2;
        const int64_t stride = w.out_features, padded = round_up(count, V * W);
        const uint32_t *data = (const uint32_t *)w.data + begin;
        float *sums = own, *scales = own + M * chunk_size;
        for (int m = 0; m < M; m++)
            for (int64_t n = 0; n < padded; n++) to[m][n] = 0;
        for (int64_t word = 0; word < words;) {
            const int64_t group = word / group_words, end = min64(words, (group + 1) * group_words);
            for (bool first = true; word < end; first = false) {
                const int64_t rows = min64(PASS, end - word), next = word + PASS;
                // What comes after these rows: the rows below, or the next chunk's first.
                const uint32_t *ahead = next < words ? data + next * stride : data + chunk_size;
                for (int64_t n = 0; n < padded; n += V * W) {
                    const uint32_t *from = data + word * stride + n;
                    if (first)
                        tile<V, true>(from, stride, count - n, word, rows, (const char *)(ahead + n), sums + n);
                    else
                        tile<V, false>(from, stride, count - n, word, rows, (const char *)(ahead + n), sums + n);
                }
                word += rows;
            }
            convert_scales(w.scales, a.scale_type, group * stride + begin, count, scales);
            for (int m = 0; m < M; m++)
                for (int64_t n = 0; n < count; n++) to[m][n] += sums[m * chunk_size + n] * scales[n];
        }
    }
};
