// An item of attend, on matrix units where there are some and they fit. Included once per instruction set, after attend.h.

// Query rows of an item of a chunk, at most.
int most_rows(const Attend& a) {
#ifdef MOMENTKV_AMX
  if (fits_units(a)) return kItemRows;
#endif
  return kRowsPerItem;
}

size_t attend_scratch(const Attend& a) {
#ifdef MOMENTKV_AMX
  if (fits_units(a)) return UnitRoom::floats(a.cache.head_dim);
#endif
  const int64_t step = a.cache.head_dim > kTileSlots ? a.cache.head_dim : kTileSlots;
  return 8 * (2 * a.cache.head_dim + step);
}

void attend(const Attend& a, const AttendItem& item, float* scratch) {
#ifdef MOMENTKV_AMX
  if (fits_units(a) && a.num_queries[item.row] > 1) return attend_units(a, item, scratch);
#endif
  const int rows = item.num_queries * int(a.query_heads / a.cache.heads);
  with_cache_type(a.cache.type, [&](auto t) {
    using T = decltype(t);
    int row = 0;
    for (; row + 8 <= rows; row += 8) attend_rows<8, T>(a, item, row, scratch);
    if (row + 4 <= rows) attend_rows<4, T>(a, item, row, scratch), row += 4;
    if (row + 2 <= rows) attend_rows<2, T>(a, item, row, scratch), row += 2;
    if (row < rows) attend_rows<1, T>(a, item, row, scratch);
  });
}
