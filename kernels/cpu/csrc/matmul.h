// Products of packed weights with any number of rows: a block of columns of a panel of outputs is decoded into the first
// cache, outputs on the lanes, and all rows go over it. Scales multiply float32 sums, so codes and inputs stay exact.

template <class E, int BITS, class X>
struct PackedMatmul {
    // Tile: ROWS rows times VECTORS vectors of outputs, as many sums as there are registers.
    static constexpr int ROWS = 6, VECTORS = W == 16 ? 4 : 2, PANEL = VECTORS * W;
    static constexpr int64_t BLOCK = 128;  // elements of the input (lowbit.h) decoded at a time
    static constexpr int FIELDS = kFields<E, BITS>;
    static constexpr int64_t WORD_COLUMNS = 32 / BITS, WORDS = BLOCK / FIELDS, COLUMNS = WORDS * WORD_COLUMNS;
    static constexpr int64_t ROW_CHUNK = 256;    // rows that a panel serves: their sums stay in the second cache
    static constexpr int64_t INPUT_CHUNK = 1024;  // rows brought into order at a time
    typedef typename E::codes_t codes_t;

    const mc_linear_args &a;
    const int64_t blocks, words, row_bytes, groups;

    explicit PackedMatmul(const mc_linear_args &a_)
        : a(a_), blocks((a.in_features + COLUMNS - 1) / COLUMNS),
          words((a.in_features + WORD_COLUMNS - 1) / WORD_COLUMNS), row_bytes(a.in_features * BITS / 8),
          groups(a.in_features / a.group_size) {}

    MC_MEMBER void decode_words(vu words, uint32_t *to) const {
        MC_UNROLL for (int f = 0; f < FIELDS; f++) {
            codes_t codes = E::template decode<BITS>(words, f);
            __builtin_memcpy(to + f * PANEL, &codes, sizeof codes);
        }
    }

    // `panel [BLOCK, PANEL]`: outputs from `begin` on, `count` of them real, words from `word` on.
    void decode(const Weight &w, int64_t begin, int64_t count, int64_t word, uint32_t *panel) const {
        const int64_t here = min64(WORDS, words - word);
        for (int v = 0; v < VECTORS; v++) {
            const int64_t available = count - v * W;
            if constexpr (BITS == INT4) {
                const uint32_t *from = (const uint32_t *)w.data + word * w.out_features + begin + v * W;
                for (int64_t j = 0; j < here; j++, from += w.out_features)
                    decode_words(load_words((const char *)from, 4 * available), panel + j * FIELDS * PANEL + v * W);
            } else {
                const char *from = (const char *)w.data + (begin + v * W) * row_bytes + 4 * word;
                for (int64_t j = 0; j < here; j += W) {
                    vu rows[W];
                    for (int i = 0; i < W; i++)
                        rows[i] = load_words(from + i * row_bytes + 4 * j, i < available ? row_bytes - 4 * (word + j) : 0);
                    transpose(rows);
                    MC_UNROLL for (int i = 0; i < W; i++)
                        if (j + i < here) decode_words(rows[i], panel + (j + i) * FIELDS * PANEL + v * W);
                }
            }
        }
    }

