// What observed queries give to every slot that they see. Included once per instruction set.

typedef float TileVec __attribute__((vector_size(4 * 8)));  // of a tile's tokens

// Weights of `Rows` query rows over some slots, those of a row `stride` from those of the next one, and what each row's are
// to be multiplied by. The rows are added to a mass one after the other, so that the sum does not depend on how they are grouped.
template <int Rows>
struct Weights {
  const float* rows;
  int64_t stride;
  float factor[Rows];

  template <class V>
  void add_to(float* mass, int64_t slot) const {
    V total = load_raw<V>(mass);
    for (int r = 0; r < Rows; ++r) total += load_raw<V>(rows + r * stride + slot) * factor[r];
    __builtin_memcpy(mass, &total, sizeof total);
  }
};

// What attend has left of some rows, from slot 0 on.
template <int Rows>
struct LeftWeights : Weights<Rows> {
  const float *tops, *lse;
  float top[Rows];

  LeftWeights(const Attend& a, const Left& left, const float* row_lse)
      : Weights<Rows>{left.row(a, 0), a.row_weights(), {}}, tops(left.row(a, 0) + a.row_slots()), lse(row_lse) {
    std::fill_n(top, Rows, -INFINITY);  // their weights are 0
  }
  // Before slots from `slot` on are added; they are of one tile of attend.
  void move_to(int64_t slot) {
    for (int r = 0; r < Rows; ++r) {
      const float now = tops[r * this->stride + slot / 8];
      if (now == top[r]) continue;
      top[r] = now;
      this->factor[r] = expf(now - lse[r]);
    }
  }
};

// Turns logits of a tile into weights, in rows of kTileSlots; `top` is each row's largest logit so far. As attend would have left
// them, bit by bit: it is a matter of memory which of the two a work list does.
template <int Rows>
inline Weights<Rows> weights_of_logits(float* logits, int vectors, int visible, const float* lse, float* top) {
  Weights<Rows> weights{logits, kTileSlots, {}};
  for (int r = 0; r < Rows; ++r) {
    float mass = 0, keep;
    soften(logits + r * kTileSlots, vectors * kLanes, visible, top[r], mass, keep);
    weights.factor[r] = expf(top[r] - lse[r]);
  }
  return weights;
}

// Adds the attention of `Rows` query rows from `first_row` to the mass of the row's quantised store.
template <int Bits, int Rows>
void observe_store(const Attend& a, const AttendItem& item, const float* query, const float* lse, float* top, const Left& left,
                   float* logits) {
  const PackedLayout& p = a.packed;
  const int64_t end = a.held(item.row, item.head);
  if (left.weights != nullptr) {
    LeftWeights<Rows> weights(a, left, lse);
    return each_tile_mass(a, item, 0, end, [&](int64_t slot, float* mass) {
      if (slot % kTileSlots == 0) weights.move_to(slot);
      weights.template add_to<TileVec>(mass, slot);
    });
  }
  const PackedQueries<Bits, Rows> queries(p, query, a.cache.head_dim, Centres(p, record_of(a, item)));
  const int64_t* pages = a.pages + item.row * a.max_pages;
  int64_t first = 0;
  for (PackedSlots slots(a.cache, p, item.head, pages, first, end); slots.slots > 0; slots.advance(), first += kTileSlots) {
    dot_packed<Bits, Rows, false>(slots, p, queries, a.scale, logits);
    if (a.softcap != 0) cap<Rows>(a, slots.vectors(), logits);
    const auto weights = weights_of_logits<Rows>(logits, slots.vectors(), slots.slots, lse, top);
    each_tile_mass(a, item, first, first + slots.slots,
                   [&](int64_t slot, float* mass) { weights.template add_to<TileVec>(mass, slot - first); });
  }
}

