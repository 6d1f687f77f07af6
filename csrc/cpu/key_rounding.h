// Keys whose errors go where queries do not look: momentkv_vllm/key_rounding.py. Included once per instruction set, after
// packed_tokens.h.

// Keys of one head that wait for each other, one in every lane: what an error adds to the numbers before it is added for all at
// once. As `fed_back` there, bit by bit: products are exact, so it does not matter which of them the compiler fuses with sums.
class FedBackKeys {
 public:
  // feedback: [width, width].
  FedBackKeys(const PackedLayout& packed, const float* feedback) : p(packed), feedback_(feedback) {
    std::fill_n(&key_[0][0], p.width * kLanes, 0.0f);
  }

  // key: [width], rotated. Written by `write` at the latest.
  template <int Bits>
  void add(const float* key, uint8_t* tile, int token) {
    for (int64_t g = 0; g < p.width / kGroup; ++g) {
      const Scale scale = scale_of<Bits>(key + g * kGroup, kGroup);
      wide_[g][waiting_] = scale.wide;
      inverse_[g][waiting_] = scale.inverse;
      std::memcpy(scale_at(p, tile, g, token), &scale.bits, 2);
    }
    for (int64_t j = 0; j < p.width; ++j) key_[j][waiting_] = key[j];
    places_[waiting_] = {tile, token};
    if (++waiting_ == kLanes) write<Bits>();
  }

  template <int Bits>
  void write() {
    if (waiting_ == 0) return;
    std::copy_n(&key_[0][0], p.width * kLanes, &left_[0][0]);
    for (int64_t j = p.width - 1; j >= 0; --j) round<Bits>(j);
    for (int n = 0; n < waiting_; ++n) put<Bits>(n);
    waiting_ = 0;
  }

 private:
  // Number j of all keys.
  template <int Bits>
  void round(int64_t j) {
    const Vec wide = load(wide_[j / kGroup]);
    const IntVec code = codes_of<Bits>(load(left_[j]), load(inverse_[j / kGroup]));
    store_bytes(codes_[j], code);
    const Vec error = (to_floats(code - Code<Bits>::kOffset) + 0.5f) * wide - load(key_[j]);
    const Vec shortened = bits_as<Vec>(bits_as<IntVec>(error) & ~0xff & (error - error == 0.0f));
    const float* row = feedback_ + j * p.width;
    for (int64_t before = 0; before < j; ++before) store(left_[before], load(left_[before]) - row[before] * shortened);
  }

  template <int Bits>
  void put(int n) {
    constexpr int kHalf = kGroup / 2;
    uint8_t bytes[kMaxHeadDim];
    for (int64_t j = 0; j < p.code_bytes; ++j) {
      const int64_t low = j / kHalf * kGroup + j % kHalf;  // int4: of two numbers in a byte
      bytes[j] = Bits == 8 ? codes_[j][n] : uint8_t(codes_[low][n] | codes_[low + kHalf][n] << 4);
    }
    write_key_bytes(p, bytes, places_[n].tile, places_[n].token);
  }

  struct Place {
    uint8_t* tile;
    int token;
  };
  const PackedLayout& p;
  const float* feedback_;
  int waiting_ = 0;
  Place places_[kLanes];
  float wide_[kMaxHeadDim / kGroup][kLanes] = {}, inverse_[kMaxHeadDim / kGroup][kLanes] = {};
  float key_[kMaxHeadDim][kLanes], left_[kMaxHeadDim][kLanes];
  uint8_t codes_[kMaxHeadDim][kLanes];
};
