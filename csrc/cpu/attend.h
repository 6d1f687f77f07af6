// Attention over pages with an online softmax, the moment record as its last step. Included once per instruction set.
//
// `Rows` query rows (queries x query heads of one KV head) share every load of a key or value. A tile of kTileSlots slots:
// logits for all rows, their exponentials, then the weighted values.

// The next slots of a row's pages, as vectors of kLanes slots.
template <class T>
struct Tile {
  const T* keys[kTileSlots / kLanes];  // first key dimension of each vector; the next one is page_size further
  const T* values[kTileSlots / kLanes];
  int slots;

  // Slots [first, end) of `pages`; `first` starts a page. Reads nothing of a page beyond `end`'s vector.
  Tile(const Cache& c, int64_t head, const int64_t* pages, int64_t first, int64_t end)
      : slots(int(end - first < kTileSlots ? end - first : kTileSlots)) {
    for (int s = 0; s < slots; s += kLanes) {
      const int64_t page = (first + s) / c.page_size, slot = (first + s) % c.page_size;
      keys[s / kLanes] = keys_of<T>(c, pages[page], head) + slot;
      values[s / kLanes] = values_of<T>(c, pages[page], head) + slot * c.head_dim;
    }
  }
  int vectors() const { return (slots + kLanes - 1) / kLanes; }
};

// logits[r][slot] = scale * q_r . k_slot; `query` is [head_dim][Rows]. Fetches the values ahead if they are needed next.
template <int Rows, bool Values, class T>
inline void dot_keys(const Tile<T>& tile, const float* query, int64_t head_dim, int64_t page_size, float scale,
                     float* logits) {
  constexpr int kVectors = Rows >= 8 ? 2 : 4;
  const int vectors = tile.vectors();
  for (int v = 0; v < vectors; v += kVectors) {
    const T* key[kVectors];
    for (int j = 0; j < kVectors; ++j) key[j] = tile.keys[v + j < vectors ? v + j : v];
    Vec sums[Rows][kVectors] = {};
    const T *next[kVectors], *value[kVectors];
    for (int j = 0; j < kVectors; ++j) {
      next[j] = tile.keys[v + j + kVectors < vectors ? v + j + kVectors : v];
      value[j] = tile.values[v + j < vectors ? v + j : v];
    }
    for (int64_t i = 0; i < head_dim; ++i) {
      Vec k[kVectors];
      for (int j = 0; j < kVectors; ++j) k[j] = load(key[j] + i * page_size);
      for (int j = 0; j < kVectors; ++j) __builtin_prefetch(next[j] + i * page_size);
      if constexpr (Values)
        for (int j = 0; j < kVectors; ++j) __builtin_prefetch(value[j] + i * kLanes);
      for (int r = 0; r < Rows; ++r)
        for (int j = 0; j < kVectors; ++j) sums[r][j] += k[j] * query[i * Rows + r];
    }
    for (int r = 0; r < Rows; ++r)
      for (int j = 0; j < kVectors && v + j < vectors; ++j)
        store(logits + r * kTileSlots + (v + j) * kLanes, sums[r][j] * scale);
  }
}

// out[r][:] = out[r][:] * keep[r] + sum over slots of weights[r][slot] * value_slot.
template <int Rows, int Width, class T>
inline void add_values_block(const Tile<T>& tile, const float* weights, const float* keep, int64_t head_dim, int64_t dim,
                             float* out) {
  Vec sums[Rows][Width];
  for (int r = 0; r < Rows; ++r)
    for (int j = 0; j < Width; ++j) sums[r][j] = load(out + r * head_dim + dim + j * kLanes) * keep[r];
  for (int s = 0; s < tile.slots; s += kLanes) {
    const T* value = tile.values[s / kLanes] + dim;
    const int here = tile.slots - s < kLanes ? tile.slots - s : kLanes;
    for (int t = 0; t < here; ++t, value += head_dim) {
      Vec v[Width];
      for (int j = 0; j < Width; ++j) v[j] = load(value + j * kLanes);
      for (int r = 0; r < Rows; ++r)
        for (int j = 0; j < Width; ++j) sums[r][j] += v[j] * weights[r * kTileSlots + s + t];
    }
  }
  for (int r = 0; r < Rows; ++r)
    for (int j = 0; j < Width; ++j) store(out + r * head_dim + dim + j * kLanes, sums[r][j]);
}

