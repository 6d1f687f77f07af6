#include "headers.h"
#define MOMENTKV_ISA generic
#define MOMENTKV_ISA_NAME "generic"
#define MOMENTKV_LANES 4
#include "kernels.inc"
