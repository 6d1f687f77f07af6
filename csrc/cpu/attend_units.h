// attend of rows with several queries on matrix units: panels of kTileSlots slots as bfloat16, which all query rows of an item
// share. Included by the instruction set that has units, after attend.h.
//
// Keys and queries of the cache are bfloat16. Those of a quantised store are rounded to it, as is a rotated query: that adds to the
// squared error of logits about a sixteenth of what 8 bits lose. Weights are rounded before values are multiplied by them, as in
// vLLM's own attention (csrc/cpu/cpu_attn_amx.hpp). A row's result does not depend on the others of its item: units sum every line
// by itself, in one order.

constexpr int kItemRows = 128;  // query rows of an item at most: what a panel costs is shared, their logits stay in a cache
constexpr int kPanelColumns = kTileSlots / kUnitColumns;

// Whether units compute what attend asks for: the cache's numbers are theirs, and heads are whole tiles.
inline bool fits_units(const Attend& a) {
  return a.cache.type == Type::kBFloat16 && a.cache.head_dim % kUnitDepth == 0 && a.query_heads / a.cache.heads <= kItemRows;
}

constexpr int64_t whole_tiles(int64_t rows) { return (rows + kUnitRows - 1) / kUnitRows * kUnitRows; }

// Room of an item.
struct UnitRoom {
  int64_t d, rows;
  float *out, *products, *step;        // [rows][d]; [rows][kTileSlots]; of a record
  uint16_t *query, *turned, *weights;  // [rows][d]; rotated, likewise; [rows][kTileSlots]
  uint8_t *keys, *values;              // tiles [d / 32][slots / 16] and [slots / 32][d / 16]

  UnitRoom(const Attend& a, int64_t item_rows, float* scratch) : d(a.cache.head_dim), rows(whole_tiles(item_rows)) {
    auto* next = reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(scratch) + 63) & ~uintptr_t(63));
    auto take = [&](auto*& to, int64_t count) {
      to = reinterpret_cast<std::remove_reference_t<decltype(to)>>(next);
      next += count * int64_t(sizeof *to);
    };
    take(out, rows * d), take(products, rows * kTileSlots), take(step, 16 * d);
    take(query, rows * d), take(turned, rows * d), take(weights, rows * kTileSlots);
    take(keys, 2 * d * kTileSlots), take(values, 2 * d * kTileSlots);
  }
  static size_t floats(int64_t d) { return kItemRows * (2 * d + kTileSlots * 3 / 2) + 16 * d + d * kTileSlots + 16; }
};

// Exact slots of a tile; those beyond the last one have values of zero.
inline void fill_panel(const Tile<BFloat16>& tile, int64_t d, int64_t page_size, const UnitRoom& room) {
  static const BFloat16 nothing[kMaxHeadDim] = {};
  const int64_t wide = d / kUnitColumns;
  auto value_of = [&](int s) { return s < tile.slots ? tile.values[s / kLanes] + s % kLanes * d : nothing; };
  for (int v = 0; v < tile.vectors(); ++v) {
    const BFloat16* key = tile.keys[v];
    for (int64_t depth = 0; depth < d / kUnitDepth; ++depth) {
      uint8_t* line = room.keys + (depth * kPanelColumns + v) * kUnitBytes;
      for (int pair = 0; pair < kUnitDepth / 2; ++pair, line += 64, key += 2 * page_size) store_line(line, key, key + page_size);
    }
  }
  for (int s = 0; s < (tile.slots + 31) / 32 * 32; s += 2) {
    const BFloat16 *even = value_of(s), *odd = value_of(s + 1);
    uint8_t* line = room.values + s / 32 * wide * kUnitBytes + s % 32 / 2 * 64;
    for (int64_t i = 0; i < wide; ++i) store_line(line + i * kUnitBytes, even + i * 16, odd + i * 16);
  }
}

// bfloat16 numbers of 4-bit codes, looked up by the low bits of words; what lies above them does not matter.
inline __m512i numbers_of_codes() {
  UnsignedWordVec numbers;
  for (int i = 0; i < 32; ++i) numbers[i] = uint16_t(bits_as<uint32_t>(float(i % 16) - Code<4>::kMiddle) >> 16);
  return (__m512i)numbers;
}

