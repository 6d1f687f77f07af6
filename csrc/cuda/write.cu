// Writes new keys and values. A page is zeroed when its first slot is written: it may have been a moment page, and as keys
// and values its bytes can be NaN. Zeroing is a launch of its own: it must precede every write to the page.

#include "cache.cuh"

namespace momentkv::cuda {
namespace {

constexpr int kWriteThreads = 128;

// A 16-byte part of a token's key or value.
struct alignas(16) Chunk {
  uint32_t words[4];
};

__device__ inline Chunk* key_chunks(const Cache& c, int64_t page, int head, int slot) {
  return reinterpret_cast<Chunk*>(key_of<BFloat16>(c, page, head, slot));  // both types have 2 bytes
}
__device__ inline Chunk* value_chunks(const Cache& c, int64_t page, int head, int slot) {
  return reinterpret_cast<Chunk*>(value_of<BFloat16>(c, page, head, slot));
}

// Block: a token and head.
__global__ void __launch_bounds__(kWriteThreads) zero_fresh_pages(const Write s) {
  const Cache& c = s.cache;
  const int slot = int(s.slots[blockIdx.x]), page = slot / c.page_size;
  const int head = blockIdx.y, chunks = c.head_dim / 8;
  if (slot < 0 || slot % c.page_size != 0) return;
  for (int i = threadIdx.x; i < c.page_size * chunks; i += kWriteThreads) {
    key_chunks(c, page, head, i / chunks)[i % chunks] = Chunk{};
    value_chunks(c, page, head, i / chunks)[i % chunks] = Chunk{};
  }
  if (s.observed == nullptr) return;
  for (int i = threadIdx.x; i < c.page_size; i += kWriteThreads)
    s.observed[(int64_t(page) * c.heads + head) * c.page_size + i] = 0;
}

// Block: a token.
__global__ void __launch_bounds__(kWriteThreads) write_tokens(const Write s) {
  const Cache& c = s.cache;
  const int64_t token = blockIdx.x;
  const int slot = int(s.slots[token]);
  if (slot < 0) return;
  const int chunks = c.head_dim / 8;
  const Chunk* key = reinterpret_cast<const Chunk*>(s.key + token * s.key_stride * 2);
  const Chunk* value = reinterpret_cast<const Chunk*>(s.value + token * s.value_stride * 2);
  for (int i = threadIdx.x; i < c.heads * chunks; i += kWriteThreads) {
    const int head = i / chunks;
    key_chunks(c, slot / c.page_size, head, slot % c.page_size)[i % chunks] = key[i];
    value_chunks(c, slot / c.page_size, head, slot % c.page_size)[i % chunks] = value[i];
  }
}

}  // namespace

const char* write(const Write& s, void* stream) {
  const char* error = launch(zero_fresh_pages, s.tokens, s.cache.heads, 1, kWriteThreads, 0, s, stream);
  return error != nullptr ? error : launch(write_tokens, s.tokens, 1, 1, kWriteThreads, 0, s, stream);
}

}  // namespace momentkv::cuda
