// The score of momentkv_vllm/policies/key_direction.py over all candidates. Included once per instruction set.

// inverse[candidate] = 1 / ||key||, both in the cache's units (directions have none), anchor += the sum of the normalised keys of the exact pages.
template <class T>
void add_directions(const Event& e, float* inverse, float* anchor) {
  const int64_t page_size = e.c.cache.page_size, d = e.c.cache.head_dim;
  alignas(64) Vec sums[kMaxHeadDim];
  std::fill_n(sums, d, Vec{});
  for (int64_t p = 0; p < e.exact_pages(); ++p, inverse += page_size) {
    const T* keys = keys_of<T>(e.c.cache, e.page(p), e.head);
    const T* next = keys_of<T>(e.c.cache, e.page(p + 1 < e.exact_pages() ? p + 1 : p), e.head);
    for (int64_t s = 0; s < page_size; s += kLanes) {
      Vec even = {}, odd = {};  // two chains hide the latency of the multiply-add
      for (int64_t i = 0; i < d; i += 2) {
        const Vec a = load(keys + i * page_size + s), b = load(keys + (i + 1) * page_size + s);
        even += a * a;
        odd += b * b;
        __builtin_prefetch(next + i * page_size + s);
        __builtin_prefetch(next + (i + 1) * page_size + s);
      }
      const Vec factor = inverse_root(even + odd);
      store(inverse + s, factor);
      for (int64_t i = 0; i < d; ++i) sums[i] += without_nan(load(keys + i * page_size + s) * factor);
    }
  }
  for (int64_t i = 0; i < d; ++i) anchor[i] += sum(sums[i]);
}

// turned[candidate]: in, 1 / ||key||; out, 1 - key . direction / ||key||.
template <class T>
void turn_away(const Event& e, const float* direction, float* turned) {
  const int64_t page_size = e.c.cache.page_size;
  for (int64_t p = 0; p < e.exact_pages(); ++p, turned += page_size) {
    const T* keys = keys_of<T>(e.c.cache, e.page(p), e.head);
    for (int64_t s = 0; s < page_size; s += kLanes) {
      Vec even = {}, odd = {};
      for (int64_t i = 0; i < e.c.cache.head_dim; i += 2) {
        even += load(keys + i * page_size + s) * direction[i];
        odd += load(keys + (i + 1) * page_size + s) * direction[i + 1];
      }
      store(turned + s, not_negative(1 - (even + odd) * load(turned + s)));
    }
  }
}

// mean += the sum of the values of the exact pages.
template <class T>
void add_values_of_candidates(const Event& e, float* mean) {
  const int64_t d = e.c.cache.head_dim;
  for (int64_t p = 0; p < e.exact_pages(); ++p) {
    const T* values = values_of<T>(e.c.cache, e.page(p), e.head);
    for (int64_t s = 0; s < e.c.cache.page_size; ++s, values += d)
      for (int64_t i = 0; i < d; i += kLanes)
        store(mean + i, load(mean + i) + without_nan(load_value(e.c.cache, values + i)));
  }
}

// distance[candidate] = observed attention * ||value - mean||.
template <class T>
void distances_of_values(const Event& e, const float* mean, float* distance) {
  const int64_t page_size = e.c.cache.page_size, d = e.c.cache.head_dim;
  for (int64_t p = 0; p < e.exact_pages(); ++p, distance += page_size) {
    const T* values = values_of<T>(e.c.cache, e.page(p), e.head);
    const float* mass = e.mass(e.packed_tokens + p * page_size);
    for (int64_t s = 0; s < page_size; ++s, values += d) {
      Vec square = {};
      for (int64_t i = 0; i < d; i += kLanes) {
        const Vec x = load_value(e.c.cache, values + i) - load(mean + i);
        square += x * x;
      }
      distance[s] = mass[s] * sqrtf(sum(square));
    }
  }
}

// score += weight * x / mean(x) over the candidates; a NaN does not count in the mean.
inline void add_relative(const Event& e, const float* x, float weight, float* score) {
  const int64_t n = e.candidates(), whole = n / kLanes * kLanes;
  Vec sums = {};
  for (int64_t i = 0; i < whole; i += kLanes) sums += without_nan(load(x + i));
  float total = sum(sums);
  for (int64_t i = whole; i < n; ++i) total += x[i] == x[i] ? x[i] : 0;
  const float mean = total / float(n), factor = weight / (mean > 1e-30f ? mean : 1e-30f);
  for (int64_t i = 0; i < n; ++i) score[i] += x[i] * factor;
}

// turned[candidate] = 1 - cosine of its key to the sum of all normalised keys.
template <class T>
void turned_keys(const Event& e, float* turned) {
  const int64_t d = e.c.cache.head_dim;
  alignas(64) float anchor[kMaxHeadDim] = {};
  if (e.packed_tokens > 0) with_bits(e.c.packed.bits, [&](auto bits) { add_packed_directions<bits>(e, turned, anchor); });
  add_directions<T>(e, turned + e.packed_tokens, anchor);
  Vec square = {};
  for (int64_t i = 0; i < d; i += kLanes) square += load(anchor + i) * load(anchor + i);
  const float length = sqrtf(sum(square)), inverse = length > 0 ? 1 / length : 0;
  for (int64_t i = 0; i < d; ++i) anchor[i] *= inverse;
  if (e.packed_tokens > 0) with_bits(e.c.packed.bits, [&](auto bits) { turn_packed_away<bits>(e, anchor, turned); });
  turn_away<T>(e, anchor, turned + e.packed_tokens);
}

// weighed[candidate] = observed attention * distance of its value to the mean evicted one.
template <class T>
void weighed_values(const Event& e, float* weighed) {
  const int64_t d = e.c.cache.head_dim;
  alignas(64) float mean[kMaxHeadDim] = {};
  if (e.num_evicted() > 0) {
    std::copy_n(e.record().mean_value(), d, mean);
  } else {
    if (e.packed_tokens > 0) with_bits(e.c.packed.bits, [&](auto bits) { add_packed_values<bits>(e, mean); });
    add_values_of_candidates<T>(e, mean);
    for (int64_t i = 0; i < d; ++i) mean[i] /= float(e.candidates());
  }
  if (e.packed_tokens > 0) with_bits(e.c.packed.bits, [&](auto bits) { distances_of_packed_values<bits>(e, mean, weighed); });
  distances_of_values<T>(e, mean, weighed + e.packed_tokens);
}

// `room`: a float per candidate.
template <class T>
void score_by_direction(const Event& e, float* room, float* score) {
  std::fill_n(score, e.candidates(), 0.0f);
  if (e.c.attention_weight != 0) {
    weighed_values<T>(e, room);
    add_relative(e, room, e.c.attention_weight, score);
  }
  turned_keys<T>(e, room);
  add_relative(e, room, 1, score);
}
