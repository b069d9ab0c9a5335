// Attention of a few queries over one run of keys in float32: the rows (query, head) lie on the vector's lanes, keys
// and values are broadcast from their natural [token, dim] layout. Any group size fills the lanes, and no sum ever
// crosses them. Other input types are converted a block of keys at a time.

// What a tile of neighbouring queries shares.
struct TileShape {
    int64_t num_queries;     // 1 .. kTile
    int64_t first_position;  // of the tile's first query among the row's keys
    int64_t sliding_window;  // 0: none
};

// Keys of one run that query `i` of the tile sees: [low, high) of `count`.
MC_INLINE void visible_keys(const TileShape &t, int64_t i, int64_t first_key, int64_t count, int &low, int &high) {
    int64_t position = t.first_position + i;
    high = (int)max64(0, min64(position - first_key + 1, count));
    low = t.sliding_window ? (int)max64(0, min64(position - t.sliding_window + 1 - first_key, high)) : 0;
}

template <class T>
struct EngineFp32 {
    typedef float key_t;
    static constexpr int UNIT = W >= 16 ? 16 : 8;  // keys whose scores are summed at a time
    static constexpr bool kConverts = sizeof(T) != 4;
    static constexpr bool kAsksAhead = false;
    static constexpr bool kGroupIsQuery = false;
    static constexpr bool kOrdersRuns = false;
    int dim, group;
    float factor;  // scale * log2(e)
    TileShape tile;
    int64_t num_rows, num_groups;
    float *q, *o, *m, *l;  // [groups][dim][W] twice, [groups][W] twice
    float *scores;         // [kTile][W]

    static size_t scratch_floats(int64_t dim, int64_t group, int64_t num_queries) {
        int64_t groups = (num_queries * group + W - 1) / W;
        return groups * W * (2 * dim + 2) + kTile * W;
    }

    void init(float *memory, int dim_, int group_, float factor_, const TileShape &tile_, const T *queries,
              int64_t head_stride, int64_t token_stride) {
        dim = dim_, group = group_, factor = factor_, tile = tile_;
        num_rows = tile.num_queries * group;
        num_groups = (num_rows + W - 1) / W;
        q = memory, o = q + num_groups * dim * W, m = o + num_groups * dim * W, l = m + num_groups * W;
        scores = l + num_groups * W;
        for (int64_t i = 0; i < num_groups * dim * W; i++) q[i] = o[i] = 0;
        for (int64_t i = 0; i < num_groups * W; i++) m[i] = kNoScore, l[i] = 0;
        for (int64_t r = 0; r < num_rows; r++) {
            const T *from = queries + (r / group) * token_stride + (r % group) * head_stride;
            float *to = q + (r / W) * dim * W + r % W;
            for (int d = 0; d < dim; d++) to[d * W] = to_float(from[d]) * factor;
        }
    }

    uint64_t queries_of(int64_t g) const {
        int64_t first = g * W / group, last = min64(g * W + W, num_rows);
        last = (last - 1) / group;
        return (~0ull >> (63 - (last - first))) << first;
    }

    MC_INLINE void dots(const float *qg, const float *k, int64_t stride, int dim, float *to) {
        vf acc[UNIT];
        MC_UNROLL for (int t = 0; t < UNIT; t++) acc[t] = vf{};
        const float *row[UNIT / 4];
        MC_UNROLL for (int t = 0; t < UNIT / 4; t++) row[t] = k + 4 * t * stride;
        for (int d = 0; d < dim; d++) {
            vf x = load(qg + d * W);
            MC_UNROLL for (int t = 0; t < UNIT / 4; t++) {
                acc[4 * t] += x * row[t][0];
                acc[4 * t + 1] += x * row[t][stride];
                acc[4 * t + 2] += x * row[t][2 * stride];
                acc[4 * t + 3] += x * row[t][3 * stride];
                row[t]++;
            }
        }
        MC_UNROLL for (int t = 0; t < UNIT; t++) store(to + t * W, acc[t]);
    }

