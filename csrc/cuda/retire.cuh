// The last step of an event: winners move into the losers' slots of the store, the losers' moments into the record.
#pragma once

#include "fold.cuh"

namespace momentkv::cuda {

// First position in `list` (ascending) with a number >= x.
__device__ inline int lower_bound(const int* list, int size, int x) {
  int begin = 0;
  while (size > 0) {
    const int half = size / 2;
    if (list[begin + half] < x)
      begin += half + 1, size -= half + 1;
    else
      size = half;
  }
  return begin;
}

// The i-th retiring token that won: the candidate with i winners and all retiring losers before it in front.
__device__ inline int winner(const Event& e, const int* retiring_losers, int size, int i) {
  int begin = 0, end = size;  // losers in front of it: the first l where retiring_losers[l] - store - l > i
  while (begin < end) {
    const int half = (begin + end) / 2;
    if (retiring_losers[half] - e.store_tokens - half > i)
      end = half;
    else
      begin = half + 1;
  }
  return e.store_tokens + i + begin;
}

// The i-th lost store slot takes the i-th retiring token that won: a warp moves a token.
template <class T, int D>
__device__ inline void fill_holes(const Event& e, const int* losers) {
  const int lane = threadIdx.x % kLanes, holes = lower_bound(losers, e.losers, e.store_tokens);
  for (int i = threadIdx.x / kLanes; i < holes; i += kConsolidateWarps) {
    const int to = losers[i], from = winner(e, losers + holes, e.losers - holes, i);
    const T *key = e.key<T>(from), *value = e.value<T>(from);
    T *new_key = e.key<T>(to), *new_value = e.value<T>(to);
    for (int dim = lane; dim < D; dim += kLanes) new_key[dim] = key[dim], new_value[dim] = value[dim];
    if (e.c.observed != nullptr && lane == 0) *e.mass(to) = *e.mass(from);
  }
}

// Means and spread of the union of record and losers (Chan et al. 1979); `delta` [2 * D]: losers' means minus the record's.
template <int D>
__device__ inline void merge_means(const Event& e, const float* folded, float share, bool empty, float* delta, float* room) {
  const RecordView record = e.record();
  float square = 0;
  for (int dim = threadIdx.x; dim < 2 * D; dim += kConsolidateThreads) {
    float* mean = record.mean(dim);
    const float step = empty ? 0 : folded[dim] - *mean;
    delta[dim] = step;
    if (dim >= D) square += step * step;
    *mean = empty ? folded[dim] : *mean + share * step;
  }
  square = block_sum(square, room);
  if (threadIdx.x > 0) return;
  float* spread = record.value_spread();
  const float gone = folded[2 * D];
  *spread = empty ? gone : *spread + share * (gone - *spread) + share * (1 - share) * square;
}

// Numbers in [-127, 127], rounded to nearest even.
__device__ inline void write_number(Int8* to, float x) { to->number = int8_t(rintf(x)); }
template <class C>
__device__ inline void write_number(C* to, float x) { *to = from_float<C>(x); }

// Half a warp merges a row of the covariance; int8: its largest number becomes 127.
template <int D, class C>
__device__ inline void merge_covariance(const Event& e, const float* folded, float share, bool empty, const float* delta) {
  const RecordView record = e.record();
  constexpr int kAcross = D / 16;
  const int x = threadIdx.x % 16;
  for (int row = threadIdx.x / 16; row < D; row += kConsolidateThreads / 16) {
    const float old_scale = sizeof(C) == 1 && !empty ? *record.scale(row) : 1.0f;
    float merged[kAcross], top = 0;
#pragma unroll
    for (int i = 0; i < kAcross; ++i) {
      const int column = x + 16 * i;
      const float gone = folded[2 * D + kFoldedSpread + row * D + column];
      const float old = empty ? 0 : to_float(*record.covariance<C>(row, column)) * old_scale;
      merged[i] = empty ? gone : old + share * (gone - old) + share * (1 - share) * delta[row] * delta[D + column];
      top = fabsf(merged[i]) > top ? fabsf(merged[i]) : top;
    }
    for (int mask = 8; mask > 0; mask /= 2) {
      const float other = shuffle_xor(top, mask);
      top = other > top ? other : top;
    }
    const float scale = sizeof(C) == 1 ? top / 127 : 1.0f, inverse = scale > 0 ? 1 / scale : 0;
#pragma unroll
    for (int i = 0; i < kAcross; ++i) write_number(record.covariance<C>(row, x + 16 * i), merged[i] * inverse);
    if (sizeof(C) == 1 && x == 0) *record.scale(row) = scale;
  }
}

template <int D>
constexpr size_t kRetireBytes = sizeof(float) * (2 * D + kConsolidateWarps);

template <class T, int D>
__global__ void __launch_bounds__(kConsolidateThreads, 4) retire(const Consolidate c) {
  const Event e(c, blockIdx.x, blockIdx.y);
  if (e.losers == 0) return;
  fill_holes<T, D>(e, e.loser_list());
  if (!c.record_layout.has_means) return;
  sync_block();  // the record may lie in retiring pages, whose winners have moved now
  float *delta = reinterpret_cast<float*>(shared_memory()), *room = delta + 2 * D;
  const float before = c.num_evicted[e.row], share = float(e.losers) / (before + float(e.losers));
  const bool empty = before == 0;
  merge_means<D>(e, e.folded(), share, empty, delta, room);
  sync_block();
  if (!c.record_layout.has_covariance) return;
  switch (c.record_layout.covariance_type) {
    case Type::kInt8: return merge_covariance<D, Int8>(e, e.folded(), share, empty, delta);
    case Type::kBFloat16: return merge_covariance<D, BFloat16>(e, e.folded(), share, empty, delta);
    default: return merge_covariance<D, float>(e, e.folded(), share, empty, delta);
  }
}

}  // namespace momentkv::cuda
