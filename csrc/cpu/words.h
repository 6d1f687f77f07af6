// Vectors of 16-bit numbers, two per lane of a Vec: integer dot products of quantised numbers. Included once per instruction
// set, after simd.h.

typedef int16_t WordVec __attribute__((vector_size(4 * MOMENTKV_LANES)));
typedef uint16_t UnsignedWordVec __attribute__((vector_size(4 * MOMENTKV_LANES)));
typedef uint8_t ByteVec __attribute__((vector_size(2 * MOMENTKV_LANES)));

// Every lane of `sums` plus the products of the lane's two pairs of numbers.
inline IntVec add_products(IntVec sums, WordVec a, WordVec b) {
#if MOMENTKV_LANES == 16 && defined(MOMENTKV_VNNI)
  return (IntVec)_mm512_dpwssd_epi32((__m512i)sums, (__m512i)a, (__m512i)b);
#elif MOMENTKV_LANES == 16
  return sums + (IntVec)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#elif MOMENTKV_LANES == 8
  return sums + (IntVec)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#elif defined(__SSE2__)
  return sums + (IntVec)_mm_madd_epi16((__m128i)a, (__m128i)b);
#else
  for (int i = 0; i < kLanes; ++i) sums[i] += int32_t(a[2 * i]) * b[2 * i] + int32_t(a[2 * i + 1]) * b[2 * i + 1];
  return sums;
#endif
}

// Every lane of `sums` plus the products of the lane's four bytes: of `a`, at most 30 each, and of `b`, signed.
inline IntVec add_byte_products(IntVec sums, BitVec a, BitVec b) {
#if MOMENTKV_LANES == 16 && defined(MOMENTKV_VNNI)
  return (IntVec)_mm512_dpbusd_epi32((__m512i)sums, (__m512i)a, (__m512i)b);
#elif MOMENTKV_LANES == 16
  return add_products(sums, (WordVec)_mm512_maddubs_epi16((__m512i)a, (__m512i)b), WordVec{} + int16_t(1));
#elif MOMENTKV_LANES == 8
  return add_products(sums, (WordVec)_mm256_maddubs_epi16((__m256i)a, (__m256i)b), WordVec{} + int16_t(1));
#else
  const WordVec even = bits_as<WordVec>(a & 0x00ff00ffu), odd = bits_as<WordVec>(a >> 8 & 0x00ff00ffu);
  const WordVec signed_even = bits_as<WordVec>(b << 8) >> 8, signed_odd = bits_as<WordVec>(b) >> 8;
  return add_products(add_products(sums, even, signed_even), odd, signed_odd);
#endif
}

// Pairs of words, one of each vector: those of the low, or high, half of every 16 bytes.
inline UnsignedWordVec low_words_of(UnsignedWordVec a, UnsignedWordVec b) {
#if MOMENTKV_LANES == 16
  return (UnsignedWordVec)_mm512_unpacklo_epi16((__m512i)a, (__m512i)b);
#elif MOMENTKV_LANES == 8
  return (UnsignedWordVec)_mm256_unpacklo_epi16((__m256i)a, (__m256i)b);
#else
  return __builtin_shuffle(a, b, UnsignedWordVec{0, 8, 1, 9, 2, 10, 3, 11});
#endif
}
inline UnsignedWordVec high_words_of(UnsignedWordVec a, UnsignedWordVec b) {
#if MOMENTKV_LANES == 16
  return (UnsignedWordVec)_mm512_unpackhi_epi16((__m512i)a, (__m512i)b);
#elif MOMENTKV_LANES == 8
  return (UnsignedWordVec)_mm256_unpackhi_epi16((__m256i)a, (__m256i)b);
#else
  return __builtin_shuffle(a, b, UnsignedWordVec{4, 12, 5, 13, 6, 14, 7, 15});
#endif
}

// Lanes of the low, or high, half of every 16 bytes, twice each.
inline WordVec low_pairs(WordVec v) {
  IntVec lanes = {};
  for (int i = 0; i < kLanes; ++i) lanes[i] = i / 4 * 4 + i % 4 / 2;
  return bits_as<WordVec>(__builtin_shuffle(bits_as<IntVec>(v), lanes));
}
inline WordVec high_pairs(WordVec v) {
  IntVec lanes = {};
  for (int i = 0; i < kLanes; ++i) lanes[i] = i / 4 * 4 + 2 + i % 4 / 2;
  return bits_as<WordVec>(__builtin_shuffle(bits_as<IntVec>(v), lanes));
}

