// Runs CUDA blocks on the CPU, for tests on machines without a GPU: every thread of a block is a fiber, blocks run one after
// the other. A fiber runs until it waits, so a missing barrier shows as wrong numbers in one of the two orders
// (MOMENTKV_EMULATE_REVERSE=1 starts with the last thread); shared memory starts as NaN; asynchronous copies happen only when
// they are waited for; lanes that disagree on a warp operation, and barriers that not all reach, are errors.
#pragma once

#include <ucontext.h>

#include <csetjmp>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

struct EmulatedIndex {
  unsigned x = 0, y = 0, z = 0;
};
inline EmulatedIndex threadIdx, blockIdx, blockDim, gridDim;

namespace momentkv::emulate {

constexpr int kLanes = 32;
constexpr size_t kStackBytes = 256 << 10;

struct Barrier {
  int members = 0, arrived = 0, generation = 0;
  bool complete() {
    if (arrived != members) return false;
    arrived = 0;
    ++generation;
    return true;
  }
};

struct Copy {
  void* to;
  const void* from;
};

struct Thread {
  std::jmp_buf state;
  ucontext_t start = {};
  std::unique_ptr<char[]> stack;
  bool started = false, done = false;
  const Barrier* waits_for = nullptr;
  int generation = 0, warp_operations = 0;
  std::vector<std::vector<Copy>> copies{1};  // committed groups, then the open one
};

// What a lane brings to a warp operation.
struct Slot {
  const char* operation;
  alignas(16) char data[48];
};

struct Warp {
  Barrier barrier;
  Slot slots[2][kLanes];  // of alternate operations: a fast lane may be one ahead
};

struct Machine {
  std::vector<std::unique_ptr<Thread>> threads;
  std::vector<Warp> warps;
  Barrier block;
  std::vector<char> shared;
  std::function<void()> kernel;
  std::jmp_buf scheduler;
  Thread* self = nullptr;
  std::string error;
};
inline Machine machine;

inline void yield() {
  if (_setjmp(machine.self->state) == 0) _longjmp(machine.scheduler, 1);
}

[[noreturn]] inline void fail(const std::string& why) {
  machine.error = "emulated CUDA, block (" + std::to_string(blockIdx.x) + ", " + std::to_string(blockIdx.y) + ", " +
                  std::to_string(blockIdx.z) + "), thread " + std::to_string(threadIdx.x) + ": " + why;
  _longjmp(machine.scheduler, 1);
}

inline void wait(Barrier& barrier) {
  ++barrier.arrived;
  if (barrier.complete()) return;
  machine.self->waits_for = &barrier;
  machine.self->generation = barrier.generation;
  yield();
}

// Waits for the other lanes; returns what all 32 brought.
template <class T>
const Slot* exchange(const char* operation, const T& mine) {
  static_assert(sizeof(T) <= sizeof(Slot::data));
  Warp& warp = machine.warps[threadIdx.x / kLanes];
  Slot* slots = warp.slots[machine.self->warp_operations++ % 2];
  slots[threadIdx.x % kLanes].operation = operation;
  std::memcpy(slots[threadIdx.x % kLanes].data, &mine, sizeof mine);
  wait(warp.barrier);
  for (int lane = 0; lane < kLanes; ++lane)
    if (slots[lane].operation != operation)
      fail(std::string("lanes disagree: ") + operation + " and " + slots[lane].operation);
  return slots;
}

template <class T>
T brought(const Slot* slots, int lane) {
  T x;
  std::memcpy(&x, slots[lane].data, sizeof x);
  return x;
}

// Does all but the newest `left` groups of asynchronous copies.
inline void finish_copies(int left) {
  auto& copies = machine.self->copies;
  while (int(copies.size()) - 1 > left) {
    for (const Copy& c : copies.front())
      c.from == nullptr ? std::memset(c.to, 0, 16) : std::memcpy(c.to, c.from, 16);
    copies.erase(copies.begin());
  }
}

inline void thread_main() {
  for (;;) {
    machine.kernel();
    machine.self->done = true;
    --machine.block.members;
    machine.block.complete();
    yield();
  }
}

inline void make_fibers(size_t count) {
  while (machine.threads.size() < count) {
    auto thread = std::make_unique<Thread>();
    thread->stack.reset(new char[kStackBytes]);
    getcontext(&thread->start);
    thread->start.uc_stack.ss_sp = thread->stack.get();
    thread->start.uc_stack.ss_size = kStackBytes;
    makecontext(&thread->start, thread_main, 0);
    machine.threads.push_back(std::move(thread));
  }
}

inline void resume(Thread& thread) {
  machine.self = &thread;
  thread.waits_for = nullptr;
  if (_setjmp(machine.scheduler) != 0) return;
  if (thread.started) _longjmp(thread.state, 1);
  thread.started = true;
  setcontext(&thread.start);
}

inline bool runnable(const Thread& thread) {
  return !thread.done && (thread.waits_for == nullptr || thread.waits_for->generation != thread.generation);
}

inline void run_block(int count, bool reverse) {
  machine.block = Barrier{count};
  machine.warps.assign(count / kLanes, Warp{Barrier{kLanes}, {}});
  std::memset(machine.shared.data(), 0xff, machine.shared.size());
  for (int i = 0; i < count; ++i) {
    machine.threads[i]->done = false;
    machine.threads[i]->copies.assign(1, {});
    machine.threads[i]->waits_for = nullptr;
  }
  for (bool progress = true; progress;) {
    progress = false;
    for (int i = 0; i < count; ++i) {
      threadIdx.x = reverse ? count - 1 - i : i;
      Thread& thread = *machine.threads[threadIdx.x];
      if (!runnable(thread)) continue;
      progress = true;
      resume(thread);
      if (!machine.error.empty()) return;
    }
  }
  for (int i = 0; i < count; ++i)
    if (!machine.threads[i]->done) machine.error = "emulated CUDA: a barrier that not all threads reach";
}

// kernel<<<grid, threads, shared_bytes>>>(params). Throws std::runtime_error.
template <class Params>
void launch(void (*kernel)(Params), EmulatedIndex grid, int threads, size_t shared_bytes, const Params& params) {
  const bool reverse = std::getenv("MOMENTKV_EMULATE_REVERSE") != nullptr;
  make_fibers(threads);
  machine.shared.resize(shared_bytes);
  machine.kernel = [&] { kernel(params); };
  gridDim = grid;
  blockDim = {unsigned(threads), 1, 1};
  for (blockIdx.z = 0; blockIdx.z < grid.z; ++blockIdx.z)
    for (blockIdx.y = 0; blockIdx.y < grid.y; ++blockIdx.y)
      for (blockIdx.x = 0; blockIdx.x < grid.x; ++blockIdx.x) {
        run_block(threads, reverse);
        if (machine.error.empty()) continue;
        machine.threads.clear();  // their stacks are in the middle of something
        throw std::runtime_error(std::exchange(machine.error, {}));
      }
}

}  // namespace momentkv::emulate
