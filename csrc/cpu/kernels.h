// The CPU kernels: framework-free, one params struct per operation (most of them in common/params.h). Same operations as
// momentkv_vllm/kernels/reference.py, which is their specification; bindings.cpp checks tensors and fills the structs.
//
// An operation is a number of independent items. Items may run on any thread in any order; the result does not depend on
// it, nor on the batch that a row is in.
#pragma once

#include "../common/params.h"

namespace momentkv {

// A layer's KV cache as vLLM's "vec" CPU attention lays it out: [num_pages, heads, page_size * 2 * head_dim]. A head's part
// of a page is head_dim x page_size keys (dimension-major), then page_size x head_dim values (token-major).
struct Cache {
  char* data;
  Type type;
  int64_t heads, page_size, head_dim;
  float key_scale = 1, value_scale = 1;  // of fp8: a number is its scale times what vLLM has stored

  int64_t part_bytes() const { return page_size * 2 * head_dim * bytes_of(type); }  // of a head, of a page
};

using Write = WriteParams<Cache>;

struct Consolidate : ConsolidateParams<Cache> {
  PackedLayout packed;
  const int64_t* stored;  // [rows] tokens in a quantised store, 0: its pages are still exact; null: no store is quantised
  int64_t store_tokens;   // that a store holds when it is full, in the mean over heads
  int64_t run_tokens;     // neighbours that stay or leave together
  int64_t observed_slots, candidates;  // of a page; of a row of `score`
  // [heads, width, width] of errors in keys (momentkv_vllm/key_rounding.py), where those that enter a store shall count; or null.
  const float* feedback;
  // [rows * heads, lent_bytes()]: what first events put into tiles that were lent, until all heads have read what lies there.
  // Null: none does.
  uint8_t* lent = nullptr;

  int64_t lent_tiles() const { return packed.places == nullptr ? 0 : packed.most_tiles - store_tokens / 8; }
  // Tiles, then what queries have given to their tokens.
  int64_t lent_bytes() const { return lent_tiles() * (packed.tile_bytes + 8 * int64_t(sizeof(float))); }

  // Tokens that have left the row's window before the event. Of rows with a quantised store; else 0.
  int64_t gone(int64_t row) const { return stored == nullptr ? 0 : stored[row] + int64_t(num_evicted[row]); }
  // Tokens in the exact pages that it takes, padding among them; a store that is not quantised, or not yet, is of those.
  int64_t exact_tokens(int64_t row) const {
    return (retiring_pages + (stored != nullptr && stored[row] > 0 ? 0 : store_pages)) * cache.page_size;
  }

  // What a head may hold once `tokens` have left the row's window.
  int64_t capacity(int64_t head, int64_t tokens) const {
    return packed.capacity == nullptr || tokens <= packed.equal_tokens ? store_tokens : packed.capacity[head];
  }
};

struct ReadStore {
  Cache cache;
  PackedLayout packed;
  const int64_t* pages;  // [rows, num_pages]
  int64_t num_pages;
  float *keys, *values;  // [rows, heads, slots, head_dim]
};

// Of attend and of observe.
struct Attend : AttendParams<Cache> {
  float softcap;                // of the scaled logits, softcap * tanh(x / softcap); 0: they are not capped
  float* observed;              // observe: [num_pages, heads, page_size]
  const int64_t* observe_from;  // [rows] first counted query of the row
  const bool* restart;          // [rows] observe: forget earlier mass
  // [rows, heads, left_rows, row_weights()]: what attend leaves to observe of each head's query rows (queries x query heads of a KV
  // head) that count, the first one first. A weight per slot, then for every 8 slots the logit that they are relative to. Null:
  // observe computes them itself, with the same bits unless a row's only query is split or matrix units attend: rounding then.
  float* weights;
  int64_t left_rows;

  float* weights_of(int64_t row, int64_t head) const {
    return weights == nullptr ? nullptr : weights + (row * cache.heads + head) * left_rows * row_weights();
  }
  // Query rows of a head that count for observe; with observe_from.
  int64_t counted_rows(int64_t row) const {
    const int64_t queries = num_queries[row] - observe_from[row];
    return queries > 0 ? queries * (query_heads / cache.heads) : 0;
  }
  PackedLayout packed;
  const int64_t* stored;  // [rows] tokens in a row's quantised store, its first `store_pages` pages; 0: none. Null: no row has one
  int64_t store_pages;
  int64_t observed_slots;  // of a page

  int64_t stored_of(int64_t row) const { return stored == nullptr ? 0 : stored[row]; }
  // Tokens that a head holds in the row's quantised store, and those that it has evicted.
  int64_t held(int64_t row, int64_t head) const { return packed.held(head, stored_of(row), num_evicted[row]); }
  float evicted(int64_t row, int64_t head) const {
    return num_evicted[row] + float(stored_of(row) - held(row, head));
  }
  // The pages of a row that are exact, slot 0 first; `last_slot` counts from there.
  const int64_t* exact_pages(int64_t row) const { return pages + row * max_pages + (stored_of(row) > 0 ? store_pages : 0); }
  // Slots of the store, which come before the exact ones in `weights`.
  int64_t store_slots() const {
    return stored == nullptr ? 0 : (packed.places == nullptr ? store_pages * packed.page_tiles : packed.most_tiles) * 8;
  }
  int64_t row_slots() const { return store_slots() + max_pages * cache.page_size; }
  int64_t row_weights() const { return row_slots() / 8 * 9; }
};

// One item of `attend`: some queries of a row against a share of its slots, those of a quantised store first. Of `observe`: all
// queries of a row.
struct AttendItem {
  int32_t row, head;
  int32_t first_query, num_queries;
  int64_t first_slot = 0, end_slot = 0;
  bool with_record = false;
  float* partial = nullptr;  // null: writes the output. Else [groups * (head_dim + 1)]: normalised outputs, then their logsumexp
  float* left = nullptr;     // Attend::weights of the row and head, or other room for as many; null: none are left
};

// Merges the partials of a row's only query; uses up their logsumexps.
struct MergeItem {
  int32_t row, head, splits;
  float* partials;
};

// One instruction set's kernels. `scratch` functions give the floats that an item needs.
struct Kernels {
  const char* name;
  void (*zero_fresh_pages)(const Write&, int64_t head);
  void (*write)(const Write&, int64_t token);
  int (*most_rows)(const Attend&);  // query rows (queries x groups) of one item of a chunk
  size_t (*attend_scratch)(const Attend&);
  void (*attend)(const Attend&, const AttendItem&, float* scratch);
  void (*merge)(const Attend&, const MergeItem&);
  size_t (*observe_scratch)(const Attend&);
  void (*observe)(const Attend&, const AttendItem&, float* scratch);
  size_t (*consolidate_scratch)(const Consolidate&);
  void (*consolidate)(const Consolidate&, int64_t item, float* scratch);
  void (*move_lent)(const Consolidate&, int64_t item);
  void (*read_store)(const ReadStore&, int64_t item);
};

constexpr int kMaxHeadDim = 512;
constexpr int kTileSlots = 128;     // slots whose logits are computed before their softmax
constexpr int kSplitSlots = 512;    // slots of one decode item
constexpr int kPackedSlots = 4;     // quantised slots that take as long as one exact one, rotating queries included
constexpr int kRowsPerItem = 32;    // query rows of one item of a chunk, without matrix units
constexpr int kPanelRows = 16;      // query rows that take as long as bringing what they read into the form that units take

// The best set that this machine has; MOMENTKV_CPU_ISA=amx|avx512vnni|avx512|avx2|generic asks for another one.
const Kernels& kernels();

}  // namespace momentkv
