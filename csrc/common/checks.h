// Checks tensors and fills the params that both families share. Included once, by the bindings of a family, which first
// define in this namespace: kDevice, where its tensors lie; kAligned, whether 16 bytes are read at once.
// Nothing here is visible outside of the including file: the extensions of several devices live in one process.

#include <ATen/core/Tensor.h>
#include <torch/library.h>

namespace momentkv {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

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

Type type_of(at::ScalarType type, const char* name, std::initializer_list<at::ScalarType> known) {
  TORCH_CHECK(std::find(known.begin(), known.end(), type) != known.end(), name, " is ", type, "; the ", kDevice,
              " kernels know ", c10::Join(", ", at::ArrayRef<at::ScalarType>(known)));
  switch (type) {
    case at::kFloat: return Type::kFloat32;
    case at::kBFloat16: return Type::kBFloat16;
    case at::kHalf: return Type::kFloat16;
    case at::kFloat8_e4m3fn: return Type::kFp8E4m3;
    case at::kFloat8_e5m2: return Type::kFp8E5m2;
    default: return Type::kInt8;
  }
}

bool is_aligned(const Tensor& x) {
  bool aligned = reinterpret_cast<uintptr_t>(x.data_ptr()) % 16 == 0;
  for (int64_t dim = 0; dim + 1 < x.dim(); ++dim) aligned = aligned && (x.size(dim) == 1 || x.stride(dim) % 8 == 0);
  return aligned;
}

// What `x`, which is written to a cache or compared with it, is to be like: the cache, or any float where that is fp8.
const Tensor& like_beside(const Tensor& x, const Tensor& cache, const char* name) {
  if (!c10::isFloat8Type(cache.scalar_type())) return cache;
  type_of(x.scalar_type(), name, {at::kFloat, at::kBFloat16, at::kHalf});
  TORCH_CHECK(x.device() == cache.device(), name, " is on ", x.device(), ", the cache on ", cache.device());
  return x;
}

// [tokens, heads, head_dim] with packed heads, as `like` in type and place; returns the distance of two tokens in numbers.
int64_t token_stride(const Tensor& x, const Tensor& like, int64_t head_dim, const char* name) {
  TORCH_CHECK(x.dim() == 3 && x.device() == like.device() && x.scalar_type() == like.scalar_type(), name, " is ",
              x.scalar_type(), " ", x.sizes(), " on ", x.device(), "; it must be [tokens, heads, head_dim] ",
              like.scalar_type(), " on ", like.device());
  TORCH_CHECK(x.size(2) == head_dim && x.stride(2) == 1 && x.stride(1) == x.size(2) && (!kAligned || is_aligned(x)), name,
              " has shape ", x.sizes(), " and strides ", x.strides(), "; heads of ", head_dim,
              " numbers must lie side by side", kAligned ? ", tokens at multiples of 8 numbers" : "");
  return x.stride(0);
}

// What Python hands over by one call each, in its order: of the functions here, of a schema, and as a record.
// One by one, not as lists: a list of tensors costs a call several microseconds.

// CacheView.record_arguments (momentkv_vllm/kernels/cache_view.py).
#define MOMENTKV_RECORD                                                                                              \
  bool has_means, bool has_covariance, at::ScalarType moment_dtype, int64_t mean_key, int64_t mean_value, int64_t spread, \
      int64_t scales, int64_t covariance
#define MOMENTKV_RECORD_SCHEMA                                                                                      \
  "bool has_means, bool has_covariance, ScalarType moment_dtype, int mean_key, int mean_value, int spread, int scales, " \
  "int covariance"
#define MOMENTKV_RECORD_GIVEN {has_means, has_covariance, moment_dtype, mean_key, mean_value, spread, scales, covariance}
struct RecordArguments {
  bool has_means, has_covariance;
  at::ScalarType moment_dtype;
  int64_t mean_key, mean_value, spread, scales, covariance;
};

// AttendWork.arguments() (momentkv_vllm/kernels/worklists.py).
#define MOMENTKV_ATTEND_WORK                                                                             \
  const Tensor &first_token, const Tensor &num_queries, const Tensor &pages, const Tensor &last_slot,    \
      const Tensor &moment_pages, const Tensor &num_evicted, const OptionalTensor &observe_from, const OptionalTensor &restart
#define MOMENTKV_ATTEND_WORK_SCHEMA                                                                       \
  "Tensor first_token, Tensor num_queries, Tensor pages, Tensor last_slot, Tensor moment_pages, Tensor num_evicted, " \
  "Tensor? observe_from, Tensor? restart"
#define MOMENTKV_ATTEND_WORK_GIVEN \
  {first_token, num_queries, pages, last_slot, moment_pages, num_evicted, observe_from, restart}
struct AttendTensors {
  const Tensor &first_token, &num_queries, &pages, &last_slot, &moment_pages, &num_evicted;
  const OptionalTensor &observe_from, &restart;
};

// RetireWork.arguments() likewise.
#define MOMENTKV_RETIRE_WORK \
  const Tensor &store_pages, const Tensor &retiring_pages, const Tensor &moment_pages, const Tensor &num_evicted
#define MOMENTKV_RETIRE_WORK_SCHEMA "Tensor store_pages, Tensor retiring_pages, Tensor moment_pages, Tensor num_evicted"
#define MOMENTKV_RETIRE_WORK_GIVEN {store_pages, retiring_pages, moment_pages, num_evicted}
struct RetireTensors {
  const Tensor &store_pages, &retiring_pages, &moment_pages, &num_evicted;
};

// Only if `used` must the record fit its pages.
template <class Cache>
RecordLayout record_of(const Cache& cache, const RecordArguments& r, const Tensor& moment_pages, bool used) {
  TORCH_CHECK(moment_pages.dim() == 2, "moment_pages has shape ", moment_pages.sizes(), "; it must be [rows, pages]");
  const Type type = type_of(r.moment_dtype, "moment_dtype", {at::kChar, at::kBFloat16, at::kFloat});
  const RecordLayout layout{r.has_means, r.has_covariance, type, int(r.mean_key), int(r.mean_value), int(r.spread),
                            int(r.scales), int(r.covariance)};
  const int64_t d = cache.head_dim, there = moment_pages.size(1) * cache.page_size * 2 * d * bytes_of(cache.type);
  const int64_t needed = layout.has_covariance ? layout.covariance + d * d * bytes_of(type) : layout.spread + 4;
  TORCH_CHECK(!used || (r.has_means && there >= needed), "moment_pages has ", moment_pages.size(1), " pages of ", there,
              " bytes a head; its record needs ", r.has_means ? needed : 0, r.has_means ? "" : ", it has no means");
  return layout;
}

// `like`: the cache's tensor, whose first dimension counts pages. Params hold the cache already.
template <class Cache>
void set_write(WriteParams<Cache>& w, const Tensor& like, const Tensor& key, const Tensor& value, const Tensor& slots,
               const OptionalTensor& observed) {
  const auto& c = w.cache;
  TORCH_CHECK(slots.dim() == 1 && key.dim() == 3 && slots.numel() <= key.size(0) && key.sizes() == value.sizes() &&
                  key.size(1) == c.heads,
              "slots has shape ", slots.sizes(), ", key ", key.sizes(), ", value ", value.sizes(),
              "; key and value must be [at least the slots, ", c.heads, " heads, head_dim]");
  w.tokens = slots.numel();
  w.slots = data_of<int64_t>(slots, "slots", {w.tokens});
  const Tensor& beside = like_beside(key, like, "key");
  w.type = type_of(beside.scalar_type(), "key", {beside.scalar_type()});
  w.key_stride = token_stride(key, beside, c.head_dim, "key");
  w.value_stride = token_stride(value, beside, c.head_dim, "value");
  w.key = static_cast<const char*>(key.data_ptr());
  w.value = static_cast<const char*>(value.data_ptr());
  TORCH_CHECK(!observed || observed->dim() == 3, "observed must be [pages, heads, slots]");
  w.observed_slots = observed ? observed->size(2) : 0;
  w.observed = data_of<float>(observed, "observed", {like.size(0), c.heads, w.observed_slots});
}

template <class Cache>
void set_queries(QueryParams<Cache>& q, const Tensor& like, const Tensor& query, const AttendTensors& work, double scale) {
  TORCH_CHECK(work.pages.dim() == 2, "pages has shape ", work.pages.sizes(), "; it must be [rows, pages]");
  q.rows = work.pages.size(0);
  q.max_pages = work.pages.size(1);
  q.pages = data_of<int64_t>(work.pages, "pages", {q.rows, q.max_pages});
  q.first_token = data_of<int64_t>(work.first_token, "first_token", {q.rows});
  q.num_queries = data_of<int64_t>(work.num_queries, "num_queries", {q.rows});
  q.last_slot = data_of<int64_t>(work.last_slot, "last_slot", {q.rows});
  const Tensor& beside = like_beside(query, like, "query");
  q.type = type_of(beside.scalar_type(), "query", {beside.scalar_type()});
  q.query_stride = token_stride(query, beside, q.cache.head_dim, "query");
  q.query = static_cast<const char*>(query.data_ptr());
  q.query_heads = query.size(1);
  TORCH_CHECK(q.query_heads % q.cache.heads == 0, q.query_heads, " query heads over ", q.cache.heads, " KV heads");
  q.scale = float(scale);
}

template <class Cache>
void set_moment_pages(AttendParams<Cache>& a, const AttendTensors& work) {
  TORCH_CHECK(work.moment_pages.dim() == 2, "moment_pages has shape ", work.moment_pages.sizes(), "; it must be [rows, pages]");
  a.num_moment_pages = work.moment_pages.size(1);
  a.moment_pages = data_of<int64_t>(work.moment_pages, "moment_pages", {a.rows, a.num_moment_pages});
}

template <class Cache>
void set_attend(AttendParams<Cache>& a, const Tensor& like, const Tensor& query, const Tensor& output,
                const OptionalTensor& lse, const AttendTensors& work, double scale, bool corrected,
                const RecordArguments& record) {
  set_queries(a, like, query, work, scale);
  a.record_layout = record_of(a.cache, record, work.moment_pages, corrected);
  set_moment_pages(a, work);
  a.num_evicted = data_of<float>(work.num_evicted, "num_evicted", {a.rows});
  a.corrected = corrected;
  a.output_stride = token_stride(output, query, a.cache.head_dim, "output");
  TORCH_CHECK(output.sizes() == query.sizes(), "output has shape ", output.sizes(), " instead of ", query.sizes());
  a.output = static_cast<char*>(output.data_ptr());
  a.lse = data_of<float>(lse, "lse", {query.size(0), a.query_heads});
}

template <class Cache>
void set_consolidate(ConsolidateParams<Cache>& c, const Tensor& like, const RetireTensors& work, const OptionalTensor& score,
                     const OptionalTensor& observed, int64_t sink_tokens, double attention_weight,
                     const RecordArguments& record, int64_t candidates, int64_t observed_slots) {
  c.record_layout = record_of(c.cache, record, work.moment_pages, record.has_means);
  TORCH_CHECK(work.store_pages.dim() == 2 && work.retiring_pages.dim() == 2, "store_pages ", work.store_pages.sizes(),
              " and retiring_pages ", work.retiring_pages.sizes(), " must be [rows, pages]");
  c.rows = work.store_pages.size(0);
  c.store_pages = work.store_pages.size(1);
  c.retiring_pages = work.retiring_pages.size(1);
  c.moment_pages = work.moment_pages.size(1);
  c.store = data_of<int64_t>(work.store_pages, "store_pages", {c.rows, c.store_pages});
  c.retiring = data_of<int64_t>(work.retiring_pages, "retiring_pages", {c.rows, c.retiring_pages});
  c.moments = data_of<int64_t>(work.moment_pages, "moment_pages", {c.rows, c.moment_pages});
  c.num_evicted = data_of<float>(work.num_evicted, "num_evicted", {c.rows});
  c.score = data_of<float>(score, "score", {c.rows, c.cache.heads, candidates});
  c.observed = data_of<float>(observed, "observed", {like.size(0), c.cache.heads, observed_slots});
  c.sink_tokens = sink_tokens;
  c.attention_weight = float(attention_weight);
}

}  // namespace
}  // namespace momentkv
