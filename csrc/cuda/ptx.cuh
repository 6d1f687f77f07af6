// The primitives of platform.cuh on a GPU. Included by platform.cuh.

namespace momentkv::cuda {

__device__ inline float to_float(Float16 x) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
}
template <class T>
__device__ inline T from_float(float x);
template <>
__device__ inline float from_float<float>(float x) { return x; }
template <>
__device__ inline Float16 from_float<Float16>(float x) {
  Float16 y;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
  return y;
}
template <>
__device__ inline BFloat16 from_float<BFloat16>(float x) {
  BFloat16 y;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
  return y;
}
template <class T>
__device__ inline uint32_t pack(float low, float high);
template <>
__device__ inline uint32_t pack<BFloat16>(float low, float high) {
  uint32_t y;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
  return y;
}
template <>
__device__ inline uint32_t pack<Float16>(float low, float high) {
  uint32_t y;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
  return y;
}

__device__ inline char* shared_memory() {
  extern __shared__ __align__(16) char memory[];
  return memory;
}
__device__ inline void sync_block() { __syncthreads(); }
__device__ inline void sync_warp() { __syncwarp(); }
template <class T>
__device__ inline T shuffle(T x, int lane) { return __shfl_sync(~0u, x, lane); }
template <class T>
__device__ inline T shuffle_xor(T x, int mask) { return __shfl_xor_sync(~0u, x, mask); }
template <class T>
__device__ inline T shuffle_up(T x, int distance) { return __shfl_up_sync(~0u, x, distance); }
__device__ inline void atomic_add(int* at, int x) { atomicAdd(at, x); }

// 16 bytes to shared memory, zeros unless `real` (nothing is read then).
__device__ inline void copy_async(void* to, const void* from, bool real) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(uint32_t(__cvta_generic_to_shared(to))), "l"(from),
               "r"(real ? 16 : 0)
               : "memory");
}
__device__ inline void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Until at most kLeft groups of this thread are under way.
template <int kLeft>
__device__ inline void wait_copies() { asm volatile("cp.async.wait_group %0;" ::"n"(kLeft) : "memory"); }

// Four 8 x 8 matrices of 16-bit numbers; lane l names row l % 8 of matrix l / 8.
template <bool kTransposed>
__device__ inline void load_matrices(uint32_t (&to)[4], const void* row) {
  const uint32_t from = uint32_t(__cvta_generic_to_shared(row));
  if constexpr (kTransposed)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3]) : "r"(from) : "memory");
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3]) : "r"(from) : "memory");
}

// c[16 x 8] += a[16 x 16] b[16 x 8]. Lane 4 g + t holds rows g, g + 8 and columns 2 t, 2 t + 1 of c (PTX, mma.m16n8k16).
template <class T>
__device__ inline void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
#define MOMENTKV_MMA(T, name)                                                                                       \
  template <>                                                                                                       \
  __device__ inline void mma<T>(float (&c)[4], const uint32_t(&a)[4], uint32_t b0, uint32_t b1) {                    \
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." name "." name                                             \
                 ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"                              \
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                                                   \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));                                   \
  }
MOMENTKV_MMA(BFloat16, "bf16")
MOMENTKV_MMA(Float16, "f16")
#undef MOMENTKV_MMA

__device__ inline uint32_t tf32_bits(float x) {
  uint32_t y;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(y) : "f"(x));
  return y;
}

// c[16 x 8] += a[16 x 8] b[8 x 8] in TF32 (10 bits of mantissa, rounded here): exact for 16-bit numbers.
__device__ inline void mma_tf32(float (&c)[4], const float (&a)[4], float b0, float b1) {
  asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(tf32_bits(a[0])), "r"(tf32_bits(a[1])), "r"(tf32_bits(a[2])), "r"(tf32_bits(a[3])), "r"(tf32_bits(b0)),
                 "r"(tf32_bits(b1)));
}

template <class Params>
const char* launch(void (*kernel)(Params), int x, int y, int z, int threads, size_t shared_bytes, const Params& params,
                   void* stream) {
  if (shared_bytes > 48 << 10) {  // more has to be asked for
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared_bytes));
    if (error != cudaSuccess) return cudaGetErrorString(error);
  }
  kernel<<<dim3(x, y, z), threads, shared_bytes, static_cast<cudaStream_t>(stream)>>>(params);
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace momentkv::cuda
