// Single tokens of a quantised store: quantised into a tile, and read from one. Included once per instruction set, after packed.h.

// A code's byte in a tile.
inline int64_t key_byte(int64_t byte, int token) { return byte / 4 * 4 * kTileTokens + token * 4 + byte % 4; }
inline int64_t value_byte(const PackedLayout& p, int64_t byte, int token) {
  return p.values_offset + token / 2 * 2 * p.code_bytes + byte * 2 + token % 2;
}
template <class Byte>
inline Byte* scale_at(const PackedLayout& p, Byte* tile, int64_t group, int token) {
  return tile + p.scales_offset + (group * kTileTokens + token) * 2;
}

// The largest |x|; NaN if one is NaN.
inline float largest_or_nan(const float* x, int64_t size) {
  Vec top = {};
  IntVec strange = {};
  for (int64_t i = 0; i < size; i += kLanes) {
    const Vec v = load(x + i), positive = absolute(v);
    top = positive > top ? positive : top;
    strange |= v != v;
  }
  return sum(strange) != 0 ? NAN : largest(top);
}

// The codes of some numbers times the inverse of their scale: 0 .. 2^Bits - 1.
template <int Bits, class Inverse>
inline IntVec codes_of(Vec x, Inverse inverse) {
  const Vec lowest = splat(Code<Bits>::kLowest), highest = splat(Code<Bits>::kHighest);
  Vec scaled = without_nan(x * inverse);
  scaled = scaled > lowest ? scaled : lowest;
  scaled = scaled < highest ? scaled : highest;
  const IntVec truncated = __builtin_convertvector(scaled, IntVec);
  return truncated + (to_floats(truncated) > scaled) + Code<Bits>::kOffset;  // a comparison that holds is -1
}

// Of some numbers: the largest is in the last step, or NaN.
struct Scale {
  BFloat16 bits;
  float wide, inverse;
};
template <int Bits>
inline Scale scale_of(const float* x, int64_t size) {
  constexpr float kStep = Bits == 8 ? 2.0 / 253 : 2.0 / 15;
  const float wanted = largest_or_nan(x, size) * kStep;
  const BFloat16 bits{wanted == wanted ? uint16_t((bits_as<uint32_t>(wanted) + 0xffff) >> 16) : uint16_t(0x7fc0)};
  const float wide = to_float(bits);
  return {bits, wide, wide > 0 ? 1 / wide : 0};
}

// Writes the bytes of `size` numbers with one scale, as of the first of them; returns the scale. As `quantised` of
// packed_store.py, bit by bit.
template <int Bits>
inline BFloat16 quantise(const float* x, int64_t size, uint8_t* bytes) {
  const Scale scale = scale_of<Bits>(x, size);
  constexpr int kHalf = kGroup / 2;  // int4: numbers of a group in low halves of bytes
  for (int64_t g = 0; g < size; g += kGroup)
    for (int i = 0; i < (Bits == 8 ? kGroup : kHalf); i += kLanes) {
      IntVec codes = codes_of<Bits>(load(x + g + i), scale.inverse);
      if (Bits == 4) codes |= codes_of<Bits>(load(x + g + kHalf + i), scale.inverse) << 4;
      store_bytes(bytes + g * Bits / 8 + i, codes);
    }
  return scale.bits;
}

// The codes of a key into a tile.
inline void write_key_bytes(const PackedLayout& p, const uint8_t* bytes, uint8_t* tile, int token) {
  for (int64_t j = 0; j < p.code_bytes; j += 4) std::memcpy(tile + key_byte(j, token), bytes + j, 4);
}

// A key into a tile, every number rounded by itself; a value. [width] each, rotated.
template <int Bits>
inline void write_key(const PackedLayout& p, const float* key, uint8_t* tile, int token) {
  uint8_t bytes[kMaxHeadDim];
  for (int64_t g = 0; g < p.width / kGroup; ++g) {
    const BFloat16 scale = quantise<Bits>(key + g * kGroup, kGroup, bytes + g * Code<Bits>::kGroupBytes);
    std::memcpy(scale_at(p, tile, g, token), &scale, 2);
  }
  write_key_bytes(p, bytes, tile, token);
}
template <int Bits>
inline void write_value(const PackedLayout& p, const float* value, uint8_t* tile, int token) {
  uint8_t bytes[kMaxHeadDim];
  const BFloat16 scale = quantise<Bits>(value, p.width, bytes);
  std::memcpy(scale_at(p, tile, p.width / kGroup, token), &scale, 2);
  for (int64_t j = 0; j < p.code_bytes; ++j) tile[value_byte(p, j, token)] = bytes[j];
}

