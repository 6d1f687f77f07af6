// Quantised store pages: momentkv_vllm/packed_store.py says how a tile looks and what its codes mean. Dot products are those of
// integers: codes times queries, or weights, rounded to 16 bits, exact in 32. Included once per instruction set.

constexpr int kTiles = kTileSlots / kTileTokens;
constexpr int64_t kFirstCache = 24 << 10;  // bytes of the first cache that tiles may fill

// A code of `Bits` bits.
template <int Bits>
struct Code {
  static constexpr int kPlanes = 16 / Bits;         // codes of a 16-bit word
  static constexpr int kGroupBytes = kGroup * Bits / 8;
  static constexpr float kMiddle = Bits == 8 ? 127.5f : 7.5f;
  static constexpr float kLowest = Bits == 8 ? -127.0f : -8.0f, kHighest = Bits == 8 ? 126.0f : 7.0f;
  static constexpr int kOffset = Bits == 8 ? 128 : 8;  // of the stored code to the signed one
  // The code in plane k of every word.
  static WordVec plane(UnsignedWordVec words, int k) {
    return (WordVec)(words >> uint16_t(Bits * k) & uint16_t((1 << Bits) - 1));
  }
  // The code in plane k of every word that holds one byte.
  static WordVec value_plane(UnsignedWordVec bytes, int k) {
    if (Bits == 8) return (WordVec)bytes;
    return (WordVec)(k == 0 ? bytes & uint16_t(15) : bytes >> uint16_t(4));
  }
  // Its dimension: plane k of word h of the w-th 4 bytes of a key.
  static int64_t dimension(int64_t w, int h, int k) {
    if (Bits == 8) return 4 * w + 2 * h + k;
    const int64_t byte = 4 * w + 2 * h + k / 2;
    return byte / 16 * kGroup + k % 2 * 16 + byte % 16;
  }
};

// The next slots of a row's store, as tiles: `for (PackedSlots t(...); t.slots > 0; t.advance())`.
struct PackedSlots {
  const uint8_t* tiles[2 * kTiles];  // those of these slots, then the next ones to fetch ahead; the row's last one is repeated
  int slots;                         // of these, at most kTileSlots; 0: behind the last one

  // Slots [first, end); `first` starts a tile.
  PackedSlots(const Cache& c, const PackedLayout& p, int64_t head, const int64_t* pages, int64_t first, int64_t end)
      : cache_(c), packed_(p), pages_(pages), head_(head), part_(c.part_bytes()), column_(first / kTileTokens / p.page_tiles),
        tile_(first / kTileTokens % p.page_tiles), unread_((end - first) / kTileTokens), left_(end - first), starts_(first == 0) {
    fill(0);
    fill(kTiles);
    slots = int(std::clamp<int64_t>(left_, 0, kTileSlots));
  }
  void advance() {
    left_ -= kTileSlots;
    starts_ = false;
    slots = int(std::clamp<int64_t>(left_, 0, kTileSlots));
    std::copy_n(tiles + kTiles, kTiles, tiles);
    fill(kTiles);
  }
  static uint8_t* tile_of(const Cache& c, const PackedLayout& p, int64_t head, const int64_t* pages, int64_t number) {
    const int64_t part = c.part_bytes();
    const TilePlace at = p.place(head, number, part, 0);
    return reinterpret_cast<uint8_t*>(c.data) + pages[at.column] * c.heads * part + at.data;
  }
  // What queries have given to a slot: `observed` is [num_pages, heads, observed_slots].
  static float* mass_of(const Cache& c, const PackedLayout& p, int64_t head, const int64_t* pages, int64_t slot, float* observed,
                        int64_t observed_slots) {
    const TilePlace at = p.place(head, slot / kTileTokens, 0, observed_slots);
    return observed + pages[at.column] * c.heads * observed_slots + at.observed + slot % kTileTokens;
  }
  int vectors() const { return (slots + kLanes - 1) / kLanes; }
  // Whether the store's first tile is among these.
  bool starts() const { return starts_; }

