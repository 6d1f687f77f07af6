// The candidates of an event. Included once per instruction set.

// The candidates of one (row, head): the store's tokens, then those of the retiring pages. Quantised ones come first; the pages
// of a store that is not quantised, or not yet, are exact pages like the retiring ones.
struct Event {
  const Consolidate& c;
  int64_t row, head;
  int64_t retiring_pages = 0, packed_tokens = 0, exact_store_pages = 0;
  Centres centres;

  Event(const Consolidate& all, int64_t item) : c(all), row(item / all.cache.heads), head(item % all.cache.heads) {
    while (retiring_pages < c.retiring_pages && c.retiring[row * c.retiring_pages + retiring_pages] >= 0)
      ++retiring_pages;
    if (c.stored != nullptr) packed_tokens = c.packed.held(head, c.stored[row], c.num_evicted[row]);
    if (packed_tokens == 0) exact_store_pages = c.store_pages;
  }
  int64_t exact_pages() const { return exact_store_pages + retiring_pages; }
  int64_t candidates() const { return packed_tokens + exact_pages() * c.cache.page_size; }
  // How many of them are in the store, in their slots.
  int64_t filled() const { return c.stored == nullptr ? c.store_tokens : packed_tokens; }
  int64_t capacity() const {
    return c.capacity(head, c.gone(row) + exact_pages() * c.cache.page_size);
  }
  // Of those, the ones that keep their slots if they stay: a store may shrink.
  int64_t settled() const { return std::min(filled(), candidates() - losers()); }
  int64_t losers() const { return candidates() > capacity() ? candidates() - capacity() : 0; }
  int64_t page(int64_t exact) const {
    return exact < exact_store_pages ? c.store[row * c.store_pages + exact]
                                     : c.retiring[row * c.retiring_pages + exact - exact_store_pages];
  }
  RecordView record() const { return {c.cache, c.record_layout, c.moments + row * c.moment_pages, head}; }
  float num_evicted() const {
    return packed_tokens == 0 ? c.num_evicted[row] : float(c.gone(row) - packed_tokens);
  }

  bool is_packed(int64_t candidate) const { return candidate < packed_tokens; }
  // The tile that a quantised store has or will have for a slot.
  uint8_t* tile(int64_t slot) const {
    return PackedSlots::tile_of(c.cache, c.packed, head, c.store + row * c.store_pages, slot / kTileTokens);
  }
  template <class T>
  T* key(int64_t candidate) const {
    const int64_t exact = candidate - packed_tokens;
    return keys_of<T>(c.cache, page(exact / c.cache.page_size), head) + exact % c.cache.page_size;
  }
  template <class T>
  T* value(int64_t candidate) const {
    const int64_t exact = candidate - packed_tokens;
    return values_of<T>(c.cache, page(exact / c.cache.page_size), head) + exact % c.cache.page_size * c.cache.head_dim;
  }
  float* mass_of_slot(int64_t slot) const {
    const int64_t* pages = c.store + row * c.store_pages;
    if (c.stored != nullptr) return PackedSlots::mass_of(c.cache, c.packed, head, pages, slot, c.observed, c.observed_slots);
    return c.observed + (pages[slot / c.cache.page_size] * c.cache.heads + head) * c.observed_slots + slot % c.cache.page_size;
  }
  float* mass(int64_t candidate) const {
    if (is_packed(candidate)) return mass_of_slot(candidate);
    const int64_t exact = candidate - packed_tokens;
    return c.observed + (page(exact / c.cache.page_size) * c.cache.heads + head) * c.observed_slots +
           exact % c.cache.page_size;
  }
};
