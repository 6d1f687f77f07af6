// AMX: products of tiles of bfloat16, 16 rows of 32 numbers times 32 rows of 16 columns, summed in float32. Included by the
// instruction set that has them (isa_amx.cpp).
//
// The second factor comes in pairs of rows: 16 lines of 64 bytes, in each the numbers of two neighbouring rows side by side, column
// after column. A line of any tile has 64 bytes. Intrinsics of g++ 12 do not say that they read memory, so they are not used.

constexpr int kUnitRows = 16, kUnitDepth = 32, kUnitColumns = 16;  // of a tile: lines, products that are summed, columns
constexpr int kUnitBytes = 1024;

// Tiles hold nothing before and after: other libraries of the process use them as well. Denormal numbers are zero meanwhile: units
// take them for it, and vectors would need a hundred cycles for each.
class MatrixUnits {
 public:
  MatrixUnits() : control_(_mm_getcsr()) {
    constexpr unsigned kFlushed = 0x8040;
    _mm_setcsr(control_ | kFlushed);
    alignas(64) uint8_t config[64] = {1};
    for (int tile = 0; tile < 8; ++tile) config[16 + 2 * tile] = 64, config[48 + tile] = kUnitRows;
    asm volatile("ldtilecfg %0" ::"m"(config) : "memory");
  }
  ~MatrixUnits() {
    asm volatile("tilerelease" ::: "memory");
    _mm_setcsr(control_);
  }
  MatrixUnits(const MatrixUnits&) = delete;
  MatrixUnits& operator=(const MatrixUnits&) = delete;

 private:
  unsigned control_;
};

template <int Tile>
inline void tile_load(const void* from, int64_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(Tile) : "memory");
}
template <int Tile>
inline void tile_store(void* to, int64_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride), "i"(Tile) : "memory");
}
template <int Tile>
inline void tile_zero() {
  asm volatile("tilezero %%tmm%c0" ::"i"(Tile));
}
// sums += rows * columns.
template <int Sums, int Rows, int Columns>
inline void tile_multiply() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(Sums), "i"(Rows), "i"(Columns));
}

// sums[0 .. 16 * RowTiles)[0 .. 16 * ColumnTiles) (+)= rows * columns, `depth` / 32 tiles deep. Adds: to what is there.
// rows: lines of bfloat16, `row_stride` numbers apart. columns: tiles of one depth `column_stride` tiles apart, neighbouring ones next to each other. sums: lines of float32,
// `sum_stride` numbers apart.
template <int RowTiles, int ColumnTiles, bool Adds>
inline void multiply_block(const uint16_t* rows, int64_t row_stride, const uint8_t* columns, int64_t depth, int64_t column_stride,
                           float* sums, int64_t sum_stride) {
  static_assert(RowTiles <= 2 && ColumnTiles <= 2);
  float* lower = sums + kUnitRows * sum_stride;
  const int64_t bytes = sum_stride * int64_t(sizeof(float));
  auto each_sum = [&](auto f) {
    f(std::integral_constant<int, 0>{}, sums);
    if constexpr (ColumnTiles > 1) f(std::integral_constant<int, 1>{}, sums + kUnitColumns);
    if constexpr (RowTiles > 1) f(std::integral_constant<int, 2>{}, lower);
    if constexpr (RowTiles > 1 && ColumnTiles > 1) f(std::integral_constant<int, 3>{}, lower + kUnitColumns);
  };
  each_sum([&](auto tile, float* at) {
    if constexpr (Adds)
      tile_load<tile>(at, bytes);
    else
      tile_zero<tile>();
  });
  for (int64_t k = 0; k < depth; k += kUnitDepth, columns += column_stride * kUnitBytes) {
    tile_load<6>(columns, 64);
    if constexpr (ColumnTiles > 1) tile_load<7>(columns + kUnitBytes, 64);
    tile_load<4>(rows + k, row_stride * 2);
    tile_multiply<0, 4, 6>();
    if constexpr (ColumnTiles > 1) tile_multiply<1, 4, 7>();
    if constexpr (RowTiles > 1) {
      tile_load<5>(rows + k + kUnitRows * row_stride, row_stride * 2);
      tile_multiply<2, 5, 6>();
      if constexpr (ColumnTiles > 1) tile_multiply<3, 5, 7>();
    }
  }
  each_sum([&](auto tile, float* at) { tile_store<tile>(at, bytes); });
}

// The same of any number of tiles: rows [row_tiles * 16], columns [depth / 32][column_tiles].
template <bool Adds>
inline void multiply_tiles(int row_tiles, int column_tiles, const uint16_t* rows, int64_t row_stride, const uint8_t* columns,
                           int64_t depth, int64_t column_stride, float* sums, int64_t sum_stride) {
  for (int c = 0; c < column_tiles; c += 2)
    for (int r = 0; r < row_tiles; r += 2) {
      const uint16_t* from = rows + r * kUnitRows * row_stride;
      float* to = sums + r * kUnitRows * sum_stride + c * kUnitColumns;
      const bool tall = r + 1 < row_tiles, wide = c + 1 < column_tiles;
      const auto block = tall ? (wide ? multiply_block<2, 2, Adds> : multiply_block<2, 1, Adds>)
                              : (wide ? multiply_block<1, 2, Adds> : multiply_block<1, 1, Adds>);
      block(from, row_stride, columns + c * kUnitBytes, depth, column_stride, to, sum_stride);
    }
}

// Numbers of the lower and of the upper half, one of each after the other.
inline __m512i side_by_side(__m512i halves) {
  UnsignedWordVec order;
  for (int i = 0; i < 32; ++i) order[i] = uint16_t(i / 2 + i % 2 * 16);
  return _mm512_permutexvar_epi16((__m512i)order, halves);
}

// 16 numbers of each as bfloat16, a line of a tile: those of `even` and `odd` side by side.
inline void store_line(uint8_t* to, Vec even, Vec odd) {
  const __m512i line = side_by_side((__m512i)_mm512_cvtne2ps_pbh((__m512)odd, (__m512)even));
  __builtin_memcpy(to, &line, 64);
}

// The same of 16 numbers that are bfloat16.
inline void store_line(uint8_t* to, const BFloat16* even, const BFloat16* odd) {
  const __m512i halves = _mm512_inserti64x4(_mm512_castsi256_si512(load_raw<__m256i>(even)), load_raw<__m256i>(odd), 1);
  const __m512i line = side_by_side(halves);
  __builtin_memcpy(to, &line, 64);
}

// 32 numbers as bfloat16.
inline void store_bfloat16(uint16_t* to, Vec first, Vec second) {
  const __m512i v = (__m512i)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first);
  __builtin_memcpy(to, &v, 64);
}
