// torch.ops.momentkv_cpu.*: checks tensors, fills the params structs, runs the items on torch's threads.

#include <Python.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <algorithm>
#include <vector>

#include "items.h"
#include "kernels.h"

namespace momentkv {
namespace {
constexpr auto kDevice = c10::DeviceType::CPU;
constexpr bool kAligned = false;
}  // namespace
}  // namespace momentkv

#include "../common/checks.h"

namespace momentkv {
namespace {

// CacheView.cache_arguments (momentkv_vllm/kernels/cache_view.py).
#define MOMENTKV_CACHE const Tensor &kv, double key_scale, double value_scale
#define MOMENTKV_CACHE_SCHEMA(tensor) tensor " kv, float key_scale, float value_scale"

Cache cache_of(MOMENTKV_CACHE) {
  TORCH_CHECK(kv.dim() == 4 && kv.is_cpu() && kv.is_contiguous(),
              "kv must be a contiguous CPU tensor [num_pages, heads, page_size, 2 * head_dim]");
  const int64_t page_size = kv.size(2), head_dim = kv.size(3) / 2;
  TORCH_CHECK(page_size % 16 == 0, "page size ", page_size, " is not a multiple of 16");
  TORCH_CHECK(head_dim % 16 == 0 && head_dim <= kMaxHeadDim, "head dimension ", head_dim, " is not a multiple of 16 up to ",
              kMaxHeadDim);
  const Type type = type_of(kv.scalar_type(), "kv", {at::kFloat, at::kBFloat16, at::kHalf, at::kFloat8_e4m3fn, at::kFloat8_e5m2});
  return {static_cast<char*>(kv.data_ptr()), type, kv.size(1), page_size, head_dim, float(key_scale), float(value_scale)};
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

void write(MOMENTKV_CACHE, const Tensor& key, const Tensor& value, const Tensor& slots, const OptionalTensor& observed) {
  Write w{};
  w.cache = cache_of(kv, key_scale, value_scale);
  set_write(w, kv, key, value, slots, observed);
  const Kernels& k = kernels();
  in_parallel(w.cache.heads, [&](int64_t head) { k.zero_fresh_pages(w, head); });
  in_parallel(w.tokens, [&](int64_t token) { k.write(w, token); });
}

// CacheView.packed_arguments (momentkv_vllm/kernels/cache_view.py); empty: no store is quantised.
PackedLayout packed_of(const Cache& c, at::IntArrayRef packed) {
  if (packed.empty()) return {};
  TORCH_CHECK(packed.size() == 9, "packed has ", packed.size(), " numbers; CacheView.packed_arguments has 9");
  const PackedLayout p{int(packed[0]), packed[1], packed[2], packed[3], packed[4], packed[5], packed[6], packed[7], packed[8]};
  TORCH_CHECK((p.bits == 8 || p.bits == 4) && p.width >= c.head_dim && p.width <= kMaxHeadDim && p.page_tiles > 0 &&
                  p.page_tiles * p.tile_bytes <= c.part_bytes(),
              "packed is ", packed, "; its tiles do not fit a page of ", c.page_size, " tokens");
  return p;
}

// Records of quantised stores hold their keys' centres.
void check_centres(const Cache& c, const PackedLayout& p, int64_t record_pages) {
  const int64_t there = record_pages * c.part_bytes();
  TORCH_CHECK(p.centres + 8 * c.head_dim <= there || p.centres < 0, "a record of ", there, " bytes does not hold centres at ", p.centres);
}

// CacheView.head_arguments (momentkv_vllm/kernels/cache_view.py).
#define MOMENTKV_HEADS \
  const OptionalTensor &places, const OptionalTensor &capacity, int64_t equal_tokens, int64_t places_pages
#define MOMENTKV_HEADS_SCHEMA "Tensor? places, Tensor? capacity, int equal_tokens, int places_pages"
#define MOMENTKV_HEADS_GIVEN places, capacity, equal_tokens, places_pages

// Heads with budgets of their own: momentkv_vllm/head_budgets.py. Where their tiles lie in other layers cannot be checked here.
void set_heads(PackedLayout& p, const Cache& c, MOMENTKV_HEADS, int64_t store_pages) {
  TORCH_CHECK(places.has_value() == capacity.has_value(), "places and capacity are given together");
  if (!places) return;
  TORCH_CHECK(p.bits != 0 && places->dim() == 3, "places has shape ", places->sizes(),
              "; it must be [heads, tiles, 3] of a quantised store");
  p.most_tiles = places->size(1);
  p.places = reinterpret_cast<const TilePlace*>(data_of<int64_t>(places, "places", {c.heads, p.most_tiles, 3}));
  p.capacity = data_of<int64_t>(capacity, "capacity", {c.heads});
  p.equal_tokens = equal_tokens;
  TORCH_CHECK(places_pages <= store_pages, "places lie in ", places_pages, " pages, the store has ", store_pages);
  for (int64_t head = 0; head < c.heads; ++head) {
    TORCH_CHECK(p.capacity[head] % 8 == 0 && p.capacity[head] > 0 && p.capacity[head] <= p.most_tiles * 8, "head ", head,
                " holds ", p.capacity[head], " tokens; they must fill whole tiles, at most ", p.most_tiles);
  }
}

// The rows' quantised stores.
void set_store(Attend& a, const OptionalTensor& stored, int64_t store_pages, at::IntArrayRef packed,
               MOMENTKV_HEADS, const OptionalTensor& observed) {
  a.packed = packed_of(a.cache, packed);
  set_heads(a.packed, a.cache, MOMENTKV_HEADS_GIVEN, store_pages);
  a.stored = data_of<int64_t>(stored, "stored", {a.rows});
  a.store_pages = store_pages;
  if (a.stored != nullptr) check_centres(a.cache, a.packed, a.num_moment_pages);
  a.observed_slots = std::max(a.cache.page_size, a.packed.page_tiles * 8);
  TORCH_CHECK(a.stored == nullptr || a.packed.bits != 0, "stored is given; packed must say how the store is quantised");
  if (!observed) return;
  TORCH_CHECK(observed->dim() == 3, "observed has shape ", observed->sizes(), "; it must be [pages, heads, slots]");
  a.observed = data_of<float>(*observed, "observed", {observed->size(0), a.cache.heads, a.observed_slots});
}

// On a CPU a work list can be looked into: no row reads beyond its pages or its queries.
void check_rows(const Attend& a, int64_t tokens) {
  for (int64_t row = 0; row < a.rows; ++row) {
    const int64_t stored = a.stored_of(row), exact_pages = a.max_pages - (stored > 0 ? a.store_pages : 0);
    TORCH_CHECK(a.num_queries[row] > 0 && a.last_slot[row] >= 0 && a.first_token[row] >= 0 &&
                    a.last_slot[row] + a.num_queries[row] <= exact_pages * a.cache.page_size,
                "row ", row, " sees more slots than its pages hold");
    TORCH_CHECK(stored >= 0 && stored % 8 == 0 && stored <= a.store_pages * a.packed.page_tiles * 8, "row ", row, " has ", stored,
                " stored tokens; they must fill whole tiles of its ", a.store_pages, " store pages");
    TORCH_CHECK(a.first_token[row] + a.num_queries[row] <= tokens, "row ", row, " has queries beyond the ", tokens,
                " tokens of query");
  }
}

// Which queries count; their weights, which attend leaves to observe.
void set_observing(Attend& a, const AttendTensors& work, const OptionalTensor& weights) {
  a.observe_from = data_of<int64_t>(work.observe_from, "observe_from", {a.rows});
  a.restart = data_of<bool>(work.restart, "restart", {a.rows});
  if (!weights) return;
  TORCH_CHECK(a.observe_from != nullptr, "weights are left where observe_from says so");
  TORCH_CHECK(weights->dim() == 4, "weights has shape ", weights->sizes(), "; it must be [rows, heads, query rows, weights]");
  a.left_rows = weights->size(2);
  a.weights = data_of<float>(weights, "weights", {a.rows, a.cache.heads, a.left_rows, a.row_weights()});
  for (int64_t row = 0; row < a.rows; ++row) {
    const int64_t counted = (a.num_queries[row] - a.observe_from[row]) * (a.query_heads / a.cache.heads);
    TORCH_CHECK(a.observe_from[row] >= 0 && counted <= a.left_rows, "weights has room for ", a.left_rows, " query rows, row ", row,
                " has ", counted, " that count");
  }
}

// Both for a part that is the whole of its row and head: what it leaves is observed while it lies in a cache.
void attend_and_observe(const Attend& a, AttendItem part) {
  const Kernels& k = kernels();
  const int64_t counted = std::max<int64_t>(0, part.num_queries - a.observe_from[part.row]) * (a.query_heads / a.cache.heads);
  const size_t left = counted * a.row_weights();
  float* room = scratch(left + std::max(k.attend_scratch(a), k.observe_scratch(a)));
  part.left = room;
  k.attend(a, part, room + left);
  k.observe(a, part, room + left);
}

// Observes too where it is given `observed`.
void attend(MOMENTKV_CACHE, const Tensor& query, const Tensor& output, const OptionalTensor& lse, MOMENTKV_ATTEND_WORK,
            double scale, double softcap, bool corrected, MOMENTKV_RECORD, const OptionalTensor& stored, int64_t store_pages,
            at::IntArrayRef packed, MOMENTKV_HEADS, const OptionalTensor& weights, const OptionalTensor& observed) {
  const AttendTensors work MOMENTKV_ATTEND_WORK_GIVEN;
  Attend a{};
  a.cache = cache_of(kv, key_scale, value_scale);
  set_attend(a, kv, query, output, lse, work, scale, corrected, MOMENTKV_RECORD_GIVEN);
  a.softcap = float(softcap);
  set_store(a, stored, store_pages, packed, MOMENTKV_HEADS_GIVEN, observed);
  check_rows(a, query.size(0));
  set_observing(a, work, weights);
  TORCH_CHECK(a.observed == nullptr || (a.restart != nullptr && a.lse != nullptr), "attend observes with observe_from, restart and lse");
  thread_local Items items;
  items.build(a, at::get_num_threads());
  const Kernels& k = kernels();
  // Not `items` in the lambda: another thread would see its own thread_local.
  const AttendItem* parts = items.parts.data();
  const MergeItem* merges = items.merges.data();
  const AttendItem* in_parts = items.in_parts.data();
  in_parallel(items.parts.size(), [&](int64_t i) {
    const bool whole = parts[i].partial == nullptr && parts[i].num_queries == a.num_queries[parts[i].row];
    if (whole && a.observed != nullptr) return attend_and_observe(a, parts[i]);
    k.attend(a, parts[i], scratch(k.attend_scratch(a)));
  });
  in_parallel(items.merges.size(), [&](int64_t i) { k.merge(a, merges[i]); });
  if (a.observed == nullptr) return;
  in_parallel(items.in_parts.size(), [&](int64_t i) { k.observe(a, in_parts[i], scratch(k.observe_scratch(a))); });
}

void observe(MOMENTKV_CACHE, const Tensor& observed, const Tensor& query, const Tensor& lse, MOMENTKV_ATTEND_WORK,
             double scale, double softcap, const OptionalTensor& stored, int64_t store_pages, at::IntArrayRef packed,
             MOMENTKV_HEADS, const OptionalTensor& weights) {
  const AttendTensors work MOMENTKV_ATTEND_WORK_GIVEN;
  Attend a{};
  a.cache = cache_of(kv, key_scale, value_scale);
  set_queries(a, kv, query, work, scale);
  a.softcap = float(softcap);
  a.num_evicted = data_of<float>(work.num_evicted, "num_evicted", {a.rows});
  set_moment_pages(a, work);
  set_store(a, stored, store_pages, packed, MOMENTKV_HEADS_GIVEN, observed);
  check_rows(a, query.size(0));
  a.lse = data_of<float>(lse, "lse", {query.size(0), a.query_heads});
  set_observing(a, work, weights);
  TORCH_CHECK(a.observe_from != nullptr && a.restart != nullptr, "observe needs observe_from and restart");
  const Kernels& k = kernels();
  in_parallel(a.rows * a.cache.heads, [&](int64_t i) {
    k.observe(a, item_of(a, i / a.cache.heads, i % a.cache.heads), scratch(k.observe_scratch(a)));
  });
}

// The native score's second term reads the means and the observed attention of every row that evicts.
void check_attention_term(const Consolidate& c, bool there) {
  for (int64_t row = 0; !there && row < c.rows; ++row) {
    const int64_t stored = c.stored == nullptr ? 0 : c.stored[row], exact = c.retiring_pages + (stored > 0 ? 0 : c.store_pages);
    const int64_t least = c.packed.capacity == nullptr ? c.store_tokens : *std::min_element(c.packed.capacity, c.packed.capacity + c.cache.heads);
    TORCH_CHECK(stored + exact * c.cache.page_size <= least, "row ", row,
                " evicts by a score with attention, which needs the means and the observed attention; give score");
  }
}

// Heads' own budgets are for the native score.
void check_heads(const Consolidate& c) {
  if (c.packed.places == nullptr) return;
  TORCH_CHECK(c.score == nullptr && c.stored != nullptr, "heads with budgets of their own have no given score");
  for (int64_t head = 0; head < c.cache.heads; ++head)
    TORCH_CHECK(c.packed.capacity[head] % c.run_tokens == 0 && c.run_tokens % 8 == 0, "head ", head, " holds ",
                c.packed.capacity[head], " tokens in runs of ", c.run_tokens, "; they must be whole runs of whole tiles");
  TORCH_CHECK(c.lent_tiles() >= 0, "heads hold ", c.packed.most_tiles, " tiles; each has ", c.store_tokens / 8, " of its own");
}

// Whether a first event retires more than a head's own tiles hold.
bool fills_lent_tiles(const Consolidate& c) {
  if (c.lent_tiles() == 0 || (c.store_pages + c.retiring_pages) * c.cache.page_size <= c.store_tokens) return false;
  return std::find(c.stored, c.stored + c.rows, 0) != c.stored + c.rows;
}

void consolidate(MOMENTKV_CACHE, MOMENTKV_RETIRE_WORK, const OptionalTensor& score, const OptionalTensor& observed,
                 int64_t sink_tokens, double attention_weight, MOMENTKV_RECORD, const OptionalTensor& stored,
                 int64_t run_tokens, int64_t store_tokens, at::IntArrayRef packed, const OptionalTensor& places,
                 const OptionalTensor& capacity, int64_t equal_tokens, int64_t places_pages,
                 const OptionalTensor& feedback) {
  Consolidate c{};
  c.cache = cache_of(kv, key_scale, value_scale);
  c.packed = packed_of(c.cache, packed);
  c.feedback = data_of<float>(feedback, "feedback", {c.cache.heads, c.packed.width, c.packed.width});
  set_heads(c.packed, c.cache, MOMENTKV_HEADS_GIVEN, store_pages.size(1));
  c.observed_slots = std::max(c.cache.page_size, c.packed.page_tiles * 8);
  const int64_t pages = store_pages.size(1), page_size = c.cache.page_size;
  c.candidates = (pages + retiring_pages.size(1)) * page_size + std::max(pages * c.packed.page_tiles, c.packed.most_tiles) * 8;
  set_consolidate(c, kv, MOMENTKV_RETIRE_WORK_GIVEN, score, observed, sink_tokens, attention_weight, MOMENTKV_RECORD_GIVEN,
                  c.candidates, c.observed_slots);
  c.stored = data_of<int64_t>(stored, "stored", {c.rows});
  c.run_tokens = run_tokens;
  c.store_tokens = c.stored == nullptr ? pages * page_size : store_tokens;
  TORCH_CHECK(run_tokens > 0 && page_size % run_tokens == 0 && c.store_tokens % run_tokens == 0, "runs of ", run_tokens,
              " tokens; pages of ", page_size, " and a store of ", c.store_tokens, " must be whole runs");
  TORCH_CHECK(c.stored == nullptr || c.packed.bits != 0, "stored is given; packed must say how the store is quantised");
  if (!score && attention_weight != 0) check_attention_term(c, has_means && observed);
  check_heads(c);
  if (c.stored != nullptr) check_centres(c.cache, c.packed, c.moment_pages);
  TORCH_CHECK(c.store_tokens <= pages * c.observed_slots, "a store of ", pages, " pages does not hold ", store_tokens, " tokens");
  const Kernels& k = kernels();
  const int64_t items = c.rows * c.cache.heads;
  Tensor lent;
  if (fills_lent_tiles(c)) {
    lent = at::empty({items, c.lent_bytes()}, kv.options().dtype(at::kByte));
    c.lent = lent.data_ptr<uint8_t>();
  }
  in_parallel(items, [&](int64_t i) { k.consolidate(c, i, scratch(k.consolidate_scratch(c))); });
  if (c.lent != nullptr) in_parallel(items, [&](int64_t i) { k.move_lent(c, i); });
}

// Keys and values of quantised store pages as float32, [rows, heads, slots, head_dim] each.
std::tuple<Tensor, Tensor> read_store(const Tensor& kv, const Tensor& pages, at::IntArrayRef packed) {
  TORCH_CHECK(pages.dim() == 2, "pages has shape ", pages.sizes(), "; it must be [rows, pages]");
  ReadStore r{cache_of(kv, 1, 1), {}, data_of<int64_t>(pages, "pages", pages.sizes()), pages.size(1), nullptr, nullptr};
  r.packed = packed_of(r.cache, packed);
  TORCH_CHECK(r.packed.bits != 0, "packed must say how the store is quantised");
  const int64_t rows = pages.size(0), slots = pages.size(1) * r.packed.page_tiles * 8;
  const auto floats = kv.options().dtype(at::kFloat);
  const Tensor keys = at::empty({rows, r.cache.heads, slots, r.cache.head_dim}, floats), values = at::empty_like(keys);
  r.keys = keys.data_ptr<float>();
  r.values = values.data_ptr<float>();
  const Kernels& k = kernels();
  in_parallel(rows * r.cache.heads, [&](int64_t i) { k.read_store(r, i); });
  return {keys, values};
}

std::string isa() { return kernels().name; }

}  // namespace
}  // namespace momentkv

// Arguments of one meaning stand in one order here and in csrc/cuda.
TORCH_LIBRARY(momentkv_cpu, m) {
  m.def("write(" MOMENTKV_CACHE_SCHEMA("Tensor(a!)") ", Tensor key, Tensor value, Tensor slots, Tensor(b!)? observed) -> ()", &momentkv::write);
  m.def(
      "attend(" MOMENTKV_CACHE_SCHEMA("Tensor") ", Tensor query, Tensor(a!) output, Tensor(b!)? lse, " MOMENTKV_ATTEND_WORK_SCHEMA
      ", float scale, float softcap, bool corrected, " MOMENTKV_RECORD_SCHEMA
      ", Tensor? stored, int store_pages, int[] packed, " MOMENTKV_HEADS_SCHEMA ", Tensor(c!)? weights, Tensor(d!)? observed) -> ()",
      &momentkv::attend);
  m.def(
      "observe(" MOMENTKV_CACHE_SCHEMA("Tensor") ", Tensor(a!) observed, Tensor query, Tensor lse, " MOMENTKV_ATTEND_WORK_SCHEMA
      ", float scale, float softcap, Tensor? stored, int store_pages, int[] packed, " MOMENTKV_HEADS_SCHEMA ", Tensor(b!)? weights) -> ()",
      &momentkv::observe);
  m.def(
      "consolidate(" MOMENTKV_CACHE_SCHEMA("Tensor(a!)") ", " MOMENTKV_RETIRE_WORK_SCHEMA
      ", Tensor? score, Tensor(b!)? observed, int sink_tokens, float attention_weight, " MOMENTKV_RECORD_SCHEMA
      ", Tensor? stored, int run_tokens, int store_tokens, int[] packed, " MOMENTKV_HEADS_SCHEMA ", Tensor? feedback) -> ()",
      &momentkv::consolidate);
  m.def("read_store(Tensor kv, Tensor pages, int[] packed) -> (Tensor, Tensor)", &momentkv::read_store);
  m.def("isa() -> str", &momentkv::isa);
}

// `import momentkv_vllm._cpu` registers the operators above.
PyMODINIT_FUNC PyInit__cpu() {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_cpu", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