// The two words at `pair` in every lane.
inline WordVec splat_pair(const int16_t* pair) { return bits_as<WordVec>(load_raw<int32_t>(pair) - IntVec{}); }

// 2 * kLanes bytes as words.
inline UnsignedWordVec load_words(const uint8_t* from) {
#if MOMENTKV_LANES == 16
  return (UnsignedWordVec)_mm512_cvtepu8_epi16(load_raw<__m256i>(from));
#elif MOMENTKV_LANES == 8
  return (UnsignedWordVec)_mm256_cvtepu8_epi16(load_raw<__m128i>(from));
#elif defined(__SSE2__)
  return (UnsignedWordVec)_mm_unpacklo_epi8(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)), _mm_setzero_si128());
#else
  return __builtin_convertvector(load_raw<ByteVec>(from), UnsignedWordVec);
#endif
}

inline Vec to_floats(IntVec v) { return __builtin_convertvector(v, Vec); }

// Rounded to nearest even; numbers below 2^22 in size.
inline IntVec to_integers(Vec v) { return bits_as<IntVec>(v + 12582912.0f) - 0x4b400000; }

// The low halves of the lanes, which they must fit.
inline void store_words(int16_t* to, IntVec v) {
#if MOMENTKV_LANES == 16
  const __m256i words = _mm512_cvtepi32_epi16((__m512i)v);
#elif MOMENTKV_LANES == 8
  const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128((__m256i)v), _mm256_extracti128_si256((__m256i)v, 1));
#else
  const HalfVec words = __builtin_convertvector(v, HalfVec);
#endif
  __builtin_memcpy(to, &words, sizeof words);
}

// kLanes bytes, and the low bytes of the lanes, which they must fit.
inline IntVec load_bytes(const uint8_t* from) {
#if MOMENTKV_LANES == 16
  return (IntVec)_mm512_cvtepu8_epi32(load_raw<__m128i>(from));
#elif MOMENTKV_LANES == 8
  return (IntVec)_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)));
#else
  IntVec v;
  for (int i = 0; i < kLanes; ++i) v[i] = from[i];
  return v;
#endif
}
inline void store_bytes(uint8_t* to, IntVec v) {
#if MOMENTKV_LANES == 16
  const __m128i bytes = _mm512_cvtepi32_epi8((__m512i)v);
  __builtin_memcpy(to, &bytes, sizeof bytes);
#else
  for (int i = 0; i < kLanes; ++i) to[i] = uint8_t(v[i]);
#endif
}

inline int32_t sum(IntVec v) {
#if MOMENTKV_LANES == 16
  return _mm512_reduce_add_epi32((__m512i)v);
#else
  int32_t total = 0;
  for (int i = 0; i < kLanes; ++i) total += v[i];
  return total;
#endif
}

// Lanes that have bit `Half` clear: a's sum of lanes `Half` apart; the others: b's.
template <int Half>
inline IntVec sums_of_pairs(IntVec a, IntVec b) {
  IntVec own = {}, other = {};
  for (int i = 0; i < kLanes; ++i) own[i] = i & Half ? kLanes + i : i, other[i] = own[i] ^ Half;
  return __builtin_shuffle(a, b, own) + __builtin_shuffle(a, b, other);
}

// totals[i] = the sum of v[i]'s lanes, of eight vectors.
inline void sums_of_eight(const IntVec* v, int32_t* totals) {
  IntVec fours[2];
  for (int i = 0; i < 2; ++i)
    fours[i] = sums_of_pairs<2>(sums_of_pairs<1>(v[4 * i], v[4 * i + 1]), sums_of_pairs<1>(v[4 * i + 2], v[4 * i + 3]));
  if constexpr (kLanes > 4) {
    IntVec all = sums_of_pairs<4>(fours[0], fours[1]);
    if constexpr (kLanes > 8) all = sums_of_pairs<8>(all, all);
    std::memcpy(totals, &all, 8 * sizeof(int32_t));
  } else {
    std::memcpy(totals, fours, 8 * sizeof(int32_t));
  }
}
