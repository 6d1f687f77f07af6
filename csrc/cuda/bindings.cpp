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

namespace momentkv {
namespace {
constexpr auto kDevice = c10::DeviceType::MOMENTKV_DEVICE;
constexpr bool kAligned = true;
}  // namespace
}  // namespace momentkv

#include "../common/checks.h"

namespace momentkv::cuda {
namespace {

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
          keys.stride(2), int(keys.size(1)), int(page_size), int(d),
          type_of(type, "keys", {at::kBFloat16, at::kHalf})};
}

void write_op(const Tensor& keys, const Tensor& values, const Tensor& key, const Tensor& value, const Tensor& slots,
              const OptionalTensor& observed) {
  Write w{};
  w.cache = cache_of(keys, values);
  set_write(w, keys, key, value, slots, observed);
  if (w.tokens > 0) run(write, w, keys);
}

// How the work is cut, and room for the parts; returned, for it must outlive the launch's enqueueing.
Tensor set_units(Attend& a, const Tensor& keys, int64_t max_queries) {
  const int64_t slots = int64_t(a.max_pages) * a.cache.page_size, d = a.cache.head_dim;
  const int64_t query_rows = max_queries * (a.query_heads / a.cache.heads);
  const int64_t tiles = (query_rows + kTileRows - 1) / kTileRows;
  a.max_queries = int(max_queries);
  a.tile_rows = int(std::min<int64_t>(query_rows, kTileRows));
  a.max_splits = int(std::max<int64_t>(1, slots / kSplitSlots));
  a.units = int(a.max_splits + 1 + 2 * (tiles - 1));
  const int64_t partials = int64_t(a.rows) * a.cache.heads * a.units * a.tile_rows;
  const Tensor room = at::empty({partials * (d + 1)}, keys.options().dtype(at::kFloat));
  a.partial_out = room.data_ptr<float>();
  a.partial_lse = a.partial_out + partials * d;
  return room;
}

void attend_op(const Tensor& keys, const Tensor& values, const Tensor& query, const Tensor& output, const OptionalTensor& lse,
               MOMENTKV_ATTEND_WORK, double scale, bool corrected, MOMENTKV_RECORD, int64_t max_queries) {
  Attend a{};
  a.cache = cache_of(keys, values);
  set_attend(a, keys, query, output, lse, MOMENTKV_ATTEND_WORK_GIVEN, scale, corrected, MOMENTKV_RECORD_GIVEN);
  TORCH_CHECK(max_queries >= 1 && max_queries <= query.size(0), "max_queries is ", max_queries, "; legal: 1 to the ",
              query.size(0), " tokens of query");
  if (a.rows == 0) return;
  const Tensor room = set_units(a, keys, max_queries);
  run(attend, a, keys);
}

void observe_op(const Tensor& keys, const Tensor& values, const Tensor& observed, const Tensor& query, const Tensor& lse,
                MOMENTKV_ATTEND_WORK, double scale) {
  const AttendTensors work MOMENTKV_ATTEND_WORK_GIVEN;
  Observe o{};
  o.cache = cache_of(keys, values);
  set_queries(o, keys, query, work, scale);
  o.lse = data_of<float>(lse, "lse", {query.size(0), o.query_heads});
  o.observed = data_of<float>(observed, "observed", {keys.size(0), o.cache.heads, o.cache.page_size});
  o.observe_from = data_of<int64_t>(work.observe_from, "observe_from", {o.rows});
  o.restart = data_of<bool>(work.restart, "restart", {o.rows});
  TORCH_CHECK(o.observe_from != nullptr && o.restart != nullptr, "observe needs observe_from and restart");
  if (o.rows > 0 && o.max_pages > 0) run(observe, o, keys);
}

void consolidate_op(const Tensor& keys, const Tensor& values, MOMENTKV_RETIRE_WORK, const Tensor& score,
                    const OptionalTensor& observed, int64_t sink_tokens, MOMENTKV_RECORD) {
  Consolidate c{};
  c.cache = cache_of(keys, values);
  const int64_t slots = c.cache.page_size, candidates = (store_pages.size(1) + retiring_pages.size(1)) * slots;
  set_consolidate(c, keys, MOMENTKV_RETIRE_WORK_GIVEN, score, observed, sink_tokens, 0, MOMENTKV_RECORD_GIVEN, candidates,
                  slots);
  if (c.rows == 0 || c.retiring_pages == 0) return;
  const int64_t heads = c.cache.heads, d = c.cache.head_dim, page_size = c.cache.page_size;
  const auto floats = keys.options().dtype(at::kFloat);
  const Tensor folded = at::empty({has_means ? c.rows * heads * (2 * d + kFoldedSpread + d * d) : 0}, floats);
  const Tensor losers = at::empty({c.rows * heads * c.retiring_pages * page_size}, keys.options().dtype(at::kInt));
  c.folded = folded.data_ptr<float>();
  c.losers = losers.data_ptr<int>();
  run(consolidate, c, keys);
}

}  // namespace
}  // namespace momentkv::cuda

#define MOMENTKV_DEFINE(library) TORCH_LIBRARY(library, m)
#define MOMENTKV_IMPLEMENT(library, device) TORCH_LIBRARY_IMPL(library, device, m)

// Arguments of one meaning stand in one order here and in csrc/cpu.
MOMENTKV_DEFINE(MOMENTKV_LIBRARY) {
  m.def(
      "write(Tensor(a!) keys, Tensor(b!) values, Tensor key, Tensor value, Tensor slots, Tensor(c!)? observed) -> ()");
  m.def(
      "attend(Tensor keys, Tensor values, Tensor query, Tensor(a!) output, Tensor(b!)? lse, " MOMENTKV_ATTEND_WORK_SCHEMA
      ", float scale, bool corrected, " MOMENTKV_RECORD_SCHEMA ", int max_queries) -> ()");
  m.def(
      "observe(Tensor keys, Tensor values, Tensor(a!) observed, Tensor query, Tensor lse, " MOMENTKV_ATTEND_WORK_SCHEMA
      ", float scale) -> ()");
  m.def(
      "consolidate(Tensor(a!) keys, Tensor(b!) values, " MOMENTKV_RETIRE_WORK_SCHEMA
      ", Tensor score, Tensor(c!)? observed, int sink_tokens, " MOMENTKV_RECORD_SCHEMA ") -> ()");
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
