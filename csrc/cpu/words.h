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

inline int32_t sum(IntVec v) {
#if MOMENTKV_LANES == 16
  return _mm512_reduce_add_epi32((__m512i)v);
#else
  int32_t total = 0;
  for (int i = 0; i < kLanes; ++i) total += v[i];
  return total;
#endif
}
