#include "headers.h"
#if defined(__x86_64__)
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,fma,f16c")
#define MOMENTKV_ISA avx512vnni
#define MOMENTKV_ISA_NAME "avx512vnni"
#define MOMENTKV_LANES 16
#define MOMENTKV_VNNI
#include "kernels.inc"
#endif
