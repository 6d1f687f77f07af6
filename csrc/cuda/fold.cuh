// What becomes of the losers of a (row, head): their moments, then the record and the holes that they leave.
#pragma once

#include "select.cuh"

namespace momentkv::cuda {

constexpr int kFoldTokens = 16;  // losers whose centred keys and values are held at a time

// Rows of the covariance that a block has in registers: kAccumulators numbers a thread, whole rows for the scales of int8.
template <int D>
struct FoldShape {
  static constexpr int kRows = D == 64 ? 64 : 16384 / D;           // 64, 128, 64
  static constexpr int kDown = kRows / 16, kAcross = D / 16;       // of a thread: rows, columns
  static constexpr size_t kBytes = sizeof(float) * (2 * D + 2 * kFoldTokens * D + kConsolidateWarps);
};

// Mean key and value of the losers into `mean` [2 * D]. `room`: kConsolidateThreads numbers.
template <class T, int D>
__device__ inline void means_of_losers(const Event& e, const int* losers, float* mean, float* room) {
  constexpr int kParts = D < kConsolidateThreads ? kConsolidateThreads / D : 1;  // threads that share a dimension
  const int dim = threadIdx.x % D, part = threadIdx.x / D;
  for (int what = 0; what < 2; ++what) {
    float sum = 0;
    for (int j = part; j < e.losers; j += kParts)
      sum += to_float((what == 0 ? e.key<T>(losers[j]) : e.value<T>(losers[j]))[dim]);
    room[threadIdx.x] = sum;
    sync_block();
    if (part == 0) {
      for (int p = 1; p < kParts; ++p) sum += room[p * D + dim];
      mean[what * D + dim] = sum / float(e.losers);
    }
    sync_block();
  }
}

// Centred keys and values of losers [first, first + kFoldTokens) into `batch` [kFoldTokens][2 * D]; zeros beyond the last.
template <class T, int D>
__device__ inline void gather(const Event& e, const int* losers, int first, const float* mean, float* batch) {
  for (int i = threadIdx.x; i < kFoldTokens * D; i += kConsolidateThreads) {
    const int j = i / D, dim = i % D;
    const bool real = first + j < e.losers;
    const int loser = losers[real ? first + j : 0];
    batch[j * 2 * D + dim] = real ? to_float(e.key<T>(loser)[dim]) - mean[dim] : 0;
    batch[j * 2 * D + D + dim] = real ? to_float(e.value<T>(loser)[dim]) - mean[D + dim] : 0;
  }
}

// Mean of the losers' squared distances to their mean value.
template <class T, int D>
__device__ inline float spread_of_losers(const Event& e, const int* losers, const float* mean, float* room) {
  float sum = 0;
  for (int i = threadIdx.x; i < e.losers * D; i += kConsolidateThreads) {
    const float x = to_float(e.value<T>(losers[i / D])[i % D]) - mean[D + i % D];
    sum += x * x;
  }
  return block_sum(sum, room) / float(e.losers);
}

// Rows [first_row, first_row + kRows) of the losers' covariance. Thread 16 y + x has rows kDown y ... and columns x + 16 i.
template <class T, int D>
__device__ inline void covariance_of_losers(const Event& e, const int* losers, int first_row, const float* mean, float* batch,
                                            float* to) {
  using Shape = FoldShape<D>;
  const int y = threadIdx.x / 16, x = threadIdx.x % 16;
  float sums[Shape::kDown][Shape::kAcross] = {};
  for (int first = 0; first < e.losers; first += kFoldTokens) {
    sync_block();
    gather<T, D>(e, losers, first, mean, batch);
    sync_block();
    for (int j = 0; j < kFoldTokens; ++j) {
      float key[Shape::kDown], value[Shape::kAcross];
#pragma unroll
      for (int r = 0; r < Shape::kDown; ++r) key[r] = batch[j * 2 * D + first_row + y * Shape::kDown + r];
#pragma unroll
      for (int i = 0; i < Shape::kAcross; ++i) value[i] = batch[j * 2 * D + D + x + 16 * i];
#pragma unroll
      for (int r = 0; r < Shape::kDown; ++r)
#pragma unroll
        for (int i = 0; i < Shape::kAcross; ++i) sums[r][i] += key[r] * value[i];
    }
  }
#pragma unroll
  for (int r = 0; r < Shape::kDown; ++r)
#pragma unroll
    for (int i = 0; i < Shape::kAcross; ++i)
      to[(first_row + y * Shape::kDown + r) * D + x + 16 * i] = sums[r][i] / float(e.losers);
}

// Block: kRows rows of the covariance of a (row, head); the first one also writes means and spread.
template <class T, int D>
__global__ void __launch_bounds__(kConsolidateThreads, 2) fold_losers(const Consolidate c) {
  const Event e(c, blockIdx.y, blockIdx.z);
  if (e.losers == 0) return;
  float *mean = reinterpret_cast<float*>(shared_memory()), *batch = mean + 2 * D, *room = batch + 2 * kFoldTokens * D;
  float* folded = e.folded();
  const int* losers = e.loser_list();
  means_of_losers<T, D>(e, losers, mean, batch);
  if (c.record_layout.has_covariance)
    covariance_of_losers<T, D>(e, losers, blockIdx.x * FoldShape<D>::kRows, mean, batch,
                               folded + 2 * D + kFoldedSpread);
  if (blockIdx.x > 0) return;
  const float spread = spread_of_losers<T, D>(e, losers, mean, room);
  for (int dim = threadIdx.x; dim < 2 * D; dim += kConsolidateThreads) folded[dim] = mean[dim];
  if (threadIdx.x == 0) folded[2 * D] = spread;
}

}  // namespace momentkv::cuda