  // The 16 / kLanes ... parts of tiles that make a vector of kLanes tokens, each token `bytes` long, `offset` into its tile.
  template <class V, int bytes>
  V gather(int vector, int64_t offset) const {
    V v;
    if constexpr (kLanes > kTileTokens) {
      char* to = reinterpret_cast<char*>(&v);
      __builtin_memcpy(to, tiles[2 * vector] + offset, kTileTokens * bytes);
      __builtin_memcpy(to + kTileTokens * bytes, tiles[2 * vector + 1] + offset, kTileTokens * bytes);
    } else {
      constexpr int kParts = kLanes < kTileTokens ? kTileTokens / kLanes : 1;
      __builtin_memcpy(&v, tiles[vector / kParts] + offset + vector % kParts * kLanes * bytes, sizeof v);
    }
    return v;
  }
  // Four bytes of each token's key codes.
  UnsignedWordVec key_words(int vector, int64_t word) const {
#if MOMENTKV_LANES == 16
    const int64_t offset = word * 4 * kTileTokens;
    return (UnsignedWordVec)_mm512_inserti64x4(_mm512_castsi256_si512(load_raw<__m256i>(tiles[2 * vector] + offset)),
                                               load_raw<__m256i>(tiles[2 * vector + 1] + offset), 1);
#else
    return gather<UnsignedWordVec, 4>(vector, word * 4 * kTileTokens);
#endif
  }
  // Scales of each token's group, `offset` to the tile's first ones.
  Vec scales(int vector, int64_t offset) const {
#if MOMENTKV_LANES == 16
    return (Vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_inserti128_si256(
        _mm256_castsi128_si256(load_raw<__m128i>(tiles[2 * vector] + offset)), load_raw<__m128i>(tiles[2 * vector + 1] + offset), 1)), 16);
#else
    const HalfVec bits = gather<HalfVec, 2>(vector, offset);
    return load(reinterpret_cast<const BFloat16*>(&bits));
#endif
  }

 private:
  // As tile_of, of one number after the other: a division per tile would be a tenth of a decode step's attention.
  const uint8_t* next_tile() {
    const int64_t tile = tile_++, column = column_;
    if (tile_ == packed_.page_tiles) tile_ = 0, ++column_;
    if (packed_.places != nullptr) return tile_of(cache_, packed_, head_, pages_, column * packed_.page_tiles + tile);
    return reinterpret_cast<const uint8_t*>(cache_.data) + (pages_[column] * cache_.heads + head_) * part_ + tile * packed_.tile_bytes;
  }
  void fill(int from) {
    for (int t = from; t < from + kTiles; ++t) {
      if (unread_ > 0) last_ = next_tile(), --unread_;
      tiles[t] = last_;
    }
  }

  const Cache& cache_;
  const PackedLayout& packed_;
  const int64_t* pages_;
  int64_t head_, part_, column_, tile_, unread_, left_;
  bool starts_;
  const uint8_t* last_ = nullptr;
};

// One butterfly stage inside vectors: lanes `Half` apart. A product with 1 or -1 is exact, fused or not.
template <int Half>
inline Vec butterfly(Vec v) {
  IntVec other;
  Vec sign;
  for (int i = 0; i < kLanes; ++i) other[i] = i ^ Half, sign[i] = i & Half ? -1.0f : 1.0f;
  return __builtin_shuffle(v, other) + v * sign;
}

// The Walsh-Hadamard transform of packed_store.py, in place: the same additions in the same order. `block` is 16 at least.
inline void rotate(float* x, int64_t width, int64_t block) {
  const float norm = float(1 / std::sqrt(double(block)));
  for (int64_t i = 0; i < width; i += kLanes) {
    Vec v = butterfly<2>(butterfly<1>(load(x + i)));
    if constexpr (kLanes > 4) v = butterfly<4>(v);
    if constexpr (kLanes > 8) v = butterfly<8>(v);
    store(x + i, v);
  }
  for (int64_t half = kLanes; half < block; half *= 2)
    for (int64_t i = 0; i < width; i += 2 * half)
      for (int64_t j = i; j < i + half; j += kLanes) {
        const Vec a = load(x + j), b = load(x + j + half);
        store(x + j, a + b);
        store(x + j + half, a - b);
      }
  for (int64_t i = 0; i < width; i += kLanes) store(x + i, load(x + i) * norm);
}

// `query`: [width], rotated.
template <int Bits>
inline void pack_query(const PackedLayout& p, const float* query, int16_t* words, float* middles, float& step) {
  constexpr int kWords = Code<Bits>::kGroupBytes / 4, kPlanes = Code<Bits>::kPlanes;
  Vec top = {};
  for (int64_t i = 0; i < p.width; i += kLanes) {
    const Vec x = absolute(load(query + i));
    top = x > top ? x : top;
  }
  const float highest = largest(top), inverse = highest > 0 ? 32767 / highest : 0;
  step = highest / 32767;
  for (int64_t g = 0; g < p.width / kGroup; ++g) {
    int16_t rounded[kGroup];
    IntVec total = {};
    for (int i = 0; i < kGroup; i += kLanes) {
      const IntVec v = to_integers(load(query + g * kGroup + i) * inverse);
      total += v;
      store_words(rounded + i, v);
    }
    middles[g] = float(sum(total)) * Code<Bits>::kMiddle;
    for (int w = 0; w < kWords; ++w)
      for (int k = 0; k < kPlanes; ++k)
        for (int h = 0; h < 2; ++h) *words++ = rounded[Code<Bits>::dimension(w, h, k)];
  }
}

