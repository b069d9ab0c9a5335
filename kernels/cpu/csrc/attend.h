// Causal attention, dense or over chosen blocks: cuts the work into tiles of neighbouring queries of one key head,
// hands the tiles to threads, and where there are fewer tiles than threads cuts the keys of a tile as well.

template <class T>
struct TypeCode;
template <> struct TypeCode<float> { static constexpr int64_t value = MC_FLOAT32; };
template <> struct TypeCode<bf16> { static constexpr int64_t value = MC_BFLOAT16; };
template <> struct TypeCode<fp16> { static constexpr int64_t value = MC_FLOAT16; };

template <class T>
MC_INLINE T *at(const mc_tensor &t, int64_t batch, int64_t head, int64_t token) {
    return (T *)t.data + batch * t.stride[0] + head * t.stride[1] + token * t.stride[2];
}

struct Tile {
    int64_t batch, head, start, num_keys;  // first real key of the row, and the row's keys from there
    int64_t query;                         // first of the tile among all queries
    TileShape shape;
};

// Runs of keys that a tile attends to: key `first(i)` .. `first(i) + size(i)`, seen by the queries of `mask(i)`. Where the
// tile does not end in it, a run has `length(i)` keys; it is number `number(i)` of the row, which has `count_of` runs.
struct DenseRuns {
    int64_t begin, count, end;
    DenseRuns(const TileShape &t, int64_t, const uint64_t *) {
        end = t.first_position + t.num_queries;
        begin = t.sliding_window ? max64(0, t.first_position - t.sliding_window + 1) / kTile : 0;
        count = (end + kTile - 1) / kTile - begin;
    }
    int64_t first(int64_t i) const { return (begin + i) * kTile; }
    int64_t length(int64_t) const { return kTile; }
    int64_t size(int64_t i) const { return min64(kTile, end - first(i)); }
    int64_t number(int64_t i) const { return begin + i; }
    uint64_t mask(int64_t) const { return ~0ull; }
    static int64_t count_of(int64_t num_keys, int64_t) { return (num_keys + kTile - 1) / kTile; }
};

struct BlockRuns {  // a block larger than a tile is cut into runs
    int64_t block_size, per_block, count, end;
    const uint64_t *masks;
    BlockRuns(const TileShape &t, int64_t block_size_, const uint64_t *masks_) : block_size(block_size_), masks(masks_) {
        end = t.first_position + t.num_queries;
        per_block = (block_size + kTile - 1) / kTile;
        count = count_of(end, block_size);
    }
    int64_t first(int64_t i) const { return i / per_block * block_size + i % per_block * kTile; }
    int64_t length(int64_t i) const { return min64(kTile, block_size - i % per_block * kTile); }
    int64_t size(int64_t i) const { return min64(length(i), end - first(i)); }
    int64_t number(int64_t i) const { return i; }
    uint64_t mask(int64_t i) const { return masks[i / per_block]; }
    static int64_t count_of(int64_t num_keys, int64_t block_size) {
        return ((num_keys - 1) / block_size + 1) * ((block_size + kTile - 1) / kTile);
    }
};

// Keys or values of a run, readable up to `rows` of them: in place, or copied where they must be converted or where
// the row's keys end.
template <class E, class T>
MC_INLINE const typename E::key_t *stage(const T *from, int64_t &stride, int64_t count, int64_t rows, int64_t available,
                                         int64_t dim, float *copy) {
    typedef typename E::key_t key_t;
    if (!E::kConverts && rows <= available) return (const key_t *)from;
    key_t *to = (key_t *)copy;
    for (int64_t t = 0; t < count; t++) {
        if (E::kConverts)
            convert_row(from + t * stride, (float *)to + t * dim, dim);
        else
            __builtin_memcpy(to + t * dim, from + t * stride, dim * sizeof(key_t));
    }
    __builtin_memset(to + count * dim, 0, (rows - count) * dim * sizeof(key_t));
    stride = dim;
    return to;
}

// The first run from `i` on that some query sees, or `end`.
template <class Runs>
MC_INLINE int64_t first_wanted(const Runs &runs, int64_t i, int64_t end) {
    while (i < end && !(runs.mask(i) && runs.size(i) > 0)) i++;
    return i;
}