template <int Rows, class T>
inline void add_values(const Tile<T>& tile, const float* weights, const float* keep, int64_t head_dim, float* out) {
  constexpr int kWidth = Rows >= 8 ? 2 : 4;
  int64_t dim = 0;
  for (; dim + kWidth * kLanes <= head_dim; dim += kWidth * kLanes)
    add_values_block<Rows, kWidth>(tile, weights, keep, head_dim, dim, out);
  for (; dim < head_dim; dim += kLanes) add_values_block<Rows, 1>(tile, weights, keep, head_dim, dim, out);
}

// Running softmax of some rows: output = out / mass, logsumexp = top + log(mass).
struct Running {
  float *out, *top, *mass;
};

// Caps scaled logits of `Rows` rows in place. Out of line: layers that cap nothing shall not even fetch its code.
template <int Rows>
__attribute__((noinline, cold)) void cap(const Attend& a, int vectors, float* logits) {
  const float inverse = 1 / a.softcap;
  for (int r = 0; r < Rows; ++r)
    for (int v = 0; v < vectors; ++v) {
      float* at = logits + r * kTileSlots + v * kLanes;
      store(at, hyperbolic_tangent(load(at) * inverse) * a.softcap);
    }
}

// Turns logits into weights in place and returns in `keep` what the earlier sums are to be multiplied by.
inline void soften(float* logits, int slots, int visible, float& top, float& mass, float& keep) {
  Vec highest = splat(-INFINITY);
  for (int s = 0; s < slots; s += kLanes) {
    if (s + kLanes > visible)
      for (int t = visible > s ? visible - s : 0; t < kLanes; ++t) logits[s + t] = -INFINITY;
    const Vec x = load(logits + s);
    highest = x > highest ? x : highest;
  }
  const float tile_top = largest(highest), new_top = tile_top > top ? tile_top : top;
  keep = top == new_top ? 1.0f : expf(top - new_top);
  top = new_top;
  if (top == -INFINITY) {  // nothing visible yet: every weight is 0
    for (int s = 0; s < slots; s += kLanes) store(logits + s, Vec{});
    return;
  }
  Vec total = {};
  for (int s = 0; s < slots; s += kLanes) {
    const Vec weight = exp_negative(load(logits + s) - top);
    store(logits + s, weight);
    total += weight;
  }
  mass = mass * keep + sum(total);
}

// Where attend leaves the weights of consecutive query rows to observe, row_weights() each: of rows from `first` on, which count.
struct Left {
  float* weights = nullptr;  // of the head's first row that counts
  int64_t before = 0;        // rows of the head from that one to row 0 here
  int first = INT_MAX;

  Left(const Attend& a, const AttendItem& item, int first_row) {
    const int64_t groups = a.query_heads / a.cache.heads;
    if (item.left == nullptr || a.observe_from[item.row] >= a.num_queries[item.row]) return;
    weights = item.left;
    before = (item.first_query - a.observe_from[item.row]) * groups + first_row;
    first = int(before < 0 ? -before : 0);
  }
  float* row(const Attend& a, int r) const { return weights + (before + r) * a.row_weights(); }
};

// Leaves the weights of some slots of a query row, and what they are relative to. Asks for the place of the next ones: it is
// written here first and read again by observe, from a cache then.
inline void leave(const Attend& a, float* left, int64_t slot, const float* weights, int slots, float top) {
  for (int i = 0; i < kTileSlots; i += 16) __builtin_prefetch(left + slot + kTileSlots + i, 1);
  __builtin_prefetch(left + a.row_slots() + (slot + kTileSlots) / 8, 1);
  std::copy_n(weights, slots, left + slot);
  std::fill_n(left + a.row_slots() + slot / 8, (slots + 7) / 8, top);
}

// Leaves zeros for slots of later queries of the row, which observe reads for all of them. `seen`: exact slots left so far.
inline void leave_nothing(const Attend& a, const AttendItem& item, float* left, int64_t seen) {
  const int64_t from = a.store_slots() + (seen + kLanes - 1) / kLanes * kLanes;
  const int64_t end = a.store_slots() + (a.last_slot[item.row] + a.num_queries[item.row] + 15) / 16 * 16;
  if (from >= end) return;
  std::fill(left + from, left + end, 0.0f);
  float* tops = left + a.row_slots();
  std::fill(tops + (from + 7) / 8, tops + end / 8, -INFINITY);
}