// `Rows` queries, rotated and rounded to 16 bits, in the order of the key codes.
template <int Bits, int Rows>
struct PackedQueries {
  alignas(64) int16_t words[Rows * kMaxHeadDim];  // [Rows][width]
  float middles[Rows * kMaxHeadDim / kGroup];     // [Rows][groups] what the middle of the codes adds to a group's dot product
  float steps[Rows];                              // of the words
  float common[Rows], first[Rows];                // what keys' centre adds to a dot product, and what the first tile's adds to that

  // `query`: [head_dim][Rows].
  PackedQueries(const PackedLayout& p, const float* query, int64_t head_dim, const Centres& centres) {
    alignas(64) float row[kMaxHeadDim];
    for (int r = 0; r < Rows; ++r) {
      common[r] = centres ? dot(query + r, centres.others, head_dim, Rows) : 0;
      first[r] = centres ? dot(query + r, centres.first, head_dim, Rows) - common[r] : 0;
      for (int64_t i = 0; i < p.width; ++i) row[i] = i < head_dim ? query[i * Rows + r] : 0;
      rotate(row, p.width, p.block);
      pack_query<Bits>(p, row, words + r * p.width, middles + r * (p.width / kGroup), steps[r]);
    }
  }
};

// Asks for 64 bytes of the next kTileSlots slots: into the second cache where those and these do not fit the first together.
inline void fetch_ahead(const PackedLayout& p, const uint8_t* bytes) {
  2 * kTiles * p.tile_bytes <= kFirstCache ? __builtin_prefetch(bytes, 0, 3) : __builtin_prefetch(bytes, 0, 2);
}

// The same for bytes [from, end) of a tile.
inline void fetch_part(const PackedLayout& p, const uint8_t* tile, int64_t from, int64_t end) {
  const uint8_t* line = reinterpret_cast<const uint8_t*>(reinterpret_cast<uintptr_t>(tile + from) & ~uintptr_t(63));
  for (; line < tile + end; line += 64) fetch_ahead(p, line);
}

// logits[r][slot] = scale * q_r . k_slot, in rows of kTileSlots. Ahead: add_packed of the same slots follows, and the next keys are
// fetched here, their values there, so that memory works all the time; else only keys are read. Not inlined: it needs all
// registers.
template <int Bits, int Rows, bool Ahead>
__attribute__((noinline)) void dot_packed(const PackedSlots& t, const PackedLayout& p, const PackedQueries<Bits, Rows>& q,
                                          float scale, float* logits) {
  constexpr int kVectors = Rows >= 8 ? 1 : Rows >= 4 ? 2 : 4, kPlanes = Code<Bits>::kPlanes;
  constexpr int kWords = Code<Bits>::kGroupBytes / 4;
  const int64_t groups = p.width / kGroup;
  for (int v = 0; v < t.vectors(); v += kVectors) {
    Vec sums[Rows][kVectors] = {};
    for (int64_t g = 0; g < groups; ++g) {
      IntVec dots[Rows][kVectors] = {};
      for (int64_t w = g * kWords; w < (g + 1) * kWords; ++w) {
        UnsignedWordVec words[kVectors];
        for (int j = 0; j < kVectors; ++j) words[j] = t.key_words(v + j < t.vectors() ? v + j : v, w);
        if (w % 2 == 0)
          for (int j = 0; j < kVectors * kLanes / kTileTokens; ++j) {
            const int tile = v * kLanes / kTileTokens + j;
            if (Ahead)
              fetch_ahead(p, t.tiles[tile + kTiles] + w * 4 * kTileTokens);
            else
              __builtin_prefetch(t.tiles[tile + kVectors * kLanes / kTileTokens] + w * 4 * kTileTokens);
          }
        for (int k = 0; k < kPlanes; ++k)
          for (int r = 0; r < Rows; ++r) {
            const WordVec query = splat_pair(q.words + r * p.width + (w * kPlanes + k) * 2);
            for (int j = 0; j < kVectors; ++j) dots[r][j] = add_products(dots[r][j], Code<Bits>::plane(words[j], k), query);
          }
      }
      for (int j = 0; j < kVectors; ++j) {
        const Vec scales = t.scales(v + j < t.vectors() ? v + j : v, p.scales_offset + g * 2 * kTileTokens);
        for (int r = 0; r < Rows; ++r) sums[r][j] += (to_floats(dots[r][j]) - q.middles[r * groups + g]) * scales;
      }
    }
    for (int r = 0; r < Rows; ++r)
      for (int j = 0; j < kVectors && v + j < t.vectors(); ++j)
        store(logits + r * kTileSlots + (v + j) * kLanes, (sums[r][j] * q.steps[r] + q.common[r]) * scale);
  }
  for (int r = 0; t.starts() && r < Rows; ++r)
    for (int i = 0; i < kTileTokens; ++i) logits[r * kTileSlots + i] += q.first[r] * scale;
}