    template <int COLUMNS>
    MC_INLINE void add_values(const float *p, const float *v, int64_t stride, int count, float *to) {
        vf acc[COLUMNS];
        MC_UNROLL for (int d = 0; d < COLUMNS; d++) acc[d] = load(to + d * W);
        for (int t = 0; t < count; t++, v += stride) {
            vf x = load(p + t * W);
            MC_UNROLL for (int d = 0; d < COLUMNS; d++) acc[d] += x * v[d];
        }
        MC_UNROLL for (int d = 0; d < COLUMNS; d++) store(to + d * W, acc[d]);
    }

    // Adds `count` keys (at most kTile, readable up to a multiple of UNIT) to row group `g`; only the queries whose bit
    // is set in `chosen` see them.
    void process(int64_t g, const float *k, int64_t k_stride, const float *v, int64_t v_stride, int64_t first_key,
                 int count, uint64_t chosen, const void *, const void *) {
        int low[W], high[W], most = 0;
        bool whole = true;
        for (int lane = 0; lane < W; lane++) {
            int64_t row = g * W + lane;
            low[lane] = 0, high[lane] = count;
            if (row >= num_rows) continue;
            int64_t query = row / group;
            visible_keys(tile, query, first_key, count, low[lane], high[lane]);
            if (!(chosen >> query & 1)) high[lane] = 0;
            whole = whole && low[lane] == 0 && high[lane] == count;
            most = high[lane] > most ? high[lane] : most;
        }
        if (!most) return;
        const float *qg = q + g * dim * W;
        float *og = o + g * dim * W;
        for (int t = 0; t < most; t += UNIT) dots(qg, k + t * k_stride, k_stride, dim, scores + t * W);
        if (!whole) {
            vi lows, highs;
            for (int lane = 0; lane < W; lane++) lows[lane] = low[lane], highs[lane] = high[lane];
            for (int t = 0; t < most; t++) {
                vi token = t - vi{};
                vi seen = (token >= lows) & (token < highs);
                store(scores + t * W, seen ? load(scores + t * W) : splat(-1e37f));
            }
        }
        vf largest = load(scores);
        for (int t = 1; t < most; t++) largest = vmax(largest, load(scores + t * W));
        vf old = load(m + g * W), now = vmax(old, largest), sum = load(l + g * W);
        vi grown = largest > old + splat(8.0f);  // most of the time the old maximum is close enough
        bool any = false;
        for (int lane = 0; lane < W; lane++) any = any || grown[lane];
        if (any) {
            vf shrink = exp2_of(old - now);
            for (int d = 0; d < dim; d++) store(og + d * W, load(og + d * W) * shrink);
            sum *= shrink;
            store(m + g * W, now);
            old = now;
        }
        for (int t = 0; t < most; t++) {
            vf p = exp2_of(load(scores + t * W) - old);
            sum += p;
            store(scores + t * W, p);
        }
        store(l + g * W, sum);
        for (int d = 0; d < dim; d += 8) add_values<8>(scores, v + d, v_stride, most, og + d * W);
    }

    // Row (query, head) of the result, rounded.
    void write(int64_t query, int head, T *to) const {
        int64_t row = query * group + head, g = row / W, lane = row % W;
        float weight = l[g * W + lane], inverse = weight > 0 ? 1 / weight : 0;
        for (int d = 0; d < dim; d++) from_float(o[(g * dim + d) * W + lane] * inverse, to[d]);
    }

    // The same in float32, and the base-2 log-sum-exp of its scores.
    float result(int64_t query, int head, float *to) const {
        int64_t row = query * group + head, g = row / W, lane = row % W;
        float weight = l[g * W + lane], inverse = weight > 0 ? 1 / weight : 0;
        for (int d = 0; d < dim; d++) to[d] = o[(g * dim + d) * W + lane] * inverse;
        return m[g * W + lane] + log2_scalar(weight);
    }
};