inline void multiply(float* numbers, int size, float factor) {
  for (int i = 0; i < size; i += kLanes) store(numbers + i, load(numbers + i) * factor);
}

// `slot`: of the tile among those of `left`.
template <int Rows, class T>
inline void attend_tile(const Attend& a, const Tile<T>& tile, const float* query, const int* visible, float* logits,
                        const Left& left, int64_t slot, Running run) {
  dot_keys<Rows, true>(tile, query, a.cache.head_dim, a.cache.page_size, a.scale * key_unit<T>(a.cache), logits);
  if (a.softcap != 0) cap<Rows>(a, tile.vectors(), logits);
  float keep[Rows];
  for (int r = 0; r < Rows; ++r)
    soften(logits + r * kTileSlots, tile.vectors() * kLanes, visible[r], run.top[r], run.mass[r], keep[r]);
  for (int r = left.first; r < Rows; ++r)
    leave(a, left.row(a, r), slot, logits + r * kTileSlots, tile.vectors() * kLanes, run.top[r]);
  if constexpr (kIsFp8<T>)
    for (int r = 0; r < Rows; ++r) multiply(logits + r * kTileSlots, tile.vectors() * kLanes, value_unit<T>(a.cache));
  add_values<Rows>(tile, logits, keep, a.cache.head_dim, run.out);
}

// step[r][:] = sum over key dimensions i of query[i][r] * covariance[i][:], kWidth vectors of value dimensions at a time.
template <int Rows, int Width, class C>
inline void add_covariance_block(C* const* covariance, const float* scales, int64_t d, int64_t dim, const float* query,
                                 float* step) {
  Vec sums[Rows][Width] = {};
  for (int64_t i = 0; i < d; ++i) {
    Vec c[Width];
    for (int w = 0; w < Width; ++w) c[w] = load(covariance[i] + dim + w * kLanes);
    if constexpr (std::is_same_v<C, Int8>)
      for (int w = 0; w < Width; ++w) c[w] *= scales[i];
    for (int w = 0; w < Width; w += 2) __builtin_prefetch(covariance[i + 8 < d ? i + 8 : i] + dim + w * kLanes);
    for (int r = 0; r < Rows; ++r)
      for (int w = 0; w < Width; ++w) sums[r][w] += c[w] * query[i * Rows + r];
  }
  for (int r = 0; r < Rows; ++r)
    for (int w = 0; w < Width; ++w) store(step + r * d + dim + w * kLanes, sums[r][w]);
}

template <int Rows, class C>
inline void add_covariance(const RecordView& record, int64_t d, const float* query, float* step) {
  constexpr int kWidth = Rows >= 8 ? 2 : 4;
  C* rows[kMaxHeadDim];
  for (int64_t i = 0; i < d; ++i) rows[i] = record.covariance_row<C>(i);
  int64_t dim = 0;
  for (; dim + kWidth * kLanes <= d; dim += kWidth * kLanes)
    add_covariance_block<Rows, kWidth>(rows, record.scales(), d, dim, query, step);
  for (; dim < d; dim += kLanes) add_covariance_block<Rows, 1>(rows, record.scales(), d, dim, query, step);
}

// The first-order partial of the evicted tokens (paper eqs. 9, 11; capped logits: `partial` of momentkv_vllm/moments.py) as one
// more step of the running softmax.
// `query` is [head_dim][Rows]; `step` has room for Rows * head_dim floats.
template <int Rows, class C>
inline void attend_record(const Attend& a, const RecordView& record, float num_evicted, const float* query, float* step,
                          Running run) {
  const int64_t d = a.cache.head_dim;
  const float *mean_key = record.mean_key(), *mean_value = record.mean_value();
  const float limit = sqrtf(*record.value_spread() > 0 ? *record.value_spread() : 0);
  if (a.record_layout.has_covariance)
    add_covariance<Rows, C>(record, d, query, step);
  else
    std::fill_n(step, Rows * d, 0.0f);
  for (int r = 0; r < Rows; ++r) {
    float dot = 0;
    for (int64_t i = 0; i < d; ++i) dot += mean_key[i] * query[i * Rows + r];
    Vec square = {};
    for (int64_t i = 0; i < d; i += kLanes) square += load(step + r * d + i) * load(step + r * d + i);
    const float bent = a.softcap != 0 ? tanhf(a.scale * dot / a.softcap) : 0;
    const float slope = a.scale * (1 - bent * bent);
    const float length = slope * sqrtf(sum(square));
    const float shrink = length > limit ? limit / length : 1.0f;
    const float log_mass = logf(num_evicted) + (a.softcap != 0 ? a.softcap * bent : a.scale * dot);
    const float top = log_mass > run.top[r] ? log_mass : run.top[r];
    const float keep = expf(run.top[r] - top), weight = expf(log_mass - top);
    for (int64_t i = 0; i < d; i += kLanes) {
      const Vec evicted = load(mean_value + i) + load(step + r * d + i) * (slope * shrink);
      store(run.out + r * d + i, load(run.out + r * d + i) * keep + evicted * weight);
    }
    run.mass[r] = run.mass[r] * keep + weight;
    run.top[r] = top;
  }
}

