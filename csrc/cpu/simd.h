// Vectors of float32 on GCC's vector extension, MOMENTKV_LANES wide: 16 with AVX-512, 8 with AVX2, 4 elsewhere (SSE, NEON).
// Included once per instruction set, inside that set's namespace; the standard headers come before it. (Not __AVX512F__:
// g++ before 13 does not define it after a target pragma.)

constexpr int kLanes = MOMENTKV_LANES;

typedef float Vec __attribute__((vector_size(4 * MOMENTKV_LANES)));
typedef int32_t IntVec __attribute__((vector_size(4 * MOMENTKV_LANES)));
typedef uint32_t BitVec __attribute__((vector_size(4 * MOMENTKV_LANES)));
typedef uint16_t HalfVec __attribute__((vector_size(2 * MOMENTKV_LANES)));

template <class To, class From>
inline To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  __builtin_memcpy(&to, &from, sizeof to);
  return to;
}

template <class V, class T>
inline V load_raw(const T* from) {
  V v;
  __builtin_memcpy(&v, from, sizeof v);
  return v;
}

inline Vec splat(float x) { return x - Vec{}; }

inline Vec load(const float* from) { return load_raw<Vec>(from); }

// Intrinsics where g++ 12 splits __builtin_convertvector into halves.
inline Vec load(const BFloat16* from) {
#if MOMENTKV_LANES == 16
  return (Vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32(load_raw<__m256i>(from)), 16);
#elif MOMENTKV_LANES == 8
  return (Vec)_mm256_slli_epi32(_mm256_cvtepu16_epi32(load_raw<__m128i>(from)), 16);
#else
  return bits_as<Vec>(__builtin_convertvector(load_raw<HalfVec>(from), BitVec) << 16);
#endif
}

inline Vec load(const Float16* from) {
#if MOMENTKV_LANES == 16
  return (Vec)_mm512_cvtph_ps(load_raw<__m256i>(from));
#elif MOMENTKV_LANES == 8
  return (Vec)_mm256_cvtph_ps(load_raw<__m128i>(from));
#else
  Vec v;
  for (int i = 0; i < kLanes; ++i) v[i] = float(bits_as<_Float16>(from[i].bits));
  return v;
#endif
}

inline Vec load(const Int8* from) {
#if MOMENTKV_LANES == 16
  return (Vec)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(load_raw<__m128i>(from)));
#elif MOMENTKV_LANES == 8
  return (Vec)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from))));
#else
  Vec v;
  for (int i = 0; i < kLanes; ++i) v[i] = from[i].number;
  return v;
#endif
}

// Numbers in [-127, 127], rounded to nearest even: adding 1.5 * 2^23 leaves the integer in the low bits.
inline void store(Int8* to, Vec v) {
  const IntVec rounded = bits_as<IntVec>(v + 12582912.0f);
  for (int i = 0; i < kLanes; ++i) to[i].number = int8_t(rounded[i]);
}

inline void store(float* to, Vec v) { __builtin_memcpy(to, &v, sizeof v); }

inline void store(BFloat16* to, Vec v) {
  const BitVec bits = bits_as<BitVec>(v);
  const BitVec rounded = bits + 0x7fff + ((bits >> 16) & 1);  // to nearest even
  const BitVec kept = (v == v ? rounded : bits | 0x400000) >> 16;
#if MOMENTKV_LANES == 16
  const __m256i half = _mm512_cvtepi32_epi16((__m512i)kept);
#else
  const HalfVec half = __builtin_convertvector(kept, HalfVec);
#endif
  __builtin_memcpy(to, &half, sizeof half);
}

inline void store(Float16* to, Vec v) {
#if MOMENTKV_LANES == 16
  const __m256i half = _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT);
  __builtin_memcpy(to, &half, sizeof half);
#elif MOMENTKV_LANES == 8
  const __m128i half = _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT);
  __builtin_memcpy(to, &half, sizeof half);
#else
  for (int i = 0; i < kLanes; ++i) to[i].bits = bits_as<uint16_t>(_Float16(v[i]));
#endif
}

inline float to_float(float x) { return x; }
inline float to_float(BFloat16 x) { return bits_as<float>(uint32_t(x.bits) << 16); }
inline float to_float(Float16 x) { return float(bits_as<_Float16>(x.bits)); }

inline float sum(Vec v) {
#if MOMENTKV_LANES == 16
  return _mm512_reduce_add_ps((__m512)v);
#endif
  float total = 0;
  for (int i = 0; i < kLanes; ++i) total += v[i];
  return total;
}

inline Vec square_root(Vec v) {
#if MOMENTKV_LANES == 16
  return (Vec)_mm512_sqrt_ps((__m512)v);
#elif MOMENTKV_LANES == 8
  return (Vec)_mm256_sqrt_ps((__m256)v);
#else
  for (int i = 0; i < kLanes; ++i) v[i] = sqrtf(v[i]);
  return v;
#endif
}

// `v` without its NaNs.
inline Vec without_nan(Vec v) { return v == v ? v : Vec{}; }

inline Vec absolute(Vec v) { return bits_as<Vec>(bits_as<BitVec>(v) & 0x7fffffffu); }

inline float largest(Vec v) {
#if MOMENTKV_LANES == 16
  return _mm512_reduce_max_ps((__m512)v);
#endif
  float top = v[0];
  for (int i = 1; i < kLanes; ++i) top = v[i] > top ? v[i] : top;
  return top;
}

// exp(x) for x <= 0 and -inf; 0 below -87. Relative error < 3e-7: 2^n times a polynomial on [-ln2/2, ln2/2], whose own is 1e-7.
inline Vec exp_negative(Vec x) {
#if MOMENTKV_LANES == 16
  const Vec kept = x, n = (Vec)_mm512_roundscale_ps((__m512)(x * 1.44269504f), _MM_FROUND_TO_NEAREST_INT);
#else
  const Vec kept = x > -87.0f ? x : splat(-87.0f);
  const IntVec whole = __builtin_convertvector(kept * 1.44269504f - 0.5f, IntVec);  // truncates towards zero = rounds
  const Vec n = __builtin_convertvector(whole, Vec);
#endif
  const Vec r = (kept - n * 0.693359375f) + n * 2.12194440e-4f;
  Vec poly = splat(8.3125028759e-3f);
  poly = poly * r + 4.1890334338e-2f;
  poly = poly * r + 1.6667115688e-1f;
  poly = poly * r + 4.9999231100e-1f;
  poly = poly * r * r + r + 1.0f;
#if MOMENTKV_LANES == 16
  return (Vec)_mm512_maskz_scalef_ps(_mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(-87.0f), _CMP_GT_OQ), (__m512)poly, (__m512)n);
#else
  return x > -87.0f ? poly * bits_as<Vec>((whole + 127) << 23) : Vec{};
#endif
}

// tanh(x), NaN for NaN. Relative error < 3e-7: an odd polynomial near 0, where the quotient of exponentials cancels.
inline Vec hyperbolic_tangent(Vec x) {
  const Vec size = absolute(x), square = x * x, decay = exp_negative(size * -2.0f);
  Vec poly = splat(-5.70498872745e-3f);
  poly = poly * square + 2.06390887954e-2f;
  poly = poly * square - 5.37397155531e-2f;
  poly = poly * square + 1.33314422036e-1f;
  poly = poly * square - 3.33332819422e-1f;
  poly = poly * square * x + x;
  const Vec far = (1.0f - decay) / (1.0f + decay), signed_far = x < 0.0f ? -far : far;
  return size >= 0.625f ? signed_far : poly;
}