// The same of the exact slots that they see.
template <int Rows, class T>
void observe_exact(const Attend& a, const AttendItem& item, const float* query, const float* lse, float* top, const int64_t* sees,
                   const Left& left, float* logits) {
  const int64_t page_size = a.cache.page_size;
  const int64_t* pages = a.exact_pages(item.row);
  auto mass_of = [&](int64_t slot) { return mass_of_exact(a, item, pages, slot); };
  if (left.weights != nullptr) {
    LeftWeights<Rows> weights(a, left, lse);
    for (int64_t slot = 0; slot < sees[Rows - 1]; slot += kLanes) {
      weights.move_to(a.store_slots() + slot);
      weights.template add_to<Vec>(mass_of(slot), a.store_slots() + slot);
    }
    return;
  }
  for (int64_t first = 0; first < sees[Rows - 1]; first += kTileSlots) {
    const Tile<T> tile(a.cache, item.head, pages, first, sees[Rows - 1]);
    dot_keys<Rows, false>(tile, query, a.cache.head_dim, page_size, a.scale * key_unit<T>(a.cache), logits);
    if (a.softcap != 0) cap<Rows>(a, tile.vectors(), logits);
    for (int r = 0; r < Rows; ++r)
      for (int64_t t = sees[r] > first ? sees[r] - first : 0; t < tile.vectors() * kLanes; ++t) logits[r * kTileSlots + t] = -INFINITY;
    const auto weights = weights_of_logits<Rows>(logits, tile.vectors(), tile.vectors() * kLanes, lse, top);
    for (int s = 0; s < tile.slots; s += kLanes) weights.template add_to<Vec>(mass_of(first + s), s);
  }
}

template <int Rows, class T>
void observe_rows(const Attend& a, const AttendItem& item, int first_row, float* scratch) {
  const int64_t groups = a.query_heads / a.cache.heads;
  float *packed = scratch, *logits = scratch + Rows * a.cache.head_dim, lse[Rows], top[Rows];
  const Left left(a, item, first_row);
  if (left.weights == nullptr)
    with_type_beside<T>(a.type, [&](auto n) { pack_queries<Rows, decltype(n)>(a, item, first_row, packed); });
  std::fill_n(top, Rows, -INFINITY);
  int64_t sees[Rows];
  for (int r = 0; r < Rows; ++r) {
    const int64_t query = (first_row + r) / groups, query_head = item.head * groups + (first_row + r) % groups;
    lse[r] = a.lse[(a.first_token[item.row] + query) * a.query_heads + query_head];
    sees[r] = a.last_slot[item.row] + query + 1;
  }
  if (a.stored_of(item.row) > 0) {
    const auto observe_bits = a.packed.bits == 8 ? observe_store<8, Rows> : observe_store<4, Rows>;
    observe_bits(a, item, packed, lse, top, left, logits);
  }
  observe_exact<Rows, T>(a, item, packed, lse, top, sees, left, logits);
}

size_t observe_scratch(const Attend& a) { return 8 * (a.cache.head_dim + kTileSlots); }

// Adds the attention that a row's counted queries give to every slot.
void observe(const Attend& a, const AttendItem& item, float* scratch) {
  const int64_t groups = a.query_heads / a.cache.heads;
  if (a.restart[item.row]) {
    const int64_t exact = (a.last_slot[item.row] + item.num_queries + a.cache.page_size - 1) / a.cache.page_size;
    const int64_t* pages = a.exact_pages(item.row);
    for (int64_t p = 0; p < exact; ++p)
      std::fill_n(a.observed + (pages[p] * a.cache.heads + item.head) * a.observed_slots, a.observed_slots, 0.0f);
    // Tile by tile: another head's, which may lie in this head's part of a page, are cleared with that head's.
    if (a.stored_of(item.row) > 0)
      each_tile_mass(a, item, 0, a.held(item.row, item.head), [](int64_t, float* mass) { std::fill_n(mass, kTileTokens, 0.0f); });
  }
  int row = int(a.observe_from[item.row] * groups);
  const int rows = item.num_queries * int(groups);
  with_cache_type(a.cache.type, [&](auto t) {
    using T = decltype(t);
    for (; row + 8 <= rows; row += 8) observe_rows<8, T>(a, item, row, scratch);
    if (row + 4 <= rows) observe_rows<4, T>(a, item, row, scratch), row += 4;
    if (row + 2 <= rows) observe_rows<2, T>(a, item, row, scratch), row += 2;
    if (row < rows) observe_rows<1, T>(a, item, row, scratch);
  });
}
