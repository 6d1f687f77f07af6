// One split of attention over pages: a block's warps take every kWarps-th tile of slots, each with an online softmax and a
// pipeline of its own, so that they meet only at the end.
#pragma once

#include "units.cuh"

namespace momentkv::cuda {

constexpr int kWarps = 4;
constexpr int kAttendThreads = kWarps * kLanes;

// Shared memory: the query tile, then each warp's stages of a key and a value tile; at the end the warps' sums.
template <class T, int D>
struct AttendShared {
  static constexpr int kTile = kTileSlots * D;  // numbers of a tile of keys, or of values, or of queries
  // 8 KB a stage and warp at D = 128; 64 to 136 KB a block, which an A100 (163 KB) has. Not tuned on a GPU yet.
  static constexpr int kStages = D == 64 ? 4 : D == 128 ? 3 : 2;
  static constexpr size_t kBytes = sizeof(T) * kTile * (1 + kWarps * kStages * 2);
  static_assert(sizeof(T) * kStages * 2 * kTile >= sizeof(float) * (kTile + 2 * kTileRows), "the sums fit into the stages");

  T* queries;
  T* stages;

  __device__ AttendShared() : queries(reinterpret_cast<T*>(shared_memory())), stages(queries + kTile) {}
  __device__ T* keys(int warp, int stage) const { return stages + (warp * kStages + stage) * 2 * kTile; }
  __device__ T* values(int warp, int stage) const { return keys(warp, stage) + kTile; }
  __device__ float* out(int warp) const { return reinterpret_cast<float*>(stages) + warp * kTile; }
  __device__ float* top(int warp) const { return out(kWarps) + warp * 2 * kTileRows; }
  __device__ float* mass(int warp) const { return top(warp) + kTileRows; }
};

// Rows beyond the tile's are zero.
template <class T, int D>
__device__ inline void load_queries(const Attend& a, const Unit& u, T* tile) {
  for (int i = threadIdx.x; i < kTileRows * D / 8; i += kAttendThreads) {
    const int r = i / (D / 8), chunk = i % (D / 8), real = r < u.query_rows ? r : 0;
    const T* from = reinterpret_cast<const T*>(a.query) + u.token_of(a, real) * a.query_stride +
                    int64_t(u.head_of(real)) * D + chunk * 8;
    copy_async(chunk_of<T, D>(tile, r, chunk), from, r < u.query_rows);
  }
  commit_copies();
  wait_copies<0>();
  sync_block();
}

// The A operand of 16 rows and 16 dimensions from 16 * step.
template <class T, int D>
__device__ inline void load_query_step(T* tile, int step, uint32_t (&a)[4]) {
  const int lane = threadIdx.x % kLanes;
  load_matrices<false>(a, chunk_of<T, D>(tile, lane % 16, 2 * step + lane / 16));
}

// A warp's tiles of the split, in order: number i is slot tile first_tile + warp + i * kWarps.
template <class T, int D>
struct TileReader {
  const Queries& work;
  const Unit& unit;
  const AttendShared<T, D>& shared;
  int warp, count, end;  // tiles of this warp; slots that the split's last query sees
  int64_t page_ids = 0;  // lane l: the page of tile i with i % 32 == l

  __device__ TileReader(const Queries& q, const Unit& u, const AttendShared<T, D>& s)
      : work(q), unit(u), shared(s), warp(threadIdx.x / kLanes) {
    count = (u.tiles - warp + kWarps - 1) / kWarps;
    end = int(u.last_slot) + 1 + u.query_of(u.query_rows - 1);
  }
  __device__ int first_slot(int i) const { return (unit.first_tile + warp + i * kWarps) * kTileSlots; }

  // Starts the copies of tile i; slots that no query sees become zeros, they may hold NaN. Called with i = 0, 1, 2 ...
  __device__ void fetch(int i) {
    const int lane = threadIdx.x % kLanes, page_size = work.cache.page_size;
    if (i < count) {
      if (i % kLanes == 0 && i + lane < count)
        page_ids = work.pages[int64_t(unit.row) * work.max_pages + first_slot(i + lane) / page_size];
      const int64_t page = shuffle(page_ids, i % kLanes);
      const int first = first_slot(i), stage = i % AttendShared<T, D>::kStages;
      const int64_t base = page * work.cache.page_stride + unit.head * work.cache.head_stride;
      for (int j = lane; j < kTileSlots * D / 8; j += kLanes) {
        const int s = j / (D / 8), chunk = j % (D / 8);
        const int64_t from = base + (first % page_size + s) * work.cache.slot_stride + chunk * 8;
        const bool real = first + s < end;
        copy_async(chunk_of<T, D>(shared.keys(warp, stage), s, chunk), reinterpret_cast<const T*>(work.cache.keys) + from, real);
        copy_async(chunk_of<T, D>(shared.values(warp, stage), s, chunk), reinterpret_cast<const T*>(work.cache.values) + from,
                   real);
      }
    }
    commit_copies();
  }
};

// Running softmax of a warp: lane 4 g + t has rows g and g + 8 (index 0 and 1), and of every 8 dimensions 2 t and 2 t + 1.
template <int D>
struct Running {
  float out[D / 8][4] = {};
  float top[2] = {-INFINITY, -INFINITY};  // in units of log 2
  float mass[2] = {};                     // of this lane's slots
};

// logits[j] = 16 rows times slots 8 j .. 8 j + 7 of the tile.
template <class T, int D>
__device__ inline void dot_keys(T* queries, T* keys, float (&logits)[2][4]) {
  const int lane = threadIdx.x % kLanes;
  for (int j = 0; j < 2; ++j)
    for (int e = 0; e < 4; ++e) logits[j][e] = 0;
#pragma unroll
  for (int step = 0; step < D / 16; ++step) {
    uint32_t q[4], k[4];
    load_query_step<T, D>(queries, step, q);
    load_matrices<false>(k, chunk_of<T, D>(keys, lane % 8 + lane / 16 * 8, 2 * step + lane / 8 % 2));
    mma<T>(logits[0], q, k[0], k[1]);
    mma<T>(logits[1], q, k[2], k[3]);
  }
}

// Turns logits into weights; earlier sums are scaled to the new top. `sees`: slots of this tile that rows g and g + 8 see.
template <int D>
__device__ inline void soften(float (&logits)[2][4], float scale_log2, const int (&sees)[2], Running<D>& run) {
  const int t = threadIdx.x % 4;
  float keep[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float top = run.top[r];
#pragma unroll
    for (int j = 0; j < 2; ++j)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        float& x = logits[j][2 * r + e];
        x = 8 * j + 2 * t + e < sees[r] ? x * scale_log2 : -INFINITY;
        top = x > top ? x : top;
      }
    for (int mask = 1; mask <= 2; mask *= 2) {
      const float other = shuffle_xor(top, mask);
      top = other > top ? other : top;
    }
    const float base = top == -INFINITY ? 0.0f : top;  // nothing seen yet: every weight is 0
    keep[r] = exp2f(run.top[r] - base);
    run.top[r] = top;
    run.mass[r] *= keep[r];
#pragma unroll
    for (int j = 0; j < 2; ++j)
#pragma unroll
      for (int e = 0; e < 2; ++e) run.mass[r] += logits[j][2 * r + e] = exp2f(logits[j][2 * r + e] - base);
  }
#pragma unroll
  for (int n = 0; n < D / 8; ++n)
#pragma unroll
    for (int e = 0; e < 4; ++e) run.out[n][e] *= keep[e / 2];
}

