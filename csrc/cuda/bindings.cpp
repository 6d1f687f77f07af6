// torch.ops.momentkv_cuda.*: checks tensors and fills the params structs. With MOMENTKV_EMULATE the same operators run the
// kernels on CPU tensors, as torch.ops.momentkv_cuda_emulated.* (tests).
//
// What work lists hold lies on the device and is not checked here: that would wait for it.

#include <Python.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>

#include "kernels.h"

#ifdef MOMENTKV_EMULATE
#define MOMENTKV_LIBRARY momentkv_cuda_emulated
#define MOMENTKV_DEVICE CPU
#define MOMENTKV_INIT PyInit__cuda_emulated
#else
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#define MOMENTKV_LIBRARY momentkv_cuda
#define MOMENTKV_DEVICE CUDA
#define MOMENTKV_INIT PyInit__cuda
#endif

namespace momentkv::cuda {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

constexpr auto kDevice = c10::DeviceType::MOMENTKV_DEVICE;

// Launches on the current stream of the tensor's device.
template <class Params>
void run(const char* (*operation)(const Params&, void*), const Params& params, const Tensor& on) {
#ifdef MOMENTKV_EMULATE
  void* stream = nullptr;
#else
  const c10::cuda::CUDAGuard guard(on.device());
  void* stream = c10::cuda::getCurrentCUDAStream().stream();
#endif
  const char* error = operation(params, stream);
  TORCH_CHECK(error == nullptr, "momentkv_cuda: ", error);
}

template <class T>
T* data_of(const Tensor& x, const char* name, at::IntArrayRef shape) {
  TORCH_CHECK(x.device().type() == kDevice && x.is_contiguous(), name, " is on ", x.device(), ", contiguous: ",
              x.is_contiguous(), "; it must be a contiguous ", kDevice, " tensor");
  TORCH_CHECK(x.sizes() == shape, name, " has shape ", x.sizes(), " instead of ", shape);
  return x.data_ptr<T>();
}

template <class T>
T* data_of(const OptionalTensor& x, const char* name, at::IntArrayRef shape) {
  return x ? data_of<T>(*x, name, shape) : nullptr;
}

bool is_aligned(const Tensor& x) {
  bool aligned = reinterpret_cast<uintptr_t>(x.data_ptr()) % 16 == 0;
  for (int64_t dim = 0; dim + 1 < x.dim(); ++dim) aligned = aligned && (x.size(dim) == 1 || x.stride(dim) % 8 == 0);
  return aligned;
}

Cache cache_of(const Tensor& keys, const Tensor& values) {
  TORCH_CHECK(keys.dim() == 4 && keys.device().type() == kDevice && keys.stride(3) == 1 && is_aligned(keys),
              "keys has shape ", keys.sizes(), ", strides ", keys.strides(), " on ", keys.device(),
              "; it must be [num_pages, heads, page_size, head_dim] on ", kDevice,
              ", the last dimension packed, the others at multiples of 8 numbers");
  TORCH_CHECK(values.sizes() == keys.sizes() && values.strides() == keys.strides() && is_aligned(values) &&
                  values.device() == keys.device() && values.scalar_type() == keys.scalar_type(),
              "values has shape ", values.sizes(), ", strides ", values.strides(), "; it must lie as keys does: ", keys.sizes(),
              ", ", keys.strides());
  const auto type = keys.scalar_type();
  TORCH_CHECK(type == at::kBFloat16 || type == at::kHalf, "keys is ", type, "; the CUDA kernels know bfloat16 and float16");
  const int64_t page_size = keys.size(2), d = keys.size(3);
  TORCH_CHECK(page_size > 0 && page_size % kTileSlots == 0, "page size ", page_size, " is not a multiple of ", kTileSlots);
  TORCH_CHECK(d == 64 || d == 128 || d == 256, "head dimension ", d, " is none of 64, 128, 256");
  TORCH_CHECK(keys.size(0) * page_size <= INT32_MAX, keys.size(0), " pages of ", page_size, " slots; legal: 2^31 slots a layer");
  return {static_cast<char*>(keys.data_ptr()), static_cast<char*>(values.data_ptr()), keys.stride(0), keys.stride(1),
          keys.stride(2), int(keys.size(1)), int(page_size), int(d), type == at::kHalf ? Type::kFloat16 : Type::kBFloat16};
}

// The layout is that of momentkv_vllm/page_layout.py.
RecordLayout record_of(const Cache& cache, const Tensor& moment_pages, bool means, bool covariance, at::ScalarType moment_dtype,
                 int64_t covariance_offset) {
  TORCH_CHECK(moment_pages.dim() == 2, "moment_pages has shape ", moment_pages.sizes(), "; it must be [rows, pages]");
  TORCH_CHECK(moment_dtype == at::kChar || moment_dtype == at::kBFloat16 || moment_dtype == at::kFloat, "moment_dtype is ",
              moment_dtype, "; the CUDA kernels know int8, bfloat16 and float32");
  const Type type = moment_dtype == at::kChar ? Type::kInt8 : moment_dtype == at::kFloat ? Type::kFloat32 : Type::kBFloat16;
  const int64_t d = cache.head_dim, number_bytes = type == Type::kInt8 ? 1 : type == Type::kFloat32 ? 4 : 2;
  const int64_t needed = !means ? 0 : covariance ? covariance_offset + d * d * number_bytes : 4 * (2 * d + 1);
  const int64_t there = moment_pages.size(1) * cache.page_size * 2 * d * 2;
  TORCH_CHECK(there >= needed, "moment_pages has ", moment_pages.size(1), " pages of ", there, " bytes a head; its record needs ",
              needed);
  return {means, covariance, type, int(covariance_offset)};
}

// [tokens, heads, head_dim] with packed heads; returns the distance of two tokens in numbers.
int64_t token_stride(const Tensor& x, const Tensor& keys, const char* name) {
  TORCH_CHECK(x.dim() == 3 && x.device() == keys.device() && x.scalar_type() == keys.scalar_type(), name, " is ",
              x.scalar_type(), " ", x.sizes(), " on ", x.device(), "; it must be [tokens, heads, head_dim] ",
              keys.scalar_type(), " on ", keys.device());
  TORCH_CHECK(x.size(2) == keys.size(3) && x.stride(2) == 1 && x.stride(1) == x.size(2) && is_aligned(x), name, " has shape ",
              x.sizes(), " and strides ", x.strides(), "; heads of ", keys.size(3),
              " numbers must lie side by side, tokens at multiples of 8 numbers");
  return x.stride(0);
}

// What attend and observe share.
Queries queries_of(const Tensor& keys, const Tensor& values, const Tensor& query, const Tensor& first_token,
                   const Tensor& num_queries, const Tensor& pages, const Tensor& last_slot, int64_t max_queries,
                   double scale) {
  Queries w{};
  w.cache = cache_of(keys, values);
  TORCH_CHECK(pages.dim() == 2, "pages has shape ", pages.sizes(), "; it must be [rows, pages]");
  w.rows = int(pages.size(0));
  w.max_pages = int(pages.size(1));
  w.pages = data_of<int64_t>(pages, "pages", {w.rows, w.max_pages});
  w.first_token = data_of<int64_t>(first_token, "first_token", {w.rows});
  w.num_queries = data_of<int64_t>(num_queries, "num_queries", {w.rows});
  w.last_slot = data_of<int64_t>(last_slot, "last_slot", {w.rows});
  w.query_stride = token_stride(query, keys, "query");
  w.query = static_cast<const char*>(query.data_ptr());
  w.query_heads = int(query.size(1));
  TORCH_CHECK(w.query_heads % w.cache.heads == 0, w.query_heads, " query heads over ", w.cache.heads, " KV heads");
  TORCH_CHECK(max_queries >= 1 && max_queries <= query.size(0), "max_queries is ", max_queries, "; legal: 1 to the ",
              query.size(0), " tokens of query");
  w.max_queries = int(max_queries);
  w.scale = float(scale);
  return w;
}

void attend_op(const Tensor& keys, const Tensor& values, const Tensor& query, const Tensor& output, const OptionalTensor& lse,
               const Tensor& first_token, const Tensor& num_queries, const Tensor& pages, const Tensor& last_slot,
               const Tensor& moment_pages, const Tensor& num_evicted, int64_t max_queries, double scale, bool corrected,
               bool has_covariance, at::ScalarType moment_dtype, int64_t covariance_offset) {
  Attend a{};
  a.work = queries_of(keys, values, query, first_token, num_queries, pages, last_slot, max_queries, scale);
  a.record_layout = record_of(a.work.cache, moment_pages, corrected, has_covariance, moment_dtype, covariance_offset);
  a.num_moment_pages = int(moment_pages.size(1));
  a.moment_pages = data_of<int64_t>(moment_pages, "moment_pages", {a.work.rows, a.num_moment_pages});
  a.num_evicted = data_of<float>(num_evicted, "num_evicted", {a.work.rows});
  a.corrected = corrected;
  a.output_stride = token_stride(output, keys, "output");
  TORCH_CHECK(output.sizes() == query.sizes(), "output has shape ", output.sizes(), " instead of ", query.sizes());
  a.output = static_cast<char*>(output.data_ptr());
  a.lse = data_of<float>(lse, "lse", {query.size(0), a.work.query_heads});
  if (a.work.rows == 0) return;
  const int64_t slots = int64_t(a.work.max_pages) * a.work.cache.page_size, d = a.work.cache.head_dim;
  const int64_t query_rows = max_queries * (a.work.query_heads / a.work.cache.heads);
  const int64_t tiles = (query_rows + kTileRows - 1) / kTileRows;
  a.tile_rows = int(std::min<int64_t>(query_rows, kTileRows));
  a.max_splits = int(std::max<int64_t>(1, slots / kSplitSlots));
  a.units = int(a.max_splits + 1 + 2 * (tiles - 1));
  const int64_t partials = int64_t(a.work.rows) * a.work.cache.heads * a.units * a.tile_rows;
  const Tensor room = at::empty({partials * (d + 1)}, keys.options().dtype(at::kFloat));
  a.partial_out = room.data_ptr<float>();
  a.partial_lse = a.partial_out + partials * d;
  run(attend, a, keys);
}

void consolidate_op(const Tensor& keys, const Tensor& values, const Tensor& store_pages, const Tensor& retiring_pages,
                    const Tensor& moment_pages, const Tensor& num_evicted, const OptionalTensor& score,
                    const OptionalTensor& observed, int64_t sink_tokens, bool has_means, bool has_covariance,
                    at::ScalarType moment_dtype, int64_t covariance_offset) {
  Consolidate c{};
  c.cache = cache_of(keys, values);
  c.record_layout = record_of(c.cache, moment_pages, has_means, has_covariance, moment_dtype, covariance_offset);
  TORCH_CHECK(store_pages.dim() == 2 && retiring_pages.dim() == 2, "store_pages ", store_pages.sizes(), " and retiring_pages ",
              retiring_pages.sizes(), " must be [rows, pages]");
  c.rows = int(store_pages.size(0));
  c.store_pages = int(store_pages.size(1));
  c.retiring_pages = int(retiring_pages.size(1));
  c.moment_pages = int(moment_pages.size(1));
  c.store = data_of<int64_t>(store_pages, "store_pages", {c.rows, c.store_pages});
  c.retiring = data_of<int64_t>(retiring_pages, "retiring_pages", {c.rows, c.retiring_pages});
  c.moments = data_of<int64_t>(moment_pages, "moment_pages", {c.rows, c.moment_pages});
  c.num_evicted = data_of<float>(num_evicted, "num_evicted", {c.rows});
  const int64_t heads = c.cache.heads, d = c.cache.head_dim, page_size = c.cache.page_size;
  const int64_t candidates = (c.store_pages + c.retiring_pages) * page_size;
  c.score = data_of<float>(score, "score", {c.rows, heads, candidates});
  c.observed = data_of<float>(observed, "observed", {keys.size(0), heads, page_size});
  TORCH_CHECK(score || (has_means && observed), "the score by moments needs the means and the observed attention; give score");
  c.sink_tokens = int(sink_tokens);
  if (c.rows == 0 || c.retiring_pages == 0) return;
  const auto floats = keys.options().dtype(at::kFloat);
  const Tensor own_score = at::empty({score ? 0 : 2 * c.rows * heads * candidates}, floats);
  const Tensor folded = at::empty({has_means ? c.rows * heads * (2 * d + kFoldedSpread + d * d) : 0}, floats);
  const Tensor losers = at::empty({c.rows * heads * c.retiring_pages * page_size}, keys.options().dtype(at::kInt));
  c.own_score = own_score.data_ptr<float>();
  c.folded = folded.data_ptr<float>();
  c.losers = losers.data_ptr<int>();
  run(consolidate, c, keys);
}

void write_op(const Tensor& keys, const Tensor& values, const Tensor& key, const Tensor& value, const Tensor& slots,
              const OptionalTensor& observed) {
  Write s{};
  s.cache = cache_of(keys, values);
  TORCH_CHECK(slots.dim() == 1 && slots.numel() <= key.size(0) && key.sizes() == value.sizes() &&
                  key.size(1) == s.cache.heads,
              "slots has shape ", slots.sizes(), ", key ", key.sizes(), ", value ", value.sizes(),
              "; key and value must be [at least the slots, ", s.cache.heads, " heads, head_dim]");
  s.tokens = int(slots.numel());
  s.slots = data_of<int64_t>(slots, "slots", {s.tokens});
  s.key_stride = token_stride(key, keys, "key");
  s.value_stride = token_stride(value, keys, "value");
  s.key = static_cast<const char*>(key.data_ptr());
  s.value = static_cast<const char*>(value.data_ptr());
  s.observed = data_of<float>(observed, "observed", {keys.size(0), s.cache.heads, s.cache.page_size});
  if (s.tokens > 0) run(write, s, keys);
}

void observe_op(const Tensor& keys, const Tensor& values, const Tensor& observed, const Tensor& query, const Tensor& lse,
                const Tensor& first_token, const Tensor& num_queries, const Tensor& pages, const Tensor& last_slot,
                const Tensor& observe_from, const Tensor& restart, double scale) {
  Observe o{};
  o.work = queries_of(keys, values, query, first_token, num_queries, pages, last_slot, query.size(0), scale);
  o.lse = data_of<float>(lse, "lse", {query.size(0), o.work.query_heads});
  o.observed = data_of<float>(observed, "observed", {keys.size(0), o.work.cache.heads, o.work.cache.page_size});
  o.observe_from = data_of<int64_t>(observe_from, "observe_from", {o.work.rows});
  o.restart = data_of<bool>(restart, "restart", {o.work.rows});
  if (o.work.rows > 0 && o.work.max_pages > 0) run(observe, o, keys);
}

}  // namespace
}  // namespace momentkv::cuda

