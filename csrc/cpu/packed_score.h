// The parts of score.h that a quantised store has, over its codes: norms and dot products do not feel the rotation.
// Included once per instruction set.

// 1 / sqrt(square), 0 of 0.
inline Vec inverse_root(Vec square) { return square == 0.0f ? Vec{} : 1 / square_root(square); }
inline Vec not_negative(Vec v) { return v < 0.0f ? Vec{} : v; }

// A code c as the odd integer 2 c - 2 middle; the number is half of it times the scale.
template <int Bits>
inline WordVec odd(WordVec codes) { return codes + codes - int16_t((1 << Bits) - 1); }

// Calls f(slots, first) for every kTileSlots slots of the row's store.
template <class F>
inline void each_packed_slots(const Event& e, F f) {
  int64_t first = 0;
  PackedSlots slots(e.c.cache, e.c.packed, e.head, e.c.store + e.row * e.c.store_pages, first, e.packed_tokens);
  for (; slots.slots > 0; slots.advance(), first += kTileSlots) f(slots, first);
}

// What a token's padding of 16 zeros has become by quantising: its square, which is no part of the token's own. The last 16
// rows of the Walsh-Hadamard matrix are +-1: signs of the parity of the bits of n / 16, times the rows of a smaller one,
// which keeps lengths. `number(n)` is the token's n-th rotated number.
template <class F>
inline float square_of_padding(const PackedLayout& p, F number) {
  float square = 0;
  for (int64_t low = 0; low < 16; ++low) {
    float total = 0;
    for (int64_t high = 0; high < p.block / 16; ++high) {
      const float x = number(p.width - p.block + high * 16 + low);
      total += __builtin_parityll(uint64_t(high)) ? -x : x;
    }
    square += total * total;
  }
  return square * 16 / float(p.block);
}

// The sum of (2 c - 2 middle)^2 over a group's codes c, per token of a vector.
template <int Bits>
inline IntVec squares_of_group(const PackedSlots& t, int vector, int64_t group) {
  constexpr int kWords = Code<Bits>::kGroupBytes / 4, kTwice = (1 << Bits) - 1;
  IntVec squares = {}, total = {};
  for (int64_t w = group * kWords; w < (group + 1) * kWords; ++w) {
    const UnsignedWordVec words = t.key_words(vector, w);
    if constexpr (Bits == 4) {
      const BitVec low = bits_as<BitVec>(words) & 0x0f0f0f0fu, high = bits_as<BitVec>(words) >> 4 & 0x0f0f0f0fu;
      squares = add_byte_products(add_byte_products(squares, low, low), high, high);
      total = add_byte_products(total, low + high, BitVec{} + 0x01010101u);
    } else {
      for (int k = 0; k < Code<Bits>::kPlanes; ++k) {
        const WordVec n = odd<Bits>(Code<Bits>::plane(words, k));
        squares = add_products(squares, n, n);
      }
    }
  }
  return Bits == 4 ? 4 * squares - 4 * kTwice * total + kTwice * kTwice * kGroup : squares;
}

// What centres add to the squares of keys' lengths: with a key's own centre c, |key|^2 = |key - c|^2 + 2 key . c - |c|^2.
template <int Bits>
struct CentreSquares {
  const Event& e;
  PackedQueries<Bits, 1> others, first;
  float square_of_others, square_of_first;

  explicit CentreSquares(const Event& event)
      : e(event), others(e.c.packed, e.centres.others, d(), e.centres), first(e.c.packed, e.centres.first, d(), e.centres),
        square_of_others(dot(e.centres.others, e.centres.others, d())), square_of_first(dot(e.centres.first, e.centres.first, d())) {}
  int64_t d() const { return e.c.cache.head_dim; }

  // `more`: [kTileSlots], of some slots.
  void add(const PackedSlots& slots, float* more) const {
    dot_packed<Bits, 1, false>(slots, e.c.packed, others, 1, more);
    for (int i = 0; i < slots.vectors() * kLanes; i += kLanes) store(more + i, load(more + i) * 2 - square_of_others);
    if (!slots.starts()) return;
    alignas(64) float own[kTileSlots];
    const PackedSlots tile(e.c.cache, e.c.packed, e.head, e.c.store + e.row * e.c.store_pages, 0, kTileTokens);
    dot_packed<Bits, 1, false>(tile, e.c.packed, first, 1, own);
    for (int i = 0; i < kTileTokens; ++i) more[i] = own[i] * 2 - square_of_first;
  }
};

// 1 / ||key|| of some slots, a vector each, with `more` added to the squares; the next ones' keys are fetched.
template <int Bits>
inline void inverse_norms(const PackedSlots& t, const PackedLayout& p, int64_t head_dim, const float* more, Vec* inverse) {
  constexpr int kVectorTiles = kLanes > kTileTokens ? kLanes / kTileTokens : 1;
  for (int v = 0; v < t.vectors(); ++v) {
    const int tile = v * kLanes / kTileTokens;
    for (int j = 0; j < kVectorTiles && v * kLanes % kTileTokens == 0; ++j) {
      fetch_part(p, t.tiles[tile + j + kTiles], 0, p.values_offset);
      fetch_part(p, t.tiles[tile + j + kTiles], p.scales_offset, p.tile_bytes);
    }
    Vec square = {};
    for (int64_t g = 0; g < p.width / kGroup; ++g) {
      const Vec half = t.scales(v, p.scales_offset + g * 2 * kTileTokens) * 0.5f;
      square += to_floats(squares_of_group<Bits>(t, v, g)) * (half * half);
    }
    if (p.width > head_dim)
      for (int i = 0, slot = v * kLanes; i < kLanes && slot < t.slots; ++i, ++slot)
        square[i] -= square_of_padding(p, [&](int64_t n) {
          return key_number<Bits>(p, t.tiles[slot / kTileTokens], slot % kTileTokens, n);
        });
    inverse[v] = inverse_root(not_negative(square + load(more + v * kLanes)));
  }
}

