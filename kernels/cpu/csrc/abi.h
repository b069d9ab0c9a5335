// The plain C interface of the library: every call takes one struct of 8-byte fields, so that Python can pack it with
// the `struct` module and nothing depends on torch's headers or version.
#pragma once
#include <stdint.h>

#if defined(_WIN32)
#define MC_EXPORT extern "C" __declspec(dllexport)
#else
#define MC_EXPORT extern "C" __attribute__((visibility("default")))
#endif

enum { MC_FLOAT32 = 0, MC_BFLOAT16 = 1, MC_FLOAT16 = 2 };
enum { MC_OK = 0, MC_NO_MEMORY = 1, MC_UNSUPPORTED = 2 };

// Strides are in elements: batch, head, token. The last dimension is contiguous.
struct mc_tensor {
    void *data;
    int64_t stride[3];
};

// Causal attention; the queries are the last `num_queries` of the `num_keys` positions.
struct mc_attention_args {
    mc_tensor q, k, v, out;          // [B, HQ, TQ, D], [B, H, TK, D] twice, [B, HQ, TQ, D]
    const int64_t *kv_start;         // [B], first real key of each row, or null
    int64_t dtype, batch, query_heads, heads, dim, num_queries, num_keys;
    int64_t num_threads;
    double scale;
    // Dense: a query sees `sliding_window` keys, itself included; 0 for all. Ignored when `blocks.data` is set.
    int64_t sliding_window;
    // Sparse: the queries to select with, both streams of pooled keys, and where the chosen blocks go.
    mc_tensor q_select, k1, k2, blocks;  // blocks: int32 [B, H, TQ, topk + window_size / block_size]
    int64_t kernel_size, kernel_stride, block_size, init_blocks, window_size, topk, lse_approx;
    // Where set, `[B, H, TQ, D]` that are copied to the last positions of k and v first: a step's own keys and values.
    mc_tensor new_k, new_v;
};

// Mean over windows of keys: out[b, h, j] = mean of in[b, h, j * stride : j * stride + size], for j in [begin, end).
struct mc_pool_args {
    mc_tensor in, out;
    int64_t dtype, batch, heads, dim, kernel_size, kernel_stride, begin, end;
    int64_t num_threads;
};

// Weights: bfloat16 [N, K], or codes with scales (lowbit.h has the layouts; scales [N, K / group_size], for MC_INT4
// [K / group_size, N]).
enum { MC_DENSE = 0, MC_TERNARY = 1, MC_INT4 = 2, MC_INT8 = 3 };

// out[m, n] = sum_k x[m, k] * weight[n, k], bfloat16 in and out, float32 sums; one to eight rows.
// Up to three weights side by side (query, key, value): their outputs follow one another in out's last dimension.
// Packed weights take any number of rows and float32 as well, but then nothing around.
// Around it, where the pointer or number is not 0, and rounded to bfloat16 after each step as torch's operators do:
//   norm_weight  RMSNorm of x first
//   gate         out = silu(x . gate) * (x . weight)
//   residual     out = residual + out * residual_scale
//   rope_heads   the first so many heads of `head_dim` outputs of row i are rotated by row i % rope_rows of `cosine` and
//                `sine` [rope_rows, head_dim]
struct mc_linear_args {
    // what changes from call to call
    const void *x;
    void *out;
    const void *residual;
    const float *cosine, *sine;
    int64_t rope_rows, rows, x_stride, residual_stride, num_threads;
    // the layer
    const void *weight[3], *gate;
    int64_t out_features[3];
    int64_t num_weights, in_features, out_stride;
    const void *norm_weight;
    double norm_eps, residual_scale;
    int64_t rope_heads, head_dim;
    int64_t format, dtype;
    // packed weights
    const void *scales[3], *gate_scales;
    int64_t scale_type, group_size;
    const int32_t *group_of_column;  // [K], or null where groups lie in order; MC_INT4 only
};

// A decoder layer at one to eight rows: query, key and value; attention; its output, gate and up, down.
struct mc_layer_args {
    mc_linear_args projection;
    mc_attention_args attention;
    mc_linear_args rest[3];
};

// One pass over rows of bfloat16, in place of several of torch's operators:
//   MC_NORM    out = RMSNorm(x), weight `y`, epsilon `number`
//   MC_GATE    out = silu(x) * y
//   MC_ADD     out = x + y * number
//   MC_ROTATE  out, in place: each head of `head_dim` by row i % rope_rows of `cosine` and `sine`
enum { MC_NORM = 0, MC_GATE = 1, MC_ADD = 2, MC_ROTATE = 3 };
struct mc_rowwise_args {
    const void *x, *y;
    void *out;
    int64_t kind, rows, features, x_stride, y_stride, out_stride, num_threads;
    double number;
    const float *cosine, *sine;
    int64_t rope_rows, head_dim;
};

struct mc_kernels {
    int (*attention)(const mc_attention_args &);
    int (*pool)(const mc_pool_args &);
    int (*linear)(const mc_linear_args &);
    int (*rowwise)(const mc_rowwise_args &);
};
