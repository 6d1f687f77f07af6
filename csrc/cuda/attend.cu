// Attention: every unit writes a partial, a second kernel merges a tile's partials by their logsumexps (flash decoding).

#include "attend_record.cuh"

namespace momentkv::cuda {
namespace {

template <class T, int D>
__global__ void __launch_bounds__(kAttendThreads) attend_units(const Attend a) {
  const Unit unit(a, blockIdx.x, blockIdx.y, blockIdx.z);
  if (!unit.exists) return;
  const AttendShared<T, D> shared;
  load_queries<T, D>(a, unit, shared.queries);
  if (unit.is_record)
    attend_record<T, D>(a, unit, shared);
  else
    attend_slots<T, D>(a, unit, shared);
}

// Block: a tile of query rows of a (row, head); warps take query rows, lanes dimensions.
template <class T, int D>
__global__ void __launch_bounds__(kAttendThreads) merge_units(const Attend a) {
  const int tile = blockIdx.x, lane = threadIdx.x % kLanes;
  const int first = tile == 0 ? 0 : a.max_splits + 1 + 2 * (tile - 1), record = tile == 0 ? a.max_splits : first + 1;
  const Unit unit(a, first, blockIdx.y, blockIdx.z);
  if (!unit.exists) return;
  const bool with_record = a.corrected && a.num_evicted[unit.row] > 0;
  const int sees = int(unit.last_slot) + 1 + unit.query_of(unit.query_rows - 1);
  const int splits = Unit::splits_of(int(a.num_queries[unit.row]), tile, (sees + kTileSlots - 1) / kTileSlots);
  for (int r = threadIdx.x / kLanes; r < unit.query_rows; r += kWarps) {
    auto partial = [&](int i) { return partial_row(a, unit.row, unit.head, i < splits ? first + i : record, r); };
    const int partials = splits + with_record;
    float top = -INFINITY, mass = 0, out[D / kLanes] = {};
    for (int i = 0; i < partials; ++i) {
      const float lse = a.partial_lse[partial(i)];
      top = lse > top ? lse : top;
    }
    for (int i = 0; i < partials; ++i) {
      const float weight = expf(a.partial_lse[partial(i)] - top);
      mass += weight;
      for (int j = 0; j < D / kLanes; ++j) out[j] += weight * a.partial_out[partial(i) * D + lane + j * kLanes];
    }
    const int64_t token = unit.token_of(a, r);
    T* to = reinterpret_cast<T*>(a.output) + token * a.output_stride + int64_t(unit.head_of(r)) * D;
    for (int j = 0; j < D / kLanes; ++j) to[lane + j * kLanes] = from_float<T>(out[j] / mass);
    if (a.lse != nullptr && lane == 0) a.lse[token * a.query_heads + unit.head_of(r)] = top + logf(mass);
  }
}

template <class T, int D>
const char* launch_attend(const Attend& a, void* stream) {
  const int rows = a.max_queries * (a.query_heads / a.cache.heads);
  const int tiles = (rows + kTileRows - 1) / kTileRows;
  const char* error = launch(attend_units<T, D>, a.units, a.cache.heads, a.rows, kAttendThreads,
                             AttendShared<T, D>::kBytes, a, stream);
  if (error != nullptr) return error;
  return launch(merge_units<T, D>, tiles, a.cache.heads, a.rows, kAttendThreads, 0, a, stream);
}

}  // namespace

const char* attend(const Attend& a, void* stream) {
  return with_shape(a.cache, [&](auto t, auto d) { return launch_attend<decltype(t), decltype(d)::value>(a, stream); });
}

}  // namespace momentkv::cuda
