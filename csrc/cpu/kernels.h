// The CPU kernels: framework-free, one params struct per operation. Same operations as momentkv_vllm/kernels/reference.py,
// which is their specification; bindings.cpp checks tensors and fills the structs.
//
// An operation is a number of independent items. Items may run on any thread in any order; the result does not depend on
// it, nor on the batch that a row is in.
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
enum class Type { kFloat32, kBFloat16, kFloat16, kInt8 };

// A layer's KV cache as vLLM's "vec" CPU attention lays it out: [num_pages, heads, page_size * 2 * head_dim]. A head's part
// of a page is head_dim x page_size keys (dimension-major), then page_size x head_dim values (token-major).
struct Cache {
  char* data;
  Type type;
  int64_t heads, page_size, head_dim;
};

// Where a moment record's parts lie, in bytes from its start; see momentkv_vllm/page_layout.py.
struct RecordLayout {
  bool has_means, has_covariance;
  Type covariance_type;  // bfloat16, float32, or int8 with a scale per row
  int64_t covariance_offset;
};

struct Write {
  Cache cache;
  const void *key, *value;  // [tokens, heads, head_dim] of cache.type, rows `*_stride` numbers apart
  int64_t key_stride, value_stride;
  const int64_t* slots;  // [tokens] page * page_size + slot; negative = not stored
  float* observed;      // [num_pages, heads, page_size], zeroed on fresh pages; may be null
  int64_t tokens;
};

struct Attend {
  Cache cache;
  RecordLayout record_layout;
  const void* query;  // [tokens, query_heads, head_dim] of cache.type, tokens `query_stride` numbers apart
  void* output;       // same shape, tokens `output_stride` numbers apart
  float* lse;         // [tokens, query_heads]; may be null in attend
  float* observed;   // observe: [num_pages, heads, page_size]
  int64_t query_stride, output_stride, query_heads;
  int64_t rows, max_pages, moment_pages;
  const int64_t *first_token, *num_queries, *last_slot;  // [rows]; the i-th query of a row sees slots 0 .. last_slot + i
  const int64_t* pages;                         // [rows, max_pages]
  const int64_t* record_pages;                  // [rows, moment_pages]
  const float* num_evicted;                           // [rows]
  const int64_t* observe_from;                  // [rows] first counted query of the row
  const bool* restart;                          // [rows] observe: forget earlier mass
  float* logits;  // [rows, query_heads, max_pages * page_size], where every row has one query: of rows that count, left by
                  // attend and used up by observe. Null: observe computes them again
  float scale;
  bool corrected;
};

// One item of `attend`: some queries of a row against a share of its slots.
struct AttendItem {
  int32_t row, head;
  int32_t first_query, num_queries;
  int32_t first_page = 0, end_page = 0;
  bool with_record = false;
  float* partial = nullptr;  // null: writes the output. Else [groups * (head_dim + 1)]: normalised outputs, then their logsumexp
};

// Merges the partials of a row's only query; uses up their logsumexps.
struct MergeItem {
  int32_t row, head, splits;
  float* partials;
};

struct Consolidate {
  Cache cache;
  RecordLayout record_layout;
  int64_t rows, store_pages, retiring_pages, moment_pages;
  const int64_t* store;     // [rows, store_pages]
  const int64_t* retiring;  // [rows, retiring_pages], -1 pads at the end
  const int64_t* moments;   // [rows, moment_pages]
  const float* num_evicted;       // [rows] before the event
  const float* score;       // [rows, heads, (store_pages + retiring_pages) * page_size]; null: policies/momentkv.py
  float* observed;         // [num_pages, heads, page_size], moved along with the tokens; may be null
  int64_t sink_tokens;
};

// One instruction set's kernels. `scratch` functions give the floats that an item needs.
struct Kernels {
  const char* name;
  void (*zero_fresh_pages)(const Write&, int64_t head);
  void (*write)(const Write&, int64_t token);
  size_t (*attend_scratch)(const Attend&);
  void (*attend)(const Attend&, const AttendItem&, float* scratch);
  void (*merge)(const Attend&, const MergeItem&);
  size_t (*observe_scratch)(const Attend&);
  void (*observe)(const Attend&, int64_t item, float* scratch);
  size_t (*consolidate_scratch)(const Consolidate&);
  void (*consolidate)(const Consolidate&, int64_t item, float* scratch);
};

constexpr int kMaxHeadDim = 512;
constexpr int kTileSlots = 128;     // slots whose logits are computed before their softmax
constexpr int kSplitSlots = 512;    // slots of one decode item
constexpr int kRowsPerItem = 32;    // query rows (queries x groups) of one item of a chunk

// The best set that this machine has; MOMENTKV_CPU_ISA=avx512|avx2|generic asks for another one.
const Kernels& kernels();

}  // namespace momentkv
