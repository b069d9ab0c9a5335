#define MC_ISA mc_avx2
#define MC_WIDTH 8
#define MC_BF16 0
#define MC_AMX 0
#include "kernels.inl"