// Writes rows of an item: to the output, or as partials.
template <class T>
inline void finish(const Attend& a, const AttendItem& item, int first_row, int rows, Running run) {
  const int64_t d = a.cache.head_dim, groups = a.query_heads / a.cache.heads;
  for (int r = 0; r < rows; ++r) {
    const int row = first_row + r;
    const float inverse = run.mass[r] > 0 ? 1 / run.mass[r] : 0, lse = run.top[r] + logf(run.mass[r]);
    if (item.partial != nullptr) {
      for (int64_t i = 0; i < d; i += kLanes)
        store(item.partial + row * d + i, load(run.out + r * d + i) * inverse);
      item.partial[groups * d + row] = lse;
      continue;
    }
    const int64_t token = a.first_token[item.row] + item.first_query + row / groups;
    const int64_t query_head = item.head * groups + row % groups;
    T* output = reinterpret_cast<T*>(a.output) + token * a.output_stride + query_head * d;
    for (int64_t i = 0; i < d; i += kLanes) store(output + i, load(run.out + r * d + i) * inverse);
    if (a.lse != nullptr) a.lse[token * a.query_heads + query_head] = lse;
  }
}

// Queries of `Rows` rows from `first_row`, transposed to [head_dim][Rows].
template <int Rows, class T>
inline void pack_queries(const Attend& a, const AttendItem& item, int first_row, float* packed) {
  const int64_t d = a.cache.head_dim, groups = a.query_heads / a.cache.heads;
  for (int r = 0; r < Rows; ++r) {
    const int64_t row = first_row + r, token = a.first_token[item.row] + item.first_query + row / groups;
    const T* query = reinterpret_cast<const T*>(a.query) + token * a.query_stride + (item.head * groups + row % groups) * d;
    for (int64_t i = 0; i < d; ++i) packed[i * Rows + r] = to_float(query[i]);
  }
}

// Slots [first, end) of the row's quantised store, before any others: `run` must be empty. `query` is [head_dim][Rows].
template <int Bits, int Rows>
void attend_store(const Attend& a, const AttendItem& item, const float* query, int64_t first, int64_t end, float* logits,
                  const Left& left, Running run) {
  const PackedLayout& p = a.packed;
  const int64_t d = a.cache.head_dim;
  const PackedQueries<Bits, Rows> queries(p, query, d, Centres(p, record_of(a, item)));
  alignas(64) float out[Rows * kMaxHeadDim];
  alignas(64) int16_t weight_words[Rows * kTileSlots];
  float keep[Rows];
  std::fill_n(out, Rows * p.width, 0.0f);
  const int64_t* pages = a.pages + item.row * a.max_pages;
  for (PackedSlots slots(a.cache, p, item.head, pages, first, end); slots.slots > 0; slots.advance(), first += kTileSlots) {
    if (left.first < Rows && a.observed != nullptr) fetch_tile_mass(a, item, first, end);
    dot_packed<Bits, Rows, true>(slots, p, queries, a.scale, logits);
    if (a.softcap != 0) cap<Rows>(a, slots.vectors(), logits);
    for (int r = 0; r < Rows; ++r)
      soften(logits + r * kTileSlots, slots.vectors() * kLanes, slots.slots, run.top[r], run.mass[r], keep[r]);
    for (int r = left.first; r < Rows; ++r)
      leave(a, left.row(a, r), first, logits + r * kTileSlots, slots.slots, run.top[r]);
    Vec scales[kTileSlots / kLanes];
    value_scales(slots, p, scales);
    add_packed<Bits, Rows>(slots, p, scales, logits, keep, weight_words, out);
  }
  for (int r = 0; r < Rows; ++r) {
    rotate(out + r * p.width, p.width, p.block);
    std::copy_n(out + r * p.width, d, run.out + r * d);
  }
}

