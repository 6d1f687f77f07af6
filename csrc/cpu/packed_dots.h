// Dot products over a quantised store: those of integers, exact in 32 bits. Codes times weights rounded to 16 bits, or times
// queries rounded to 16, to 8 where codes have 4: the keys' own error is then 17 times as large. (Weights in 8 bits would lose the
// tokens beside a sink.) Included once per instruction set, after packed.h.

constexpr int64_t kFirstCache = 24 << 10;  // bytes of the first cache that tiles may fill

// `Rows` queries, rotated and rounded, in the order in which key codes meet them.
template <int Bits, int Rows>
struct PackedQueries {
  using Number = typename Code<Bits>::Number;
  alignas(64) Number numbers[Rows * kMaxHeadDim];  // [Rows][width]
  float steps[Rows * kMaxHeadDim / kGroup];        // [Rows][groups] of the numbers of a group
  float middles[Rows * kMaxHeadDim / kGroup];      // [Rows][groups] what the middle of the codes adds to a group's dot product

  // `query`: [head_dim][Rows].
  PackedQueries(const PackedLayout& p, const float* query, int64_t head_dim) {
    alignas(64) float row[kMaxHeadDim];
    const int64_t groups = p.width / kGroup;
    for (int r = 0; r < Rows; ++r) {
      for (int64_t i = 0; i < p.width; ++i) row[i] = i < head_dim ? query[i * Rows + r] : 0;
      rotate(row, p.width, p.block);
      for (int64_t g = 0; g < groups; ++g) pack(row + g * kGroup, r * groups + g);
    }
  }
  // One query; every further row is what rounding the row before has left, so that their sum is finer.
  static PackedQueries of_one(const PackedLayout& p, const float* query, int64_t head_dim) {
    PackedQueries packed;
    alignas(64) float row[kMaxHeadDim] = {};
    std::copy_n(query, head_dim, row);
    rotate(row, p.width, p.block);
    for (int64_t group = 0; group < Rows * p.width / kGroup; ++group) packed.pack(row + group * kGroup % p.width, group);
    return packed;
  }

 private:
  PackedQueries() = default;

  // Rounds a group's numbers and leaves what that takes from them.
  void pack(float* x, int64_t group) {
    Vec top = {};
    for (int i = 0; i < kGroup; i += kLanes) top = absolute(load(x + i)) > top ? absolute(load(x + i)) : top;
    const float highest = largest(top), inverse = highest > 0 ? Code<Bits>::kLargest / highest : 0;
    const float step = highest / Code<Bits>::kLargest;
    int16_t rounded[kGroup];
    IntVec total = {};
    for (int i = 0; i < kGroup; i += kLanes) {
      const IntVec v = to_integers(load(x + i) * inverse);
      total += v;
      store_words(rounded + i, v);
      store(x + i, load(x + i) - to_floats(v) * step);
    }
    steps[group] = step;
    middles[group] = float(sum(total)) * Code<Bits>::kMiddle * step;
    Number* to = numbers + group * kGroup;
    for (int w = 0; w < Code<Bits>::kGroupBytes / 4; ++w)
      for (int k = 0; k < 2; ++k)
        for (int n = 0; n < Code<Bits>::kNumbers; ++n) *to++ = Number(rounded[Code<Bits>::dimension_met(w, n, k)]);
  }
};

// Asks for 64 bytes of the next kTileSlots slots: into the second cache where those and these do not fit the first together.
inline void fetch_ahead(const PackedLayout& p, const uint8_t* bytes) {
  2 * kTiles * p.tile_bytes <= kFirstCache ? __builtin_prefetch(bytes, 0, 3) : __builtin_prefetch(bytes, 0, 2);
}

// logits[r][slot] = scale * q_r . k_slot, in rows of kTileSlots. Ahead: add_packed of the same slots follows, and the next keys are
// fetched here, their values there; else only keys are read.
template <int Bits, int Rows, bool Ahead>
inline void dot_packed(const PackedSlots& t, const PackedLayout& p, const PackedQueries<Bits, Rows>& q, float scale,
                       float* logits) {
  constexpr int kVectors = Rows >= 8 ? 1 : Rows >= 4 ? 2 : 4;
  constexpr int kWords = Code<Bits>::kGroupBytes / 4;
  const int64_t groups = p.width / kGroup;
  for (int v = 0; v < t.vectors(); v += kVectors) {
    Vec sums[Rows][kVectors] = {};
    for (int64_t g = 0; g < groups; ++g) {
      DotSums<Bits> dots[Rows][kVectors] = {};
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
        for (int k = 0; k < 2; ++k)
          for (int r = 0; r < Rows; ++r) {
            const WordVec query = splat_pair(q.numbers + r * p.width + (w * 2 + k) * Code<Bits>::kNumbers);
            for (int j = 0; j < kVectors; ++j) add_dots<Bits>(dots[r][j], Code<Bits>::half(words[j], k), query);
          }
      }
      for (int j = 0; j < kVectors; ++j) {
        const Vec scales = t.scales(v + j < t.vectors() ? v + j : v, p.scales_offset + g * 2 * kTileTokens);
        for (int r = 0; r < Rows; ++r) sums[r][j] += (to_floats(widened(dots[r][j])) * q.steps[r * groups + g] - q.middles[r * groups + g]) * scales;
      }
    }
    for (int r = 0; r < Rows; ++r)
      for (int j = 0; j < kVectors && v + j < t.vectors(); ++j)
        store(logits + r * kTileSlots + (v + j) * kLanes, sums[r][j] * scale);
  }
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
// Rows * kTileSlots. Weights of slots beyond the last one must be zero.
template <int Bits, int Rows>
inline void add_packed(const PackedSlots& t, const PackedLayout& p, const Vec* scales, const float* weights, const float* keep,
                       int16_t* words, float* out) {
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
        if (g == 0 && v == 0) fetch_ahead(p, t.tiles[i + kTiles] + p.scales_offset + 64);
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