// Which byte of a token's codes holds number n; that number, of such a byte.
template <int Bits>
inline int64_t code_byte(int64_t n) { return Bits == 8 ? n : n / kGroup * 16 + n % 16; }
template <int Bits>
inline float number_of(uint8_t byte, int64_t n, const uint8_t* scale) {
  const int shift = Bits == 8 ? 0 : int(n % kGroup / 16 * 4);
  return (float(byte >> shift & ((1 << Bits) - 1)) - Code<Bits>::kMiddle) * to_float(load_raw<BFloat16>(scale));
}

// Number n of a tile's token, rotated.
template <int Bits>
inline float key_number(const PackedLayout& p, const uint8_t* tile, int token, int64_t n) {
  return number_of<Bits>(tile[key_byte(code_byte<Bits>(n), token)], n, scale_at(p, tile, n / kGroup, token));
}
template <int Bits>
inline float value_number(const PackedLayout& p, const uint8_t* tile, int token, int64_t n) {
  return number_of<Bits>(tile[value_byte(p, code_byte<Bits>(n), token)], n, scale_at(p, tile, p.width / kGroup, token));
}

// A group's numbers from its bytes.
template <int Bits>
inline void numbers_of(const uint8_t* bytes, const uint8_t* scale, float* x) {
  const float wide = to_float(load_raw<BFloat16>(scale));
  for (int i = 0; i < Code<Bits>::kGroupBytes; i += kLanes) {
    const IntVec codes = load_bytes(bytes + i);
    for (int k = 0; k < 8 / Bits; ++k)
      store(x + k * 16 + i, (to_floats(codes >> Bits * k & ((1 << Bits) - 1)) - Code<Bits>::kMiddle) * wide);
  }
}

// A token of a tile as float32 [width], not rotated.
template <int Bits>
inline void read_token(const PackedLayout& p, const uint8_t* tile, int token, float* key, float* value) {
  uint8_t keys[kMaxHeadDim], values[kMaxHeadDim];
  const int64_t groups = p.width / kGroup;
  for (int64_t j = 0; j < p.code_bytes; j += 4) std::memcpy(keys + j, tile + key_byte(j, token), 4);
  for (int64_t j = 0; j < p.code_bytes; ++j) values[j] = tile[value_byte(p, j, token)];
  for (int64_t g = 0; g < groups; ++g) {
    numbers_of<Bits>(keys + g * Code<Bits>::kGroupBytes, scale_at(p, tile, g, token), key + g * kGroup);
    numbers_of<Bits>(values + g * Code<Bits>::kGroupBytes, scale_at(p, tile, groups, token), value + g * kGroup);
  }
  rotate(key, p.width, p.block);
  rotate(value, p.width, p.block);
}

// Calls f(constant) with the bits of a code.
template <class F>
inline void with_bits(int bits, F f) {
  bits == 8 ? f(std::integral_constant<int, 8>{}) : f(std::integral_constant<int, 4>{});
}

// Item: row * heads + head.
void read_store(const ReadStore& r, int64_t item) {
  const int64_t d = r.cache.head_dim, slots = r.num_pages * r.packed.page_tiles * kTileTokens;
  float key[kMaxHeadDim], value[kMaxHeadDim];
  with_bits(r.packed.bits, [&](auto bits) {
    for (int64_t slot = 0; slot < slots; ++slot) {
      uint8_t* tile = PackedSlots::tile_of(r.cache, r.packed, item % r.cache.heads, r.pages + item / r.cache.heads * r.num_pages,
                                           slot / kTileTokens);
      read_token<bits>(r.packed, tile, int(slot % kTileTokens), key, value);
      std::copy_n(key, d, r.keys + (item * slots + slot) * d);
      std::copy_n(value, d, r.values + (item * slots + slot) * d);
    }
  });
}
