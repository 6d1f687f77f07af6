// Retires pages of one (row, head): score, choose, fold the losers into the moments, fill their slots with the winners.
// Included once per instruction set.

constexpr int kFoldTokens = 64;  // losers whose centred keys and values are held at a time

// The candidates of one (row, head): the store's slots, then those of the retiring pages.
struct Event {
  const Consolidate& c;
  int64_t row, head;
  int64_t retiring_pages = 0;

  Event(const Consolidate& all, int64_t item) : c(all), row(item / all.cache.heads), head(item % all.cache.heads) {
    while (retiring_pages < c.retiring_pages && c.retiring[row * c.retiring_pages + retiring_pages] >= 0)
      ++retiring_pages;
  }
  int64_t store_tokens() const { return c.store_pages * c.cache.page_size; }
  int64_t retiring_tokens() const { return retiring_pages * c.cache.page_size; }
  int64_t candidates() const { return store_tokens() + retiring_tokens(); }
  int64_t page(int64_t number) const {
    return number < c.store_pages ? c.store[row * c.store_pages + number]
                                  : c.retiring[row * c.retiring_pages + number - c.store_pages];
  }
  RecordView record() const { return {c.cache, c.record_layout, c.moments + row * c.moment_pages, head}; }
  float num_evicted() const { return c.num_evicted[row]; }

  template <class T>
  T* key(int64_t candidate) const {
    return keys_of<T>(c.cache, page(candidate / c.cache.page_size), head) + candidate % c.cache.page_size;
  }
  template <class T>
  T* value(int64_t candidate) const {
    return values_of<T>(c.cache, page(candidate / c.cache.page_size), head) +
           candidate % c.cache.page_size * c.cache.head_dim;
  }
  float* mass(int64_t candidate) const {
    return c.observed + (page(candidate / c.cache.page_size) * c.cache.heads + head) * c.cache.page_size +
           candidate % c.cache.page_size;
  }
};

