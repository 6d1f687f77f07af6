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
  for (int64_t first = 0; first < e.packed_tokens; first += kTileSlots)
    f(PackedSlots(e.c.cache, e.c.packed, e.head, e.c.store + e.row * e.c.store_pages, first, e.packed_tokens), first);
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

// 1 / ||key|| of some slots, a vector each.
template <int Bits>
inline void inverse_norms(const PackedSlots& t, const PackedLayout& p, int64_t head_dim, Vec* inverse) {
  constexpr int kWords = Code<Bits>::kGroupBytes / 4;
  for (int v = 0; v < t.vectors(); ++v) {
    Vec square = {};
    for (int64_t g = 0; g < p.width / kGroup; ++g) {
      IntVec squares = {};
      for (int64_t w = g * kWords; w < (g + 1) * kWords; ++w) {
        const UnsignedWordVec words = t.key_words(v, w);
        for (int k = 0; k < Code<Bits>::kPlanes; ++k) {
          const WordVec n = odd<Bits>(Code<Bits>::plane(words, k));
          squares = add_products(squares, n, n);
        }
      }
      const Vec half = t.scales(v, p.scales_offset + g * 2 * kTileTokens) * 0.5f;
      square += to_floats(squares) * (half * half);
    }
    if (p.width > head_dim)
      for (int i = 0, slot = v * kLanes; i < kLanes && slot < t.slots; ++i, ++slot)
        square[i] -= square_of_padding(p, [&](int64_t n) {
          return key_number<Bits>(p, t.tiles[slot / kTileTokens], slot % kTileTokens, n);
        });
    inverse[v] = inverse_root(not_negative(square));
  }
}

// Weights of two vectors of slots as pairs of words, rounded to 16 bits.
inline WordVec pack_pair(Vec a, Vec b) {
  return bits_as<WordVec>((to_integers(a) & 0xffff) | (to_integers(b) << 16));
}

// sums[dimension] += the normalised keys of some slots, lane by lane; what the middle of the codes adds goes to middles[group].
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
    WordVec words[kPairs];
    IntVec total = {};
    for (int j = 0; j < pairs; ++j) {
      words[j] = pack_pair(weights[2 * j] * scale, weights[2 * j + 1] * scale);
      total = add_products(total, words[j], WordVec{} + int16_t(1));
    }
    middles[g] += float(sum(total)) * Code<Bits>::kMiddle * step;
    for (int64_t w = g * kWords; w < (g + 1) * kWords; ++w) {
      IntVec dots[2][kPlanes] = {};
      for (int j = 0; j < pairs; ++j) {
        const BitVec a = bits_as<BitVec>(t.key_words(2 * j, w));
        const BitVec b = bits_as<BitVec>(t.key_words(2 * j + 1 < t.vectors() ? 2 * j + 1 : 2 * j, w));
        const auto low = bits_as<UnsignedWordVec>((a & 0xffffu) | b << 16);
        const auto high = bits_as<UnsignedWordVec>(a >> 16 | (b & 0xffff0000u));
        for (int k = 0; k < kPlanes; ++k) {
          dots[0][k] = add_products(dots[0][k], Code<Bits>::plane(low, k), words[j]);
          dots[1][k] = add_products(dots[1][k], Code<Bits>::plane(high, k), words[j]);
        }
      }
      for (int h = 0; h < 2; ++h)
        for (int k = 0; k < kPlanes; ++k) sums[Code<Bits>::dimension(w, h, k)] += to_floats(dots[h][k]) * step;
    }
  }
}

// inverse[slot] = 1 / ||key||, anchor = the sum of the normalised keys, not rotated.
template <int Bits>
void add_packed_directions(const Event& e, float* inverse, float* anchor) {
  const PackedLayout& p = e.c.packed;
  alignas(64) Vec sums[kMaxHeadDim];
  float middles[kMaxHeadDim / kGroup] = {};
  std::fill_n(sums, p.width, Vec{});
  each_packed_slots(e, [&](const PackedSlots& slots, int64_t first) {
    Vec factors[kTileSlots / kLanes];
    inverse_norms<Bits>(slots, p, e.c.cache.head_dim, factors);
    add_packed_keys<Bits>(slots, p, factors, sums, middles);
    std::memcpy(inverse + first, factors, slots.slots * sizeof(float));
  });
  for (int64_t i = 0; i < p.width; ++i) anchor[i] = sum(sums[i]) - middles[i / kGroup];
  rotate(anchor, p.width, p.block);
}

// turned[slot]: in, 1 / ||key||; out, 1 - key . direction / ||key||.
template <int Bits>
void turn_packed_away(const Event& e, const float* direction, float* turned) {
  const PackedQueries<Bits, 1> query(e.c.packed, direction, e.c.cache.head_dim);
  each_packed_slots(e, [&](const PackedSlots& slots, int64_t first) {
    alignas(64) float dots[kTileSlots];
    dot_packed<Bits, 1, false>(slots, e.c.packed, query, 1, dots);
    for (int t = 0; t < slots.slots; ++t) {
      const float x = 1 - dots[t] * turned[first + t];
      turned[first + t] = x < 0 ? 0 : x;
    }
  });
}