// Codes of 8 bits in the low and in the high halves of lanes.
inline Vec low_numbers(IntVec words) { return to_floats(words & 0xff) - Code<8>::kMiddle; }
inline Vec high_numbers(IntVec words) { return to_floats(words >> 16 & 0xff) - Code<8>::kMiddle; }

// Rotated keys of a tile of slots; numbers come in the order of turn_query.
template <int Bits>
inline void fill_stored_keys(const PackedSlots& t, const PackedLayout& p, const UnitRoom& room) {
  constexpr int kPlanes = Code<Bits>::kPlanes, kWords = Code<Bits>::kGroupBytes / 4;
  const __m512i numbers = numbers_of_codes();
  for (int v = 0; v < t.vectors(); ++v)
    for (int64_t g = 0; g < p.width / kGroup; ++g) {
      uint8_t* line = room.keys + (g * kPanelColumns + v) * kUnitBytes;
      const Vec scales = t.scales(v, p.scales_offset + g * 2 * kTileTokens);
      for (int w = 0; w < kWords; ++w) {
        const UnsignedWordVec words = t.key_words(v, g * kWords + w);
        for (int k = 0; k < kPlanes; ++k, line += 64) {
          Vec low, high;
          if constexpr (Bits == 4) {
            const __m512i found = _mm512_permutexvar_epi16((__m512i)(words >> uint16_t(4 * k)), numbers);
            low = (Vec)_mm512_slli_epi32(found, 16), high = (Vec)_mm512_and_si512(found, _mm512_set1_epi32(int(0xffff0000)));
          } else {
            const IntVec codes = bits_as<IntVec>(words >> uint16_t(8 * k));
            low = low_numbers(codes), high = high_numbers(codes);
          }
          store_line(line, low * scales, high * scales);
        }
      }
    }
}

// Rotated values of a tile of slots over their scales, which weights are multiplied by.
template <int Bits>
inline void fill_stored_values(const PackedSlots& t, const PackedLayout& p, const UnitRoom& room) {
  const int64_t wide = p.width / kUnitColumns;
  const __m512i numbers = numbers_of_codes();
  for (int s = 0; s < (t.slots + 31) / 32 * 32; s += 2) {
    uint8_t* line = room.values + s / 32 * wide * kUnitBytes + s % 32 / 2 * 64;
    const uint8_t* bytes = t.tiles[s / kTileTokens] + p.values_offset + s % kTileTokens * p.code_bytes;
    for (int64_t i = 0; i < wide; i += 8 / Bits) {
      uint8_t* to = line + i * kUnitBytes;
      if (s >= t.slots) {
        std::memset(to, 0, 64);
        if (Bits == 4) std::memset(to + kUnitBytes, 0, 64);
        continue;
      }
      const UnsignedWordVec codes = load_words(bytes + i * Bits * 4);
      if constexpr (Bits == 4) {
        const __m512i low = _mm512_permutexvar_epi16((__m512i)codes, numbers);
        const __m512i high = _mm512_permutexvar_epi16((__m512i)(codes >> uint16_t(4)), numbers);
        std::memcpy(to, &low, 64), std::memcpy(to + kUnitBytes, &high, 64);
      } else {
        store_line(to, low_numbers(bits_as<IntVec>(codes)), high_numbers(bits_as<IntVec>(codes)));
      }
    }
  }
}

// A query [d] rotated, in the order of the key codes.
template <int Bits>
inline void turn_query(const PackedLayout& p, const float* query, uint16_t* turned) {
  constexpr int kWords = Code<Bits>::kGroupBytes / 4, kPlanes = Code<Bits>::kPlanes;
  alignas(64) float numbers[kMaxHeadDim], ordered[kGroup];
  std::copy_n(query, p.width, numbers);
  rotate(numbers, p.width, p.block);
  for (int64_t g = 0; g < p.width; g += kGroup) {
    float* next = ordered;
    for (int w = 0; w < kWords; ++w)
      for (int k = 0; k < kPlanes; ++k)
        for (int h = 0; h < 2; ++h) *next++ = numbers[g + Code<Bits>::dimension(w, h, k)];
    store_bfloat16(turned + g, load(ordered), load(ordered + kLanes));
  }
}