// Attends all queries of a tile to the runs begin, begin + 1, ... < end.
template <class E, class T, class Runs>
static void attend_runs(E &engine, const Tile &tile, const Runs &runs, int64_t begin, int64_t end, const T *k,
                        int64_t k_row, const T *v, int64_t v_row, int64_t dim, float *staged) {
    float *staged_values = staged + kTile * dim;
    // The run to fetch meanwhile: the next one, or the one after it where a single query leaves memory less time.
    const int64_t ahead = 1;
    auto wanted_from = [&](int64_t i) { return first_wanted(runs, i, end); };
    auto fetch = [&](int64_t i) {
        prefetch_rows(k + runs.first(i) * k_row, k_row * sizeof(T), dim * sizeof(T), runs.size(i));
        prefetch_rows(v + runs.first(i) * v_row, v_row * sizeof(T), dim * sizeof(T), runs.size(i));
    };
    int64_t next = wanted_from(begin);
    for (int64_t a = 0; a < ahead && next < end; a++, next = wanted_from(next + 1)) fetch(next);
    for (int64_t i = wanted_from(begin); i < end; i = wanted_from(i + 1)) {
        uint64_t mask = runs.mask(i);
        int64_t first = runs.first(i), count = runs.size(i), rows = round_up(count, E::UNIT);
        int64_t k_stride = k_row, v_stride = v_row, available = tile.num_keys - first;
        auto *keys = stage<E, T>(k + first * k_row, k_stride, count, rows, available, dim, staged);
        auto *values = stage<E, T>(v + first * v_row, v_stride, count, rows, available, dim, staged_values);
        const void *next_k = nullptr, *next_v = nullptr;
        if (next < end) {
            // Asked for while the first query computes where the engine reads in place, before it otherwise.
            if (E::kAsksAhead && k_row == dim && v_row == dim && rows == count)
                next_k = k + runs.first(next) * k_row, next_v = v + runs.first(next) * v_row;
            else
                fetch(next);
        }
        next = wanted_from(next + 1);
        auto process = [&](int64_t g) {
            engine.process(g, keys, k_stride, values, v_stride, first, (int)count, mask, next_k, next_v);
            next_k = nullptr;
        };
        if constexpr (E::kGroupIsQuery) {  // only a few queries of a tile want a far block
            const uint64_t all = ~0ull >> (64 - engine.num_groups);
            for (uint64_t wanted = mask & all; wanted; wanted &= wanted - 1) process(__builtin_ctzll(wanted));
        } else {
            for (int64_t g = 0; g < engine.num_groups; g++)
                if (engine.queries_of(g) & mask) process(g);
        }
    }
}

#if MC_AMX
// The same from copies in the order of tile registers. `first_run` is the row's first run among those of the call.
template <class E, class Runs>
static void attend_ordered_runs(E &engine, const Tile &tile, const Runs &runs, int64_t begin, int64_t end, const bf16 *k,
                             int64_t k_row, const bf16 *v, int64_t v_row, OrderedRuns &ordered, int64_t first_run,
                             uint16_t *own) {
    for (int64_t i = first_wanted(runs, begin, end), next; i < end; i = next) {
        next = first_wanted(runs, i + 1, end);
        const int64_t first = runs.first(i), existing = min64(runs.length(i), tile.num_keys - first);
        KeyRows keys = {(const uint16_t *)k + first * k_row, k_row, nullptr};
        KeyRows values = {(const uint16_t *)v + first * v_row, v_row, nullptr};
        if (next < end) {
            keys.ahead = (const uint16_t *)k + runs.first(next) * k_row;
            values.ahead = (const uint16_t *)v + runs.first(next) * v_row;
        }
        const uint16_t *run = ordered.get(first_run + runs.number(i), keys, values, existing, own);
        engine.process(run, run + engine.run_rows * engine.dim_, first, runs.size(i), runs.mask(i));
    }
}
#endif

// The whole call, for one engine, input type and way to pick the keys.
template <class E, class S, class T, class Runs, bool SPARSE>
struct Attention {
    const mc_attention_args &a;
    int64_t group, chunk, num_chunks;  // query heads of a key head, and how many of them an engine takes at once
    int64_t budget, max_blocks, max_queries;
    Tile *tiles = nullptr;
    int64_t num_tiles = 0;
#if MC_AMX
    OrderedRuns *ordered = nullptr;
#endif

