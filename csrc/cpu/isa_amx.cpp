#include "headers.h"
#if defined(__x86_64__)
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512bf16,amx-tile,amx-bf16,fma,f16c")
#define MOMENTKV_ISA amx
#define MOMENTKV_ISA_NAME "amx"
#define MOMENTKV_LANES 16
#define MOMENTKV_VNNI
#define MOMENTKV_AMX
#include "kernels.inc"
#endif
