// Retires pages, in three launches: select the losers, fold them, move the winners and merge the record. Later launches
// overwrite what earlier ones read.

#include "retire.cuh"

namespace momentkv::cuda {
namespace {

template <class T, int D>
const char* launch_consolidate(const Consolidate& c, void* stream) {
  const int heads = c.cache.heads;
  const char* error = launch(select_losers, heads, c.rows, 1, kConsolidateThreads, kSelectBytes, c, stream);
  if (error == nullptr && c.record_layout.has_means)
    error = launch(fold_losers<T, D>, c.record_layout.has_covariance ? D / FoldShape<D>::kRows : 1, heads, c.rows,
                   kConsolidateThreads, FoldShape<D>::kBytes, c, stream);
  if (error == nullptr) error = launch(retire<T, D>, heads, c.rows, 1, kConsolidateThreads, kRetireBytes<D>, c, stream);
  return error;
}

}  // namespace

const char* consolidate(const Consolidate& c, void* stream) {
  return with_shape(c.cache, [&](auto t, auto d) { return launch_consolidate<decltype(t), decltype(d)::value>(c, stream); });
}

}  // namespace momentkv::cuda
