// What the keys of a quantised store are quantised less: momentkv_vllm/key_centres.py. Included once per instruction set, after
// cache.h.

constexpr int kTileTokens = 8, kGroup = 32;

// Of a row and head, [head_dim] each: of keys in the store's first tile, and of all others. Null: keys have none.
struct Centres {
  float *first = nullptr, *others = nullptr;

  Centres() = default;
  Centres(float* of_first, float* of_others) : first(of_first), others(of_others) {}
  // Those that a record holds.
  Centres(const PackedLayout& p, const RecordView& record) {
    if (p.centres < 0) return;
    first = record.floats(p.centres);
    others = record.floats(p.centres + record.cache.head_dim * int64_t(sizeof(float)));
  }
  explicit operator bool() const { return others != nullptr; }
  const float* of_slot(int64_t slot) const { return slot < kTileTokens ? first : others; }
};

inline RecordView record_of(const Attend& a, const AttendItem& item) {
  return {a.cache, a.record_layout, a.moment_pages + item.row * a.num_moment_pages, item.head};
}

inline float dot(const float* a, const float* b, int64_t size, int64_t stride = 1) {
  float total = 0;
  for (int64_t i = 0; i < size; ++i) total += a[i * stride] * b[i];
  return total;
}