    Attention(const mc_attention_args &a_, int64_t chunk_) : a(a_) {
        group = a.query_heads / a.heads;
        chunk = min64(group, chunk_), num_chunks = (group + chunk - 1) / chunk;
        budget = SPARSE ? a.topk + a.window_size / a.block_size : 0;
        max_blocks = SPARSE ? (a.num_keys - 1) / a.block_size + 1 : 0;
        max_queries = min64(a.num_queries, SPARSE ? min64(kTile, a.block_size) : kTile);
    }
    ~Attention() { free(tiles); }

    // Tiles end where a block of keys ends, so that a tile's queries share their own block.
    bool cut_tiles() {
        int64_t unit = SPARSE ? a.block_size : kTile;
        int64_t per_row = a.num_queries / unit + a.num_queries / kTile + 3;
        tiles = (Tile *)malloc(sizeof(Tile) * a.batch * a.heads * per_row);
        if (!tiles) return false;
        for (int64_t b = 0; b < a.batch; b++) {
            int64_t start = a.kv_start ? min64(max64(0, a.kv_start[b]), a.num_keys) : 0;
            int64_t offset = a.num_keys - a.num_queries - start;  // position of query 0 in the row
            for (int64_t position = max64(0, offset); position < a.num_keys - start;) {
                int64_t end = min64((position / unit + 1) * unit, min64(position + kTile, a.num_keys - start));
                for (int64_t h = 0; h < a.heads; h++)
                    tiles[num_tiles++] = {b, h, start, a.num_keys - start, position - offset,
                                          {end - position, position, SPARSE ? 0 : a.sliding_window}};
                position = end;
            }
        }
        return true;
    }

    void clear_padding() const {  // queries before their row's first key
        if (!a.kv_start) return;
        for (int64_t b = 0; b < a.batch; b++) {
            int64_t start = min64(max64(0, a.kv_start[b]), a.num_keys);
            int64_t padding = min64(max64(0, a.num_queries - (a.num_keys - start)), a.num_queries);
            for (int64_t i = 0; i < padding; i++) {
                for (int64_t h = 0; h < a.query_heads; h++) __builtin_memset(at<T>(a.out, b, h, i), 0, a.dim * sizeof(T));
                for (int64_t h = 0; SPARSE && h < a.heads; h++)
                    __builtin_memset(at<int32_t>(a.blocks, b, h, i), 255, budget * 4);
            }
        }
    }

    // What one thread needs.
    struct Workspace {
        TileRegisters registers;
        Scratch memory;
        float *select, *scores, *engine, *staged, *row;
        uint64_t *masks;
        explicit Workspace(const Attention &x) : memory(bytes(x)) {
            if (!memory.ok()) return;
            select = memory.template take<float>(select_floats(x));
            scores = memory.template take<float>(x.max_queries * x.max_blocks);
            engine = memory.template take<float>(E::scratch_floats(x.a.dim, x.chunk, x.max_queries));
            staged = memory.template take<float>(2 * kTile * x.a.dim);
            row = memory.template take<float>(x.a.dim);
            masks = memory.template take<uint64_t>(x.max_blocks);
        }
        static size_t select_floats(const Attention &x) {
            return SPARSE ? Selector<S, T>::scratch_floats(x.a, x.max_queries) : 0;
        }
        static size_t bytes(const Attention &x) {
            return 4 * (select_floats(x) + x.max_queries * x.max_blocks + 2 * kTile * x.a.dim + x.a.dim +
                        E::scratch_floats(x.a.dim, x.chunk, x.max_queries)) + 8 * x.max_blocks + 64 * 8;
        }
    };

    int64_t own_block(const Tile &t) const { return t.shape.first_position / a.block_size; }
    bool must_choose(const Tile &t) const { return SPARSE && own_block(t) >= budget; }

    void score(const Tile &t, int64_t begin, int64_t end, float *memory, float *scores, TileRegisters &registers) const {
        Selector<S, T> selector(a, memory, t.shape.num_queries, registers);
        const mc_tensor &q = a.q_select.data ? a.q_select : a.q;
        selector.load_queries(at<const T>(q, t.batch, t.head * group, t.query), q.stride[1], q.stride[2],
                              t.shape.num_queries);
        Stream<T> fine = {at<const T>(a.k1, t.batch, t.head, 0), a.k1.stride[2], a.kernel_size, a.kernel_stride, 0};
        Stream<T> coarse = {at<const T>(a.k2, t.batch, t.head, 0), a.k2.stride[2], 4 * a.kernel_size, 4 * a.kernel_stride, 0};
        const int64_t last = t.shape.first_position + t.shape.num_queries - 1;
        fine.count = fine.visible(last), coarse.count = coarse.visible(last);
        selector.run(fine, coarse, t.shape.first_position, t.shape.num_queries, begin, end, scores, max_blocks);
    }

