// Addresses inside a layer's cache. Included once per instruction set.

// A head's part of a page: keys [head_dim][page_size], then values [page_size][head_dim].
template <class T>
inline T* keys_of(const Cache& c, int64_t page, int64_t head) {
  return reinterpret_cast<T*>(c.data) + (page * c.heads + head) * c.page_size * 2 * c.head_dim;
}

template <class T>
inline T* values_of(const Cache& c, int64_t page, int64_t head) {
  return keys_of<T>(c, page, head) + c.page_size * c.head_dim;
}

// One head's moment record, spread over the head's parts of its pages. No field straddles a page (page_layout.py).
struct RecordView {
  const Cache& cache;
  const RecordLayout& layout;
  const int64_t* pages;
  int64_t head;

  char* at(int64_t offset) const {
    const int64_t part = cache.part_bytes();
    return cache.data + (pages[offset / part] * cache.heads + head) * part + offset % part;
  }
  float* floats(int64_t offset) const { return reinterpret_cast<float*>(at(offset)); }
  float* mean_key() const { return floats(layout.mean_key); }
  float* mean_value() const { return floats(layout.mean_value); }
  float* value_spread() const { return floats(layout.spread); }
  float* scales() const { return floats(layout.scales); }  // [head_dim] one per covariance row, int8 only
  // Row of the covariance for one key dimension, [head_dim] over the value dimensions.
  template <class C>
  C* covariance_row(int64_t key_dim) const {
    return reinterpret_cast<C*>(at(layout.covariance + key_dim * cache.head_dim * sizeof(C)));
  }
};

// Calls f(C{}) with the type of a record's covariance.
template <class F>
inline void with_covariance_type(Type type, F f) {
  if (type == Type::kInt8) return f(Int8{});
  if (type == Type::kBFloat16) return f(BFloat16{});
  f(float{});
}

// Calls f(T{}) with the C++ type of a model's numbers.
template <class F>
inline void with_type(Type type, F f) {
  if (type == Type::kBFloat16) return f(BFloat16{});
  if (type == Type::kFloat16) return f(Float16{});
  f(float{});
}

// Likewise of a cache's.
template <class F>
inline void with_cache_type(Type type, F f) {
  if (type == Type::kFp8E4m3) return f(Fp8E4m3{});
  if (type == Type::kFp8E5m2) return f(Fp8E5m2{});
  with_type(type, f);
}

// Likewise of what stands beside a cache of type T.
template <class T, class F>
inline void with_type_beside(Type type, F f) {
  if constexpr (kIsFp8<T>)
    with_type(type, f);
  else
    f(T{});
}

// What numbers of a cache are to be multiplied by, as loaded.
template <class T>
inline float key_unit(const Cache& c) { return kIsFp8<T> ? kUnit<T> * c.key_scale : 1; }
template <class T>
inline float value_unit(const Cache& c) { return kIsFp8<T> ? kUnit<T> * c.value_scale : 1; }
template <class T>
inline Vec load_value(const Cache& c, const T* from) {
  if constexpr (kIsFp8<T>) return load(from) * value_unit<T>(c);
  return load(from);
}