// `vectors` vectors of weights times value scales, rounded to 16 bits; returns their step, `total` is their sum.
inline float pack_weights(int vectors, const Vec* scales, const float* weights, int16_t* words, float& total) {
  Vec scaled[kTileSlots / kLanes], top = {};
  for (int v = 0; v < vectors; ++v) {
    scaled[v] = load(weights + v * kLanes) * scales[v];
    top = scaled[v] > top ? scaled[v] : top;
  }
  const float highest = largest(top), inverse = highest > 0 ? 32767 / highest : 0;
  IntVec sum_of_words = {};
  for (int v = 0; v < vectors; ++v) {
    const IntVec rounded = to_integers(scaled[v] * inverse);
    sum_of_words += rounded;
    store_words(words + v * kLanes, rounded);
  }
  total = float(sum(sum_of_words));
  return highest / 32767;
}

// Scales of the values, a vector of slots each.
inline void value_scales(const PackedSlots& t, const PackedLayout& p, Vec* scales) {
  for (int v = 0; v < t.vectors(); ++v) scales[v] = t.scales(v, p.scales_offset + p.width / kGroup * 2 * kTileTokens);
}

// out[r][:] = out[r][:] * keep[r] + sum over slots of weights[r][slot] * value_slot, rotated; `words` has room for
// Rows * kTileSlots. Weights of slots beyond the last one must be zero. Not inlined likewise.
template <int Bits, int Rows>
__attribute__((noinline)) void add_packed(const PackedSlots& t, const PackedLayout& p, const Vec* scales, const float* weights,
                                          const float* keep, int16_t* words, float* out) {
  constexpr int kPlanes = 8 / Bits, kVectors = Code<Bits>::kGroupBytes / kLanes;  // of a group's bytes
  const int64_t groups = p.width / kGroup;
  const int tiles = (t.slots + kTileTokens - 1) / kTileTokens;
  float step[Rows], total[Rows];
  for (int r = 0; r < Rows; ++r)
    step[r] = pack_weights(t.vectors(), scales, weights + r * kTileSlots, words + r * kTileSlots, total[r]);
  for (int64_t g = 0; g < groups; ++g) {
    for (int v = 0; v < kVectors; ++v) {
      IntVec sums[Rows][kPlanes] = {};
#pragma GCC unroll 1
      for (int i = 0; i < tiles; ++i) {
        const uint8_t* bytes = t.tiles[i] + p.values_offset + 2 * (g * Code<Bits>::kGroupBytes + v * kLanes);
        const int16_t* w = words + i * kTileTokens;
        const uint8_t* next = t.tiles[i + kTiles] + p.values_offset + (g * kVectors + v) * kLanes * kTileTokens;
        for (int line = 0; line < kLanes * kTileTokens; line += 64) fetch_ahead(p, next + line);
        if (g == 0 && v == 0) fetch_part(p, t.tiles[i + kTiles], p.scales_offset, p.tile_bytes);
#pragma GCC unroll 4
        for (int pair = 0; pair < kTileTokens / 2; ++pair, bytes += 2 * p.code_bytes) {
          const UnsignedWordVec codes = load_words(bytes);
          WordVec planes[kPlanes];
          for (int k = 0; k < kPlanes; ++k) planes[k] = Code<Bits>::value_plane(codes, k);
          for (int r = 0; r < Rows; ++r) {
            const WordVec weight = splat_pair(w + r * kTileSlots + 2 * pair);
            for (int k = 0; k < kPlanes; ++k) sums[r][k] = add_products(sums[r][k], planes[k], weight);
          }
        }
      }
      for (int r = 0; r < Rows; ++r)
        for (int k = 0; k < kPlanes; ++k) {
          float* to = out + r * p.width + g * kGroup + k * Code<Bits>::kGroupBytes + v * kLanes;
          store(to, load(to) * keep[r] + (to_floats(sums[r][k]) - total[r] * Code<Bits>::kMiddle) * step[r]);
        }
    }
  }
}
