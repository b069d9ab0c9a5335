// Linear layers with what stands around them in a decoder layer, at one to eight rows, whatever the weights' format; the
// product itself is one of dense.h or lowbit.h. More rows of packed weights go to matmul.h, without anything around.

MC_INLINE float round_bf16(float x) {
    bf16 y;
    from_float(x, y);
    return to_float(y);
}

MC_INLINE vf round_bf16(vf x) {  // to nearest, ties to even; finite numbers and infinity
    vu u = (vu)x;
    vu rounded = (u + 0x7fff + ((u >> 16) & 1)) & 0xffff0000u;
    return x != x ? x : (vf)rounded;
}

template <class Product, int M>
static int run_linear(const mc_linear_args &a) {
    constexpr int TO = Product::kMaxChunk;
    const int64_t features = a.in_features;
    Product product(a);
    const int64_t thread_floats = round_up(product.thread_bytes(), 64) / 4, chunk = product.chunk();
    Scratch memory(product.scratch_bytes() + 4 * thread_floats * a.num_threads +
                   (a.norm_weight ? 2 * M * features : 0) + 256 + Stretches::bytes(a.num_threads));
    if (!memory.ok()) return MC_NO_MEMORY;
    int64_t x_stride = a.x_stride;
    const bf16 *input = (const bf16 *)a.x;
    if (a.norm_weight) {
        bf16 *normed = memory.take<bf16>(M * features);
        for (int m = 0; m < M; m++)
            norm_row(input + m * a.x_stride, (const bf16 *)a.norm_weight, (float)a.norm_eps, features, normed + m * features);
        input = normed, x_stride = features;
    }
    product.prepare(input, x_stride, memory);
    int64_t chunks[4] = {0};
    for (int64_t i = 0; i < a.num_weights; i++)
        chunks[i + 1] = chunks[i] + (a.out_features[i] + chunk - 1) / chunk;
    const int64_t total = chunks[a.num_weights];
    const int64_t num_threads = min64(a.num_threads, total);
    float *own = memory.take<float>(thread_floats * a.num_threads);
    Stretches work(memory, total, num_threads);
    parallel_run(num_threads, [&](int thread, int) {
        alignas(64) float products[M][TO], gates[M][TO];
        work.run(thread, [&](int64_t c) __attribute__((always_inline)) {
            int64_t i = 0, column = 0;
            while (c >= chunks[i + 1]) column += a.out_features[i++];
            int64_t begin = (c - chunks[i]) * chunk, count = min64(chunk, a.out_features[i] - begin);
            float *scratch = own + thread * thread_floats;
            product.run(Weight{a.weight[i], a.scales[i], a.out_features[i]}, begin, count, scratch, products);
            if (a.gate) product.run(Weight{a.gate, a.gate_scales, a.out_features[i]}, begin, count, scratch, gates);
            for (int m = 0; m < M; m++) {
                if (a.gate)
                    for (int64_t n = 0; n < count; n += W)
                        store(products[m] + n, round_bf16(load(products[m] + n)) *
                                                   round_bf16(silu(round_bf16(load(gates[m] + n)))));
                bf16 *to = (bf16 *)a.out + m * a.out_stride + column + begin;
                const bf16 *residual = nullptr;
                if (a.residual) residual = (const bf16 *)a.residual + m * a.residual_stride + column + begin;
                for (int64_t n = 0; n < count; n++) {
                    float y = products[m][n];
                    if (residual) y = to_float(residual[n]) + round_bf16(round_bf16(y) * (float)a.residual_scale);
                    from_float(y, to[n]);
                }
            }
        });
    });
    for (int m = 0; a.rope_heads && m < M; m++) {
        int64_t at = m % a.rope_rows * a.head_dim;
        rotate_row((bf16 *)a.out + m * a.out_stride, a.cosine + at, a.sine + at, a.rope_heads, a.head_dim);
    }
    return MC_OK;
}

template <int M>
static int run_format(const mc_linear_args &a) {
    switch (a.format) {
        case MC_DENSE: return run_linear<DenseProduct<M>, M>(a);
        case MC_TERNARY: return run_linear<TernaryProduct<M>, M>(a);
        case MC_INT4: return run_linear<OutputMajorProduct<CodeEngine, M>, M>(a);
        case MC_INT8: return run_linear<RowMajorProduct<Fp32Engine, INT8, M>, M>(a);
    }
    return MC_UNSUPPORTED;
}

static int linear(const mc_linear_args &a) {
    if (a.format != MC_DENSE && (a.rows > 8 || a.dtype != MC_BFLOAT16 || a.group_of_column)) return matmul(a);
    switch (a.rows) {
        case 1: return run_format<1>(a);
        case 2: return run_format<2>(a);
        case 3: return run_format<3>(a);
        case 4: return run_format<4>(a);
        case 5: return run_format<5>(a);
        case 6: return run_format<6>(a);
        case 7: return run_format<7>(a);
        case 8: return run_format<8>(a);
    }
    return MC_UNSUPPORTED;
}
