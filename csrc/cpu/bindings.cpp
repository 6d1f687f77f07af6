// torch.ops.momentkv_cpu.*: checks tensors, fills the params structs, runs the items on torch's threads.

#include <Python.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <vector>

#include "kernels.h"

namespace momentkv {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

Type type_of(at::ScalarType type, const char* what) {
  switch (type) {
    case at::kFloat: return Type::kFloat32;
    case at::kBFloat16: return Type::kBFloat16;
    case at::kHalf: return Type::kFloat16;
    default: TORCH_CHECK(false, what, " is ", type, "; the CPU kernels know float32, bfloat16 and float16");
  }
}

template <class T>
T* data_of(const Tensor& tensor, const char* name, at::IntArrayRef shape) {
  TORCH_CHECK(tensor.is_cpu() && tensor.is_contiguous(), name, " must be a contiguous CPU tensor");
  TORCH_CHECK(tensor.sizes() == shape, name, " has shape ", tensor.sizes(), " instead of ", shape);
  return tensor.data_ptr<T>();
}

template <class T>
T* data_of(const OptionalTensor& tensor, const char* name, at::IntArrayRef shape) {
  return tensor ? data_of<T>(*tensor, name, shape) : nullptr;
}

Cache cache_of(const Tensor& kv) {
  TORCH_CHECK(kv.dim() == 4 && kv.is_cpu() && kv.is_contiguous(),
              "kv must be a contiguous CPU tensor [num_pages, heads, page_size, 2 * head_dim]");
  const int64_t page_size = kv.size(2), head_dim = kv.size(3) / 2;
  TORCH_CHECK(page_size % 16 == 0, "page size ", page_size, " is not a multiple of 16");
  TORCH_CHECK(head_dim % 16 == 0 && head_dim <= kMaxHeadDim, "head dimension ", head_dim, " is not a multiple of 16 up to ",
              kMaxHeadDim);
  return {static_cast<char*>(kv.data_ptr()), type_of(kv.scalar_type(), "kv"), kv.size(1), page_size, head_dim};
}

// The layout is that of momentkv_vllm/page_layout.py.
RecordLayout record_of(const Cache& cache, int64_t moment_pages, bool means, bool covariance, at::ScalarType moment_dtype,
                 int64_t covariance_offset) {
  TORCH_CHECK(moment_dtype == at::kChar || moment_dtype == at::kBFloat16 || moment_dtype == at::kFloat, "moment_dtype is ",
              moment_dtype, "; the CPU kernels know int8, bfloat16 and float32");
  const Type type = moment_dtype == at::kChar ? Type::kInt8 : type_of(moment_dtype, "moment_dtype");
  const int64_t d = cache.head_dim, bytes = covariance_offset + covariance * d * d * int64_t(at::elementSize(moment_dtype));
  const int64_t page_bytes = cache.page_size * 2 * d * (cache.type == Type::kFloat32 ? 4 : 2);
  TORCH_CHECK(!means || bytes <= moment_pages * page_bytes, "moment_pages has ", moment_pages, " pages of ", page_bytes,
              " bytes a head; its record needs ", bytes);
  return {means, covariance, type, covariance_offset};
}

// [tokens, heads, head_dim] with packed heads; returns the distance of two tokens in numbers.
int64_t token_stride(const Tensor& x, const Tensor& kv, int64_t tokens, const char* name) {
  TORCH_CHECK(x.dim() == 3 && x.is_cpu() && x.scalar_type() == kv.scalar_type(), name, " must be [tokens, heads, head_dim] ",
              kv.scalar_type(), " on the CPU");
  TORCH_CHECK(x.size(0) >= tokens && x.size(2) == kv.size(3) / 2 && x.stride(2) == 1 && x.stride(1) == x.size(2), name,
              " has shape ", x.sizes(), " and strides ", x.strides());
  return x.stride(0);
}

// Floats that live as long as their thread, so that the decode path allocates nothing.
float* scratch(size_t floats) {
  thread_local std::vector<float> room;
  if (room.size() < floats) room.resize(floats);
  return room.data();
}

template <class F>
void in_parallel(int64_t items, F f) {
  at::parallel_for(0, items, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) f(i);
  });
}