    static void transpose(vu (&rows)[W]) {
#if MC_WIDTH == 16 && defined(__AVX512F__)
        __m512i *r = (__m512i *)rows, t[16];
        MC_UNROLL for (int i = 0; i < 16; i += 2) {  // pairs of words of neighbouring rows
            t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
            t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
        }
        MC_UNROLL for (int i = 0; i < 16; i += 4) {  // quarters of four rows
            r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
            r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
            r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
            r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
        }
        MC_UNROLL for (int i = 0; i < 4; i++) {  // words i and i + 8, i + 4 and i + 12 of eight rows
            t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
            t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
            t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
            t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
        }
        MC_UNROLL for (int i = 0; i < 4; i++) {
            r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
            r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
            r[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
            r[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
        }
#else
        for (int i = 1; i < W; i++)
            for (int j = 0; j < i; j++) {
                uint32_t x = rows[i][j];
                rows[i][j] = rows[j][i], rows[j][i] = x;
            }
#endif
    }

    // Scales of a panel's outputs for one group.
    void panel_scales(const Weight &w, int64_t begin, int64_t count, int64_t group, float *to) const {
        for (int64_t n = count; n < PANEL; n++) to[n] = 0;
        if (BITS == INT4)
            convert_scales(w.scales, a.scale_type, group * w.out_features + begin, count, to);
        else
            for (int64_t n = 0; n < count; n++) to[n] = scale_at(w.scales, a.scale_type, (begin + n) * groups + group);
    }

    // Groups out of order: each column is multiplied by its own scale, `scales [groups, PANEL]`.
    void scale_columns(const float *scales, int64_t block, uint32_t *panel) const {
        const int64_t first = block * COLUMNS, count = min64(COLUMNS, a.in_features - first);
        for (int64_t c = 0; c < count; c++) {
            const float *scale = scales + a.group_of_column[first + c] * PANEL;
            float *codes = (float *)panel + c * PANEL;
            for (int n = 0; n < PANEL; n += W) store(codes + n, load(codes + n) * load(scale + n));
        }
    }

    // R rows of x from element `begin` to `end` of a block; sums [R, PANEL].
    template <int R>
    MC_MEMBER void tile(const uint32_t *panel, const uint32_t *x, int64_t begin, int64_t end, const float *scales,
                        float *sums) const {
        vf acc[R][VECTORS];
        MC_UNROLL for (int r = 0; r < R; r++) MC_UNROLL for (int v = 0; v < VECTORS; v++) acc[r][v] = vf{};
        for (int64_t e = begin; e < end; e++) {
            codes_t codes[VECTORS];
            MC_UNROLL for (int v = 0; v < VECTORS; v++) __builtin_memcpy(&codes[v], panel + e * PANEL + v * W, sizeof(vf));
            MC_UNROLL for (int r = 0; r < R; r++) {
                auto input = E::splat_input(x + r * BLOCK + e);
                MC_UNROLL for (int v = 0; v < VECTORS; v++) acc[r][v] = E::madd(acc[r][v], codes[v], input);
            }
        }
        MC_UNROLL for (int r = 0; r < R; r++) MC_UNROLL for (int v = 0; v < VECTORS; v++) {
            float *sum = sums + r * PANEL + v * W;
            store(sum, load(sum) + acc[r][v] * load(scales + v * W));
        }
    }

#if MC_AMX
    // Pairs of codes and pairs of inputs lie as tile registers want them: 16 rows of x at a time.
    static constexpr bool kTileRegisters = E::COLUMNS == 2;

    void multiply_tiles(const uint32_t *panel, const uint32_t *x, int64_t rows, int64_t begin, int64_t end,
                        const float *scales, float *sums, TileRegisters &registers) const {
        alignas(64) float products[16 * PANEL];
        for (int64_t m = 0; m < rows; m += 16) {
            const int64_t here = min64(16, rows - m);
            registers.set_rows((int)here);
            TileProduct{(const char *)(x + m * BLOCK + begin), (const char *)(panel + begin * PANEL), 4 * BLOCK, 64,
                        4 * PANEL, 64 * PANEL, 64, products, 4 * PANEL, (end - begin) / 16}.template run<VECTORS, false>();
            for (int64_t r = 0; r < here; r++) MC_UNROLL for (int v = 0; v < PANEL; v += W) {
                float *sum = sums + (m + r) * PANEL + v;
                store(sum, load(sum) + load(products + r * PANEL + v) * load(scales + v));
            }
        }
    }
#endif

    // All rows over elements begin to end of a decoded block.
    void multiply(const uint32_t *panel, const uint32_t *x, int64_t rows, int64_t begin, int64_t end, const float *scales,
                  float *sums, TileRegisters &registers) const {
#if MC_AMX
        if constexpr (kTileRegisters)
            if ((end - begin) % 16 == 0) return multiply_tiles(panel, x, rows, begin, end, scales, sums, registers);
#endif
        int64_t m = 0;
        for (; m + ROWS <= rows; m += ROWS) tile<ROWS>(panel, x + m * BLOCK, begin, end, scales, sums + m * PANEL);
        x += m * BLOCK, sums += m * PANEL;
        switch (rows - m) {
            case 1: tile<1>(panel, x, begin, end, scales, sums); break;
            case 2: tile<2>(panel, x, begin, end, scales, sums); break;
            case 3: tile<3>(panel, x, begin, end, scales, sums); break;
            case 4: tile<4>(panel, x, begin, end, scales, sums); break;
            case 5: tile<5>(panel, x, begin, end, scales, sums); break;
        }
    }

    // `rows` rows of x, in order [blocks, of_rows, BLOCK], times outputs `begin` to `begin + count`.
    void run_panel(const Weight &w, int64_t begin, int64_t count, const uint32_t *x, int64_t rows, int64_t of_rows,
                   uint32_t *panel, float *scales, float *sums, X *out, TileRegisters &registers) const {
        __builtin_memset(sums, 0, rows * PANEL * 4);
        if (a.group_of_column)
            for (int64_t g = 0; g < groups; g++) panel_scales(w, begin, count, g, scales + (g + 1) * PANEL);
        const bool scaled_last = groups == 1 || a.group_of_column;
        for (int n = 0; n < PANEL; n++) scales[n] = 1;
        for (int64_t b = 0; b < blocks; b++, x += of_rows * BLOCK) {
            const int64_t first = b * COLUMNS, end = min64(a.in_features, first + COLUMNS);
            decode(w, begin, count, b * WORDS, panel);
            if constexpr (BITS == INT4 && E::COLUMNS == 1)
                if (a.group_of_column) scale_columns(scales + PANEL, b, panel);
            if (scaled_last) {
                multiply(panel, x, rows, 0, (end - first + WORD_COLUMNS - 1) / WORD_COLUMNS * FIELDS, scales, sums,
                         registers);
                continue;
            }
            for (int64_t column = first; column < end;) {
                const int64_t group = column / a.group_size, until = min64(end, (group + 1) * a.group_size);
                panel_scales(w, begin, count, group, scales);
                multiply(panel, x, rows, (column - first) / E::COLUMNS, (until - first) / E::COLUMNS, scales, sums,
                         registers);
                column = until;
            }
        }
        for (int n = 0; n < PANEL; n++) scales[n] = 1;
        if (groups == 1 && !a.group_of_column) panel_scales(w, begin, count, 0, scales);
        for (int64_t m = 0; m < rows; m++)
            for (int64_t n = 0; n < count; n++) from_float(sums[m * PANEL + n] * scales[n], out[m * a.out_stride + n]);
    }

    int run() const {
        const int64_t chunk_rows = min64(a.rows, INPUT_CHUNK), part_rows = min64(a.rows, ROW_CHUNK);
        const int64_t scale_rows = a.group_of_column ? groups + 1 : 1;
        const int64_t own_words = (BLOCK + scale_rows + part_rows) * PANEL;
        int64_t panels[4] = {0}, columns[4] = {0};
        for (int64_t i = 0; i < a.num_weights; i++) {
            panels[i + 1] = panels[i] + (a.out_features[i] + PANEL - 1) / PANEL;
            columns[i + 1] = columns[i] + a.out_features[i];
        }
        Scratch memory(4 * (chunk_rows * blocks * BLOCK + own_words * a.num_threads) + 256);
        if (!memory.ok()) return MC_NO_MEMORY;
        uint32_t *x = memory.take<uint32_t>(chunk_rows * blocks * BLOCK);
        uint32_t *own = memory.take<uint32_t>(own_words * a.num_threads);
        for (int64_t begin = 0; begin < a.rows; begin += chunk_rows) {
            const int64_t rows = min64(chunk_rows, a.rows - begin), parts = (rows + ROW_CHUNK - 1) / ROW_CHUNK;
            const int64_t items = parts * panels[a.num_weights];
            Counter row_counter, item_counter;
            parallel_run(min64(a.num_threads, (rows + 7) / 8), [&](int, int) {
                for (int64_t i; (i = row_counter.next()) * 8 < rows;)
                    for (int64_t m = i * 8; m < min64(rows, i * 8 + 8); m++) order_row(begin + m, m, rows, x);
            });
            parallel_run(min64(a.num_threads, items), [&](int thread, int) {
                uint32_t *panel = own + thread * own_words;
                float *sums = (float *)panel + BLOCK * PANEL, *scales = sums + part_rows * PANEL;
                TileRegisters registers;
                for (int64_t i; (i = item_counter.next()) < items;) {
                    const int64_t p = i / parts, first = i % parts * ROW_CHUNK;
                    int64_t w = 0;
                    while (p >= panels[w + 1]) w++;
                    const int64_t n = (p - panels[w]) * PANEL;
                    run_panel(Weight{a.weight[w], a.scales[w], a.out_features[w]}, n, min64(PANEL, a.out_features[w] - n),
                              x + first * BLOCK, min64(ROW_CHUNK, rows - first), rows, panel, scales, sums,
                              (X *)a.out + (begin + first) * a.out_stride + columns[w] + n, registers);
                }
            });
        }
        return MC_OK;
    }

    // Row `from` of the input becomes row `m` of `x [blocks, rows, BLOCK]`.
    void order_row(int64_t from, int64_t m, int64_t rows, uint32_t *x) const {
        const X *row = (const X *)a.x + from * a.x_stride;
        for (int64_t b = 0; b < blocks; b++)
            order_input<E, BITS>(row + b * COLUMNS, min64(COLUMNS, a.in_features - b * COLUMNS), WORDS,
                                 x + (b * rows + m) * BLOCK);
    }
};

static int matmul(const mc_linear_args &a) {
    if (a.norm_weight || a.gate || a.residual || a.rope_heads) return MC_UNSUPPORTED;
    if (a.group_of_column)
        return a.dtype == MC_BFLOAT16 ? PackedMatmul<Fp32Engine, INT4, bf16>(a).run()
                                      : PackedMatmul<Fp32Engine, INT4, float>(a).run();
    if (a.dtype == MC_FLOAT32) switch (a.format) {
        case MC_TERNARY: return PackedMatmul<Fp32Engine, TERNARY, float>(a).run();
        case MC_INT4: return PackedMatmul<Fp32Engine, INT4, float>(a).run();
        case MC_INT8: return PackedMatmul<Fp32Engine, INT8, float>(a).run();
    }
    // On Intel's processors VDPBF16PS is slow: on a Xeon with AMX, float32 makes more products a second. Tile registers,
    // which are faster, take 32 columns at a time.
    const bool in_tiles = MC_AMX && (a.group_size == a.in_features || a.group_size % 32 == 0);
    if (a.dtype == MC_BFLOAT16 && mc_is_intel && !in_tiles) switch (a.format) {
        case MC_TERNARY: return PackedMatmul<Fp32Engine, TERNARY, bf16>(a).run();
        case MC_INT4: return PackedMatmul<Fp32Engine, INT4, bf16>(a).run();
    }
    if (a.dtype == MC_BFLOAT16) switch (a.format) {
        case MC_TERNARY: return PackedMatmul<CodeEngine, TERNARY, bf16>(a).run();
        case MC_INT4: return PackedMatmul<CodeEngine, INT4, bf16>(a).run();
        case MC_INT8: return PackedMatmul<Fp32Engine, INT8, bf16>(a).run();
    }
    return MC_UNSUPPORTED;
}
