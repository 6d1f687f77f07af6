// 8-bit floats of vLLM's fp8 caches. Included once per instruction set, after words.h.
//
// Loads are exact, but in units of `kUnit`: a number of fp8 e4m3 is one of float16 with another bias. e4m3's NaN is not told from a
// number: vLLM's CPU attention writes none.

template <class T>
constexpr bool kIsFp8 = std::is_same_v<T, Fp8E4m3> || std::is_same_v<T, Fp8E5m2>;
template <class T>
constexpr float kUnit = std::is_same_v<T, Fp8E4m3> ? 256 : 1;

// The same numbers as float16, in units of kUnit.
template <class T>
inline uint16_t half_of(T x) {
  return std::is_same_v<T, Fp8E5m2> ? x.bits << 8 : (x.bits & 0x80) << 8 | (x.bits & 0x7f) << 7;
}
template <class T>
  requires kIsFp8<T>
inline float to_float(T x) {
  return to_float(Float16{half_of(x)});
}

template <class T>
  requires kIsFp8<T>
inline Vec load(const T* from) {
#if MOMENTKV_LANES == 16
  const __m128i bytes = load_raw<__m128i>(from);
  if constexpr (std::is_same_v<T, Fp8E5m2>) return (Vec)_mm512_cvtph_ps(_mm256_slli_epi16(_mm256_cvtepu8_epi16(bytes), 8));
  // A byte that keeps its sign twice: the second one is where float16 has its highest exponent bit.
  const __m256i twice = _mm256_slli_epi16(_mm256_cvtepi8_epi16(bytes), 7);
  return (Vec)_mm512_cvtph_ps(_mm256_and_si256(twice, _mm256_set1_epi16(int16_t(0xbfff))));
#elif MOMENTKV_LANES == 8
  const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from));
  if constexpr (std::is_same_v<T, Fp8E5m2>) return (Vec)_mm256_cvtph_ps(_mm_slli_epi16(_mm_cvtepu8_epi16(bytes), 8));
  const __m128i twice = _mm_slli_epi16(_mm_cvtepi8_epi16(bytes), 7);
  return (Vec)_mm256_cvtph_ps(_mm_and_si128(twice, _mm_set1_epi16(int16_t(0xbfff))));
#else
  Vec v;
  for (int i = 0; i < kLanes; ++i) v[i] = to_float(from[i]);
  return v;
#endif
}

// As vLLM writes them, bit by bit (momentkv_vllm/fp8.py, `truncated`): towards zero, the largest number for what is larger or
// NaN, 0 for -0. In e4m3 numbers below the smallest normal one are added to it first, in float32.
template <class T>
  requires kIsFp8<T>
inline void store(T* to, Vec v) {
  constexpr bool kE5m2 = std::is_same_v<T, Fp8E5m2>;
  constexpr int kMantissa = kE5m2 ? 2 : 3, kBias = kE5m2 ? 15 : 7;
  constexpr float kLargest = kE5m2 ? 57344 : 448, kSmallestNormal = kE5m2 ? 0x1p-14f : 0x1p-6f;
  Vec size = absolute(v);
  size = size < kLargest ? size : splat(kLargest);
  const IntVec tiny = size < kSmallestNormal;
  const Vec raised = tiny ? size + kSmallestNormal : size;
  IntVec code = (bits_as<IntVec>(raised) >> (23 - kMantissa)) - ((127 - kBias) << kMantissa);
  if constexpr (kE5m2)
    code = tiny ? __builtin_convertvector(size * 0x1p16f, IntVec) : code;
  else
    code += tiny << kMantissa;  // a comparison that holds is -1
  code |= (v < 0.0f) & 0x80;
  store_bytes(reinterpret_cast<uint8_t*>(to), code);
}