void write(const Tensor& kv, const Tensor& key, const Tensor& value, const Tensor& slots, const OptionalTensor& observed) {
  Write s{};
  s.cache = cache_of(kv);
  s.tokens = slots.numel();
  s.slots = data_of<int64_t>(slots, "slots", {s.tokens});
  s.key_stride = token_stride(key, kv, s.tokens, "key");
  s.value_stride = token_stride(value, kv, s.tokens, "value");
  TORCH_CHECK(key.size(1) == s.cache.heads && value.size(1) == s.cache.heads, "key and value must have the cache's heads");
  s.key = key.data_ptr();
  s.value = value.data_ptr();
  s.observed = data_of<float>(observed, "observed", {kv.size(0), s.cache.heads, s.cache.page_size});
  const Kernels& k = kernels();
  in_parallel(s.cache.heads, [&](int64_t head) { k.zero_fresh_pages(s, head); });
  in_parallel(s.tokens, [&](int64_t token) { k.write(s, token); });
}

// What attend and observe share.
Attend attend_of(const Tensor& kv, const Tensor& query, const Tensor& first_token, const Tensor& num_queries, const Tensor& pages,
                 const Tensor& last_slot, double scale) {
  Attend a{};
  a.cache = cache_of(kv);
  a.rows = pages.size(0);
  a.max_pages = pages.size(1);
  a.pages = data_of<int64_t>(pages, "pages", {a.rows, a.max_pages});
  a.first_token = data_of<int64_t>(first_token, "first_token", {a.rows});
  a.num_queries = data_of<int64_t>(num_queries, "num_queries", {a.rows});
  a.last_slot = data_of<int64_t>(last_slot, "last_slot", {a.rows});
  int64_t tokens = 0;
  for (int64_t row = 0; row < a.rows; ++row) {
    tokens = std::max(tokens, a.first_token[row] + a.num_queries[row]);
    TORCH_CHECK(a.num_queries[row] > 0 && a.last_slot[row] >= 0 && a.first_token[row] >= 0 &&
                    a.last_slot[row] + a.num_queries[row] <= a.max_pages * a.cache.page_size,
                "row ", row, " sees more slots than its pages hold");
  }
  a.query_stride = token_stride(query, kv, tokens, "query");
  a.query = query.data_ptr();
  a.query_heads = query.size(1);
  TORCH_CHECK(a.query_heads % a.cache.heads == 0, a.query_heads, " query heads over ", a.cache.heads, " KV heads");
  a.scale = float(scale);
  return a;
}

// Logits of one query a row, which attend leaves to observe.
void set_logits(Attend& a, const OptionalTensor& observe_from, const OptionalTensor& logits) {
  a.observe_from = data_of<int64_t>(observe_from, "observe_from", {a.rows});
  a.logits = data_of<float>(logits, "logits", {a.rows, a.query_heads, a.max_pages * a.cache.page_size});
  if (a.logits == nullptr) return;
  TORCH_CHECK(a.observe_from != nullptr, "logits are left where observe_from says so");
  for (int64_t row = 0; row < a.rows; ++row)
    TORCH_CHECK(a.num_queries[row] == 1, "logits are left for one query a row, row ", row, " has ", a.num_queries[row]);
}

// Cuts attend's work into items. How a row is cut depends on that row only, so its result does not depend on the batch.
// Kept between calls: no allocation once it has seen the largest batch.
struct Plan {
  std::vector<AttendItem> items;
  std::vector<MergeItem> merges;
  std::vector<float> partials;

  void build(const Attend& a) {
    items.clear();
    merges.clear();
    size_t floats = 0;
    for (int64_t row = 0; row < a.rows; ++row)
      if (a.num_queries[row] == 1) floats += splits(a, row) * a.query_heads * (a.cache.head_dim + 1);
    if (partials.size() < floats) partials.resize(floats);
    float* next = partials.data();
    for (int32_t row = 0; row < a.rows; ++row)
      for (int32_t head = 0; head < a.cache.heads; ++head)
        a.num_queries[row] == 1 ? add_decode(a, row, head, next) : add_chunk(a, row, head);
  }

