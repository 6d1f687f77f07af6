// The score's second term over a quantised store: the mean of its values and their distances to a point. Included once per
// instruction set, after packed_score.h.

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

// A point that values are compared with, rotated and rounded to integers, in the order of the value codes.
template <int Bits>
struct PackedPoint {
  static constexpr int kPlanes = 8 / Bits, kColumns = 2 * kLanes;  // of a byte; bytes of a vector, of two tokens each
  static constexpr int kHighestCode = (1 << Bits) - 1;
  int64_t vectors;
  bool ragged;                                                     // the last vector reaches beyond the codes
  WordVec words[kPlanes * kMaxHeadDim / kColumns], last;           // [vectors][planes]; `last` masks what is beyond
  float square, step, middle;  // of its length; of the words; what the middle of the codes adds to a dot product, in steps

  PackedPoint(const PackedLayout& p, const float* point, int64_t head_dim)
      : vectors((p.code_bytes + kColumns - 1) / kColumns), ragged(p.code_bytes % kColumns != 0) {
    alignas(64) float x[kMaxHeadDim] = {};
    std::copy_n(point, head_dim, x);
    rotate(x, p.width, p.block);
    float top = 0;
    square = 0;
    for (int64_t i = 0; i < p.width; ++i) top = fabsf(x[i]) > top ? fabsf(x[i]) : top, square += x[i] * x[i];
    // Dot products with codes stay within 32 bits.
    const float highest = std::min<float>(32767, float(INT32_MAX / (kHighestCode * p.width)));
    const float inverse = top > 0 ? highest / top : 0;
    step = top / highest;
    int32_t total = 0;
    for (int64_t v = 0; v < vectors; ++v)
      for (int k = 0; k < kPlanes; ++k)
        for (int i = 0; i < kColumns; ++i) {
          const int64_t byte = v * kColumns + i, n = Bits == 8 ? byte : byte / 16 * kGroup + k * 16 + byte % 16;
          const int16_t rounded = byte < p.code_bytes ? int16_t(lrintf(x[n] * inverse)) : 0;
          words[v * kPlanes + k][i] = rounded;
          total += rounded;
        }
    middle = float(total) * Code<Bits>::kMiddle;
    for (int i = 0; i < kColumns; ++i) last[i] = (vectors - 1) * kColumns + i < p.code_bytes ? -1 : 0;
  }
};

// square[token] = ||value - point||^2 of a tile's tokens: |v|^2 - 2 v . point + |point|^2, the integer sums exact. With codes c
// and their middle m, (c - m)^2 = c (c - 2 m) + m^2.
template <int Bits>
inline void squares_of_tile(const PackedLayout& p, const PackedPoint<Bits>& point, const uint8_t* tile, float* square) {
  using Point = PackedPoint<Bits>;
  constexpr float kMiddle = Code<Bits>::kMiddle;
  IntVec products[kTileTokens], dots[kTileTokens];
  for (int pair = 0; pair < kTileTokens / 2; ++pair) {
    const uint8_t* bytes = tile + p.values_offset + pair * 2 * p.code_bytes;
    IntVec own[2] = {}, with_point[2] = {};
    for (int64_t v = 0; v < point.vectors; ++v) {
      // The last vector of the last pair may reach into the scales behind it.
      const UnsignedWordVec codes = load_raw<UnsignedWordVec>(bytes + v * 2 * Point::kColumns);
      for (int t = 0; t < 2; ++t)
        for (int k = 0; k < Point::kPlanes; ++k) {
          WordVec c = Code<Bits>::plane(codes, t * Point::kPlanes + k);
          if (point.ragged && v == point.vectors - 1) c &= point.last;
          own[t] = add_products(own[t], c, c - int16_t(Point::kHighestCode));
          with_point[t] = add_products(with_point[t], c, point.words[v * Point::kPlanes + k]);
        }
    }
    for (int t = 0; t < 2; ++t) products[2 * pair + t] = own[t], dots[2 * pair + t] = with_point[t];
  }
  int32_t own[kTileTokens], with_point[kTileTokens];
  sums_of_eight(products, own);
  sums_of_eight(dots, with_point);
  const auto* scales = reinterpret_cast<const BFloat16*>(scale_at(p, tile, p.width / kGroup, 0));
  for (int t = 0; t < kTileTokens; ++t) {
    const float scale = to_float(scales[t]), length = float(own[t]) + kMiddle * kMiddle * float(p.width);
    square[t] = length * (scale * scale) - (float(with_point[t]) - point.middle) * (2 * scale * point.step) + point.square;
  }
}

// distance[slot] = observed attention * ||value - mean||. Fetches the keys too, which are read next: memory works while this
// computes.
template <int Bits>
void distances_of_packed_values(const Event& e, const float* mean, float* distance) {
  const PackedLayout& p = e.c.packed;
  const PackedPoint<Bits> point(p, mean, e.c.cache.head_dim);
  each_packed_slots(e, [&](const PackedSlots& slots, int64_t first) {
    for (int64_t at = 0; at < slots.slots; at += kTileTokens) {
      const uint8_t* tile = slots.tiles[at / kTileTokens];
      fetch_part(p, slots.tiles[at / kTileTokens + kTiles], 0, p.tile_bytes);
      __builtin_prefetch(e.mass_of_slot(std::min(first + at + kTileSlots, e.packed_tokens - 1)));
      const float* mass = e.mass_of_slot(first + at);
      float square[kTileTokens];
      squares_of_tile<Bits>(p, point, tile, square);
      for (int t = 0; p.width > e.c.cache.head_dim && t < kTileTokens; ++t)
        square[t] -= square_of_padding(p, [&](int64_t n) { return value_number<Bits>(p, tile, t, n); });
      for (int t = 0; t < kTileTokens; ++t) distance[first + at + t] = mass[t] * sqrtf(std::max(square[t], 0.0f));
    }
  });
}
