// Adds the attention that a row's counted queries give to every slot. Few queries are observed before an event (8 for the
// default policy), so this reads keys once and leaves the tensor cores alone. Sums run over queries, then query heads, one
// after the other: the same bits every time.

#include "units.cuh"

namespace momentkv::cuda {
namespace {

constexpr int kObserveThreads = 128;
constexpr int kObserveWarps = kObserveThreads / kLanes;

// Block: a page of a (row, head). A warp takes a slot at a time, its lanes share the dimensions.
template <class T, int D>
__global__ void __launch_bounds__(kObserveThreads, 8) observe_page(const Observe o) {
  const Queries& w = o;
  const int number = blockIdx.x, head = blockIdx.y, row = blockIdx.z, page_size = w.cache.page_size;
  const int64_t queries = w.num_queries[row], first = int64_t(number) * page_size;
  if (queries == 0 || first >= w.last_slot[row] + queries) return;
  if (o.observe_from[row] >= queries && !o.restart[row]) return;  // most rows of most steps
  const int64_t page = w.pages[int64_t(row) * w.max_pages + number];
  const int lane = threadIdx.x % kLanes, groups = w.query_heads / w.cache.heads;
  float* mass = o.observed + (page * w.cache.heads + head) * page_size;
  for (int slot = threadIdx.x / kLanes; slot < page_size; slot += kObserveWarps) {
    float total = o.restart[row] ? 0 : mass[slot], key[D / kLanes];
    load_vector(key_of<T>(w.cache, page, head, slot) + lane * (D / kLanes), key);
    const int64_t unseen = first + slot - w.last_slot[row];  // queries before this one do not see the slot
    for (int64_t i = o.observe_from[row] > unseen ? o.observe_from[row] : unseen; i < queries; ++i)
      for (int h = head * groups; h < (head + 1) * groups; ++h) {
        const int64_t token = w.first_token[row] + i;
        float query[D / kLanes], dot = 0;
        load_vector(reinterpret_cast<const T*>(w.query) + token * w.query_stride + h * D + lane * (D / kLanes), query);
        for (int j = 0; j < D / kLanes; ++j) dot += key[j] * query[j];
        total += expf(w.scale * warp_sum(dot) - o.lse[token * w.query_heads + h]);
      }
    if (lane == 0) mass[slot] = total;
  }
}

template <class T, int D>
const char* launch_observe(const Observe& o, void* stream) {
  return launch(observe_page<T, D>, o.max_pages, o.cache.heads, o.rows, kObserveThreads, 0, o, stream);
}

}  // namespace

const char* observe(const Observe& o, void* stream) {
  return with_shape(o.cache, [&](auto t, auto d) { return launch_observe<decltype(t), decltype(d)::value>(o, stream); });
}

}  // namespace momentkv::cuda
