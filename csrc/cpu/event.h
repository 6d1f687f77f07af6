// The candidates of an event and their default score. Included once per instruction set.

// The candidates of one (row, head): the store's tokens, then those of the retiring pages. Quantised ones come first; the pages
// of a store that is not quantised, or not yet, are exact pages like the retiring ones.
struct Event {
  const Consolidate& c;
  int64_t row, head;
  int64_t retiring_pages = 0, packed_tokens = 0, exact_store_pages = 0;

  Event(const Consolidate& all, int64_t item) : c(all), row(item / all.cache.heads), head(item % all.cache.heads) {
    while (retiring_pages < c.retiring_pages && c.retiring[row * c.retiring_pages + retiring_pages] >= 0)
      ++retiring_pages;
    if (c.stored != nullptr) packed_tokens = c.stored[row];
    if (packed_tokens == 0) exact_store_pages = c.store_pages;
  }
  int64_t exact_pages() const { return exact_store_pages + retiring_pages; }
  int64_t candidates() const { return packed_tokens + exact_pages() * c.cache.page_size; }
  // How many of them are in the store, in their slots.
  int64_t filled() const { return c.stored == nullptr ? c.store_tokens : packed_tokens; }
  int64_t losers() const { return candidates() > c.store_tokens ? candidates() - c.store_tokens : 0; }
  int64_t page(int64_t exact) const {
    return exact < exact_store_pages ? c.store[row * c.store_pages + exact]
                                     : c.retiring[row * c.retiring_pages + exact - exact_store_pages];
  }
  RecordView record() const { return {c.cache, c.record_layout, c.moments + row * c.moment_pages, head}; }
  float num_evicted() const { return c.num_evicted[row]; }

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
    const int64_t page_tokens = c.stored == nullptr ? c.cache.page_size : c.packed.page_tiles * kTileTokens;
    return c.observed + (c.store[row * c.store_pages + slot / page_tokens] * c.cache.heads + head) * c.observed_slots +
           slot % page_tokens;
  }
  float* mass(int64_t candidate) const {
    if (is_packed(candidate)) return mass_of_slot(candidate);
    const int64_t exact = candidate - packed_tokens;
    return c.observed + (page(exact / c.cache.page_size) * c.cache.heads + head) * c.observed_slots +
           exact % c.cache.page_size;
  }
};

// Mean key and value of all candidates, [head_dim] each.
template <class T>
void means_of_candidates(const Event& e, float* mean_key, float* mean_value) {
  const int64_t page_size = e.c.cache.page_size, d = e.c.cache.head_dim;
  std::fill_n(mean_key, d, 0.0f);
  std::fill_n(mean_value, d, 0.0f);
  for (int64_t p = 0; p < e.exact_pages(); ++p) {
    const T *keys = keys_of<T>(e.c.cache, e.page(p), e.head), *values = values_of<T>(e.c.cache, e.page(p), e.head);
    for (int64_t i = 0; i < d; ++i) {
      Vec total = {};
      for (int64_t s = 0; s < page_size; s += kLanes) total += load(keys + i * page_size + s);
      mean_key[i] += sum(total);
    }
    for (int64_t s = 0; s < page_size; ++s)
      for (int64_t i = 0; i < d; i += kLanes) store(mean_value + i, load(mean_value + i) + load(values + s * d + i));
  }
  for (int64_t i = 0; i < d; ++i) mean_key[i] /= float(e.candidates()), mean_value[i] /= float(e.candidates());
}

// distance[candidate] = ||key - mean||.
template <class T>
void distances_of_keys(const Event& e, const float* mean, float* distance) {
  const int64_t page_size = e.c.cache.page_size;
  const int64_t pages = e.exact_pages();
  for (int64_t p = 0; p < pages; ++p) {
    const T* keys = keys_of<T>(e.c.cache, e.page(p), e.head);
    const T* next = keys_of<T>(e.c.cache, e.page(p + 1 < pages ? p + 1 : p), e.head);
    for (int64_t s = 0; s < page_size; s += kLanes) {
      Vec even = {}, odd = {};  // two chains hide the latency of the multiply-add
      for (int64_t i = 0; i < e.c.cache.head_dim; i += 2) {
        const Vec a = load(keys + i * page_size + s) - mean[i], b = load(keys + (i + 1) * page_size + s) - mean[i + 1];
        even += a * a;
        odd += b * b;
        __builtin_prefetch(next + i * page_size + s);
        __builtin_prefetch(next + (i + 1) * page_size + s);
      }
      const Vec square = even + odd;
      for (int t = 0; t < kLanes; ++t) distance[p * page_size + s + t] = sqrtf(square[t]);
    }
  }
}

// distance[candidate] = observed attention * ||value - mean||.
template <class T>
void distances_of_values(const Event& e, const float* mean, float* distance) {
  const int64_t page_size = e.c.cache.page_size, d = e.c.cache.head_dim, pages = e.exact_pages();
  for (int64_t p = 0; p < pages; ++p) {
    const T* values = values_of<T>(e.c.cache, e.page(p), e.head);
    const float* mass = e.mass(p * page_size);
    for (int64_t s = 0; s < page_size; ++s, values += d) {
      Vec square = {};
      for (int64_t i = 0; i < d; i += kLanes) {
        const Vec x = load(values + i) - load(mean + i);
        square += x * x;
      }
      distance[p * page_size + s] = mass[s] * sqrtf(sum(square));
    }
  }
}

// score += weight * x / mean(x) over the candidates; a NaN does not count in the mean.
inline void add_relative(const Event& e, const float* x, float weight, float* score) {
  const int64_t n = e.candidates();
  float total = 0;
  for (int64_t i = 0; i < n; ++i) total += x[i] == x[i] ? x[i] : 0;
  const float mean = total / float(n), inverse = weight / (mean > 1e-30f ? mean : 1e-30f);
  for (int64_t i = 0; i < n; ++i) score[i] += x[i] * inverse;
}

// The score of policies/momentkv.py. `means` has room for 2 * head_dim floats, `room` for a float per candidate.
template <class T>
void score_by_moments(const Event& e, float* means, float* room, float* score) {
  float *mean_key = means, *mean_value = means + e.c.cache.head_dim;
  if (e.num_evicted() == 0)
    means_of_candidates<T>(e, mean_key, mean_value);
  else
    mean_key = e.record().mean_key(), mean_value = e.record().mean_value();
  std::fill_n(score, e.candidates(), 0.0f);
  distances_of_keys<T>(e, mean_key, room);
  add_relative(e, room, 1, score);
  distances_of_values<T>(e, mean_value, room);
  add_relative(e, room, e.c.attention_weight, score);
}
