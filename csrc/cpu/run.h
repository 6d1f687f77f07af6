// Params of kernels on torch's threads: an operation alone, or rounds of them. Included once, by bindings.cpp.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <memory>
#include <mutex>
#include <variant>
#include <vector>

#include "items.h"
#include "kernels.h"

namespace momentkv {
namespace {

// Floats that live as long as their thread, so that the decode path allocates nothing.
float* scratch(size_t floats) {
  thread_local std::vector<float> room;
  if (room.size() < floats) room.resize(floats);
  return room.data();
}

template <class F>
void in_parallel(int64_t items, F f) {
  at::parallel_for(0, items, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) f(i);
  });
}

// The same where items take unlike times: a thread takes the next one when it is free.
template <class F>
void in_turn(int64_t items, F f) {
  std::atomic<int64_t> next{0};
  at::parallel_for(0, std::min<int64_t>(at::get_num_threads(), items), 1, [&](int64_t, int64_t) {
    for (int64_t i; (i = next++) < items;) f(i);
  });
}

// Floats of what a row's head leaves to observe; with observe_from.
size_t left_floats(const Attend& a, int64_t row) { return a.counted_rows(row) * a.row_weights(); }

// All parts of a row and head here: what they leave is observed while it lies in a cache. left: floats that they have room to leave;
// 0: observe computes them again.
void attend_and_observe(const Attend& a, AttendItem* parts, size_t count, const std::vector<MergeItem>& merges, size_t left) {
  const Kernels& k = kernels();
  const bool observes = a.observed != nullptr;
  float* room = scratch(left + std::max(k.attend_scratch(a), observes ? k.observe_scratch(a) : 0));
  for (size_t i = 0; i < count; ++i) {
    parts[i].left = left > 0 ? room : nullptr;
    k.attend(a, parts[i], room + left);
  }
  for (const MergeItem& merge : merges) k.merge(a, merge);
  if (!observes) return;
  AttendItem whole = item_of(a, parts[0].row, parts[0].head);
  whole.left = parts[0].left;
  k.observe(a, whole, room + left);
}

void run(const Attend& a) {
  thread_local Items items;
  items.build(a, at::get_num_threads());
  const Kernels& k = kernels();
  // Not `items` in the lambda: another thread would see its own thread_local.
  AttendItem* parts = items.parts.data();
  const MergeItem* merges = items.merges.data();
  const AttendItem* in_parts = items.in_parts.data();
  in_turn(items.parts.size(), [&](int64_t i) {
    const bool whole = parts[i].partial == nullptr && parts[i].num_queries == a.num_queries[parts[i].row];
    if (whole && a.observed != nullptr) return attend_and_observe(a, parts + i, 1, {}, left_floats(a, parts[i].row));
    k.attend(a, parts[i], scratch(k.attend_scratch(a)));
  });
  in_parallel(items.merges.size(), [&](int64_t i) { k.merge(a, merges[i]); });
  if (a.observed == nullptr) return;
  in_parallel(items.in_parts.size(), [&](int64_t i) { k.observe(a, in_parts[i], scratch(k.observe_scratch(a))); });
}

// Whether a first event retires more than a head's own tiles hold.
bool fills_lent_tiles(const Consolidate& c) {
  if (c.lent_tiles() == 0 || (c.store_pages + c.retiring_pages) * c.cache.page_size <= c.store_tokens) return false;
  return std::find(c.stored, c.stored + c.rows, 0) != c.stored + c.rows;
}

void run(Consolidate& c) {
  const Kernels& k = kernels();
  const int64_t items = c.rows * c.cache.heads;
  at::Tensor lent;
  if (fills_lent_tiles(c)) {
    lent = at::empty({items, c.lent_bytes()}, at::kByte);
    c.lent = lent.data_ptr<uint8_t>();
  }
  in_parallel(items, [&](int64_t i) { k.consolidate(c, i, scratch(k.consolidate_scratch(c))); });
  if (c.lent != nullptr) in_parallel(items, [&](int64_t i) { k.move_lent(c, i); });
}

// All that `run` does for a row and head, here: the same bits.
void run_alone(const Attend& a, int64_t row, int64_t head) {
  constexpr size_t kMostLeft = size_t(1) << 23;  // floats; of more, observe computes them again
  thread_local Items items;
  items.build_alone(a, row, head);
  const size_t left = a.observed == nullptr ? 0 : left_floats(a, row);
  attend_and_observe(a, items.parts.data(), items.parts.size(), items.merges, left > kMostLeft ? 0 : left);
}

void run_alone(const Consolidate& c, int64_t row, int64_t head) {
  const Kernels& k = kernels();
  k.consolidate(c, row * c.cache.heads + head, scratch(k.consolidate_scratch(c)));
}