  static int64_t pages(const Attend& a, int64_t row) {
    return (a.last_slot[row] + a.num_queries[row] + a.cache.page_size - 1) / a.cache.page_size;
  }
  static int64_t splits(const Attend& a, int64_t row) {
    return std::max<int64_t>(1, pages(a, row) * a.cache.page_size / kSplitSlots);
  }
  static bool with_record(const Attend& a, int64_t row) { return a.corrected && a.num_evicted[row] > 0; }

  void add_decode(const Attend& a, int32_t row, int32_t head, float*& next) {
    const int64_t size = a.query_heads / a.cache.heads * (a.cache.head_dim + 1);
    const int32_t n = int32_t(splits(a, row)), num_pages = int32_t(pages(a, row));
    if (n > 1) merges.push_back({row, head, n, next});
    for (int32_t s = 0; s < n; ++s) {
      const bool last = s == n - 1;
      items.push_back({row, head, 0, 1, num_pages * s / n, num_pages * (s + 1) / n, last && with_record(a, row),
                       n > 1 ? next : nullptr});
      if (n > 1) next += size;
    }
  }

  void add_chunk(const Attend& a, int32_t row, int32_t head) {
    const int32_t queries = int32_t(a.num_queries[row]), num_pages = int32_t(pages(a, row));
    const int32_t step = std::max<int32_t>(1, int32_t(kRowsPerItem / (a.query_heads / a.cache.heads)));
    for (int32_t first = 0; first < queries; first += step)
      items.push_back({row, head, first, std::min(step, queries - first), 0, num_pages, with_record(a, row), nullptr});
  }
};

void attend(const Tensor& kv, const Tensor& query, const Tensor& output, const OptionalTensor& lse, const Tensor& first_token,
            const Tensor& num_queries, const Tensor& pages, const Tensor& last_slot, const Tensor& record_pages, const Tensor& num_evicted,
            const OptionalTensor& observe_from, const OptionalTensor& logits, double scale, bool corrected, bool has_covariance,
            at::ScalarType moment_dtype, int64_t covariance_offset) {
  Attend a = attend_of(kv, query, first_token, num_queries, pages, last_slot, scale);
  a.moment_pages = record_pages.size(1);
  a.record_layout = record_of(a.cache, a.moment_pages, corrected, has_covariance, moment_dtype, covariance_offset);
  a.record_pages = data_of<int64_t>(record_pages, "moment_pages", {a.rows, a.moment_pages});
  a.num_evicted = data_of<float>(num_evicted, "num_evicted", {a.rows});
  a.corrected = corrected;
  a.output_stride = token_stride(output, kv, 0, "output");
  TORCH_CHECK(output.sizes() == query.sizes(), "output has shape ", output.sizes(), " instead of ", query.sizes());
  a.output = output.data_ptr();
  a.lse = data_of<float>(lse, "lse", {query.size(0), a.query_heads});
  set_logits(a, observe_from, logits);
  thread_local Plan plan;
  plan.build(a);
  const Kernels& k = kernels();
  // Not `plan` in the lambda: another thread would see its own thread_local.
  const AttendItem* items = plan.items.data();
  const MergeItem* merges = plan.merges.data();
  in_parallel(plan.items.size(), [&](int64_t i) { k.attend(a, items[i], scratch(k.attend_scratch(a))); });
  in_parallel(plan.merges.size(), [&](int64_t i) { k.merge(a, merges[i]); });
}

