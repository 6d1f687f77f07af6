// The moment record as one more split: what attention over the evicted tokens would have returned (paper eqs. 9 and 11; see
// moments.partial in momentkv_vllm/moments.py).
#pragma once

#include "attend_slots.cuh"

namespace momentkv::cuda {

// step[j] = 16 query rows times kTiles covariance columns of this warp: columns D / kWarps * warp + n * kTiles + j of n < 8.
// So a lane reads kTiles numbers of a row side by side. In TF32, which holds 16-bit queries and records exactly.
template <class T, int D, class C>
__device__ inline void times_covariance(const RecordView& record, T* queries, float (&step)[D / 8 / kWarps][4]) {
  constexpr int kTiles = D / 8 / kWarps;
  const int lane = threadIdx.x % kLanes, g = lane / 4, t = lane % 4;
  const int column = threadIdx.x / kLanes * (D / kWarps) + g * kTiles;
#pragma unroll 4
  for (int i = 0; i < D; i += 8) {
    float c[2][kTiles], q[4];
    for (int h = 0; h < 2; ++h) {
      const int dim = i + t + 4 * h;
      load_vector(record.covariance<C>(dim, column), c[h]);
      const float scale = sizeof(C) == 1 ? *record.scale(dim) : 1.0f;
      for (int r = 0; r < 2; ++r)
        q[2 * h + r] = scale * to_float(chunk_of<T, D>(queries, g + 8 * r, dim / 8)[dim % 8]);
    }
#pragma unroll
    for (int j = 0; j < kTiles; ++j) mma_tf32(step[j], q, c[0][j], c[1][j]);
  }
}

// The record's log mass for every query row: logf(n) + scale * q . mean key. Warps take query rows, lanes dimensions.
template <class T, int D>
__device__ inline void write_log_mass(const Attend& a, const Unit& u, const AttendShared<T, D>& s, const RecordView& record) {
  const int lane = threadIdx.x % kLanes;
  for (int r = threadIdx.x / kLanes; r < u.query_rows; r += kWarps) {
    float dot = 0;
    for (int dim = lane; dim < D; dim += kLanes)
      dot += *record.mean_key(dim) * to_float(chunk_of<T, D>(s.queries, r, dim / 8)[dim % 8]);
    dot = warp_sum(dot);
    if (lane == 0)
      a.partial_lse[partial_row(a, u.row, u.head, blockIdx.x, r)] = logf(a.num_evicted[u.row]) + a.scale * dot;
  }
}

// The record's partial: mean value plus the first-order step C q, no longer than the values' spread.
template <class T, int D>
__device__ inline void attend_record(const Attend& a, const Unit& u, const AttendShared<T, D>& s) {
  constexpr int kTiles = D / 8 / kWarps;
  const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes, g = lane / 4, t = lane % 4;
  const RecordView record{a.cache, a.record_layout, a.moment_pages + int64_t(u.row) * a.num_moment_pages, u.head};
  float* squares = s.top(warp);  // [kTileRows] of this warp's columns
  float step[kTiles][4] = {};
  if (a.record_layout.has_covariance) switch (a.record_layout.covariance_type) {
      case Type::kInt8: times_covariance<T, D, Int8>(record, s.queries, step); break;
      case Type::kBFloat16: times_covariance<T, D, BFloat16>(record, s.queries, step); break;
      default: times_covariance<T, D, float>(record, s.queries, step);
    }
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float square = 0;
#pragma unroll
    for (int j = 0; j < kTiles; ++j)
      for (int e = 0; e < 2; ++e) square += step[j][2 * r + e] * step[j][2 * r + e];
    square += shuffle_xor(square, 1);
    square += shuffle_xor(square, 2);
    if (t == 0) squares[g + 8 * r] = square;
  }
  sync_block();
  const float spread = *record.value_spread(), limit = sqrtf(spread > 0 ? spread : 0);
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int query_row = g + 8 * r;
    float square = 0;
    for (int w = 0; w < kWarps; ++w) square += s.top(w)[query_row];
    const float length = a.scale * sqrtf(square), factor = a.scale * (length > limit ? limit / length : 1.0f);
    if (query_row >= u.query_rows) continue;
    float* to = a.partial_out + partial_row(a, u.row, u.head, blockIdx.x, query_row) * D;
#pragma unroll
    for (int j = 0; j < kTiles; ++j)
      for (int e = 0; e < 2; ++e) {
        const int dim = warp * (D / kWarps) + (2 * t + e) * kTiles + j;
        to[dim] = *record.mean_value(dim) + factor * step[j][2 * r + e];
      }
  }
  write_log_mass(a, u, s, record);
}

}  // namespace momentkv::cuda