// Weights of two vectors of slots as pairs of words, rounded to 16 bits.
inline WordVec pack_pair(Vec a, Vec b) {
  return bits_as<WordVec>((to_integers(a) & 0xffff) | (to_integers(b) << 16));
}

// The normalised keys of some slots: sums[word][plane] += those of dimension(word, lane % 2, plane), lane by lane; what the
// middle of the codes adds goes to middles[group].
template <int Bits>
inline void add_packed_keys(const PackedSlots& t, const PackedLayout& p, const Vec* inverse, Vec* sums, float* middles) {
  constexpr int kWords = Code<Bits>::kGroupBytes / 4, kPlanes = Code<Bits>::kPlanes, kPairs = kTileSlots / kLanes / 2;
  const int pairs = (t.vectors() + 1) / 2;
  for (int64_t g = 0; g < p.width / kGroup; ++g) {
    Vec weights[2 * kPairs] = {}, top = {};
    for (int v = 0; v < t.vectors(); ++v) {
      weights[v] = without_nan(inverse[v] * t.scales(v, p.scales_offset + g * 2 * kTileTokens));
      for (int i = t.slots - v * kLanes; i < kLanes; ++i) weights[v][i] = 0;
      top = weights[v] > top ? weights[v] : top;
    }
    const float highest = largest(top), scale = highest > 0 ? 32767 / highest : 0, step = highest / 32767;
    WordVec low_words[kPairs], high_words[kPairs];
    IntVec total = {};
    for (int j = 0; j < pairs; ++j) {
      const WordVec words = pack_pair(weights[2 * j] * scale, weights[2 * j + 1] * scale);
      low_words[j] = low_pairs(words);
      high_words[j] = high_pairs(words);
      total = add_products(total, words, WordVec{} + int16_t(1));
    }
    middles[g] += float(sum(total)) * Code<Bits>::kMiddle * step;
    for (int64_t w = g * kWords; w < (g + 1) * kWords; ++w) {
      IntVec dots[kPlanes] = {};
      for (int j = 0; j < pairs; ++j) {
        const UnsignedWordVec a = t.key_words(2 * j, w), b = t.key_words(2 * j + 1 < t.vectors() ? 2 * j + 1 : 2 * j, w);
        const UnsignedWordVec low = low_words_of(a, b), high = high_words_of(a, b);
        for (int k = 0; k < kPlanes; ++k) {
          dots[k] = add_products(dots[k], Code<Bits>::plane(low, k), low_words[j]);
          dots[k] = add_products(dots[k], Code<Bits>::plane(high, k), high_words[j]);
        }
      }
      for (int k = 0; k < kPlanes; ++k) sums[w * kPlanes + k] += to_floats(dots[k]) * step;
    }
  }
}

// inverse[slot] = 1 / ||key||, anchor = the sum of the normalised keys, not rotated.
template <int Bits>
void add_packed_directions(const Event& e, float* inverse, float* anchor) {
  const PackedLayout& p = e.c.packed;
  constexpr int kPlanes = Code<Bits>::kPlanes;
  alignas(64) Vec sums[kMaxHeadDim / 2];  // [words][planes]
  float middles[kMaxHeadDim / kGroup] = {};
  std::fill_n(sums, p.width / 2, Vec{});
  std::optional<CentreSquares<Bits>> centres;
  if (e.centres) centres.emplace(e);
  alignas(64) float more[kTileSlots] = {};
  each_packed_slots(e, [&](const PackedSlots& slots, int64_t first) {
    Vec factors[kTileSlots / kLanes];
    if (centres) centres->add(slots, more);
    inverse_norms<Bits>(slots, p, e.c.cache.head_dim, more, factors);
    add_packed_keys<Bits>(slots, p, factors, sums, middles);
    std::memcpy(inverse + first, factors, slots.slots * sizeof(float));
  });
  for (int64_t i = 0; i < p.width / 2; ++i)
    for (int h = 0; h < 2; ++h) {
      const int64_t dimension = Code<Bits>::dimension(i / kPlanes, h, int(i % kPlanes));
      float total = 0;
      for (int lane = h; lane < kLanes; lane += 2) total += sums[i][lane];
      anchor[dimension] = total - middles[dimension / kGroup];
    }
  rotate(anchor, p.width, p.block);
  if (!e.centres) return;
  float of_first = 0, of_others = 0;  // sums of the factors
  for (int64_t i = 0; i < e.packed_tokens; ++i) (i < kTileTokens ? of_first : of_others) += inverse[i] == inverse[i] ? inverse[i] : 0;
  for (int64_t i = 0; i < e.c.cache.head_dim; ++i) anchor[i] += e.centres.first[i] * of_first + e.centres.others[i] * of_others;
}

// turned[slot]: in, 1 / ||key||; out, 1 - key . direction / ||key||.
template <int Bits>
void turn_packed_away(const Event& e, const float* direction, float* turned) {
  const PackedQueries<Bits, 1> query(e.c.packed, direction, e.c.cache.head_dim, e.centres);
  each_packed_slots(e, [&](const PackedSlots& slots, int64_t first) {
    alignas(64) float dots[kTileSlots];
    dot_packed<Bits, 1, false>(slots, e.c.packed, query, 1, dots);
    for (int t = 0; t < slots.slots; ++t) {
      const float x = 1 - dots[t] * turned[first + t];
      turned[first + t] = x < 0 ? 0 : x;
    }
  });
}
