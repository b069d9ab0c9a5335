#define MC_ISA mc_amx
#define MC_WIDTH 16
#define MC_BF16 1
#define MC_AMX 1
#include "kernels.inl"