void observe(const Tensor& kv, const Tensor& observed, const Tensor& query, const Tensor& lse, const Tensor& first_token,
             const Tensor& num_queries, const Tensor& pages, const Tensor& last_slot, const Tensor& observe_from,
             const Tensor& restart, const OptionalTensor& logits, double scale) {
  Attend a = attend_of(kv, query, first_token, num_queries, pages, last_slot, scale);
  a.lse = data_of<float>(lse, "lse", {query.size(0), a.query_heads});
  a.observed = data_of<float>(observed, "observed", {kv.size(0), a.cache.heads, a.cache.page_size});
  set_logits(a, observe_from, logits);
  a.restart = data_of<bool>(restart, "restart", {a.rows});
  const Kernels& k = kernels();
  in_parallel(a.rows * a.cache.heads, [&](int64_t i) { k.observe(a, i, scratch(k.observe_scratch(a))); });
}

void consolidate(const Tensor& kv, const Tensor& store_pages, const Tensor& retiring_pages, const Tensor& moment_pages,
                 const Tensor& num_evicted, const OptionalTensor& score, const OptionalTensor& observed, int64_t sink_tokens,
                 bool has_means, bool has_covariance, at::ScalarType moment_dtype, int64_t covariance_offset) {
  Consolidate c{};
  c.cache = cache_of(kv);
  c.rows = store_pages.size(0);
  c.store_pages = store_pages.size(1);
  c.retiring_pages = retiring_pages.size(1);
  c.moment_pages = moment_pages.size(1);
  c.record_layout = record_of(c.cache, c.moment_pages, has_means, has_covariance, moment_dtype, covariance_offset);
  c.store = data_of<int64_t>(store_pages, "store_pages", {c.rows, c.store_pages});
  c.retiring = data_of<int64_t>(retiring_pages, "retiring_pages", {c.rows, c.retiring_pages});
  c.moments = data_of<int64_t>(moment_pages, "moment_pages", {c.rows, c.moment_pages});
  c.num_evicted = data_of<float>(num_evicted, "num_evicted", {c.rows});
  const int64_t candidates = (c.store_pages + c.retiring_pages) * c.cache.page_size;
  c.score = data_of<float>(score, "score", {c.rows, c.cache.heads, candidates});
  c.observed = data_of<float>(observed, "observed", {kv.size(0), c.cache.heads, c.cache.page_size});
  TORCH_CHECK(score || (has_means && observed), "the score by moments needs the means and the observed attention");
  c.sink_tokens = sink_tokens;
  const Kernels& k = kernels();
  in_parallel(c.rows * c.cache.heads, [&](int64_t i) { k.consolidate(c, i, scratch(k.consolidate_scratch(c))); });
}

std::string isa() { return kernels().name; }

}  // namespace
}  // namespace momentkv

TORCH_LIBRARY(momentkv_cpu, m) {
  m.def("write(Tensor(a!) kv, Tensor key, Tensor value, Tensor slots, Tensor(b!)? observed) -> ()", &momentkv::write);
  m.def(
      "attend(Tensor kv, Tensor query, Tensor(a!) output, Tensor(b!)? lse, Tensor first_token, Tensor num_queries, Tensor pages, "
      "Tensor last_slot, Tensor moment_pages, Tensor num_evicted, Tensor? observe_from, Tensor(c!)? logits, float scale, bool corrected, "
      "bool has_covariance, "
      "ScalarType moment_dtype, int covariance_offset) -> ()",
      &momentkv::attend);
  m.def(
      "observe(Tensor kv, Tensor(a!) observed, Tensor query, Tensor lse, Tensor first_token, Tensor num_queries, Tensor pages, "
      "Tensor last_slot, Tensor observe_from, Tensor restart, Tensor(b!)? logits, float scale) -> ()",
      &momentkv::observe);
  m.def(
      "consolidate(Tensor(a!) kv, Tensor store_pages, Tensor retiring_pages, Tensor moment_pages, Tensor num_evicted, "
      "Tensor? score, Tensor(b!)? observed, int sink_tokens, bool has_means, bool has_covariance, ScalarType moment_dtype, "
      "int covariance_offset) -> ()",
      &momentkv::consolidate);
  m.def("isa() -> str", &momentkv::isa);
}

// `import momentkv_vllm._cpu` registers the operators above.
PyMODINIT_FUNC PyInit__cpu() {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_cpu", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