#define MOMENTKV_DEFINE(library) TORCH_LIBRARY(library, m)
#define MOMENTKV_IMPLEMENT(library, device) TORCH_LIBRARY_IMPL(library, device, m)

MOMENTKV_DEFINE(MOMENTKV_LIBRARY) {
  m.def(
      "attend(Tensor keys, Tensor values, Tensor query, Tensor(a!) output, Tensor(b!)? lse, Tensor first_token, "
      "Tensor num_queries, Tensor pages, Tensor last_slot, Tensor moment_pages, Tensor num_evicted, int max_queries, "
      "float scale, bool corrected, bool has_covariance, ScalarType moment_dtype, int covariance_offset) -> ()");
  m.def(
      "observe(Tensor keys, Tensor values, Tensor(a!) observed, Tensor query, Tensor lse, Tensor first_token, "
      "Tensor num_queries, Tensor pages, Tensor last_slot, Tensor observe_from, Tensor restart, float scale) -> ()");
  m.def(
      "consolidate(Tensor(a!) keys, Tensor(b!) values, Tensor store_pages, Tensor retiring_pages, Tensor moment_pages, "
      "Tensor num_evicted, Tensor? score, Tensor(c!)? observed, int sink_tokens, bool has_means, "
      "bool has_covariance, ScalarType moment_dtype, int covariance_offset) -> ()");
  m.def(
      "write(Tensor(a!) keys, Tensor(b!) values, Tensor key, Tensor value, Tensor slots, Tensor(c!)? observed) -> ()");
}

MOMENTKV_IMPLEMENT(MOMENTKV_LIBRARY, MOMENTKV_DEVICE) {
  using namespace momentkv::cuda;
  m.impl("attend", &attend_op);
  m.impl("observe", &observe_op);
  m.impl("consolidate", &consolidate_op);
  m.impl("write", &write_op);
}

// Importing the extension registers the operators above.
PyMODINIT_FUNC MOMENTKV_INIT() {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_cuda", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
