// What the operations of csrc/cpu and csrc/cuda are told: number formats, a record's layout, the params that both share.
// `Cache` is a family's own view of vLLM's KV cache; counts have the type of its sizes. Same operations as
// momentkv_vllm/kernels/base.py; bindings check the tensors and fill the structs (checks.h).
#pragma once

#include <cstddef>
#include <cstdint>

namespace momentkv {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};
struct Int8 {
  int8_t number;
};
struct Fp8E4m3 {
  uint8_t bits;
};
struct Fp8E5m2 {
  uint8_t bits;
};
enum class Type { kFloat32, kBFloat16, kFloat16, kInt8, kFp8E4m3, kFp8E5m2 };

constexpr int bytes_of(Type type) {
  return type == Type::kFloat32 ? 4 : type == Type::kBFloat16 || type == Type::kFloat16 ? 2 : 1;
}

// Where the parts of a moment record lie, in bytes from its start: momentkv_vllm/page_layout.py says so.
struct RecordLayout {
  bool has_means, has_covariance;
  Type covariance_type;  // bfloat16, float32, or int8 with a scale per row
  int mean_key, mean_value, spread, scales, covariance;
};

// Where a head's tile lies, its own or one that was lent, maybe by another layer (momentkv_vllm/head_budgets.py): page of the row's
// store; bytes from that page of this layer's cache to the tile, and numbers from that page's observations to the tile's.
struct TilePlace {
  int64_t column, data, observed;
};

// How quantised store pages look: momentkv_vllm/packed_store.py. `block`: numbers that are rotated together.
struct PackedLayout {
  int bits = 0;  // 8 or 4; 0: no store is quantised
  int64_t width = 0, block = 0, code_bytes = 0, values_offset = 0, scales_offset = 0, tile_bytes = 0, page_tiles = 0;
  int64_t centres = -1;  // byte of a record where those of the keys begin (momentkv_vllm/key_centres.py); -1: keys have none
  // Heads with budgets of their own; null: all hold the same number of tokens, each in its own part of the pages.
  const TilePlace* places = nullptr;    // [heads, most_tiles]
  const int64_t* capacity = nullptr;    // [heads] tokens
  int64_t most_tiles = 0;
  int64_t equal_tokens = 0;  // that have left the window until when heads hold as many, all of them

  // part_bytes: a head's of a page; part_observed: observed numbers of it.
  TilePlace place(int64_t head, int64_t number, int64_t part_bytes, int64_t part_observed) const {
    if (places != nullptr) return places[head * most_tiles + number];
    const int64_t tile = number % page_tiles;
    return {number / page_tiles, head * part_bytes + tile * tile_bytes, head * part_observed + tile * 8};
  }
  // Of the tokens that have left a row's window, those that a head holds where every head would hold `stored`; the others it
  // has evicted.
  int64_t held(int64_t head, int64_t stored, float evicted) const {
    const int64_t all = stored + int64_t(evicted);
    if (capacity == nullptr || all <= equal_tokens) return stored;
    return all < capacity[head] ? all : capacity[head];
  }
};

template <class Cache>
struct WriteParams {
  Cache cache;
  const char *key, *value;  // [tokens, heads, head_dim] of `type`, tokens `*_stride` numbers apart
  int64_t key_stride, value_stride;
  Type type;             // the cache's; any float where that is fp8
  const int64_t* slots;  // [tokens] page * page_size + slot; negative = not written
  float* observed;       // [num_pages, heads, observed_slots], zeroed on fresh pages; may be null
  decltype(Cache::heads) tokens;
  int64_t observed_slots;
};

// What attend and observe read: some queries of every row against the pages that the row retains.
template <class Cache>
struct QueryParams {
  using Int = decltype(Cache::heads);
  Cache cache;
  const char* query;  // [tokens, query_heads, head_dim] of `type`, tokens `query_stride` numbers apart
  int64_t query_stride;
  Type type;          // of queries and outputs: the cache's; any float where that is fp8
  Int query_heads, rows, max_pages;
  const int64_t *first_token, *num_queries, *last_slot;  // [rows]; the i-th query of a row sees slots 0 .. last_slot + i
  const int64_t* pages;                                  // [rows, max_pages]
  float scale;
};

template <class Cache>
struct AttendParams : QueryParams<Cache> {
  RecordLayout record_layout;
  char* output;  // [tokens, query_heads, head_dim], tokens `output_stride` numbers apart
  int64_t output_stride;
  float* lse;                   // [tokens, query_heads] with the moments; may be null
  const int64_t* moment_pages;  // [rows, num_moment_pages]
  const float* num_evicted;     // [rows]; 0 = no record
  decltype(Cache::heads) num_moment_pages;
  bool corrected;
};

template <class Cache>
struct ConsolidateParams {
  using Int = decltype(Cache::heads);
  Cache cache;
  RecordLayout record_layout;
  Int rows, store_pages, retiring_pages, moment_pages, sink_tokens;
  const int64_t* store;       // [rows, store_pages]
  const int64_t* retiring;    // [rows, retiring_pages], -1 pads at the end; a row of padding is skipped
  const int64_t* moments;     // [rows, moment_pages]
  const float* num_evicted;   // [rows] before the event
  const float* score;         // [rows, heads, (store_pages + retiring_pages) * page_size]; null: the native score
  float* observed;            // [num_pages, heads, page_size], moved along with the tokens; may be null if score is given
  float attention_weight;     // of the native score's second term; unused if score is given
};

}  // namespace momentkv
