// Writes new keys and values. Included once per instruction set.

// A fresh page may have been a moment page: as keys and values its bytes can be NaN, and vLLM's kernel multiplies unwritten
// slots by zero. Before any `write` of the same step.
void zero_fresh_pages(const Write& s, int64_t head) {
  const Cache& c = s.cache;
  const size_t part = c.page_size * 2 * c.head_dim * bytes_of(c.type);
  for (int64_t i = 0; i < s.tokens; ++i) {
    if (s.slots[i] < 0 || s.slots[i] % c.page_size != 0) continue;
    const int64_t page = s.slots[i] / c.page_size;
    std::memset(c.data + (page * c.heads + head) * part, 0, part);
    if (s.observed != nullptr) std::fill_n(s.observed + (page * c.heads + head) * c.page_size, c.page_size, 0.0f);
  }
}

void write(const Write& s, int64_t token) {
  if (s.slots[token] < 0) return;
  const Cache& c = s.cache;
  const int64_t page = s.slots[token] / c.page_size, slot = s.slots[token] % c.page_size;
  with_type(c.type, [&](auto t) {
    using T = decltype(t);
    for (int64_t head = 0; head < c.heads; ++head) {
      const T* key = reinterpret_cast<const T*>(s.key) + token * s.key_stride + head * c.head_dim;
      const T* value = reinterpret_cast<const T*>(s.value) + token * s.value_stride + head * c.head_dim;
      T* keys = keys_of<T>(c, page, head) + slot;
      for (int64_t i = 0; i < c.head_dim; ++i) keys[i * c.page_size] = key[i];
      std::memcpy(values_of<T>(c, page, head) + slot * c.head_dim, value, c.head_dim * sizeof(T));
    }
  });
}
