// attend of rows with several queries on matrix units: panels of kTileSlots slots as bfloat16, which all query rows of an item
// share. Included by the instruction set that has units, after attend.h.
//
// Logits lose nothing to bfloat16: keys and queries of the cache are of it, so are codes of quantised keys, and a rotated query is
// the sum of two numbers of it. Weights are rounded to it before values are multiplied by them, as vLLM's own attention does
// (csrc/cpu/cpu_attn_amx.hpp). A row's result does not depend on the others of its item: units sum every line by itself, in one
// order.

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
  float *out, *products, *step;        // [rows][d]; [d / 32][rows][kTileSlots], of stored slots by group of numbers; of a record
  uint16_t *query, *turned, *weights;  // [rows][d]; rotated, in two parts [rows][2][d]; [rows][kTileSlots]
  uint8_t *keys, *values;              // tiles [d / 32][slots / 16] and [slots / 32][d / 16]

  UnitRoom(const Attend& a, int64_t item_rows, float* scratch) : d(a.cache.head_dim), rows(whole_tiles(item_rows)) {
    auto* next = reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(scratch) + 63) & ~uintptr_t(63));
    auto take = [&](auto*& to, int64_t count) {
      to = reinterpret_cast<std::remove_reference_t<decltype(to)>>(next);
      next += count * int64_t(sizeof *to);
    };
    take(out, rows * d), take(products, d / kGroup * rows * kTileSlots), take(step, 16 * d);
    take(query, rows * d), take(turned, rows * 2 * d), take(weights, rows * kTileSlots);
    take(keys, 2 * d * kTileSlots), take(values, 2 * d * kTileSlots);
  }
  static size_t floats(int64_t d) { return kItemRows * (d * 5 / 2 + (d / kGroup * 2 + 1) * kTileSlots / 2) + 16 * d + d * kTileSlots + 16; }
};

