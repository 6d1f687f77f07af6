// Which candidates of a (row, head) lose: exact selection by score. One block a (row, head).
#pragma once

#include "cache.cuh"

namespace momentkv::cuda {

constexpr int kConsolidateThreads = 256;
constexpr int kConsolidateWarps = kConsolidateThreads / kLanes;

// The candidates of one (row, head): the store's slots, then those of the retiring pages.
struct Event {
  const Consolidate& c;
  int row, head;
  int store_tokens, candidates, losers;  // as many lose as retire

  __device__ Event(const Consolidate& all, int head_, int row_) : c(all), row(row_), head(head_) {
    int pages = 0;
    while (pages < c.retiring_pages && c.retiring[int64_t(row) * c.retiring_pages + pages] >= 0) ++pages;
    store_tokens = c.store_pages * c.cache.page_size;
    losers = pages * c.cache.page_size;
    candidates = store_tokens + losers;
  }
  __device__ int64_t page(int candidate) const {
    const int number = candidate / c.cache.page_size;
    return number < c.store_pages ? c.store[int64_t(row) * c.store_pages + number]
                                  : c.retiring[int64_t(row) * c.retiring_pages + number - c.store_pages];
  }
  template <class T>
  __device__ T* key(int candidate) const { return key_of<T>(c.cache, page(candidate), head, candidate % c.cache.page_size); }
  template <class T>
  __device__ T* value(int candidate) const { return value_of<T>(c.cache, page(candidate), head, candidate % c.cache.page_size); }
  __device__ float* mass(int candidate) const {
    return c.observed + (page(candidate) * c.cache.heads + head) * c.cache.page_size + candidate % c.cache.page_size;
  }
  __device__ RecordView record() const { return {c.cache, c.record_layout, c.moments + int64_t(row) * c.moment_pages, head}; }
  __device__ size_t number() const { return size_t(row) * c.cache.heads + head; }
  __device__ int* loser_list() const { return c.losers + number() * c.retiring_pages * c.cache.page_size; }
  __device__ size_t scores_at() const { return number() * (c.store_pages + c.retiring_pages) * c.cache.page_size; }
  __device__ float* folded() const {
    const size_t d = c.cache.head_dim;
    return c.folded + number() * (2 * d + kFoldedSpread + d * d);
  }
};

// Sum over the block in a fixed order, in every thread. `room`: kConsolidateWarps numbers of shared memory.
__device__ inline float block_sum(float x, float* room) {
  x = warp_sum(x);
  sync_block();  // readers of an earlier sum
  if (threadIdx.x % kLanes == 0) room[threadIdx.x / kLanes] = x;
  sync_block();
  float sum = 0;
  for (int w = 0; w < kConsolidateWarps; ++w) sum += room[w];
  return sum;
}

// What all threads before this one brought; `total`: what all brought.
__device__ inline int block_scan(int x, int* room, int& total) {
  const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes;
  int sum = x;
  for (int distance = 1; distance < kLanes; distance *= 2) {
    const int below = shuffle_up(sum, distance);
    if (lane >= distance) sum += below;
  }
  sync_block();
  if (lane == kLanes - 1) room[warp] = sum;
  sync_block();
  int before = 0;
  total = 0;
  for (int w = 0; w < kConsolidateWarps; ++w) {
    if (w < warp) before += room[w];
    total += room[w];
  }
  return before + sum - x;
}

// Sorts like the score; NaN like -inf, -0 like +0.
__device__ inline uint32_t rank_of(const Event& e, const float* score, int candidate) {
  float x = candidate < e.c.sink_tokens ? INFINITY : score[candidate];
  x = x == x ? x + 0.0f : -INFINITY;
  const uint32_t bits = bits_as<uint32_t>(x);
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}

// Radix selection, a byte at a time from the top: the rank of the last loser. `ties`: how many of that very rank lose.
// `room`: 258 integers.
__device__ inline uint32_t last_loser_rank(const Event& e, const float* score, int* room, int& ties) {
  uint32_t prefix = 0;
  int wanted = e.losers;
  for (int shift = 24; shift >= 0; shift -= 8) {
    sync_block();
    for (int i = threadIdx.x; i < 256; i += kConsolidateThreads) room[i] = 0;
    sync_block();
    for (int j = threadIdx.x; j < e.candidates; j += kConsolidateThreads) {
      const uint32_t rank = rank_of(e, score, j);
      if ((uint64_t(rank) >> (shift + 8)) == (uint64_t(prefix) >> (shift + 8))) atomic_add(room + (rank >> shift & 255), 1);
    }
    sync_block();
    if (threadIdx.x == 0) {
      int byte = 0;
      while (room[byte] < wanted) wanted -= room[byte++];
      room[256] = byte;
      room[257] = wanted;
    }
    sync_block();
    prefix |= uint32_t(room[256]) << shift;
    wanted = room[257];
  }
  ties = wanted;
  return prefix;
}

// Writes the losers, ascending. Of equal ranks the later ones lose. Thread i looks at the i-th share of the candidates.
__device__ inline void write_losers(const Event& e, const float* score, int* room, int* losers) {
  int ties, all_equal, all;
  const uint32_t last = last_loser_rank(e, score, room, ties);
  const int share = (e.candidates + kConsolidateThreads - 1) / kConsolidateThreads;
  const int begin = int(threadIdx.x) * share, end = begin + share < e.candidates ? begin + share : e.candidates;
  int equal = 0;
  for (int j = begin; j < end; ++j) equal += rank_of(e, score, j) == last;
  int equal_before = block_scan(equal, room, all_equal);
  auto loses = [&](int j) {
    const uint32_t rank = rank_of(e, score, j);
    return rank < last || (rank == last && equal_before++ >= all_equal - ties);
  };
  const int start = equal_before;
  int mine = 0;
  for (int j = begin; j < end; ++j) mine += loses(j);
  equal_before = start;
  int at = block_scan(mine, room, all);
  for (int j = begin; j < end; ++j)
    if (loses(j)) losers[at++] = j;
}

constexpr size_t kSelectBytes = 258 * sizeof(int);

__global__ void __launch_bounds__(kConsolidateThreads, 4) select_losers(const Consolidate c) {
  const Event e(c, blockIdx.x, blockIdx.y);
  if (e.losers == 0) return;
  write_losers(e, c.score + e.scores_at(), reinterpret_cast<int*>(shared_memory()), e.loser_list());
}

}  // namespace momentkv::cuda