    void choose(const Tile &t, const float *scores, uint64_t *masks) const {
        __builtin_memset(masks, 0, max_blocks * 8);
        for (int64_t i = 0; i < t.shape.num_queries; i++)
            choose_blocks(a, scores + i * max_blocks, own_block(t), i, masks,
                          at<int32_t>(a.blocks, t.batch, t.head, t.query + i));
    }

    Runs runs_of(const Tile &t, const uint64_t *masks) const { return Runs(t.shape, a.block_size, masks); }

    // Rows of the copy of a run, and runs of a row.
    int64_t run_rows() const { return SPARSE ? round_up(min64(kTile, a.block_size), 32) : kTile; }
    int64_t row_runs() const { return Runs::count_of(a.num_keys, a.block_size); }

    void attend(E &engine, const Tile &t, int64_t c, const Runs &runs, int64_t begin, int64_t end, Workspace &w) const {
        int64_t first_head = t.head * group + c * chunk;
        engine.init(w.engine, (int)a.dim, (int)min64(chunk, group - c * chunk), (float)(a.scale * 1.4426950408889634),
                    t.shape, at<const T>(a.q, t.batch, first_head, t.query), a.q.stride[1], a.q.stride[2]);
#if MC_AMX
        if constexpr (E::kOrdersRuns) {
            engine.registers = &w.registers, engine.run_rows = run_rows();
            attend_ordered_runs<E, Runs>(engine, t, runs, begin, end, at<const T>(a.k, t.batch, t.head, t.start),
                                      a.k.stride[2], at<const T>(a.v, t.batch, t.head, t.start), a.v.stride[2], *ordered,
                                      (t.batch * a.heads + t.head) * row_runs(), (uint16_t *)w.staged);
        } else
#endif
        attend_runs<E, T, Runs>(engine, t, runs, begin, end, at<const T>(a.k, t.batch, t.head, t.start), a.k.stride[2],
                                at<const T>(a.v, t.batch, t.head, t.start), a.v.stride[2], a.dim, w.staged);
    }

    T *out_row(const Tile &t, int64_t query, int64_t head) const {
        return at<T>(a.out, t.batch, t.head * group + head, t.query + query);
    }

    void run_tile(const Tile &t, Workspace &w) const {
        if (SPARSE) {
            if (must_choose(t))
                score(t, a.init_blocks, own_block(t) - a.window_size / a.block_size, w.select, w.scores, w.registers);
            choose(t, w.scores, w.masks);
        }
        Runs runs = runs_of(t, w.masks);
        E engine;
        for (int64_t c = 0; c < num_chunks; c++) {
            attend(engine, t, c, runs, 0, runs.count, w);
            for (int64_t i = 0; i < t.shape.num_queries; i++)
                for (int64_t h = 0; h < min64(chunk, group - c * chunk); h++)
                    engine.write(i, (int)h, out_row(t, i, c * chunk + h));
        }
    }

    int run_tiles(int64_t num_threads) {
        Counter counter;
        int failed = 0;
        parallel_run(min64(num_threads, num_tiles), [&](int, int) {
            Workspace w(*this);
            if (!w.memory.ok()) {
                __atomic_store_n(&failed, 1, __ATOMIC_RELAXED);
                return;
            }
            // The last tiles see the most keys, so they go first.
            for (int64_t i; (i = counter.next()) < num_tiles;) run_tile(tiles[num_tiles - 1 - i], w);
        });
        return failed ? MC_NO_MEMORY : MC_OK;
    }

