// What observed queries give to every slot that they see. Included once per instruction set.

// Adds the attention of some rows to the mass of kLanes slots; `logits` of a row are `row_slots` from those of the next one.
// The rows are added one after the other, so that the sum does not depend on how they are grouped.
inline void add_mass(float* mass, const float* logits, int64_t row_slots, int rows, const float* lse) {
  Vec total = load(mass);
  for (int r = 0; r < rows; ++r) total += exp_negative(load(logits + r * row_slots) - lse[r]);
  store(mass, total);
}

// Adds the attention of `Rows` query rows from `first_row` to the mass of the row's quantised store.
template <int Bits, int Rows>
void observe_store(const Attend& a, const AttendItem& item, const float* query, const float* lse, float* left, float* logits) {
  const PackedLayout& p = a.packed;
  const int64_t end = a.stored[item.row], page_slots = p.page_tiles * kTileTokens;
  const int64_t* pages = a.pages + item.row * a.max_pages;
  std::optional<PackedQueries<Bits, Rows>> queries;
  if (left == nullptr) queries.emplace(p, query, a.cache.head_dim);
  for (int64_t first = 0; first < end; first += kTileSlots) {
    const PackedSlots slots(a.cache, p, item.head, pages, first, end);
    if (left == nullptr) dot_packed(slots, p, *queries, a.scale, logits);
    const int64_t row_slots = left == nullptr ? kTileSlots : a.row_slots();
    const float* of_rows = left == nullptr ? logits : left + first;
    for (int s = 0; s < slots.slots; s += kTileTokens) {
      const int64_t slot = first + s;
      float* mass = a.observed + (pages[slot / page_slots] * a.cache.heads + item.head) * a.observed_slots + slot % page_slots;
      for (int t = 0; t < kTileTokens; ++t)
        for (int r = 0; r < Rows; ++r) mass[t] += expf(of_rows[r * row_slots + s + t] - lse[r]);
    }
  }
}

template <int Rows, class T>
void observe_rows(const Attend& a, const AttendItem& item, int first_row, float* scratch) {
  const int64_t d = a.cache.head_dim, page_size = a.cache.page_size, groups = a.query_heads / a.cache.heads;
  const int64_t* pages = a.exact_pages(item.row);
  float *packed = scratch, *logits = scratch + Rows * d, lse[Rows];
  float* left = logits_of(a, item);
  if (left != nullptr) left += first_row * a.row_slots();
  const int64_t row_slots = left == nullptr ? kTileSlots : a.row_slots();  // from one row's logits to the next
  int64_t sees[Rows];
  if (left == nullptr) pack_queries<Rows, T>(a, item, first_row, packed);
  for (int r = 0; r < Rows; ++r) {
    const int64_t query = (first_row + r) / groups, query_head = item.head * groups + (first_row + r) % groups;
    lse[r] = a.lse[(a.first_token[item.row] + query) * a.query_heads + query_head];
    sees[r] = a.last_slot[item.row] + query + 1;
  }
  if (a.stored_of(item.row) > 0) {
    const auto observe_bits = a.packed.bits == 8 ? observe_store<8, Rows> : observe_store<4, Rows>;
    observe_bits(a, item, packed, lse, left, logits);
  }
  for (int64_t first = 0; first < sees[Rows - 1]; first += kTileSlots) {
    const Tile<T> tile(a.cache, item.head, pages, first, sees[Rows - 1]);
    if (left == nullptr)
      dot_keys<Rows, false>(tile, packed, d, page_size, a.scale, logits);
    else
      logits = left + a.store_slots() + first;
    for (int s = 0; s < tile.slots; s += kLanes) {
      const int64_t slot = first + s;
      for (int r = 0; r < Rows; ++r)
        for (int64_t t = sees[r] > slot ? sees[r] - slot : 0; t < kLanes; ++t) logits[r * row_slots + s + t] = -INFINITY;
      float* mass = a.observed + (pages[slot / page_size] * a.cache.heads + item.head) * a.observed_slots + slot % page_size;
      add_mass(mass, logits + s, row_slots, Rows, lse);
    }
  }
}

size_t observe_scratch(const Attend& a) { return 8 * (a.cache.head_dim + kTileSlots); }

// Adds the attention that a row's counted queries give to every slot; item = row * heads + head.
void observe(const Attend& a, int64_t item_index, float* scratch) {
  const int64_t groups = a.query_heads / a.cache.heads, row_index = item_index / a.cache.heads;
  const AttendItem item{int32_t(row_index), int32_t(item_index % a.cache.heads), 0, int32_t(a.num_queries[row_index])};
  if (a.restart[item.row]) {
    const int64_t exact = (a.last_slot[item.row] + item.num_queries + a.cache.page_size - 1) / a.cache.page_size;
    const int64_t* end = a.exact_pages(item.row) + exact;
    for (const int64_t* page = a.pages + item.row * a.max_pages; page < end; ++page)
      std::fill_n(a.observed + (*page * a.cache.heads + item.head) * a.observed_slots, a.observed_slots, 0.0f);
  }
  int row = int(a.observe_from[item.row] * groups);
  const int rows = item.num_queries * int(groups);
  with_type(a.cache.type, [&](auto t) {
    using T = decltype(t);
    for (; row + 8 <= rows; row += 8) observe_rows<8, T>(a, item, row, scratch);
    if (row + 4 <= rows) observe_rows<4, T>(a, item, row, scratch), row += 4;
    if (row + 2 <= rows) observe_rows<2, T>(a, item, row, scratch), row += 2;
    if (row < rows) observe_rows<1, T>(a, item, row, scratch);
  });
}
