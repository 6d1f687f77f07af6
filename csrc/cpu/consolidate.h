// Retires pages of one (row, head): score, choose, fold the losers into the moments, fill their slots with the winners.
// Included once per instruction set.

constexpr int kFoldTokens = 64;  // losers whose centred keys and values are held at a time

// A number that sorts candidates by who goes first: the lower score, of equal scores the later one, NaN before all.
inline uint64_t rank_of(float score, int64_t candidate) {
  const int32_t bits = bits_as<int32_t>(score + 0.0f);  // -0 becomes +0
  const uint32_t ascending = score == score ? uint32_t(bits < 0 ? ~bits : bits ^ INT32_MIN) : 0;
  return uint64_t(ascending) << 32 | uint32_t(~candidate);
}

// Writes the losers in ascending order: runs of `run_tokens` neighbours, by the mean of their scores. `ranks` has room for every
// candidate.
void choose_losers(const Event& e, const float* score, uint64_t* ranks, int32_t* losers) {
  const int64_t length = e.c.run_tokens, runs = e.candidates() / length, count = e.losers() / length;
  if (count == 0) return;
  for (int64_t i = 0; i < runs; ++i) {
    float total = 0;
    for (int64_t t = i * length; t < (i + 1) * length; ++t) total += score[t];
    ranks[i] = rank_of(i * length < e.c.sink_tokens ? INFINITY : total / float(length), i);
  }
  std::nth_element(ranks, ranks + count - 1, ranks + runs);
  for (int64_t i = 0; i < count; ++i) losers[i] = int32_t(~uint32_t(ranks[i]));
  std::sort(losers, losers + count);
  for (int64_t i = count - 1; i >= 0; --i)
    for (int64_t t = length - 1; t >= 0; --t) losers[i * length + t] = int32_t(losers[i] * length + t);
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

// A candidate as float32, [head_dim] each.
template <class T>
void load_candidate(const Event& e, int64_t candidate, float* key, float* value) {
  const int64_t d = e.c.cache.head_dim;
  if (e.is_packed(candidate)) {
    float wide_key[kMaxHeadDim], wide_value[kMaxHeadDim];
    with_bits(e.c.packed.bits, [&](auto bits) {
      read_token<bits>(e.c.packed, e.tile(candidate), int(candidate % kTileTokens), wide_key, wide_value);
    });
    std::copy_n(wide_key, d, key);
    std::copy_n(wide_value, d, value);
    for (int64_t i = 0; e.centres && i < d; ++i) key[i] += e.centres.of_slot(candidate)[i];
    return;
  }
  const T *from = e.key<T>(candidate), *values = e.value<T>(candidate);
  for (int64_t i = 0; i < d; ++i) key[i] = to_float(from[i * e.c.cache.page_size]) * key_unit<T>(e.c.cache);
  for (int64_t i = 0; i < d; i += kLanes) store(value + i, load_value(e.c.cache, values + i));
}

template <class T>
void gather(const Event& e, const int32_t* losers, const Batch& b) {
  const int64_t d = e.c.cache.head_dim;
  for (int64_t j = 0; j < b.tokens; ++j) load_candidate<T>(e, losers[j], b.keys + j * d, b.values + j * d);
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
  const int64_t d = e.c.cache.head_dim, n = e.losers();
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
  const float before = e.num_evicted(), n = float(e.losers());
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

// Candidates that stay and are not in their slot yet, in order.
struct Winners {
  const int32_t *loser, *end;
  int64_t next;

  Winners(const Event& e, const int32_t* losers)
      : loser(std::lower_bound(losers, losers + e.losers(), int32_t(e.settled()))), end(losers + e.losers()), next(e.settled()) {}
  int64_t take() {
    while (loser < end && *loser == next) ++loser, ++next;
    return next++;
  }
};

template <class T>
void move_exact(const Event& e, int64_t winner, int64_t slot) {
  const T* from = e.key<T>(winner);
  T* to = e.key<T>(slot);
  for (int64_t i = 0; i < e.c.cache.head_dim; ++i) to[i * e.c.cache.page_size] = from[i * e.c.cache.page_size];
  std::memcpy(e.value<T>(slot), e.value<T>(winner), e.c.cache.head_dim * sizeof(T));
}

// What enters a quantised store, token by token.
template <class T>
class Entering {
 public:
  explicit Entering(const Event& event) : e(event), p(event.c.packed) {
    if (e.c.feedback != nullptr) fed_back_.emplace(p, e.c.feedback + e.head * p.width * p.width);
  }

  // The candidate `winner` as a tile's token, in the store's `slot`. It is read now, and there when `finish` has been called.
  void take(int64_t winner, int64_t slot, uint8_t* tile) {
    const int token = int(slot % kTileTokens);
    float key[kMaxHeadDim] = {}, value[kMaxHeadDim] = {};
    load_candidate<T>(e, winner, key, value);
    for (int64_t i = 0; e.centres && i < e.c.cache.head_dim; ++i) key[i] -= e.centres.of_slot(slot)[i];
    rotate(key, p.width, p.block);
    rotate(value, p.width, p.block);
    with_bits(p.bits, [&](auto bits) {
      fed_back_ ? fed_back_->template add<bits>(key, tile, token) : write_key<bits>(p, key, tile, token);
      write_value<bits>(p, value, tile, token);
    });
  }

  void finish() {
    if (fed_back_) with_bits(p.bits, [&](auto bits) { fed_back_->template write<bits>(); });
  }

 private:
  const Event& e;
  const PackedLayout& p;
  std::optional<FedBackKeys> fed_back_;
};

// The i-th lost or empty store slot takes the i-th retiring token that won; `losers` ascending.
template <class T>
void fill_holes(const Event& e, const int32_t* losers) {
  Winners winners(e, losers);
  Entering<T> entering(e);
  const int64_t filled = e.settled(), stay = e.candidates() - e.losers();
  auto put = [&](int64_t slot) {
    const int64_t winner = winners.take();
    if (e.c.stored == nullptr)
      move_exact<T>(e, winner, slot);
    else if (e.is_packed(winner))  // whole tiles move, for whole runs do
      std::memcpy(e.tile(slot), e.tile(winner), slot % kTileTokens == 0 ? e.c.packed.tile_bytes : 0);
    else
      entering.take(winner, slot, e.tile(slot));
    if (e.c.observed != nullptr) *e.mass_of_slot(slot) = *e.mass(winner);
  };
  for (const int32_t* hole = losers; hole < losers + e.losers() && *hole < filled; ++hole) put(*hole);
  for (int64_t slot = filled; slot < stay; ++slot) put(slot);
  entering.finish();
}

// Centres of the keys of a sequence whose store is quantised for the first time: [2][head_dim], the first key and the mean of those
// behind the first tile, of finite numbers.
template <class T>
void find_centres(const Event& e, float* centres) {
  const int64_t d = e.c.cache.head_dim, page_size = e.c.cache.page_size, others = e.candidates() - kTileTokens;
  auto finite = [](float x) { return x - x == 0 ? x : 0.0f; };
  for (int64_t i = 0; i < d; ++i) {
    double total = 0;
    for (int64_t n = kTileTokens; n < e.candidates(); ++n) total += finite(to_float(e.key<T>(n)[i * page_size]) * key_unit<T>(e.c.cache));
    centres[i] = finite(to_float(e.key<T>(0)[i * page_size]) * key_unit<T>(e.c.cache));
    centres[d + i] = float(total / double(std::max<int64_t>(others, 1)));
  }
}

void write_centres(const Event& e) {
  const Centres in_record(e.c.packed, e.record());
  std::copy_n(e.centres.first, e.c.cache.head_dim, in_record.first);
  std::copy_n(e.centres.others, e.c.cache.head_dim, in_record.others);
}

// What a head puts into tiles that were lent: bytes and observed mass of its `tile`-th one.
struct Lent {
  uint8_t* bytes;
  float* mass;

  Lent(const Consolidate& c, int64_t item, int64_t tile)
      : bytes(c.lent + item * c.lent_bytes() + tile * c.packed.tile_bytes),
        mass(reinterpret_cast<float*>(c.lent + item * c.lent_bytes() + c.lent_tiles() * c.packed.tile_bytes) + tile * kTileTokens) {}
};

// The first event of a quantised store: its pages become tiles, page by page. What a page takes lies in that page or in later
// ones, and is read before the page is written. Tiles that were lent come last: other heads' tokens may still lie there
// (`move_lent`). `room` is for the bytes and the observed mass of a page.
template <class T>
void become_packed(const Event& e, const int32_t* losers, float* room) {
  Winners winners(e, losers);
  Entering<T> entering(e);
  const PackedLayout& p = e.c.packed;
  const int64_t stay = e.candidates() - e.losers(), page_tokens = p.page_tiles * kTileTokens;
  const int64_t own = std::min(stay, e.c.store_tokens), item = e.row * e.c.cache.heads + e.head;
  uint8_t* bytes = reinterpret_cast<uint8_t*>(room + page_tokens);
  auto take = [&](uint8_t* tile, int64_t slot, float* mass) {
    const int64_t winner = winners.take();
    entering.take(winner, slot, tile);
    if (e.c.observed != nullptr) *mass = *e.mass(winner);
  };
  for (int64_t first = 0; first < own; first += page_tokens) {
    const int64_t here = std::min(own - first, page_tokens);
    for (int64_t i = 0; i < here; ++i) take(bytes + i / kTileTokens * p.tile_bytes, first + i, room + i);
    entering.finish();
    std::memcpy(e.tile(first), bytes, (here + kTileTokens - 1) / kTileTokens * p.tile_bytes);
    if (e.c.observed != nullptr) std::copy_n(room, here, e.mass_of_slot(first));
  }
  for (int64_t slot = own; slot < stay; ++slot) {
    const Lent lent(e.c, item, (slot - own) / kTileTokens);
    take(lent.bytes, slot, lent.mass + slot % kTileTokens);
  }
  entering.finish();
}

// When all heads have consolidated: the last tiles of a first event to their places.
void move_lent(const Consolidate& c, int64_t item) {
  const Event e(c, item);
  if (e.retiring_pages == 0 || e.packed_tokens > 0) return;
  const int64_t stay = e.candidates() - e.losers();
  for (int64_t slot = c.store_tokens; slot < stay; slot += kTileTokens) {
    const Lent lent(c, item, (slot - c.store_tokens) / kTileTokens);
    std::memcpy(e.tile(slot), lent.bytes, c.packed.tile_bytes);
    if (c.observed != nullptr) std::copy_n(lent.mass, kTileTokens, e.mass_of_slot(slot));
  }
}

// Floats: ranks (8 bytes) and score of every candidate, losers, then `Folded` and a batch, or a page of tiles.
size_t consolidate_scratch(const Consolidate& c) {
  const size_t d = c.cache.head_dim, tiles = c.packed.page_tiles * (kTileTokens + c.packed.tile_bytes / 4 + 1);
  return 4 * c.candidates + d * (2 + d + 2 * kFoldTokens) + tiles;
}

void consolidate(const Consolidate& c, int64_t item, float* scratch) {
  Event e(c, item);
  if (e.retiring_pages == 0) return;
  const bool centred = c.stored != nullptr && c.packed.centres >= 0, is_first = e.packed_tokens == 0;
  float centres[2 * kMaxHeadDim];
  if (centred) e.centres = is_first ? Centres(centres, centres + c.cache.head_dim) : Centres(c.packed, e.record());
  const int64_t d = c.cache.head_dim;
  uint64_t* ranks = reinterpret_cast<uint64_t*>(scratch);
  float* own_score = scratch + 2 * c.candidates;
  int32_t* losers = reinterpret_cast<int32_t*>(own_score + c.candidates);
  float* rest = own_score + 2 * c.candidates;
  Folded f{rest, rest + d, rest + 2 * d, 0};
  const bool folds = c.record_layout.has_means && e.losers() > 0;
  with_cache_type(c.cache.type, [&](auto t) {
    using T = decltype(t);
    if (centred && is_first) find_centres<T>(e, centres);
    // `scratch` is free until the ranks are made.
    if (c.score == nullptr && e.losers() > 0) score_by_direction<T>(e, scratch, own_score);
    choose_losers(e, c.score == nullptr ? own_score : c.score + item * c.candidates, ranks, losers);
    // The record may lie in retiring pages, or behind the store's last tile: tokens are read and written before it.
    if (folds) fold<T>(e, losers, f, f.covariance + d * d);
    if (c.stored != nullptr && is_first)
      become_packed<T>(e, losers, f.covariance + d * d + 2 * kFoldTokens * d);
    else
      fill_holes<T>(e, losers);
  });
  if (centred && is_first) write_centres(e);
  if (folds) with_covariance_type(c.record_layout.covariance_type, [&](auto t) { merge_into_record<decltype(t)>(e, f); });
}