// The queries of an item, each in the layouts that its slots are asked in.
struct UnitQueries {
  int rows;
  float common[kItemRows], first[kItemRows];  // what keys' centre adds to a dot product, and what the first tile's adds to that

  UnitQueries(const Attend& a, const AttendItem& item, bool stored, const UnitRoom& room)
      : rows(int(item.num_queries * (a.query_heads / a.cache.heads))) {
    const int64_t d = room.d, groups = a.query_heads / a.cache.heads;
    std::memset(room.query, 0, room.rows * d * 2);
    if (stored) std::memset(room.turned, 0, room.rows * d * 2);
    const Centres centres = stored ? Centres(a.packed, record_of(a, item)) : Centres();
    for (int r = 0; r < rows; ++r) {
      const int64_t token = a.first_token[item.row] + item.first_query + r / groups;
      const char* from = a.query + (token * a.query_stride + (item.head * groups + r % groups) * d) * 2;
      std::memcpy(room.query + r * d, from, d * 2);
      if (!stored) continue;
      alignas(64) float query[kMaxHeadDim];
      for (int64_t i = 0; i < d; i += kLanes) store(query + i, load(reinterpret_cast<const BFloat16*>(from) + i));
      common[r] = centres ? dot(query, centres.others, d) : 0;
      first[r] = centres ? dot(query, centres.first, d) - common[r] : 0;
      (a.packed.bits == 8 ? turn_query<8> : turn_query<4>)(a.packed, query, room.turned + r * d);
    }
  }
};

// Running softmax of the rows of an item. Weights are powers of two of logits over ln 2, relative to `top`.
struct UnitRunning {
  float *out, *top;
  Vec* mass;  // by lane
};