// Exact slots of a tile; those beyond the last one have values of zero.
inline void fill_panel(const Tile<BFloat16>& tile, int64_t d, int64_t page_size, const UnitRoom& room) {
  static const BFloat16 nothing[kMaxHeadDim] = {};
  const int64_t wide = d / kUnitColumns;
  auto value_of = [&](int s) { return s < tile.slots ? tile.values[s / kLanes] + s % kLanes * d : nothing; };
  for (int v = 0; v < tile.vectors(); ++v)
    for (int64_t pair = 0; pair < d / 2; ++pair) {
      const BFloat16* key = tile.keys[v] + 2 * pair * page_size;
      store_line(room.keys + (pair / 16 * kPanelColumns + v) * kUnitBytes + pair % 16 * 64, key, key + page_size);
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

// Rotated keys of a tile of slots over their scales; numbers come in the order of split_query.
template <int Bits>
inline void fill_stored_keys(const PackedSlots& t, const PackedLayout& p, const UnitRoom& room) {
  constexpr int kPlanes = Code<Bits>::kPlanes, kWords = Code<Bits>::kGroupBytes / 4;
  const __m512i numbers = numbers_of_codes();
  for (int v = 0; v < t.vectors(); ++v)
    for (int64_t g = 0; g < p.width / kGroup; ++g) {
      uint8_t* line = room.keys + (g * kPanelColumns + v) * kUnitBytes;
      for (int w = 0; w < kWords; ++w) {
        const UnsignedWordVec words = t.key_words(v, g * kWords + w);
        for (int k = 0; k < kPlanes; ++k, line += 64) {
          if constexpr (Bits == 4) {
            const __m512i found = _mm512_permutexvar_epi16((__m512i)(words >> uint16_t(4 * k)), numbers);
            std::memcpy(line, &found, 64);
          } else {
            const IntVec codes = bits_as<IntVec>(words >> uint16_t(8 * k));
            store_line(line, low_numbers(codes), high_numbers(codes));
          }
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

// Numbers as sums of two of bfloat16.
inline void split(Vec first, Vec second, uint16_t* high, uint16_t* low) {
  store_bfloat16(high, first, second);
  const auto* kept = reinterpret_cast<const BFloat16*>(high);
  store_bfloat16(low, first - load(kept), second - load(kept + kLanes));
}

// A query [d] rotated, in the order of the key codes: [2][d].
template <int Bits>
inline void split_query(const PackedLayout& p, const float* query, uint16_t* parts) {
  constexpr int kWords = Code<Bits>::kGroupBytes / 4, kPlanes = Code<Bits>::kPlanes;
  alignas(64) float turned[kMaxHeadDim], ordered[kGroup];
  std::copy_n(query, p.width, turned);
  rotate(turned, p.width, p.block);
  for (int64_t g = 0; g < p.width; g += kGroup) {
    float* next = ordered;
    for (int w = 0; w < kWords; ++w)
      for (int k = 0; k < kPlanes; ++k)
        for (int h = 0; h < 2; ++h) *next++ = turned[g + Code<Bits>::dimension(w, h, k)];
    split(load(ordered), load(ordered + kLanes), parts + g, parts + p.width + g);
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
    if (stored) std::memset(room.turned, 0, room.rows * d * 4);
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
      (a.packed.bits == 8 ? split_query<8> : split_query<4>)(a.packed, query, room.turned + r * 2 * d);
    }
  }
};

// Slots of a panel. scales: of values that lack theirs, which weights are multiplied by; null: none do.
struct Panel {
  int vectors;
  const Vec* scales;
  int64_t slot;    // where weights are left,
  int left_slots;  // so many
};

// The softmax of a row, as `soften`, in two passes: logits and their maximum, then weights, as numbers and rounded.
// logit(v): the logits of 16 slots. A weight of zero stays one, whatever its value.
template <class Logit>
inline float weigh(const Attend& a, const Panel& panel, Logit logit, int visible, float* weights, uint16_t* rounded, float& top,
                   float& mass) {
  Vec highest = splat(-INFINITY);
  for (int v = 0; v < panel.vectors; ++v) {
    Vec x = logit(v);
    if (a.softcap != 0) store(weights + v * kLanes, x), cap<1>(a, 1, weights + v * kLanes), x = load(weights + v * kLanes);
    if (const int seen = visible - v * kLanes; seen < kLanes)
      x = (Vec)_mm512_mask_mov_ps(_mm512_set1_ps(-INFINITY), seen > 0 ? __mmask16((1 << seen) - 1) : 0, (__m512)x);
    store(weights + v * kLanes, x);
    highest = x > highest ? x : highest;
  }
  const float panel_top = largest(highest), new_top = panel_top > top ? panel_top : top;
  const float keep = top == new_top ? 1.0f : expf(top - new_top);
  top = new_top;
  const float base = top == -INFINITY ? 0 : top;  // nothing visible yet: every weight is 0
  Vec total = {};
  auto weight = [&](int v) {
    const Vec w = exp_negative(load(weights + v * kLanes) - base);
    total += w;
    store(weights + v * kLanes, w);
    if (panel.scales == nullptr) return w;
    return (Vec)_mm512_maskz_mul_ps(_mm512_cmp_ps_mask((__m512)w, _mm512_setzero_ps(), _CMP_GT_OQ), (__m512)w, (__m512)panel.scales[v]);
  };
  for (int v = 0; v < panel.vectors; v += 2) {
    const Vec first = weight(v), second = v + 1 < panel.vectors ? weight(v + 1) : Vec{};
    store_bfloat16(rounded + v * kLanes, first, second);
  }
  mass = mass * keep + sum(total);
  return keep;
}

// The softmax of all rows, and the weighted values onto `out`. visible(r): slots that a row sees. logits_of(r): what `weigh` asks.
template <class Visible, class Logits>
inline void attend_panel(const Attend& a, const UnitRoom& room, int rows, const Panel& panel, Visible visible, Logits logits_of,
                         const Left& left, Running run) {
  const int64_t d = room.d;
  for (int r = 0; r < rows; ++r) {
    float* weights = room.products + r * kTileSlots;
    const float keep = weigh(a, panel, logits_of(r), visible(r), weights, room.weights + r * kTileSlots, run.top[r], run.mass[r]);
    if (r >= left.first) leave(a, left.row(a, r), panel.slot, weights, panel.left_slots, run.top[r]);
    if (keep != 1) multiply(run.out + r * d, int(d), keep);
  }
  const int tiles = int(room.rows / kUnitRows), wide = int(d / kUnitColumns), depth = (panel.vectors + 1) / 2 * kUnitDepth;
  multiply_tiles<1, true>(tiles, wide, room.weights, kTileSlots, 0, room.values, depth, wide, run.out, d);
}

template <int Bits>
void attend_stored_units(const Attend& a, const AttendItem& item, const UnitQueries& q, const UnitRoom& room, int64_t end,
                         const Left& left, Running run) {
  const PackedLayout& p = a.packed;
  const int tiles = int(room.rows / kUnitRows);
  const int64_t groups = p.width / kGroup;
  int64_t first = 0;
  for (PackedSlots slots(a.cache, p, item.head, a.pages + item.row * a.max_pages, 0, end); slots.slots > 0;
       slots.advance(), first += kTileSlots) {
    const int vectors = slots.vectors();
    fill_stored_keys<Bits>(slots, p, room);
    fill_stored_values<Bits>(slots, p, room);
    Vec scales[kTileSlots / kLanes];
    value_scales(slots, p, scales);
    Vec key_scales[kMaxHeadDim / kGroup][kTileSlots / kLanes];
    for (int64_t g = 0; g < groups; ++g)
      for (int v = 0; v < vectors; ++v) key_scales[g][v] = slots.scales(v, p.scales_offset + g * 2 * kTileTokens);
    for (int64_t g = 0; g < groups; ++g)
      multiply_tiles<2, false>(tiles, vectors, room.turned + g * kGroup, 2 * room.d, room.d, room.keys + g * kPanelColumns * kUnitBytes,
                               kGroup, kPanelColumns, room.products + g * room.rows * kTileSlots, kTileSlots);
    auto logits_of = [&](int r) {
      return [&, r](int v) {
        Vec sum = splat(q.common[r]);
        for (int64_t g = 0; g < groups; ++g)
          sum += load(room.products + (g * room.rows + r) * kTileSlots + v * kLanes) * key_scales[g][v];
        if (v == 0 && slots.starts()) sum += (Vec)_mm512_maskz_mov_ps(0xff, _mm512_set1_ps(q.first[r]));
        return sum * a.scale;
      };
    };
    attend_panel(a, room, q.rows, {vectors, scales, first, slots.slots}, [&](int) { return slots.slots; }, logits_of, left, run);
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
  const Running run = {room.out, top, mass};
  std::fill_n(top, rows, -INFINITY), std::fill_n(mass, rows, 0.0f);
  std::fill_n(room.out, room.rows * d, 0.0f);
  std::memset(room.weights, 0, room.rows * kTileSlots * 2);
  const Left left(a, item, 0);
  const MatrixUnits units;
  if (stored > 0) (a.packed.bits == 8 ? attend_stored_units<8> : attend_stored_units<4>)(a, item, queries, room, stored, left, run);
  auto sees = [&](int r) { return a.last_slot[item.row] + item.first_query + r / groups + 1; };
  const int64_t end = sees(rows - 1);
  for (int64_t first = 0; first < end; first += kTileSlots) {
    const Tile<BFloat16> tile(a.cache, item.head, a.exact_pages(item.row), first, end);
    const int vectors = tile.vectors(), tiles = int(room.rows / kUnitRows);
    fill_panel(tile, d, a.cache.page_size, room);
    multiply_tiles<1, false>(tiles, vectors, room.query, d, 0, room.keys, d, kPanelColumns, room.products, kTileSlots);
    auto visible = [&](int r) { return int(sees(r) - first > 0 ? sees(r) - first : 0); };
    auto logits_of = [&](int r) { return [&, r](int v) { return load(room.products + r * kTileSlots + v * kLanes) * a.scale; }; };
    attend_panel(a, room, rows, {vectors, nullptr, a.store_slots() + first, vectors * kLanes}, visible, logits_of, left, run);
  }
  for (int r = left.first; r < rows; ++r) leave_nothing(a, item, left.row(a, r), end);
  int row = 0;
  while (item.with_record && row < rows)
    row = rows - row >= 8 ? attend_record_rows<8>(a, item, row, room, run) : attend_record_rows<1>(a, item, row, room, run);
  finish<BFloat16>(a, item, 0, rows, run);
}
