// Retires pages, in three launches: select the losers, fold them, move the winners and merge the record. Later launches
// overwrite what earlier ones read.

#include "retire.cuh"

namespace momentkv::cuda {
namespace {

template <class T, int D>
const char* launch_consolidate(const Consolidate& c, void* stream) {
  const int heads = c.cache.heads;
  const char* error = launch(select_losers<T, D>, heads, c.rows, 1, kConsolidateThreads, kSelectBytes<D>, c, stream);
  if (error == nullptr && c.record.has_means)
    error = launch(fold_losers<T, D>, c.record.has_covariance ? D / FoldShape<D>::kRows : 1, heads, c.rows,
                   kConsolidateThreads, FoldShape<D>::kBytes, c, stream);
  if (error == nullptr) error = launch(retire<T, D>, heads, c.rows, 1, kConsolidateThreads, kRetireBytes<D>, c, stream);
  return error;
}

template <class T>
const char* by_head_dim(const Consolidate& c, void* stream) {
  switch (c.cache.head_dim) {
    case 64: return launch_consolidate<T, 64>(c, stream);
    case 128: return launch_consolidate<T, 128>(c, stream);
    case 256: return launch_consolidate<T, 256>(c, stream);
    default: return "head_dim is none of 64, 128, 256";
  }
}

}  // namespace

const char* consolidate(const Consolidate& c, void* stream) {
  return c.cache.type == Type::kBFloat16 ? by_head_dim<BFloat16>(c, stream) : by_head_dim<Float16>(c, stream);
}

}  // namespace momentkv::cuda
