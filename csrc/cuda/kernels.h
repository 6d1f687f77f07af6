// The CUDA kernels: framework-free, one params struct per operation. Same operations as momentkv_vllm/kernels/reference.py,
// which is their specification; bindings.cpp checks tensors and fills the structs.
//
// Launch sizes depend on shapes alone, never on what the work lists hold, and nothing waits for the device: a launch can be
// captured in a CUDA graph. What a row gives depends on that row only, not on its batch. Pointers are device memory.
#pragma once

#include <cstddef>
#include <cstdint>

namespace momentkv::cuda {

enum class Type { kBFloat16, kFloat16, kFloat32, kInt8 };

// A layer's KV cache as views [num_pages, heads, page_size, head_dim] of keys and of values: the last dimension is packed,
// the others lie anywhere (vLLM's NHD and HND layouts, keys beside or before values). Strides count numbers.
struct Cache {
  char *keys, *values;  // 16-byte aligned, as all strides are
  int64_t page_stride, head_stride, slot_stride;
  int heads, page_size, head_dim;  // page_size: a multiple of 16
  Type type;                       // bfloat16 or float16
};

// A head's record in its moment pages, see momentkv_vllm/page_layout.py: its bytes run through the pages slot by slot, key
// numbers before value numbers.
struct RecordLayout {
  bool has_means, has_covariance;
  Type covariance_type;  // bfloat16, float32, or int8 with a scale per row
  int covariance_offset;
};

// What attend and observe read: some queries of every row against the pages that the row retains.
struct Queries {
  Cache cache;
  const char* query;  // [tokens, query_heads, head_dim] of cache.type, tokens `query_stride` numbers apart
  int64_t query_stride;
  int query_heads, rows, max_pages, max_queries;
  const int64_t *first_token, *num_queries, *last_slot;  // [rows]; the i-th query of a row sees slots 0 .. last_slot + i; none: skipped
  const int64_t* pages;                         // [rows, max_pages]
  float scale;
};

struct Attend {
  Queries work;
  RecordLayout record_layout;
  char* output;  // [tokens, query_heads, head_dim], tokens `output_stride` numbers apart
  int64_t output_stride;
  float* lse;                   // [tokens, query_heads] with the moments; may be null
  const int64_t* moment_pages;  // [rows, num_moment_pages]
  const float* num_evicted;           // [rows]; 0 = no record
  int num_moment_pages;
  bool corrected;
  int max_splits, units;  // see Unit in units.cuh
  int tile_rows;          // query rows that a tile has at most, up to kTileRows
  float* partial_out;     // [rows, heads, units, tile_rows, head_dim], normalised
  float* partial_lse;     // [rows, heads, units, tile_rows] natural logarithm
};

struct Observe {
  Queries work;
  const float* lse;             // [tokens, query_heads] as attend wrote it
  float* observed;             // [num_pages, heads, page_size]
  const int64_t* observe_from;  // [rows] first counted query of the row
  const bool* restart;          // [rows] forget earlier mass
};

struct Write {
  Cache cache;
  const char *key, *value;  // [tokens, heads, head_dim], tokens `*_stride` numbers apart
  int64_t key_stride, value_stride;
  const int64_t* slots;  // [tokens] page * page_size + slot; negative = not stored
  float* observed;      // [num_pages, heads, page_size], zeroed on fresh pages; may be null
  int tokens;
};

struct Consolidate {
  Cache cache;
  RecordLayout record_layout;
  int rows, store_pages, retiring_pages, moment_pages, sink_tokens;
  const int64_t* store;     // [rows, store_pages]
  const int64_t* retiring;  // [rows, retiring_pages], -1 pads at the end; a row of padding is skipped
  const int64_t* moments;   // [rows, moment_pages]
  const float* num_evicted;       // [rows] before the event
  const float* score;       // [rows, heads, (store_pages + retiring_pages) * page_size]; null: policies/momentkv.py
  float* observed;         // [num_pages, heads, page_size], moved along with the tokens; may be null if score is given
  float* own_score;         // workspace, like score, two of them; unused if score is given
  int* losers;              // workspace [rows, heads, retiring_pages * page_size]
  float* folded;            // workspace [rows, heads, 2 * head_dim + kFoldedSpread + head_dim * head_dim]: the losers' mean
                            // key, mean value, value spread, covariance; unused without means
};

constexpr int kFoldedSpread = 4;  // numbers that the spread takes, so that the covariance is aligned
constexpr int kTileRows = 16;     // query rows (queries x query heads of a KV head) of one tensor-core tile
constexpr int kTileSlots = 16;    // slots of one tile: never straddles two pages
constexpr int kSplitSlots = 256;  // least slots of a decode split; not tuned on a GPU yet

// `stream` is a cudaStream_t. Return an error's text, or null.
const char* attend(const Attend&, void* stream);
const char* observe(const Observe&, void* stream);
const char* write(const Write&, void* stream);
const char* consolidate(const Consolidate&, void* stream);

}  // namespace momentkv::cuda
