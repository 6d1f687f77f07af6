// What a kernel uses of the machine: number formats, warp operations, tensor cores, asynchronous copies, launches. On the GPU
// (sm_80 and later) these are PTX; with MOMENTKV_EMULATE the same kernels run on the CPU (emulate.h).
#pragma once

#include "kernels.h"

#ifdef MOMENTKV_EMULATE
#include <algorithm>
#include <cmath>
#include <cstring>

#include "emulate.h"
#define __device__
#define __global__
#define __launch_bounds__(...)
#else
#include <cuda_runtime.h>
#endif

namespace momentkv::cuda {

constexpr int kLanes = 32;
constexpr float kLog2e = 1.4426950408889634f;

template <class To, class From>
__device__ inline To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(Int8 x) { return float(x.number); }
__device__ inline float to_float(BFloat16 x) { return bits_as<float>(uint32_t(x.bits) << 16); }

}  // namespace momentkv::cuda

#ifdef MOMENTKV_EMULATE
#include "emulated.cuh"
#else
#include "ptx.cuh"
#endif

namespace momentkv::cuda {

// Sum and largest over the lanes of a warp, in every lane; always in the same order.
__device__ inline float warp_sum(float x) {
  for (int mask = kLanes / 2; mask > 0; mask /= 2) x += shuffle_xor(x, mask);
  return x;
}

}  // namespace momentkv::cuda
