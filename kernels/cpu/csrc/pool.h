// Means over windows of keys, summed in float32 and rounded once.

template <class T>
static int run_pool(const mc_pool_args &a) {
    Counter counter;
    int failed = 0;
    const int64_t rows = a.batch * a.heads, span = 256, pieces = (a.end - a.begin + span - 1) / span;
    const int64_t per_kernel = a.kernel_size / a.kernel_stride;
    parallel_run(min64(a.num_threads, rows * pieces), [&](int, int) {
        Scratch memory(4 * a.dim * (per_kernel + 1));
        if (!memory.ok()) {
            __atomic_store_n(&failed, 1, __ATOMIC_RELAXED);
            return;
        }
        float *segments = (float *)memory.data, *sum = segments + per_kernel * a.dim;  // a ring of segment sums
        for (int64_t i; (i = counter.next()) < rows * pieces;) {
            int64_t b = i / pieces / a.heads, h = i / pieces % a.heads;
            int64_t begin = a.begin + i % pieces * span, end = min64(begin + span, a.end);
            for (int64_t s = begin; s < end + per_kernel - 1; s++) {
                float *__restrict segment = segments + s % per_kernel * a.dim;
                for (int64_t d = 0; d < a.dim; d++) segment[d] = 0;
                for (int64_t t = 0; t < a.kernel_stride; t++) {
                    const T *__restrict row = at<const T>(a.in, b, h, s * a.kernel_stride + t);
                    for (int64_t d = 0; d < a.dim; d++) segment[d] += to_float(row[d]);
                }
                int64_t j = s - per_kernel + 1;
                if (j < begin) continue;
                for (int64_t d = 0; d < a.dim; d++) sum[d] = segments[j % per_kernel * a.dim + d];
                for (int64_t p = 1; p < per_kernel; p++)
                    for (int64_t d = 0; d < a.dim; d++) sum[d] += segments[(j + p) % per_kernel * a.dim + d];
                T *to = at<T>(a.out, b, h, j);
                for (int64_t d = 0; d < a.dim; d++) from_float(sum[d] / (float)a.kernel_size, to[d]);
            }
        }
    });
    return failed ? MC_NO_MEMORY : MC_OK;
}

static int pool(const mc_pool_args &a) {
    if (a.dtype == MC_FLOAT32) return run_pool<float>(a);
    if (a.dtype == MC_FLOAT16) return run_pool<fp16>(a);
    if (a.dtype == MC_BFLOAT16) return run_pool<bf16>(a);
    return MC_UNSUPPORTED;
}