template <int Rows, class T>
void attend_rows(const Attend& a, const AttendItem& item, int first_row, float* scratch) {
  const int64_t d = a.cache.head_dim, groups = a.query_heads / a.cache.heads;
  float top[Rows], mass[Rows];
  const Running run = {scratch, top, mass};
  float *packed = scratch + Rows * d, *logits = packed + Rows * d;
  with_type_beside<T>(a.type, [&](auto n) { pack_queries<Rows, decltype(n)>(a, item, first_row, packed); });
  for (int r = 0; r < Rows; ++r) top[r] = -INFINITY, mass[r] = 0;
  for (int64_t i = 0; i < Rows * d; ++i) run.out[i] = 0;

  int64_t sees[Rows];  // exact slots that a row sees
  for (int r = 0; r < Rows; ++r) sees[r] = a.last_slot[item.row] + item.first_query + (first_row + r) / groups + 1;
  const Left left(a, item, first_row);
  const int64_t stored = a.held(item.row, item.head), store_end = stored < item.end_slot ? stored : item.end_slot;
  if (item.first_slot < store_end) {
    const auto attend_bits = a.packed.bits == 8 ? attend_store<8, Rows> : attend_store<4, Rows>;
    attend_bits(a, item, packed, item.first_slot, store_end, logits, left, run);
  }
  const int64_t item_end = item.end_slot - stored, end = sees[Rows - 1] < item_end ? sees[Rows - 1] : item_end;
  for (int64_t first = item.first_slot > stored ? item.first_slot - stored : 0; first < end; first += kTileSlots) {
    const Tile<T> tile(a.cache, item.head, a.exact_pages(item.row), first, end);
    int visible[Rows];
    for (int r = 0; r < Rows; ++r) visible[r] = int(sees[r] - first > 0 ? sees[r] - first : 0);
    if (left.first < Rows && a.observed != nullptr) fetch_exact_mass(a, item, first, end);
    attend_tile<Rows>(a, tile, packed, visible, logits, left, a.store_slots() + first, run);
  }
  if (a.num_queries[item.row] > 1)
    for (int r = left.first; r < Rows; ++r) leave_nothing(a, item, left.row(a, r), end);
  if (item.with_record) {
    const RecordView record = record_of(a, item);
    with_covariance_type(a.record_layout.covariance_type, [&](auto c) {
      attend_record<Rows, decltype(c)>(a, record, a.evicted(item.row, item.head), packed, logits, run);
    });
  }
  with_type_beside<T>(a.type, [&](auto n) { finish<decltype(n)>(a, item, first_row, Rows, run); });
}

// Flash-decoding's second half: the splits of one query, weighted by their logsumexp.
void merge(const Attend& a, const MergeItem& item) {
  const int64_t d = a.cache.head_dim, groups = a.query_heads / a.cache.heads, size = groups * (d + 1);
  const int64_t token = a.first_token[item.row];
  for (int64_t g = 0; g < groups; ++g) {
    float* lse = item.partials + groups * d + g;  // of split 0; the next one is `size` further
    float top = -INFINITY, mass = 0;
    for (int s = 0; s < item.splits; ++s) top = lse[s * size] > top ? lse[s * size] : top;
    for (int s = 0; s < item.splits; ++s) mass += lse[s * size] = expf(lse[s * size] - top);
    const int64_t query_head = item.head * groups + g;
    for (int64_t i = 0; i < d; i += kLanes) {
      Vec out = {};
      for (int s = 0; s < item.splits; ++s) out += load(item.partials + s * size + g * d + i) * lse[s * size];
      with_type(a.type, [&](auto t) {
        store(reinterpret_cast<decltype(t)*>(a.output) + token * a.output_stride + query_head * d + i, out * (1 / mass));
      });
    }
    if (a.lse != nullptr) a.lse[token * a.query_heads + query_head] = top + logf(mass);
  }
}
