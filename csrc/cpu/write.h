// Writes new keys and values. Included once per instruction set.

// A fresh page may have been a moment page: as keys and values its bytes can be NaN, and vLLM's kernel multiplies unwritten
// slots by zero. Before any `write` of the same step.
void zero_fresh_pages(const Write& s, int64_t head) {
  const Cache& c = s.cache;
  const size_t part = c.part_bytes();
  for (int64_t i = 0; i < s.tokens; ++i) {
    if (s.slots[i] < 0 || s.slots[i] % c.page_size != 0) continue;
    const int64_t page = s.slots[i] / c.page_size;
    std::memset(c.data + (page * c.heads + head) * part, 0, part);
    if (s.observed != nullptr) std::fill_n(s.observed + (page * c.heads + head) * s.observed_slots, s.observed_slots, 0.0f);
  }
}

// A head's numbers as the cache has them: themselves, or what is put into `room`.
template <class T>
inline const T* as_stored(const T* numbers, int64_t, float, T*) { return numbers; }
template <class N, class T>
  requires kIsFp8<T>
inline const T* as_stored(const N* numbers, int64_t size, float inverse_scale, T* room) {
  for (int64_t i = 0; i < size; i += kLanes) store(room + i, load(numbers + i) * inverse_scale);
  return room;
}

void write(const Write& s, int64_t token) {
  if (s.slots[token] < 0) return;
  const Cache& c = s.cache;
  const int64_t page = s.slots[token] / c.page_size, slot = s.slots[token] % c.page_size;
  with_cache_type(c.type, [&](auto t) {
    using T = decltype(t);
    with_type_beside<T>(s.type, [&](auto n) {
      using N = decltype(n);
      T room[kMaxHeadDim];
      for (int64_t head = 0; head < c.heads; ++head) {
        const N* key = reinterpret_cast<const N*>(s.key) + token * s.key_stride + head * c.head_dim;
        const N* value = reinterpret_cast<const N*>(s.value) + token * s.value_stride + head * c.head_dim;
        T* keys = keys_of<T>(c, page, head) + slot;
        const T* given = as_stored(key, c.head_dim, 1 / c.key_scale, room);
        for (int64_t i = 0; i < c.head_dim; ++i) keys[i * c.page_size] = given[i];
        given = as_stored(value, c.head_dim, 1 / c.value_scale, room);
        std::memcpy(values_of<T>(c, page, head) + slot * c.head_dim, given, c.head_dim * sizeof(T));
      }
    });
  });
}
