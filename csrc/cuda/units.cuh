// How attend cuts its work: blocks of a launch -> splits of query tiles.
#pragma once

#include "cache.cuh"

namespace momentkv::cuda {

// Query rows of a (row, head): queries x query heads of the KV head, in tiles of kTileRows. The units of a (row, head) are
// `max_splits` splits of tile 0 and its record, then for every further tile one split and its record. Decode has tile 0 only;
// further tiles belong to chunks, which have parallelism enough.
struct Unit {
  int row, head, tile, split;
  bool is_record, exists;
  int query_rows;         // of this tile
  int groups;             // query heads of a KV head
  int first_tile, tiles;  // tiles of kTileSlots slots that this split reads
  int64_t last_slot;           // last slot that the row's first query sees

  __device__ Unit(const Attend& a, int number, int head_, int row_) : row(row_), head(head_) {
    const int beyond = number - (a.max_splits + 1);
    tile = beyond < 0 ? 0 : 1 + beyond / 2;
    is_record = beyond < 0 ? number == a.max_splits : beyond % 2 == 1;
    split = beyond < 0 ? number : 0;
    groups = a.query_heads / a.cache.heads;
    const int64_t queries = a.num_queries[row];
    const int rows_left = int(queries * groups) - tile * kTileRows;
    query_rows = rows_left < kTileRows ? rows_left : kTileRows;
    exists = rows_left > 0;
    if (!exists) return;
    last_slot = a.last_slot[row];
    const int64_t sees = last_slot + 1 + query_of(query_rows - 1);
    const int all = int((sees + kTileSlots - 1) / kTileSlots);
    const int splits = splits_of(int(queries), tile, all);
    exists = is_record ? a.corrected && a.num_evicted[row] > 0 : split < splits;
    first_tile = int(int64_t(all) * split / splits);
    tiles = int(int64_t(all) * (split + 1) / splits) - first_tile;
  }

  // A function of the row alone.
  __device__ static int splits_of(int queries, int tile, int slot_tiles) {
    const int splits = queries == 1 && tile == 0 ? slot_tiles / (kSplitSlots / kTileSlots) : 1;
    return splits > 1 ? splits : 1;
  }
  // The row's query that a row of this tile belongs to, and its place in the tensors.
  __device__ int query_of(int query_row) const { return (tile * kTileRows + query_row) / groups; }
  __device__ int head_of(int query_row) const { return head * groups + (tile * kTileRows + query_row) % groups; }
  __device__ int64_t token_of(const Queries& work, int query_row) const {
    return work.first_token[row] + query_of(query_row);
  }
};

__device__ inline size_t partial_row(const Attend& a, int row, int head, int unit, int query_row) {
  return ((size_t(row) * a.cache.heads + head) * a.units + unit) * a.tile_rows + query_row;
}

}  // namespace momentkv::cuda