    // Fewer tiles than threads: each tile's blocks are scored, and its runs attended to, in `parts`.
    int run_parts(int64_t num_threads) {
        const int64_t parts = (num_threads + num_tiles - 1) / num_tiles, items = num_tiles * parts;
        const int64_t rows = max_queries * group, part_floats = rows * (a.dim + 1);
        Scratch shared(4 * (num_tiles * max_queries * max_blocks + items * part_floats) + 8 * num_tiles * max_blocks +
                       8 * num_tiles + 64 * 4);
        if (!shared.ok()) return MC_NO_MEMORY;
        float *scores = shared.take<float>(num_tiles * max_queries * max_blocks);
        float *partial = shared.take<float>(items * part_floats);
        uint64_t *masks = shared.take<uint64_t>(num_tiles * max_blocks);
        int64_t *pending = shared.take<int64_t>(num_tiles);
        int failed = 0;
        Counter first_counter, second_counter;
        bool choosing = false;
        for (int64_t t = 0; t < num_tiles; t++) choosing = choosing || must_choose(tiles[t]), pending[t] = parts;
        if (SPARSE && choosing)
            parallel_run(num_threads, [&](int, int) {
                TileRegisters registers;
                Scratch memory(4 * Workspace::select_floats(*this));
                if (!memory.ok()) __atomic_store_n(&failed, 1, __ATOMIC_RELAXED);
                for (int64_t i; memory.ok() && (i = first_counter.next()) < items;) {
                    const Tile &t = tiles[i / parts];
                    if (!must_choose(t)) continue;
                    int64_t begin = a.init_blocks, end = own_block(t) - a.window_size / a.block_size, part = i % parts;
                    int64_t from = begin + (end - begin) * part / parts, to = begin + (end - begin) * (part + 1) / parts;
                    if (from < to)
                        score(t, from, to, (float *)memory.data, scores + i / parts * max_queries * max_blocks, registers);
                }
            });
        if (failed) return MC_NO_MEMORY;
        if (SPARSE)
            for (int64_t t = 0; t < num_tiles; t++)
                choose(tiles[t], scores + t * max_queries * max_blocks, masks + t * max_blocks);
        parallel_run(num_threads, [&](int, int) {
            Workspace w(*this);
            if (!w.memory.ok()) {
                __atomic_store_n(&failed, 1, __ATOMIC_RELAXED);
                return;
            }
            E engine;
            for (int64_t i; (i = second_counter.next()) < items;) {
                const Tile &t = tiles[i / parts];
                Runs runs = runs_of(t, masks + i / parts * max_blocks);
                int64_t wanted = 0, seen = 0, begin = 0, end = runs.count;
                for (int64_t r = 0; r < runs.count; r++) wanted += runs.mask(r) != 0;
                int64_t part = i % parts, from = wanted * part / parts, to = wanted * (part + 1) / parts;
                for (int64_t r = 0; r < runs.count; r++) {
                    if (!runs.mask(r)) continue;
                    if (seen == from) begin = r;
                    if (++seen == to) {
                        end = r + 1;
                        break;
                    }
                }
                if (from == to) begin = end = 0;
                for (int64_t c = 0; c < num_chunks; c++) {
                    attend(engine, t, c, runs, begin, end, w);
                    for (int64_t q = 0; q < t.shape.num_queries; q++)
                        for (int64_t h = 0; h < min64(chunk, group - c * chunk); h++) {
                            float *to_row = partial + i * part_floats + (q * group + c * chunk + h) * (a.dim + 1);
                            to_row[a.dim] = engine.result(q, (int)h, to_row);
                        }
                }
                // Whoever finishes a tile last puts its parts together, always in the same order.
                if (__atomic_sub_fetch(&pending[i / parts], 1, __ATOMIC_ACQ_REL) == 0)
                    merge(t, partial + i / parts * parts * part_floats, parts, part_floats, w.row);
            }
        });
        return failed ? MC_NO_MEMORY : MC_OK;
    }

    void merge(const Tile &t, const float *partial, int64_t parts, int64_t part_floats, float *row) const {
        for (int64_t r = 0; r < t.shape.num_queries * group; r++) {
            const float *first = partial + r * (a.dim + 1);
            float largest = -__builtin_inff(), total = 0;
            for (int64_t p = 0; p < parts; p++) largest = largest > first[p * part_floats + a.dim] ? largest : first[p * part_floats + a.dim];
            for (int64_t d = 0; d < a.dim; d++) row[d] = 0;
            for (int64_t p = 0; p < parts; p++) {
                const float *x = first + p * part_floats;
                float weight = x[a.dim] == -__builtin_inff() ? 0 : exp2_scalar(x[a.dim] - largest);
                total += weight;
                if (weight > 0)
                    for (int64_t d = 0; d < a.dim; d++) row[d] += weight * x[d];
            }
            T *to = out_row(t, r / group, r % group);
            for (int64_t d = 0; d < a.dim; d++) from_float(row[d] / total, to[d]);
        }
    }