// Mean key and value of all candidates, [head_dim] each.
template <class T>
void means_of_candidates(const Event& e, float* mean_key, float* mean_value) {
  const int64_t page_size = e.c.cache.page_size, d = e.c.cache.head_dim;
  std::fill_n(mean_key, d, 0.0f);
  std::fill_n(mean_value, d, 0.0f);
  for (int64_t p = 0; p < e.c.store_pages + e.retiring_pages; ++p) {
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
  const int64_t pages = e.c.store_pages + e.retiring_pages;
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
  const int64_t page_size = e.c.cache.page_size, d = e.c.cache.head_dim, pages = e.c.store_pages + e.retiring_pages;
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

// A number that sorts candidates by who goes first: the lower score, of equal scores the later one, NaN before all.
inline uint64_t rank_of(float score, int64_t candidate) {
  const int32_t bits = bits_as<int32_t>(score + 0.0f);  // -0 becomes +0
  const uint32_t ascending = score == score ? uint32_t(bits < 0 ? ~bits : bits ^ INT32_MIN) : 0;
  return uint64_t(ascending) << 32 | uint32_t(~candidate);
}

// Writes the losers, as many as retire, in ascending order; `ranks` has room for every candidate.
void choose_losers(const Event& e, const float* score, uint64_t* ranks, int32_t* losers) {
  const int64_t n = e.candidates(), count = e.retiring_tokens();
  for (int64_t i = 0; i < n; ++i) ranks[i] = rank_of(i < e.c.sink_tokens ? INFINITY : score[i], i);
  std::nth_element(ranks, ranks + count - 1, ranks + n);
  for (int64_t i = 0; i < count; ++i) losers[i] = int32_t(~uint32_t(ranks[i]));
  std::sort(losers, losers + count);
}

// Moments of the losers, not yet merged: means [head_dim], covariance [head_dim (key)][head_dim (value)] times their number.
struct Folded {
  float *mean_key, *mean_value, *covariance;
  float value_spread;
};

// A batch of losers as float32, [tokens][head_dim] each.
struct Batch {
  float *keys, *values;
  int64_t tokens;
};

template <class T>
void gather(const Event& e, const int32_t* losers, const Batch& b) {
  const int64_t d = e.c.cache.head_dim;
  for (int64_t j = 0; j < b.tokens; ++j) {
    const T *key = e.key<T>(losers[j]), *value = e.value<T>(losers[j]);
    for (int64_t i = 0; i < d; ++i) b.keys[j * d + i] = to_float(key[i * e.c.cache.page_size]);
    for (int64_t i = 0; i < d; i += kLanes) store(b.values + j * d + i, load(value + i));
  }
}

inline void add_rows(const float* rows, int64_t tokens, int64_t d, float* total) {
  for (int64_t j = 0; j < tokens; ++j)
    for (int64_t i = 0; i < d; i += kLanes) store(total + i, load(total + i) + load(rows + j * d + i));
}

inline void subtract_from_rows(float* rows, int64_t tokens, int64_t d, const float* mean) {
  for (int64_t j = 0; j < tokens; ++j)
    for (int64_t i = 0; i < d; i += kLanes) store(rows + j * d + i, load(rows + j * d + i) - load(mean + i));
}

// covariance += keys^T values for kRows key dimensions from `i` and Width vectors of value dimensions from `dim`.
template <int Rows, int Width>
inline void add_products_block(const Batch& b, int64_t d, int64_t i, int64_t dim, float* covariance) {
  Vec sums[Rows][Width];
  for (int r = 0; r < Rows; ++r)
    for (int w = 0; w < Width; ++w) sums[r][w] = load(covariance + (i + r) * d + dim + w * kLanes);
  for (int64_t j = 0; j < b.tokens; ++j) {
    Vec v[Width];
    for (int w = 0; w < Width; ++w) v[w] = load(b.values + j * d + dim + w * kLanes);
    for (int r = 0; r < Rows; ++r)
      for (int w = 0; w < Width; ++w) sums[r][w] += v[w] * b.keys[j * d + i + r];
  }
  for (int r = 0; r < Rows; ++r)
    for (int w = 0; w < Width; ++w) store(covariance + (i + r) * d + dim + w * kLanes, sums[r][w]);
}

inline void add_products(const Batch& b, int64_t d, float* covariance) {
  constexpr int kRows = 4, kWidth = 4;
  for (int64_t i = 0; i < d; i += kRows) {
    int64_t dim = 0;
    for (; dim + kWidth * kLanes <= d; dim += kWidth * kLanes) add_products_block<kRows, kWidth>(b, d, i, dim, covariance);
    for (; dim < d; dim += kLanes) add_products_block<kRows, 1>(b, d, i, dim, covariance);
  }
}

// Fills `f` from the losers, in batches that fit `room` (2 * kFoldTokens * head_dim floats): means first, then the rest.
template <class T>
void fold(const Event& e, const int32_t* losers, Folded& f, float* room) {
  const int64_t d = e.c.cache.head_dim, n = e.retiring_tokens();
  auto batch = [&](int64_t first) {
    return Batch{room, room + kFoldTokens * d, n - first < kFoldTokens ? n - first : kFoldTokens};
  };
  std::fill_n(f.mean_key, d, 0.0f);
  std::fill_n(f.mean_value, d, 0.0f);
  for (int64_t first = 0; first < n; first += kFoldTokens) {
    const Batch b = batch(first);
    gather<T>(e, losers + first, b);
    add_rows(b.keys, b.tokens, d, f.mean_key);
    add_rows(b.values, b.tokens, d, f.mean_value);
  }
  for (int64_t i = 0; i < d; ++i) f.mean_key[i] /= float(n), f.mean_value[i] /= float(n);

  if (e.c.record_layout.has_covariance) std::fill_n(f.covariance, d * d, 0.0f);
  Vec spread = {};
  for (int64_t first = 0; first < n; first += kFoldTokens) {
    const Batch b = batch(first);
    if (n > kFoldTokens) gather<T>(e, losers + first, b);  // a single batch is still there
    subtract_from_rows(b.keys, b.tokens, d, f.mean_key);
    subtract_from_rows(b.values, b.tokens, d, f.mean_value);
    for (int64_t i = 0; i < b.tokens * d; i += kLanes) spread += load(b.values + i) * load(b.values + i);
    if (e.c.record_layout.has_covariance) add_products(b, d, f.covariance);
  }
  f.value_spread = sum(spread) / float(n);
}

template <class C>
void write_row(C* row, const float* values, int64_t d, float*) {
  for (int64_t dim = 0; dim < d; dim += kLanes) store(row + dim, load(values + dim));
}

// int8: the row's largest number becomes 127.
inline void write_row(Int8* row, const float* values, int64_t d, float* scale) {
  Vec top = {};
  for (int64_t dim = 0; dim < d; dim += kLanes) {
    const Vec v = absolute(load(values + dim));
    top = v > top ? v : top;
  }
  *scale = largest(top) / 127;
  const float inverse = *scale > 0 ? 1 / *scale : 0;
  for (int64_t dim = 0; dim < d; dim += kLanes) store(row + dim, load(values + dim) * inverse);
}

// Merges `f` into the record (Chan et al. 1979); an empty record is not read.
template <class C>
void merge_into_record(const Event& e, const Folded& f) {
  const int64_t d = e.c.cache.head_dim;
  const RecordView record = e.record();
  const float before = e.num_evicted(), n = float(e.retiring_tokens());
  const bool empty = before == 0;
  const float share = n / (before + n), between = share * (1 - share);
  float delta_key[kMaxHeadDim], delta_value[kMaxHeadDim], square = 0;
  float *mean_key = record.mean_key(), *mean_value = record.mean_value(), *spread = record.value_spread();
  for (int64_t i = 0; i < d; ++i) {
    delta_key[i] = empty ? 0 : f.mean_key[i] - mean_key[i];
    delta_value[i] = empty ? 0 : f.mean_value[i] - mean_value[i];
    square += delta_value[i] * delta_value[i];
    mean_key[i] = empty ? f.mean_key[i] : mean_key[i] + share * delta_key[i];
    mean_value[i] = empty ? f.mean_value[i] : mean_value[i] + share * delta_value[i];
  }
  *spread = empty ? f.value_spread : *spread + share * (f.value_spread - *spread) + between * square;
  if (!e.c.record_layout.has_covariance) return;
  for (int64_t i = 0; i < d; ++i) {
    C* row = record.covariance_row<C>(i);
    const float scale = std::is_same_v<C, Int8> ? record.scales()[i] : 1.0f;
    float merged[kMaxHeadDim];
    for (int64_t dim = 0; dim < d; dim += kLanes) {
      const Vec gone = load(f.covariance + i * d + dim) * (1 / n);
      const Vec old = empty ? Vec{} : load(row + dim) * scale;
      const Vec both = old + (gone - old) * share + load(delta_value + dim) * (between * delta_key[i]);
      store(merged + dim, empty ? gone : both);
    }
    write_row(row, merged, d, record.scales() + i);
  }
}

// The i-th lost store slot takes the i-th retiring token that won; `losers` ascending.
template <class T>
void fill_holes(const Event& e, const int32_t* losers) {
  const int64_t n = e.retiring_tokens(), store = e.store_tokens(), d = e.c.cache.head_dim;
  int64_t winner = store, next_loser = std::lower_bound(losers, losers + n, int32_t(store)) - losers;
  for (int64_t hole = 0; hole < n && losers[hole] < store; ++hole, ++winner) {
    while (next_loser < n && losers[next_loser] == winner) ++next_loser, ++winner;
    const T* from = e.key<T>(winner);
    T* to = e.key<T>(losers[hole]);
    for (int64_t i = 0; i < d; ++i) to[i * e.c.cache.page_size] = from[i * e.c.cache.page_size];
    std::memcpy(e.value<T>(losers[hole]), e.value<T>(winner), d * sizeof(T));
    if (e.c.observed != nullptr) *e.mass(losers[hole]) = *e.mass(winner);
  }
}

// Floats: ranks (8 bytes) and score of every candidate, losers, then `Folded` and a batch.
size_t consolidate_scratch(const Consolidate& c) {
  const size_t candidates = (c.store_pages + c.retiring_pages) * c.cache.page_size, d = c.cache.head_dim;
  return 4 * candidates + d * (2 + d + 2 * kFoldTokens);
}

void consolidate(const Consolidate& c, int64_t item, float* scratch) {
  const Event e(c, item);
  if (e.retiring_pages == 0) return;
  const int64_t d = c.cache.head_dim, candidates = (c.store_pages + c.retiring_pages) * c.cache.page_size;
  uint64_t* ranks = reinterpret_cast<uint64_t*>(scratch);
  float* own_score = scratch + 2 * candidates;
  int32_t* losers = reinterpret_cast<int32_t*>(own_score + candidates);
  float* rest = own_score + 2 * candidates;
  Folded f{rest, rest + d, rest + 2 * d, 0};
  with_type(c.cache.type, [&](auto t) {
    using T = decltype(t);
    // `scratch` is free until the ranks are made.
    if (c.score == nullptr) score_by_moments<T>(e, f.mean_key, scratch, own_score);
    choose_losers(e, c.score == nullptr ? own_score : c.score + item * candidates, ranks, losers);
    // The record may lie in retiring pages: their tokens are read before it is written.
    if (c.record_layout.has_means) fold<T>(e, losers, f, f.covariance + d * d);
    fill_holes<T>(e, losers);
  });
  if (c.record_layout.has_means)
    with_covariance_type(c.record_layout.covariance_type, [&](auto t) { merge_into_record<decltype(t)>(e, f); });
}
