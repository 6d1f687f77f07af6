// Attend's work list, cut into items that threads share; and observe's, of rows that no item has whole.
#pragma once

#include <algorithm>
#include <climits>
#include <vector>

#include "kernels.h"

namespace momentkv {

// Of observe.
inline AttendItem item_of(const Attend& a, int64_t row, int64_t head) {
  AttendItem item{int32_t(row), int32_t(head), 0, int32_t(a.num_queries[row])};
  item.left = a.weights_of(row, head);
  return item;
}

// Attend's work, cut into items. How a row's slots are cut depends on that row only, so its result does not depend on the batch.
// Kept between calls: no allocation once it has seen the largest batch.
struct Items {
  std::vector<AttendItem> parts;
  std::vector<MergeItem> merges;
  std::vector<AttendItem> in_parts;  // the rows' heads that several parts serve, as items of observe
  std::vector<float> partials;
  int64_t rows_per_item = kRowsPerItem;

  // Query rows of an item. Without matrix units, or without chunks: kRowsPerItem. On them large items share more of what they
  // read, but threads shall have alike: the cut whose busiest thread has least to do, a panel being worth kPanelRows rows.
  static int64_t rows_of_items(const Attend& a, int64_t threads) {
    const int64_t most = kernels().most_rows(a), groups = a.query_heads / a.cache.heads;
    int64_t longest = 0, heads = 0;
    for (int64_t row = 0; row < a.rows; ++row)
      if (a.num_queries[row] > 1) longest = std::max(longest, a.num_queries[row] * groups), heads += a.cache.heads;
    if (most == kRowsPerItem || heads == 0) return kRowsPerItem;
    int64_t found = most, least = INT64_MAX;
    for (int64_t parts = (longest + most - 1) / most; parts <= (longest + kRowsPerItem - 1) / kRowsPerItem; ++parts) {
      const int64_t rows = (longest + parts - 1) / parts, turns = (heads * parts + threads - 1) / threads;
      if (turns * (rows + kPanelRows) < least) least = turns * (rows + kPanelRows), found = rows;
    }
    return std::min(most, (found + groups - 1) / groups * groups);
  }

  void build(const Attend& a, int64_t threads) {
    rows_per_item = rows_of_items(a, threads);
    begin();
    size_t floats = 0;
    for (int64_t row = 0; row < a.rows; ++row)
      for (int64_t head = 0; head < a.cache.heads; ++head) floats += partial_floats(a, row, head);
    if (partials.size() < floats) partials.resize(floats);
    float* next = partials.data();
    for (int32_t row = 0; row < a.rows; ++row)
      for (int32_t head = 0; head < a.cache.heads; ++head) add(a, row, head, next);
  }

  // Of one row and head, for one thread.
  void build_alone(const Attend& a, int64_t row, int64_t head) {
    rows_per_item = kernels().most_rows(a);
    begin();
    if (const size_t floats = partial_floats(a, row, head); partials.size() < floats) partials.resize(floats);
    float* next = partials.data();
    add(a, int32_t(row), int32_t(head), next);
  }

  void begin() { parts.clear(), merges.clear(), in_parts.clear(); }
  static size_t partial_floats(const Attend& a, int64_t row, int64_t head) {
    return a.num_queries[row] > 1 ? 0 : splits(a, row, head) * (a.query_heads / a.cache.heads) * (a.cache.head_dim + 1);
  }
  void add(const Attend& a, int32_t row, int32_t head, float*& next) {
    a.num_queries[row] == 1 ? add_decode(a, row, head, next) : add_chunk(a, row, head);
  }

  static int64_t slots(const Attend& a, int64_t row, int64_t head) {
    return a.held(row, head) + a.last_slot[row] + a.num_queries[row];
  }
  static int64_t splits(const Attend& a, int64_t row, int64_t head) {
    const int64_t stored = a.held(row, head);
    return std::max<int64_t>(1, (slots(a, row, head) - stored + stored / kPackedSlots) / kSplitSlots);
  }
  static bool with_record(const Attend& a, int64_t row, int64_t head) { return a.corrected && a.evicted(row, head) > 0; }

  // The s-th of n cuts of a row's slots: between whole tiles of kernels, or pages.
  static int64_t cut(const Attend& a, int64_t row, int64_t head, int64_t s, int64_t n) {
    const int64_t stored = a.held(row, head), at = slots(a, row, head) * s / n, page = a.cache.page_size;
    if (s == n) return slots(a, row, head);
    return at < stored ? at / kTileSlots * kTileSlots : stored + (at - stored) / page * page;
  }

  void add_decode(const Attend& a, int32_t row, int32_t head, float*& next) {
    const int64_t size = a.query_heads / a.cache.heads * (a.cache.head_dim + 1);
    const int32_t n = int32_t(splits(a, row, head));
    if (n > 1) merges.push_back({row, head, n, next}), in_parts.push_back(item_of(a, row, head));
    for (int32_t s = 0; s < n; ++s) {
      const bool last = s == n - 1;
      parts.push_back({row, head, 0, 1, cut(a, row, head, s, n), cut(a, row, head, s + 1, n), last && with_record(a, row, head),
                       n > 1 ? next : nullptr, a.weights_of(row, head)});
      if (n > 1) next += size;
    }
  }

  void add_chunk(const Attend& a, int32_t row, int32_t head) {
    const int32_t queries = int32_t(a.num_queries[row]);
    const int32_t step = std::max<int32_t>(1, int32_t(rows_per_item / (a.query_heads / a.cache.heads)));
    if (step < queries) in_parts.push_back(item_of(a, row, head));
    for (int32_t first = 0; first < queries; first += step)
      parts.push_back({row, head, first, std::min(step, queries - first), 0, slots(a, row, head), with_record(a, row, head),
                       nullptr, a.weights_of(row, head)});
  }
};

}  // namespace momentkv
