// Where the attention that slots were given lies, `observed` [num_pages, heads, observed_slots]. Included once per instruction set.

inline float* mass_of_exact(const Attend& a, const AttendItem& item, const int64_t* pages, int64_t slot) {
  return a.observed + (pages[slot / a.cache.page_size] * a.cache.heads + item.head) * a.observed_slots + slot % a.cache.page_size;
}

// Calls f(slot, mass) for every tile of slots [first, end) of the row's quantised store. Inlined: g++ removes calls of functions
// that do nothing but ask for memory.
template <class F>
inline __attribute__((always_inline)) void each_tile_mass(const Attend& a, const AttendItem& item, int64_t first, int64_t end, F f) {
  const int64_t together = a.packed.places != nullptr ? kTileTokens : a.packed.page_tiles * kTileTokens;  // in one page
  const int64_t* pages = a.pages + item.row * a.max_pages;
  while (first < end) {
    const int64_t stop = std::min(end, (first / together + 1) * together);
    float* mass = PackedSlots::mass_of(a.cache, a.packed, item.head, pages, first, a.observed, a.observed_slots);
    for (; first < stop; first += kTileTokens, mass += kTileTokens) f(first, mass);
  }
}

// Asks for the masses of slots that attend is about to read, which observe will change.
inline __attribute__((always_inline)) void fetch_tile_mass(const Attend& a, const AttendItem& item, int64_t first, int64_t end) {
  each_tile_mass(a, item, first, std::min(first + kTileSlots, end), [](int64_t, float* mass) { __builtin_prefetch(mass, 1, 2); });
}
inline __attribute__((always_inline)) void fetch_exact_mass(const Attend& a, const AttendItem& item, int64_t first, int64_t end) {
  const int64_t* pages = a.exact_pages(item.row);
  for (const int64_t stop = std::min(first + kTileSlots, end); first < stop; first += 16)
    __builtin_prefetch(mass_of_exact(a, item, pages, first), 1, 2);
}
