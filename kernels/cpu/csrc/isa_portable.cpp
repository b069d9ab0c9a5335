#define MC_ISA mc_portable
#define MC_WIDTH 4
#define MC_BF16 0
#define MC_AMX 0
#include "kernels.inl"