// 2^x for x up to 127; 0 for large negative ones, not for infinite ones. Relative error < 4e-6 (minimax on [0, 1)): weights are
// rounded to bfloat16.
inline Vec power_of_two(Vec x) {
  const Vec rest = (Vec)_mm512_reduce_ps((__m512)x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  Vec poly = splat(0.0135341679f);
  poly = poly * rest + 0.0520114606f;
  poly = poly * rest + 0.241442757f;
  poly = poly * rest + 0.693003834f;
  poly = poly * rest + 1.00000259f;
  return (Vec)_mm512_scalef_ps((__m512)poly, (__m512)x);
}

constexpr float kLog2E = 1.44269504f, kLn2 = 0.693147181f;
// What a logit over ln 2 may lie above `top` before that is raised: sums are far from float32's end, and few panels raise it.
constexpr float kSlack = 12;
constexpr float kUnseen = -1e30f;

// A row's dot products over a panel as they were computed, and what is missing in them.
struct Products {
  float* at;
  float common = 0, first = 0;  // to be added to all, and to those of the first tile
};

// Completes dot products in place where they are not all alike. Logits are `factor` times them then.
inline void complete(const Attend& a, Products& p, int vectors, int visible, float& factor) {
  if (p.first != 0) {
    const Vec first = (Vec)_mm512_maskz_mov_ps((1 << kTileTokens) - 1, _mm512_set1_ps(p.first));
    store(p.at, load(p.at) + first);
  }
  if (a.softcap != 0) {
    for (int v = 0; v < vectors; ++v) store(p.at + v * kLanes, (load(p.at + v * kLanes) + p.common) * a.scale);
    cap<1>(a, vectors, p.at);
    p.common = 0, factor = 1;
  }
  for (int v = visible / kLanes; v < vectors; ++v) {
    const int seen = visible - v * kLanes;
    store(p.at + v * kLanes, (Vec)_mm512_mask_mov_ps(_mm512_set1_ps(kUnseen), seen > 0 ? (1 << seen) - 1 : 0, (__m512)load(p.at + v * kLanes)));
  }
}

// The softmax of a row over a panel: weights, rounded; as numbers too where it `Leaves` them.
// vectors: a constant where the panel is full. scaled(v, w): the weights of 16 slots times their values' scales.
template <bool Leaves, class Count, class Scaled>
inline void weigh(const Products& p, Count vectors, float factor, Scaled scaled, uint16_t* rounded, float* left, float* out, int64_t d,
                  float& top, Vec& mass) {
  Vec highest = load(p.at);
  for (int v = 1; v < vectors; ++v) {
    const Vec x = load(p.at + v * kLanes);
    highest = x > highest ? x : highest;
  }
  if (_mm512_cmp_ps_mask((__m512)((highest + p.common) * factor), _mm512_set1_ps(top + kSlack), _CMP_GT_OQ)) {
    const float now = (largest(highest) + p.common) * factor, keep = exp2f(top - now);
    top = now;
    mass *= keep;
    multiply(out, int(d), keep);
  }
  const float base = top - p.common * factor;
  Vec total = {};
  auto weight = [&](int v) {
    const Vec w = power_of_two(load(p.at + v * kLanes) * factor - base);
    total += w;
    if constexpr (Leaves) store(left + v * kLanes, w);
    return scaled(v, w);
  };
  for (int v = 0; v < vectors; v += 2) {
    const Vec first = weight(v), second = v + 1 < vectors ? weight(v + 1) : Vec{};
    store_bfloat16(rounded + v * kLanes, first, second);
  }
  mass += total;
}

// Slots of a panel.
struct Panel {
  int vectors;
  int64_t slot;    // where weights are left,
  int left_slots;  // so many
};

// Logits of a panel, the softmax of all rows, the weighted values onto `out`. query: [rows][d]; visible(r): slots that a row sees;
// missing(r): Products; scaled: as `weigh`.
template <class Visible, class Missing, class Scaled>
inline void attend_panel(const Attend& a, const UnitRoom& room, const uint16_t* query, int rows, const Panel& panel, Visible visible,
                         Missing missing, Scaled scaled, const Left& left, const UnitRunning& run) {
  constexpr std::integral_constant<int, kTileSlots / kLanes> kAll;
  const int64_t d = room.d;
  const int tiles = int(room.rows / kUnitRows), wide = int(d / kUnitColumns), depth = (panel.vectors + 1) / 2 * kUnitDepth;
  multiply_tiles<false>(tiles, panel.vectors, query, d, room.keys, d, kPanelColumns, room.products, kTileSlots);
  alignas(64) float weights[kTileSlots];
  for (int r = 0; r < rows; ++r) {
    uint16_t* rounded = room.weights + r * kTileSlots;
    const bool leaves = r >= left.first;
    if (const int seen = visible(r); seen > 0) {
      float factor = a.scale;
      Products p = missing(r);
      if (seen < panel.vectors * kLanes || p.first != 0 || a.softcap != 0) complete(a, p, panel.vectors, seen, factor);
      factor *= kLog2E;
      auto weigh_row = [&](auto keeps, auto vectors) {
        weigh<keeps>(p, vectors, factor, scaled, rounded, weights, run.out + r * d, d, run.top[r], run.mass[r]);
      };
      auto weigh_any = [&](auto keeps) { panel.vectors == kAll ? weigh_row(keeps, kAll) : weigh_row(keeps, panel.vectors); };
      leaves ? weigh_any(std::true_type{}) : weigh_any(std::false_type{});
    } else {
      std::memset(rounded, 0, kTileSlots * 2);
      std::fill_n(weights, kTileSlots, 0.0f);
    }
    if (leaves) leave(a, left.row(a, r), panel.slot, weights, panel.left_slots, run.top[r] * kLn2);
  }
  multiply_tiles<true>(tiles, wide, room.weights, kTileSlots, room.values, depth, wide, run.out, d);
}

template <int Bits>
void attend_stored_units(const Attend& a, const AttendItem& item, const UnitQueries& q, const UnitRoom& room, int64_t end,
                         const Left& left, const UnitRunning& run) {
  const PackedLayout& p = a.packed;
  int64_t first = 0;
  for (PackedSlots slots(a.cache, p, item.head, a.pages + item.row * a.max_pages, 0, end); slots.slots > 0;
       slots.advance(), first += kTileSlots) {
    const int vectors = slots.vectors(), seen = slots.slots;
    fill_stored_keys<Bits>(slots, p, room);
    fill_stored_values<Bits>(slots, p, room);
    Vec scales[kTileSlots / kLanes];
    value_scales(slots, p, scales);
    if (const int rest = seen % kLanes) scales[vectors - 1] = (Vec)_mm512_maskz_mov_ps((1 << rest) - 1, (__m512)scales[vectors - 1]);
    const bool starts = slots.starts();
    auto missing = [&](int r) { return Products{room.products + r * kTileSlots, q.common[r], starts ? q.first[r] : 0}; };
    auto scaled = [&](int v, Vec w) { return w * scales[v]; };
    attend_panel(a, room, room.turned, q.rows, {vectors, first, seen}, [&](int) { return seen; }, missing, scaled, left, run);
  }
  for (int r = 0; r < q.rows; ++r) rotate(run.out + r * room.d, p.width, p.block);
}

// The record after all slots, as attend_rows.
template <int Rows>
inline int attend_record_rows(const Attend& a, const AttendItem& item, int row, const UnitRoom& room, Running run) {
  const RecordView record = record_of(a, item);
  float *query = room.step, *step = room.step + Rows * room.d;
  pack_queries<Rows, BFloat16>(a, item, row, query);
  with_covariance_type(a.record_layout.covariance_type, [&](auto c) {
    attend_record<Rows, decltype(c)>(a, record, a.evicted(item.row, item.head), query, step,
                                     {run.out + row * room.d, run.top + row, run.mass + row});
  });
  return row + Rows;
}

void attend_units(const Attend& a, const AttendItem& item, float* scratch) {
  const int64_t d = a.cache.head_dim, groups = a.query_heads / a.cache.heads;
  const int64_t stored = a.held(item.row, item.head);
  const UnitRoom room(a, item.num_queries * groups, scratch);
  const UnitQueries queries(a, item, stored > 0, room);
  const int rows = queries.rows;
  float top[kItemRows], mass[kItemRows];
  Vec masses[kItemRows];
  const UnitRunning run = {room.out, top, masses};
  std::fill_n(top, rows, -INFINITY), std::fill_n(masses, rows, Vec{});
  std::fill_n(room.out, room.rows * d, 0.0f);
  std::memset(room.weights, 0, room.rows * kTileSlots * 2);
  const Left left(a, item, 0);
  const MatrixUnits units;
  if (stored > 0) (a.packed.bits == 8 ? attend_stored_units<8> : attend_stored_units<4>)(a, item, queries, room, stored, left, run);
  auto sees = [&](int r) { return a.last_slot[item.row] + item.first_query + r / groups + 1; };
  const int64_t end = sees(rows - 1);
  for (int64_t first = 0; first < end; first += kTileSlots) {
    const Tile<BFloat16> tile(a.cache, item.head, a.exact_pages(item.row), first, end);
    const int vectors = tile.vectors();
    fill_panel(tile, d, a.cache.page_size, room);
    auto missing = [&](int r) { return Products{room.products + r * kTileSlots}; };
    auto visible = [&](int r) { return int(sees(r) - first); };
    const Panel panel{vectors, a.store_slots() + first, vectors * kLanes};
    attend_panel(a, room, room.query, rows, panel, visible, missing, [](int, Vec w) { return w; }, left, run);
  }
  for (int r = 0; r < rows; ++r) top[r] *= kLn2, mass[r] = sum(masses[r]);
  for (int r = left.first; r < rows; ++r) leave_nothing(a, item, left.row(a, r), end);
  const Running total = {room.out, top, mass};
  int row = 0;
  while (item.with_record && row < rows)
    row = rows - row >= 8 ? attend_record_rows<8>(a, item, row, room, total) : attend_record_rows<1>(a, item, row, room, total);
  finish<BFloat16>(a, item, 0, rows, total);
}