// mean += the sum of the values.
template <int Bits>
void add_packed_values(const Event& e, float* mean) {
  const PackedLayout& p = e.c.packed;
  alignas(64) float total[kMaxHeadDim] = {}, weights[kTileSlots];
  each_packed_slots(e, [&](const PackedSlots& slots, int64_t) {
    alignas(64) int16_t words[kTileSlots];
    Vec scales[kTileSlots / kLanes];
    const float keep = 1;
    value_scales(slots, p, scales);
    for (int v = 0; v < slots.vectors(); ++v) scales[v] = without_nan(scales[v]);
    for (int t = 0; t < kTileSlots; ++t) weights[t] = t < slots.slots ? 1 : 0;
    add_packed<Bits, 1>(slots, p, scales, weights, &keep, words, total);
  });
  rotate(total, p.width, p.block);
  for (int64_t i = 0; i < e.c.cache.head_dim; ++i) mean[i] += total[i];
}

// A point that values are compared with, rotated and rounded to 16 bits, in the order of the value codes.
template <int Bits>
struct PackedPoint {
  static constexpr int kPlanes = 8 / Bits, kColumns = 2 * kLanes;  // of a byte; bytes of a vector, of two tokens each
  int64_t vectors;
  WordVec words[kPlanes * kMaxHeadDim / kColumns], last;  // [vectors][planes]; `last` masks what the last vector has beyond
  float square, step;

  PackedPoint(const PackedLayout& p, const float* point, int64_t head_dim)
      : vectors((p.code_bytes + kColumns - 1) / kColumns) {
    alignas(64) float x[kMaxHeadDim] = {};
    std::copy_n(point, head_dim, x);
    rotate(x, p.width, p.block);
    float top = 0;
    square = 0;
    for (int64_t i = 0; i < p.width; ++i) top = fabsf(x[i]) > top ? fabsf(x[i]) : top, square += x[i] * x[i];
    const float inverse = top > 0 ? 32767 / top : 0;
    step = top / 32767;
    for (int64_t v = 0; v < vectors; ++v)
      for (int k = 0; k < kPlanes; ++k)
        for (int i = 0; i < kColumns; ++i) {
          const int64_t byte = v * kColumns + i, n = Bits == 8 ? byte : byte / 16 * kGroup + k * 16 + byte % 16;
          words[v * kPlanes + k][i] = byte < p.code_bytes ? int16_t(lrintf(x[n] * inverse)) : 0;
        }
    for (int i = 0; i < kColumns; ++i) last[i] = (vectors - 1) * kColumns + i < p.code_bytes ? -1 : 0;
  }
};

// square[token] = ||value - point||^2 of a tile's tokens: |v|^2 - 2 v . point + |point|^2, the integer sums exact.
template <int Bits>
inline void squares_of_tile(const PackedLayout& p, const PackedPoint<Bits>& point, const uint8_t* tile, float* square) {
  constexpr int kPlanes = PackedPoint<Bits>::kPlanes, kColumns = PackedPoint<Bits>::kColumns;
  for (int pair = 0; pair < kTileTokens / 2; ++pair) {
    const uint8_t* bytes = tile + p.values_offset + pair * 2 * p.code_bytes;
    IntVec squares[2] = {}, dots[2] = {};
    for (int64_t v = 0; v < point.vectors; ++v) {
      // The last vector of the last pair may reach into the scales behind it.
      const UnsignedWordVec codes = load_raw<UnsignedWordVec>(bytes + v * 2 * kColumns);
      for (int t = 0; t < 2; ++t)
        for (int k = 0; k < kPlanes; ++k) {
          WordVec n = odd<Bits>(Code<Bits>::plane(codes, t * kPlanes + k));
          if (v == point.vectors - 1) n &= point.last;
          squares[t] = add_products(squares[t], n, n);
          dots[t] = add_products(dots[t], n, point.words[v * kPlanes + k]);
        }
    }
    for (int t = 0; t < 2; ++t) {
      const float scale = to_float(load_raw<BFloat16>(scale_at(p, tile, p.width / kGroup, 2 * pair + t)));
      const Vec both = to_floats(squares[t]) * (scale * scale / 4) - to_floats(dots[t]) * (scale * point.step);
      square[2 * pair + t] = sum(both) + point.square;
    }
  }
}

// distance[slot] = observed attention * ||value - mean||.
template <int Bits>
void distances_of_packed_values(const Event& e, const float* mean, float* distance) {
  const PackedLayout& p = e.c.packed;
  const PackedPoint<Bits> point(p, mean, e.c.cache.head_dim);
  for (int64_t slot = 0; slot < e.packed_tokens; slot += kTileTokens) {
    const uint8_t* tile = e.tile(slot);
    const float* mass = e.mass_of_slot(slot);
    float square[kTileTokens];
    squares_of_tile<Bits>(p, point, tile, square);
    for (int t = 0; t < kTileTokens; ++t) {
      if (p.width > e.c.cache.head_dim)
        square[t] -= square_of_padding(p, [&](int64_t n) { return value_number<Bits>(p, tile, t, n); });
      distance[slot + t] = mass[t] * sqrtf(square[t] < 0 ? 0 : square[t]);
    }
  }
}
