#include "headers.h"
#if defined(__x86_64__)
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,fma,f16c")
#define MOMENTKV_ISA avx512
#define MOMENTKV_ISA_NAME "avx512"
#define MOMENTKV_LANES 16
#include "kernels.inc"
#endif