// Chains of steps, each in order. A thread takes a chain that is behind, does a few steps of it and gives it back: chains end
// together, whatever their number.
template <class F>
void in_chains(int64_t chains, int64_t steps, F f) {
  constexpr int64_t kTurns = 16;  // of a chain
  const int64_t turn = (steps + kTurns - 1) / kTurns;
  std::vector<int64_t> next(chains, 0);
  std::vector<char> taken(chains, 0);
  std::mutex mutex;
  at::parallel_for(0, std::min<int64_t>(at::get_num_threads(), chains), 1, [&](int64_t, int64_t) {
    for (;;) {
      int64_t chain = -1;
      {
        const std::lock_guard<std::mutex> lock(mutex);
        for (int64_t i = 0; i < chains; ++i)
          if (!taken[i] && next[i] < steps && (chain < 0 || next[i] < next[chain])) chain = i;
        if (chain < 0) return;  // whoever has the others ends them
        taken[chain] = 1;
      }
      const int64_t end = std::min(next[chain] + turn, steps);
      for (int64_t step = next[chain]; step < end; ++step) f(chain, step);
      const std::lock_guard<std::mutex> lock(mutex);
      next[chain] = end;
      taken[chain] = 0;
    }
  });
}

using Seconds = std::chrono::duration<double>;
using Clock = std::chrono::steady_clock;

// One operation of several rounds.
struct Step {
  std::variant<Attend, Consolidate> params;
  std::atomic<double>* seconds = nullptr;  // of an event
};

// With room for what attend leaves to observe where several threads serve a row's head, unless that is very much.
void run_in_room(Attend& a) {
  constexpr size_t kMostRoom = size_t(1) << 25;  // floats; MAX_LEFT of momentkv_vllm/kernels/cpu.py
  thread_local std::unique_ptr<float[]> room;  // what is not written takes no memory
  thread_local size_t size = 0;
  if (a.observed != nullptr && a.weights == nullptr) {
    for (int64_t row = 0; row < a.rows; ++row) a.left_rows = std::max(a.left_rows, a.counted_rows(row));
    const size_t floats = a.rows * a.cache.heads * a.left_rows * a.row_weights();
    if (floats > 0 && floats <= kMostRoom) {
      if (size < floats) room = std::make_unique_for_overwrite<float[]>(floats), size = floats;
      a.weights = room.get();
    }
  }
  run(a);
}
void run_in_room(Consolidate& c) { run(c); }

// Whether an event is the last one in which heads read tiles that they give up (equal_until, momentkv_vllm/head_budgets.py).
bool gives_up_tiles(const Consolidate& c) {
  if (c.packed.places == nullptr) return false;
  for (int64_t row = 0; row < c.rows; ++row) {
    const int64_t before = c.gone(row), after = before + c.exact_tokens(row);
    if (before <= c.packed.equal_tokens && after > c.packed.equal_tokens) return true;
  }
  return false;
}

// Where operations from `first` on end that heads may do without each other, who do not read each other's. They wait where tiles go
// from one to another: a first event that fills lent ones is by itself, and others get theirs when all have given up theirs.
size_t end_of_chains(const std::vector<Step>& steps, size_t first) {
  for (size_t i = first; i < steps.size(); ++i) {
    const auto* c = std::get_if<Consolidate>(&steps[i].params);
    if (c != nullptr && fills_lent_tiles(*c)) return i;
    if (c != nullptr && gives_up_tiles(*c)) return i + 1;
  }
  return steps.size();
}

// Whether the head with most to attend to is done before all threads together would be, or not much later: they lose about a third
// where they wait for each other at every operation.
bool heads_are_alike(const std::vector<Step>& steps, size_t first, size_t end, int64_t threads) {
  constexpr double kSlowest = 1.5;
  std::vector<double> pairs;
  for (size_t i = first; i < end; ++i)
    if (const auto* a = std::get_if<Attend>(&steps[i].params)) {
      pairs.resize(a->cache.heads, 0.0);
      for (int64_t row = 0; row < a->rows; ++row)
        for (int64_t head = 0; head < a->cache.heads; ++head) pairs[head] += double(Items::slots(*a, row, head) * a->num_queries[row]);
    }
  double total = 0, most = 0;
  for (const double n : pairs) total += n, most = std::max(most, n);
  return most * double(threads) <= kSlowest * total;
}

// Operations one after the other. Where heads are enough each goes its own way: no thread waits between operations, and a head's
// store stays in its thread's cache.
void run(std::vector<Step>& steps) {
  auto timed = [](Step& step, int64_t threads, auto f) {
    if (step.seconds == nullptr) return f();
    const auto start = Clock::now();
    f();
    step.seconds->fetch_add(Seconds(Clock::now() - start).count() / double(threads));
  };
  const int64_t threads = at::get_num_threads();
  for (size_t first = 0; first < steps.size();) {
    const size_t end = end_of_chains(steps, first);
    if (end <= first + 1 || !heads_are_alike(steps, first, end, threads)) {
      for (const size_t last = std::max(end, first + 1); first < last; ++first)
        timed(steps[first], 1, [&] { std::visit([](auto& p) { run_in_room(p); }, steps[first].params); });
      continue;
    }
    const int64_t heads = std::visit([](const auto& p) { return p.cache.heads; }, steps[first].params);
    in_chains(heads, end - first, [&](int64_t head, int64_t i) {
      timed(steps[first + i], threads, [&] {
        std::visit([&](const auto& p) { for (int64_t row = 0; row < p.rows; ++row) run_alone(p, row, head); }, steps[first + i].params);
      });
    });
    first = end;
  }
}

}  // namespace
}  // namespace momentkv