    int run() {
        clear_padding();
        if (!cut_tiles()) return MC_NO_MEMORY;
        if (!num_tiles) return MC_OK;
#if MC_AMX
        if constexpr (E::kOrdersRuns) {
            const bool shared = num_tiles > a.batch * a.heads;
            OrderedRuns runs(shared ? a.batch * a.heads * row_runs() : 0, run_rows(), a.dim);
            ordered = &runs;
            return run_threads();
        }
#endif
        return run_threads();
    }

    int run_threads() {
        return a.num_threads > num_tiles ? run_parts(a.num_threads) : run_tiles(a.num_threads);
    }
};

template <class E, class S, class T>
static int run_attention(const mc_attention_args &a, int64_t chunk) {
    if (a.blocks.data) return Attention<E, S, T, BlockRuns, true>(a, chunk).run();
    return Attention<E, S, T, DenseRuns, false>(a, chunk).run();
}

#if MC_AMX
// Whether putting keys in order for the tile registers pays: not for a single token, which is bound by reading them.
static bool fills_tiles(const mc_attention_args &a) {
    return a.num_queries > 1 && a.num_queries * a.query_heads / a.heads >= 8 && a.dim % 32 == 0;
}

static int run_amx(const mc_attention_args &a) {
    if (a.dim == 64) return run_attention<EngineAmx<64>, SelectAmx, bf16>(a, 16);
    if (a.dim == 128) return run_attention<EngineAmx<128>, SelectAmx, bf16>(a, 16);
    return run_attention<EngineAmx<0>, SelectAmx, bf16>(a, 16);
}
#endif

#if MC_BF16
template <int GP>
static int run_bf16(const mc_attention_args &a) {
    if (a.dim == 64) return run_attention<EngineBf16<GP, 64>, SelectBf16, bf16>(a, GP);
    if (a.dim == 128) return run_attention<EngineBf16<GP, 128>, SelectBf16, bf16>(a, GP);
    return run_attention<EngineBf16<GP, 0>, SelectBf16, bf16>(a, GP);
}
#endif

static void append_rows(const mc_tensor &from, const mc_tensor &to, const mc_attention_args &a) {
    const int64_t size = a.dtype == MC_FLOAT32 ? 4 : 2, first = a.num_keys - a.num_queries;
    for (int64_t b = 0; b < a.batch; b++)
        for (int64_t h = 0; h < a.heads; h++)
            for (int64_t t = 0; t < a.num_queries; t++)
                memcpy((char *)to.data + size * (b * to.stride[0] + h * to.stride[1] + (first + t) * to.stride[2]),
                       (char *)from.data + size * (b * from.stride[0] + h * from.stride[1] + t * from.stride[2]),
                       size * a.dim);
}

static int attention(const mc_attention_args &a) {
    if (a.dim % 16 || a.dim <= 0) return MC_UNSUPPORTED;
    if (a.new_k.data) {
        append_rows(a.new_k, a.k, a);
        append_rows(a.new_v, a.v, a);
    }
    if (a.dtype == MC_FLOAT32) return run_attention<EngineFp32<float>, SelectFp32, float>(a, 1 << 20);
    if (a.dtype == MC_FLOAT16) return run_attention<EngineFp32<fp16>, SelectFp32, fp16>(a, 1 << 20);
    if (a.dtype != MC_BFLOAT16) return MC_UNSUPPORTED;
#if MC_AMX
    if (fills_tiles(a)) return run_amx(a);
#endif
#if MC_BF16
    int64_t group = a.query_heads / a.heads;
    if (group > 8) return run_bf16<16>(a);
    if (group > 4) return run_bf16<8>(a);
    if (group > 2) return run_bf16<4>(a);
    if (group > 1 || a.dim % 32) return run_bf16<2>(a);  // one head alone takes 32 dimensions at a time
    return run_bf16<1>(a);
#else
    return run_attention<EngineFp32<bf16>, SelectFp32, bf16>(a, 1 << 20);
#endif
}
