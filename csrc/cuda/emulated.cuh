// The primitives of platform.cuh on the CPU; ptx.cuh says what each one does. Included by platform.cuh.

namespace momentkv::cuda {

inline float to_float(Float16 x) { return float(bits_as<_Float16>(x.bits)); }
template <class T>
inline T from_float(float x);
template <>
inline float from_float<float>(float x) { return x; }
template <>
inline Float16 from_float<Float16>(float x) { return {bits_as<uint16_t>(_Float16(x))}; }
template <>
inline BFloat16 from_float<BFloat16>(float x) {
  const uint32_t bits = bits_as<uint32_t>(x);
  if (x != x) return {uint16_t(bits >> 16 | 0x40)};
  return {uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};  // to nearest even
}
template <class T>
inline uint32_t pack(float low, float high) {
  return from_float<T>(low).bits | uint32_t(from_float<T>(high).bits) << 16;
}

inline char* shared_memory() { return emulate::machine.shared.data(); }
inline void sync_block() { emulate::wait(emulate::machine.block); }
inline void sync_warp() { emulate::exchange("sync_warp", 0); }
template <class T>
inline T shuffle(T x, int lane) { return emulate::brought<T>(emulate::exchange("shuffle", x), lane); }
template <class T>
inline T shuffle_xor(T x, int mask) { return shuffle(x, int(threadIdx.x % kLanes) ^ mask); }
template <class T>
inline T shuffle_up(T x, int distance) {
  const int lane = int(threadIdx.x % kLanes);
  return shuffle(x, lane < distance ? lane : lane - distance);
}
inline void atomic_add(int* at, int x) { *at += x; }

inline void copy_async(void* to, const void* from, bool real) {
  const char* begin = emulate::machine.shared.data();
  if (to < begin || static_cast<char*>(to) + 16 > begin + emulate::machine.shared.size() || uintptr_t(to) % 16 != 0)
    emulate::fail("copy_async does not write 16 aligned bytes of shared memory");
  emulate::machine.self->copies.back().push_back({to, real ? from : nullptr});
}
inline void commit_copies() { emulate::machine.self->copies.emplace_back(); }
template <int kLeft>
inline void wait_copies() { emulate::finish_copies(kLeft); }

template <bool kTransposed>
inline void load_matrices(uint32_t (&to)[4], const void* row) {
  const emulate::Slot* slots = emulate::exchange(kTransposed ? "load_matrices_t" : "load_matrices", row);
  const int lane = threadIdx.x % kLanes, g = lane / 4, t = lane % 4;
  for (int m = 0; m < 4; ++m) {
    auto at = [&](int r, int column) {
      return reinterpret_cast<const uint16_t*>(emulate::brought<const void*>(slots, m * 8 + r))[column];
    };
    to[m] = kTransposed ? at(2 * t, g) | uint32_t(at(2 * t + 1, g)) << 16 : at(g, 2 * t) | uint32_t(at(g, 2 * t + 1)) << 16;
  }
}

struct MmaOperands {
  uint32_t a[4], b[2];
};

template <class T>
inline void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  const emulate::Slot* slots = emulate::exchange("mma", MmaOperands{{a[0], a[1], a[2], a[3]}, {b0, b1}});
  const int lane = threadIdx.x % kLanes, g = lane / 4, t = lane % 4;
  auto half = [](uint32_t word, int k) { return to_float(T{uint16_t(word >> 16 * (k % 2))}); };
  for (int e = 0; e < 4; ++e)
    for (int k = 0; k < 16; ++k) {
      const int row = g + 8 * (e / 2), column = 2 * t + e % 2;
      const auto left = emulate::brought<MmaOperands>(slots, row % 8 * 4 + k % 8 / 2);
      const auto right = emulate::brought<MmaOperands>(slots, column * 4 + k % 8 / 2);
      c[e] += half(left.a[row / 8 + 2 * (k / 8)], k) * half(right.b[k / 8], k);
    }
}

inline float round_to_tf32(float x) { return bits_as<float>((bits_as<uint32_t>(x) + 0x1000) & ~0x1fffu); }

inline void mma_tf32(float (&c)[4], const float (&a)[4], float b0, float b1) {
  struct Operands {
    float a[4], b[2];
  };
  const emulate::Slot* slots = emulate::exchange("mma_tf32", Operands{{a[0], a[1], a[2], a[3]}, {b0, b1}});
  const int lane = threadIdx.x % kLanes, g = lane / 4, t = lane % 4;
  for (int e = 0; e < 4; ++e)
    for (int k = 0; k < 8; ++k) {
      const int row = g + 8 * (e / 2), column = 2 * t + e % 2;
      const auto left = emulate::brought<Operands>(slots, row % 8 * 4 + k % 4);
      const auto right = emulate::brought<Operands>(slots, column * 4 + k % 4);
      c[e] += round_to_tf32(left.a[row / 8 + 2 * (k / 4)]) * round_to_tf32(right.b[k / 4]);
    }
}

template <class Params>
const char* launch(void (*kernel)(Params), int x, int y, int z, int threads, size_t shared_bytes, const Params& params, void*) {
  emulate::launch(kernel, {unsigned(x), unsigned(y), unsigned(z)}, threads, shared_bytes, params);
  return nullptr;
}

}  // namespace momentkv::cuda
