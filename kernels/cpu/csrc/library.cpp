// Picks the instruction set once and exports the plain C functions.
#include <stdlib.h>
#include <string.h>
#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#include "abi.h"

// Which sets this build has is decided by what its compiler could do (setup.py).
#if defined(MC_HAS_AMX)
extern const mc_kernels mc_amx;
#endif
#if defined(MC_HAS_AVX512_BF16)
extern const mc_kernels mc_avx512_bf16;
#endif
#if defined(MC_HAS_AVX512)
extern const mc_kernels mc_avx512;
#endif
#if defined(MC_HAS_AVX2)
extern const mc_kernels mc_avx2;
#endif
extern const mc_kernels mc_portable;

extern const bool mc_is_intel;

namespace {

struct Isa {
    const char *name;
    const mc_kernels *kernels;
    bool (*runs_here)();
};

#if defined(__x86_64__)
bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
bool has_avx512() {
    return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}
bool has_avx512_bf16() {
    return has_avx512() && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni");
}
#if defined(__linux__)
// A process must ask for the tile registers, whose contents a thread's state then has to hold.
bool has_amx() {
    unsigned a = 0, b = 0, c = 0, d = 0;
    if (!has_avx512_bf16() || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
    const unsigned tiles = 1u << 24, bf16_products = 1u << 22;
    constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    return (d & tiles) && (d & bf16_products) && !syscall(SYS_arch_prctl, kRequestPermission, kTileData);
}
#else
bool has_amx() { return false; }
#endif
bool is_intel() {
    __builtin_cpu_init();  // constructors may run before the compiler's own
    return __builtin_cpu_is("intel");
}
#else
bool is_intel() { return false; }
#endif
bool always() { return true; }

const Isa kIsas[] = {  // the fastest first
#if defined(MC_HAS_AMX)
    {"amx", &mc_amx, has_amx},
#endif
#if defined(MC_HAS_AVX512_BF16)
    {"avx512_bf16", &mc_avx512_bf16, has_avx512_bf16},
#endif
#if defined(MC_HAS_AVX512)
    {"avx512", &mc_avx512, has_avx512},
#endif
#if defined(MC_HAS_AVX2)
    {"avx2", &mc_avx2, has_avx2},
#endif
    {"portable", &mc_portable, always},
};

const Isa *g_isa = nullptr;

}  // namespace

const bool mc_is_intel = is_intel();

// Chooses the instruction set: the named one, or the best that this machine runs for null. Returns its name, or null
// where the name is unknown to this build or the machine lacks it. Called once, before any other function.
MC_EXPORT const char *mc_choose_isa(const char *name) {
    for (const Isa &isa : kIsas)
        if ((!name || !strcmp(name, isa.name)) && isa.runs_here()) {
            g_isa = &isa;
            return isa.name;
        }
    return nullptr;
}

// The instruction sets of this build that the machine runs, fastest first: the i-th, or null after the last.
MC_EXPORT const char *mc_isa_name(int64_t i) {
    for (const Isa &isa : kIsas)
        if (isa.runs_here() && i-- == 0) return isa.name;
    return nullptr;
}

MC_EXPORT int64_t mc_abi_version() { return 4; }

MC_EXPORT int mc_attention(const mc_attention_args *args) { return g_isa->kernels->attention(*args); }
MC_EXPORT int mc_pool(const mc_pool_args *args) { return g_isa->kernels->pool(*args); }
// `count` layers, one after another: a later one may read what an earlier one wrote.
MC_EXPORT int mc_linear(const mc_linear_args *args, int64_t count) {
    int result = MC_OK;
    for (int64_t i = 0; i < count && result == MC_OK; i++) result = g_isa->kernels->linear(args[i]);
    return result;
}
MC_EXPORT int mc_layer(const mc_layer_args *args) {
    int result = mc_linear(&args->projection, 1);
    if (result == MC_OK) result = mc_attention(&args->attention);
    return result == MC_OK ? mc_linear(args->rest, 3) : result;
}
MC_EXPORT int mc_rowwise(const mc_rowwise_args *args) { return g_isa->kernels->rowwise(*args); }
