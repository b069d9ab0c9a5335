#define MC_ISA mc_avx512_bf16
#define MC_WIDTH 16
#define MC_BF16 1
#define MC_AMX 0
#include "kernels.inl"