template <class T, int D>
__device__ inline void add_values(const float (&weights)[2][4], T* values, Running<D>& run) {
  const int lane = threadIdx.x % kLanes;
  uint32_t w[4];
  for (int j = 0; j < 2; ++j)
    for (int r = 0; r < 2; ++r) w[2 * j + r] = pack<T>(weights[j][2 * r], weights[j][2 * r + 1]);
#pragma unroll
  for (int n = 0; n < D / 8; n += 2) {
    uint32_t v[4];
    load_matrices<true>(v, chunk_of<T, D>(values, lane % 16, n + lane / 16));
    mma<T>(run.out[n], w, v[0], v[1]);
    mma<T>(run.out[n + 1], w, v[2], v[3]);
  }
}

// The block's partial from its warps' sums.
template <class T, int D>
__device__ inline void combine_warps(const Attend& a, const Unit& u, const AttendShared<T, D>& s, const Running<D>& run) {
  const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes, g = lane / 4, t = lane % 4;
  wait_copies<0>();
  sync_block();  // the sums lie where the stages were
  for (int r = 0; r < 2; ++r) {
    float mass = run.mass[r] + shuffle_xor(run.mass[r], 1);
    mass += shuffle_xor(mass, 2);
    if (t == 0) s.top(warp)[g + 8 * r] = run.top[r], s.mass(warp)[g + 8 * r] = mass;
#pragma unroll
    for (int n = 0; n < D / 8; ++n)
      for (int e = 0; e < 2; ++e) s.out(warp)[(g + 8 * r) * D + 8 * n + 2 * t + e] = run.out[n][2 * r + e];
  }
  sync_block();
  for (int i = threadIdx.x; i < u.query_rows * D; i += kAttendThreads) {
    const int r = i / D;
    float top = -INFINITY, mass = 0, out = 0;
    for (int w = 0; w < kWarps; ++w) top = s.top(w)[r] > top ? s.top(w)[r] : top;
    for (int w = 0; w < kWarps; ++w) {
      const float weight = exp2f(s.top(w)[r] - top);
      mass += s.mass(w)[r] * weight;
      out += s.out(w)[i] * weight;
    }
    const size_t to = partial_row(a, u.row, u.head, blockIdx.x, r);
    a.partial_out[to * D + i % D] = out / mass;
    if (i % D == 0) a.partial_lse[to] = top / kLog2e + logf(mass);
  }
}

template <class T, int D>
__device__ inline void attend_slots(const Attend& a, const Unit& u, const AttendShared<T, D>& s) {
  constexpr int kStages = AttendShared<T, D>::kStages;
  const int g = threadIdx.x % kLanes / 4;
  TileReader<T, D> reader(a, u, s);
  Running<D> run;
  // Rows beyond the tile's are zeros and see what the last one sees.
  int sees[2];
  for (int r = 0; r < 2; ++r) sees[r] = int(u.last_slot) + 1 + u.query_of(g + 8 * r < u.query_rows ? g + 8 * r : u.query_rows - 1);
  for (int i = 0; i < kStages - 1; ++i) reader.fetch(i);
  for (int i = 0; i < reader.count; ++i) {
    wait_copies<kStages - 2>();
    sync_warp();  // tile i is here, and no lane still reads the stage of tile i - 1, which is filled next
    reader.fetch(i + kStages - 1);
    const int first = reader.first_slot(i), stage = i % kStages;
    const int sees_here[2] = {sees[0] - first, sees[1] - first};
    float logits[2][4];
    dot_keys<T, D>(s.queries, s.keys(reader.warp, stage), logits);
    soften(logits, a.scale * kLog2e, sees_here, run);
    add_values<T, D>(logits, s.values(reader.warp, stage), run);
  }
  combine_warps<T, D>(a, u, s, run);
}

}  // namespace momentkv::cuda
