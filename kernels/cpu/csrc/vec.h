// Vectors of MC_WIDTH floats in the compiler's own vector types, and the conversions every kernel needs.

constexpr int W = MC_WIDTH;
typedef float vf __attribute__((vector_size(W * 4)));
typedef int32_t vi __attribute__((vector_size(W * 4)));
typedef uint32_t vu __attribute__((vector_size(W * 4)));
typedef float vf_any __attribute__((vector_size(W * 4), aligned(4), may_alias));  // at any address

#define MC_MEMBER inline __attribute__((always_inline))
#define MC_INLINE static MC_MEMBER
#define MC_UNROLL _Pragma("GCC unroll 16")

struct bf16 { uint16_t bits; };
struct fp16 { uint16_t bits; };

constexpr float kLog2E = 1.4426950408889634f;
constexpr float kMaxExponent = 115.0f;  // as in the reference: 2 ** 115 times a query group still fits float32
constexpr float kNoScore = -1e30f;      // the running maximum before the first key
constexpr int kTile = 64;               // queries that work through the keys together

template <bool B>
struct Constant { static constexpr bool value = B; };

MC_INLINE int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
MC_INLINE int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }
MC_INLINE int64_t round_up(int64_t x, int64_t unit) { return (x + unit - 1) / unit * unit; }

MC_INLINE vf splat(float x) { return x - vf{}; }
MC_INLINE vf load(const float *p) { return *(const vf_any *)p; }
MC_INLINE void store(float *p, vf x) { *(vf_any *)p = x; }
MC_INLINE vf vmax(vf a, vf b) { return a > b ? a : b; }
MC_INLINE vf vmin(vf a, vf b) { return a < b ? a : b; }
MC_INLINE float hmax(vf x) {
    float r = x[0];
    for (int i = 1; i < W; i++) r = x[i] > r ? x[i] : r;
    return r;
}
MC_INLINE float hsum(vf x) {
    float r = x[0];
    for (int i = 1; i < W; i++) r += x[i];
    return r;
}

MC_INLINE uint32_t float_bits(float x) {
    uint32_t u;
    __builtin_memcpy(&u, &x, 4);
    return u;
}
MC_INLINE float bits_float(uint32_t u) {
    float x;
    __builtin_memcpy(&x, &u, 4);
    return x;
}

MC_INLINE float to_float(float x) { return x; }
MC_INLINE float to_float(bf16 x) { return bits_float((uint32_t)x.bits << 16); }
MC_INLINE float to_float(fp16 x) {
    // 2 ** 112 moves the exponent's bias from 15 to 127, and gives subnormals for free.
    float r = bits_float((uint32_t)(x.bits & 0x7fff) << 13) * 5.192296858534828e33f;
    uint32_t special = (x.bits & 0x7c00) == 0x7c00 ? 0x7f800000u : 0u;
    return bits_float(float_bits(r) | special | (uint32_t)(x.bits & 0x8000) << 16);
}

MC_INLINE void from_float(float x, float &y) { y = x; }
MC_INLINE void from_float(float x, bf16 &y) {  // to nearest, ties to even
    uint32_t u = float_bits(x);
    y.bits = (u & 0x7fffffff) > 0x7f800000 ? (uint16_t)(u >> 16 | 64) : (uint16_t)((u + 0x7fff + (u >> 16 & 1)) >> 16);
}
MC_INLINE void from_float(float x, fp16 &y) {  // to nearest, ties to even
    uint32_t u = float_bits(x), sign = u >> 16 & 0x8000;
    u &= 0x7fffffff;
    if (u >= 0x47800000) {  // 65536 and above, infinity, NaN
        y.bits = (uint16_t)(sign | (u > 0x7f800000 ? 0x7e00 : 0x7c00));
    } else if (u < 0x38800000) {  // subnormal: adding 0.5 rounds at the right bit
        y.bits = (uint16_t)(sign | (float_bits(bits_float(u) + 0.5f) - 0x3f000000));
    } else {
        y.bits = (uint16_t)(sign | ((u - 0x38000000 + 0xfff + (u >> 13 & 1)) >> 13));
    }
}

template <class T>
MC_INLINE void convert_row(const T *__restrict from, float *__restrict to, int64_t count) {
    for (int64_t i = 0; i < count; i++) to[i] = to_float(from[i]);
}

// 2 ** x with a relative error of 8e-8 (degree 5) or 3e-6 (degree 4); 0 below -126. Coefficients: least maximum
// relative error on [-0.5, 0.5].
template <int DEGREE = 5>
MC_INLINE vf exp2_of(vf x) {
#if defined(__AVX512DQ__)
    vf f = (vf)_mm512_reduce_ps((__m512)x, 0x08);  // x - round(x)
    vf n = x - f;
#else
    const float magic = 12582912.0f;  // 1.5 * 2 ** 23: adding it leaves round(x) in the lowest bits
    vf shifted = x + splat(magic);
    vf f = x - (shifted - splat(magic));
#endif
    vf r;
    if (DEGREE == 5) {
        r = splat(0.001327647152f);
        r = r * f + splat(0.009675541331f);
        r = r * f + splat(0.05550713275f);
        r = r * f + splat(0.2402211972f);
        r = r * f + splat(0.6931469671f);
        r = r * f + splat(1.000000072f);
    } else {
        r = splat(0.009570101434f);
        r = r * f + splat(0.05591786028f);
        r = r * f + splat(0.2402474484f);
        r = r * f + splat(0.6931218147f);
        r = r * f + splat(0.9999992614f);
    }
#if defined(__AVX512DQ__)
    return (vf)_mm512_scalef_ps((__m512)r, (__m512)n);
#else
    r = (vf)((vu)r + ((vu)shifted << 23));  // unsigned: below -126 it overflows, and is replaced
    return x < splat(-126.0f) ? vf{} : r;
#endif
}

MC_INLINE float exp2_scalar(float x) { return exp2_of(splat(x))[0]; }
MC_INLINE float log2_scalar(float x) { return __builtin_log2f(x); }

MC_INLINE void prefetch_rows(const void *base, int64_t stride_bytes, int64_t row_bytes, int64_t rows) {
    for (int64_t r = 0; r < rows; r++)
        for (int64_t i = 0; i < row_bytes; i += 64) __builtin_prefetch((const char *)base + r * stride_bytes + i, 0, 3);
}
