// The CUDA kernels: framework-free, one params struct per operation (most of them in common/params.h). Same operations as
// momentkv_vllm/kernels/reference.py, which is their specification; bindings.cpp checks tensors and fills the structs.
//
// Launch sizes depend on shapes alone, never on what the work lists hold, and nothing waits for the device: a launch can be
// captured in a CUDA graph. What a row gives depends on that row only, not on its batch. Pointers are device memory.
#pragma once

#include "../common/params.h"

namespace momentkv::cuda {

// A layer's KV cache as views [num_pages, heads, page_size, head_dim] of keys and of values: the last dimension is packed,
// the others lie anywhere (vLLM's NHD and HND layouts, keys beside or before values). Strides count numbers.
// A head's record runs through the slots of its moment pages, key numbers before value numbers.
struct Cache {
  char *keys, *values;  // 16-byte aligned, as all strides are
  int64_t page_stride, head_stride, slot_stride;
  int heads, page_size, head_dim;  // page_size: a multiple of 16
  Type type;                       // bfloat16 or float16
};

using Write = WriteParams<Cache>;
using Queries = QueryParams<Cache>;  // a row without queries is skipped

struct Attend : AttendParams<Cache> {
  int max_queries;        // no row has more
  int max_splits, units;  // see Unit in units.cuh
  int tile_rows;          // query rows that a tile has at most, up to kTileRows
  float* partial_out;     // [rows, heads, units, tile_rows, head_dim], normalised
  float* partial_lse;     // [rows, heads, units, tile_rows] natural logarithm
};

struct Observe : Queries {
  const float* lse;             // [tokens, query_heads] as attend wrote it
  float* observed;              // [num_pages, heads, page_size]
  const int64_t* observe_from;  // [rows] first counted query of the row
  const bool* restart;          // [rows] forget earlier mass
};

struct Consolidate : ConsolidateParams<Cache> {
  int* losers;    // workspace [rows, heads, retiring_pages * page_size]
  float* folded;  // workspace [rows, heads, 2 * head_dim + kFoldedSpread + head_dim * head_dim]: the losers' mean key, mean
                  // value, value spread, covariance; unused without means
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
