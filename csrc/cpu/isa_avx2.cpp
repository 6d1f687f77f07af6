#include "headers.h"
#if defined(__x86_64__)
#pragma GCC target("avx2,fma,f16c")
#define MOMENTKV_ISA avx2
#define MOMENTKV_ISA_NAME "avx2"
#define MOMENTKV_LANES 8
#include "kernels.inc"
#endif
