// What stands between the matrix products of a decoder layer, row by row in bfloat16: bound by memory, so each is one
// pass where torch's operators take several. Rounded where torch's own operators round.

constexpr int64_t kPiece = 64;  // elements converted to float32 at a time

MC_INLINE float round_fast(float x) {  // to bfloat16 and back, in integers that the compiler makes vectors of
    uint32_t u = float_bits(x);
    return bits_float((u + 0x7fff + (u >> 16 & 1)) & 0xffff0000u);
}
MC_INLINE void store_fast(float x, bf16 &y) { y.bits = (uint16_t)(float_bits(round_fast(x)) >> 16); }

// RMSNorm as torch rounds it: the scaled row to bfloat16, then times the weight.
static void norm_row(const bf16 *x, const bf16 *weight, float eps, int64_t count, bf16 *to) {
    float squares[kPiece] = {0}, total = 0;
    int64_t k = 0;
    for (; k + kPiece <= count; k += kPiece)
        for (int64_t i = 0; i < kPiece; i++) squares[i] += to_float(x[k + i]) * to_float(x[k + i]);
    for (; k < count; k++) squares[0] += to_float(x[k]) * to_float(x[k]);
    for (int i = 0; i < kPiece; i++) total += squares[i];
    float scale = 1.0f / __builtin_sqrtf(total / (float)count + eps);
    for (k = 0; k < count; k++) store_fast(to_float(weight[k]) * round_fast(to_float(x[k]) * scale), to[k]);
}

MC_INLINE vf silu(vf x) { return x / (splat(1.0f) + exp2_of(x * splat(-kLog2E))); }

// to = silu(gate) * up
static void gate_row(const bf16 *gate, const bf16 *up, int64_t count, bf16 *to) {
    for (int64_t k = 0; k < count; k += kPiece) {
        float piece[kPiece] = {0};
        int64_t n = min64(kPiece, count - k);
        for (int64_t i = 0; i < n; i++) piece[i] = to_float(gate[k + i]);
        for (int64_t i = 0; i < kPiece; i += W) store(piece + i, silu(load(piece + i)));
        for (int64_t i = 0; i < n; i++) store_fast(round_fast(piece[i]) * to_float(up[k + i]), to[k + i]);
    }
}

// to = residual + branch * scale
static void add_row(const bf16 *residual, const bf16 *branch, float scale, int64_t count, bf16 *to) {
    for (int64_t k = 0; k < count; k++)
        store_fast(to_float(residual[k]) + round_fast(to_float(branch[k]) * scale), to[k]);
}

// Rotates each head of a row in place: y * cosine + (the other half, its first part negated) * sine.
static void rotate_row(bf16 *row, const float *cosine, const float *sine, int64_t heads, int64_t head_dim) {
    const int64_t half = head_dim / 2;
    for (int64_t h = 0; h < heads; h++, row += head_dim)
        for (int64_t d = 0; d < half; d++) {
            float first = to_float(row[d]), second = to_float(row[d + half]);
            store_fast(first * cosine[d] - second * sine[d], row[d]);
            store_fast(second * cosine[d + half] + first * sine[d + half], row[d + half]);
        }
}

static int rowwise(const mc_rowwise_args &a) {
    Counter counter;
    const int64_t step = 16, pieces = (a.rows + step - 1) / step;
    parallel_run(min64(a.num_threads, pieces), [&](int, int) {
        for (int64_t c; (c = counter.next()) < pieces;)
            for (int64_t r = c * step; r < min64(a.rows, (c + 1) * step); r++) {
                const bf16 *x = (const bf16 *)a.x + r * a.x_stride, *y = (const bf16 *)a.y + r * a.y_stride;
                bf16 *to = (bf16 *)a.out + r * a.out_stride;
                switch (a.kind) {
                    case MC_NORM: norm_row(x, (const bf16 *)a.y, (float)a.number, a.features, to); break;
                    case MC_GATE: gate_row(x, y, a.features, to); break;
                    case MC_ADD: add_row(x, y, (float)a.number, a.features, to); break;
                    case MC_ROTATE: {
                        int64_t at = r % a.rope_rows * a.head_dim;
                        rotate_row(to, a.cosine + at, a.sine + at, a.features / a.head_dim, a.head_dim);
                        break;
                    }
                }
            }
    });
    return MC_OK;
}
