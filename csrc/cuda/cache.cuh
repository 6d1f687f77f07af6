// Addresses inside a layer's cache.
#pragma once

#include "platform.cuh"

namespace momentkv::cuda {

template <class T>
__device__ inline T* key_of(const Cache& c, int64_t page, int head, int slot) {
  return reinterpret_cast<T*>(c.keys) + page * c.page_stride + head * c.head_stride + slot * c.slot_stride;
}

template <class T>
__device__ inline T* value_of(const Cache& c, int64_t page, int head, int slot) {
  return reinterpret_cast<T*>(c.values) + page * c.page_stride + head * c.head_stride + slot * c.slot_stride;
}

// One head's moment record. Numbers of 4 bytes, and vectors of 16 bytes that start at a multiple of 16, lie in one piece.
struct RecordView {
  const Cache& cache;
  const RecordLayout& layout;
  const int64_t* pages;
  int head;

  __device__ char* at(int offset) const {
    const int piece_bytes = cache.head_dim * 2, piece = offset / piece_bytes;  // pieces: keys, values of slot 0, of slot 1 ...
    const int slot = piece / 2;
    char* base = piece % 2 == 0 ? cache.keys : cache.values;
    const int64_t numbers = pages[slot / cache.page_size] * cache.page_stride + head * cache.head_stride +
                            slot % cache.page_size * cache.slot_stride;
    return base + numbers * 2 + offset % piece_bytes;
  }
  __device__ float* number(int part, int index) const { return reinterpret_cast<float*>(at(part + index * 4)); }
  __device__ float* mean_key(int dim) const { return number(layout.mean_key, dim); }
  __device__ float* mean_value(int dim) const { return number(layout.mean_value, dim); }
  // Of keys, then of values.
  __device__ float* mean(int dim) const { return dim < cache.head_dim ? mean_key(dim) : mean_value(dim - cache.head_dim); }
  __device__ float* value_spread() const { return number(layout.spread, 0); }
  __device__ float* scale(int key_dim) const { return number(layout.scales, key_dim); }  // int8 only
  template <class C>
  __device__ C* covariance(int key_dim, int value_dim) const {
    return reinterpret_cast<C*>(at(layout.covariance + (key_dim * cache.head_dim + value_dim) * int(sizeof(C))));
  }
};

// kCount numbers in a row as floats; the address is a multiple of their size, or of 16 bytes if that is less.
template <int kCount, class T>
__device__ inline void load_vector(const T* from, float (&to)[kCount]) {
  constexpr int kAlign = kCount * sizeof(T) < 16 ? kCount * sizeof(T) : 16;
  struct alignas(kAlign) Vector {
    T numbers[kCount];
  };
  const Vector vector = *reinterpret_cast<const Vector*>(from);
  for (int i = 0; i < kCount; ++i) to[i] = to_float(vector.numbers[i]);
}

template <int D>
struct HeadDim {
  static constexpr int value = D;
};

template <class T, class F>
const char* with_head_dim(const Cache& c, F f) {
  switch (c.head_dim) {
    case 64: return f(T{}, HeadDim<64>{});
    case 128: return f(T{}, HeadDim<128>{});
    case 256: return f(T{}, HeadDim<256>{});
    default: return "head_dim is none of 64, 128, 256";
  }
}

// Calls f(T{}, HeadDim<D>{}) with the type of the cache's numbers and its head size; an error's text, or what f returns.
template <class F>
const char* with_shape(const Cache& c, F f) {
  return c.type == Type::kBFloat16 ? with_head_dim<BFloat16>(c, f) : with_head_dim<Float16>(c, f);
}

// A tile of kTileRows or kTileSlots rows of D numbers in shared memory. Chunks of 16 bytes are permuted within a row so that
// neither writing rows nor loading matrices has bank conflicts.
template <class T, int D>
__device__ inline T* chunk_of(T* tile, int row, int chunk) {
  return tile + row * D + ((chunk ^ (row & 7)) * 8);
}

}  // namespace momentkv::cuda
