// Tensors of operators as params of kernels, checked. Included once, by bindings.cpp.
#pragma once

#include <torch/library.h>

#include <algorithm>

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
  TORCH_CHECK(a.observed == nullptr || (a.restart != nullptr && a.lse != nullptr), "attend observes with observe_from, restart and lse");
  if (!weights) return;
  TORCH_CHECK(a.observe_from != nullptr, "weights are left where observe_from says so");
  TORCH_CHECK(weights->dim() == 4, "weights has shape ", weights->sizes(), "; it must be [rows, heads, query rows, weights]");
  a.left_rows = weights->size(2);
  a.weights = data_of<float>(weights, "weights", {a.rows, a.cache.heads, a.left_rows, a.row_weights()});
  for (int64_t row = 0; row < a.rows; ++row) {
    TORCH_CHECK(a.observe_from[row] >= 0 && a.counted_rows(row) <= a.left_rows, "weights has room for ", a.left_rows,
                " query rows, row ", row, " has ", a.counted_rows(row), " that count");
  }
}

// What attend is told of records, and whether they correct.
struct Correction {
  bool corrected;
  RecordArguments record;
};

// Observes too where it is given `observed`.
Attend attend_of(MOMENTKV_CACHE, const Tensor& query, const Tensor& output, const OptionalTensor& lse, const AttendTensors& work,
                 double scale, double softcap, const Correction& correction, const OptionalTensor& stored, int64_t store_pages,
                 at::IntArrayRef packed, MOMENTKV_HEADS, const OptionalTensor& weights, const OptionalTensor& observed) {
  Attend a{};
  a.cache = cache_of(kv, key_scale, value_scale);
  set_attend(a, kv, query, output, lse, work, scale, correction.corrected, correction.record);
  a.softcap = float(softcap);
  set_store(a, stored, store_pages, packed, MOMENTKV_HEADS_GIVEN, observed);
  check_rows(a, query.size(0));
  set_observing(a, work, weights);
  return a;
}

// The native score's second term reads the means and the observed attention of every row that evicts.
void check_attention_term(const Consolidate& c, bool there) {
  for (int64_t row = 0; !there && row < c.rows; ++row) {
    const int64_t stored = c.stored == nullptr ? 0 : c.stored[row];
    const int64_t least = c.packed.capacity == nullptr ? c.store_tokens : *std::min_element(c.packed.capacity, c.packed.capacity + c.cache.heads);
    TORCH_CHECK(stored + c.exact_tokens(row) <= least, "row ", row,
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

// What all events of a call have in common.
struct Events {
  int64_t sink_tokens;
  double attention_weight;
  int64_t run_tokens, store_tokens;
};

Consolidate consolidate_of(MOMENTKV_CACHE, const RetireTensors& work, const OptionalTensor& score, const OptionalTensor& observed,
                           const Events& events, const RecordArguments& record, const OptionalTensor& stored, at::IntArrayRef packed,
                           MOMENTKV_HEADS, const OptionalTensor& feedback) {
  const auto& [sink_tokens, attention_weight, run_tokens, store_tokens] = events;
  Consolidate c{};
  c.cache = cache_of(kv, key_scale, value_scale);
  c.packed = packed_of(c.cache, packed);
  c.feedback = data_of<float>(feedback, "feedback", {c.cache.heads, c.packed.width, c.packed.width});
  set_heads(c.packed, c.cache, MOMENTKV_HEADS_GIVEN, work.store_pages.size(1));
  c.observed_slots = std::max(c.cache.page_size, c.packed.page_tiles * 8);
  const int64_t pages = work.store_pages.size(1), page_size = c.cache.page_size;
  c.candidates = (pages + work.retiring_pages.size(1)) * page_size + std::max(pages * c.packed.page_tiles, c.packed.most_tiles) * 8;
  set_consolidate(c, kv, work, score, observed, sink_tokens, attention_weight, record, c.candidates, c.observed_slots);
  c.stored = data_of<int64_t>(stored, "stored", {c.rows});
  c.run_tokens = run_tokens;
  c.store_tokens = c.stored == nullptr ? pages * page_size : store_tokens;
  TORCH_CHECK(run_tokens > 0 && page_size % run_tokens == 0 && c.store_tokens % run_tokens == 0, "runs of ", run_tokens,
              " tokens; pages of ", page_size, " and a store of ", c.store_tokens, " must be whole runs");
  TORCH_CHECK(c.stored == nullptr || c.packed.bits != 0, "stored is given; packed must say how the store is quantised");
  if (!score && attention_weight != 0) check_attention_term(c, record.has_means && observed);
  check_heads(c);
  if (c.stored != nullptr) check_centres(c.cache, c.packed, c.moment_pages);
  TORCH_CHECK(c.store_tokens <= pages * c.observed_slots, "a store of ", pages, " pages does not hold ", store_tokens, " tokens");
  return c;
}

}  // namespace
}  // namespace momentkv
