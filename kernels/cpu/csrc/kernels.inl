// All kernels for one instruction set. The file that includes this one defines
//   MC_ISA    name of the table it exports
//   MC_WIDTH  floats of a vector
//   MC_BF16   1 where there are bfloat16 dot products (AVX512-BF16)
//   MC_AMX    1 where there are tile registers with bfloat16 products
// and is compiled with that instruction set's flags. Everything lies in an anonymous namespace: with external linkage
// the linker would keep one copy of each inline function, and that one may use instructions the machine lacks.
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#if defined(__AVX2__)
#include <immintrin.h>
#endif
#if defined(MC_GOMP)
extern "C" {
void GOMP_parallel(void (*)(void *), void *, unsigned, unsigned);
int omp_get_thread_num(void);
int omp_get_num_threads(void);
}
#elif defined(_OPENMP)
#include <omp.h>
#endif
#if defined(MC_STD_THREADS)
#include <thread>
#include <vector>
#endif
#include "abi.h"

extern const bool mc_is_intel;  // library.cpp

namespace {
#include "parallel.h"
#include "vec.h"
#include "engine_fp32.h"
#if MC_BF16
#include "engine_bf16.h"
#endif
#if MC_AMX
#include "tiles.h"
#else
struct TileRegisters {};
#endif
#include "select.h"
#if MC_AMX
#include "engine_amx.h"
#endif
#include "attend.h"
#include "pool.h"
#include "rowwise.h"
#include "dense.h"
#include "lowbit.h"
#include "matmul.h"
#include "linear.h"
}  // namespace

extern const mc_kernels MC_ISA = {attention, pool, linear, rowwise};
