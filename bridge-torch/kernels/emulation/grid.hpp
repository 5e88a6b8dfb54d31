// A grid of thread blocks on one CPU thread: who runs next, barriers, shared memory.
//
// Blocks run one after the other. Within a block every CUDA thread is a fiber that runs until it waits for its warp or its
// block. A warp runs as far as it can before another one gets its turn, in one of three orders: a read that lacks a barrier
// therefore comes before the write in one order and behind it in the other, and shared memory starts out as NaN.
// A wait that can never end (a barrier that some thread does not reach) stops the program and says who waits where.
#pragma once

#include <algorithm>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <numeric>
#include <random>
#include <vector>

#include "fiber.hpp"

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

namespace emulation {

inline constexpr int kWarp = 32;
// What a block may have on the smallest architecture that we build for (sm_80).
inline constexpr size_t kMaxStaticShared = size_t{48} << 10;
inline constexpr size_t kMaxShared = size_t{163} << 10;
inline constexpr unsigned char kPoison = 0xFF;  // NaN in every float format, -1 in every integer

enum class Schedule { kAscending, kDescending, kShuffled };

[[noreturn]] inline void fail(const char* format, ...) {
  std::va_list arguments;
  va_start(arguments, format);
  std::fprintf(stderr, "emulation: ");
  std::vfprintf(stderr, format, arguments);
  std::fprintf(stderr, "\n");
  va_end(arguments);
  std::exit(1);
}

enum class State { kReady, kAtBarrier, kAtWarp, kDone };

// A copy that cp.async has started and no wait has finished.
struct PendingCopy {
  void* to;
  const void* from;
  size_t source_bytes, bytes;
  int group;
};

struct Thread {
  Fiber fiber;
  dim3 index;
  int linear = 0;
  State state = State::kReady;
  const char* where = "";
  int line = 0;
  unsigned exchanges = 0;  // how many warp exchanges this thread has taken part in
  int copy_group = 0;
  std::vector<PendingCopy> copies;
};

// Two boxes in turn: a lane that is one exchange ahead does not write over what the others still read.
struct Warp {
  uint64_t box[2][kWarp][4];
};

struct SharedArray {
  const void* key;
  size_t offset;
};

struct Grid {
  Schedule schedule = Schedule::kAscending;
  std::mt19937 random{1};
  dim3 grid, block, block_index;
  int num_threads = 0;
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  std::vector<SharedArray> arrays;
  std::vector<unsigned char> shared = std::vector<unsigned char>(kMaxShared + 64 + 4096);
  size_t static_bytes = 0, dynamic_bytes = 0;
  std::function<void()> body;
  Thread* current = nullptr;

  unsigned char* shared_base() {
    uintptr_t base = reinterpret_cast<uintptr_t>(shared.data());
    return reinterpret_cast<unsigned char*>((base + 63) & ~uintptr_t{63});
  }
};

inline Grid& grid() {
  static Grid state;
  return state;
}

inline void set_schedule(Schedule schedule, unsigned seed = 1) {
  grid().schedule = schedule;
  grid().random.seed(seed);
}

inline void wait(State state, const char* where, int line) {
  Thread& self = *grid().current;
  self.state = state;
  self.where = where;
  self.line = line;
  self.fiber.leave();
}

inline void thread_entry() {
  grid().body();
  grid().current->state = State::kDone;
  grid().current->fiber.leave();
  fail("a finished thread was run again");
}

// Releases the threads [first, last) if all of them wait in `state`, and refuses a wait at two places.
inline void release_if_complete(int first, int last, State state) {
  Grid& g = grid();
  for (int i = first; i < last; ++i) {
    if (g.threads[i].state != state) {
      return;
    }
  }
  for (int i = first; i < last; ++i) {
    Thread &a = g.threads[first], &b = g.threads[i];
    if (a.line != b.line || std::strcmp(a.where, b.where) != 0) {
      fail("threads %d and %d wait at different places: %s:%d and %s:%d", first, i, a.where, a.line, b.where, b.line);
    }
    b.state = State::kReady;
  }
}

inline std::vector<int> order_of(int count) {
  Grid& g = grid();
  std::vector<int> order(static_cast<size_t>(count));
  std::iota(order.begin(), order.end(), 0);
  if (g.schedule == Schedule::kDescending) {
    std::reverse(order.begin(), order.end());
  } else if (g.schedule == Schedule::kShuffled) {
    std::shuffle(order.begin(), order.end(), g.random);
  }
  return order;
}

inline bool run_warp(int warp, const std::vector<int>& lanes) {
  Grid& g = grid();
  bool moved = false;
  const int first = warp * kWarp;
  for (;;) {
    bool again = false;
    for (int lane : lanes) {
      Thread& thread = g.threads[static_cast<size_t>(first + lane)];
      if (thread.state == State::kReady) {
        g.current = &thread;
        thread.fiber.enter();
        again = moved = true;
      }
    }
    release_if_complete(first, first + kWarp, State::kAtWarp);
    if (!again) {
      return moved;
    }
    // In the shuffled order a warp is also interrupted between two waits of its own.
    if (g.schedule == Schedule::kShuffled && (g.random() & 3) == 0) {
      return true;
    }
  }
}

inline void run_block() {
  Grid& g = grid();
  const int n = g.num_threads;
  std::memset(g.shared_base(), kPoison, g.dynamic_bytes + g.static_bytes + 4096);
  g.arrays.clear();
  g.static_bytes = 0;
  for (int i = 0; i < n; ++i) {
    Thread& thread = g.threads[static_cast<size_t>(i)];
    thread.linear = i;
    const auto x = static_cast<unsigned>(i);
    thread.index = dim3(x % g.block.x, x / g.block.x % g.block.y, x / g.block.x / g.block.y);
    thread.state = State::kReady;
    thread.exchanges = 0;
    thread.copy_group = 0;
    thread.copies.clear();
    thread.fiber.reset(thread_entry);
  }
  const int num_warps = n / kWarp;
  int done = 0;
  while (done < n) {
    bool moved = false;
    for (int warp : order_of(num_warps)) {
      moved = run_warp(warp, order_of(kWarp)) || moved;
    }
    release_if_complete(0, n, State::kAtBarrier);
    done = 0;
    bool ready = false;
    for (int i = 0; i < n; ++i) {
      done += g.threads[static_cast<size_t>(i)].state == State::kDone;
      ready = ready || g.threads[static_cast<size_t>(i)].state == State::kReady;
    }
    if (!moved && !ready && done < n) {
      for (int i = 0; i < n; ++i) {
        const Thread& t = g.threads[static_cast<size_t>(i)];
        if (t.state != State::kDone && (i % kWarp == 0 || t.line != g.threads[static_cast<size_t>(i - 1)].line)) {
          std::fprintf(stderr, "  from thread %d: waits for its %s at %s:%d\n", i,
                       t.state == State::kAtWarp ? "warp" : "block", t.where, t.line);
        }
      }
      fail("block (%u, %u, %u): %d of %d threads have left, the others wait for ever", g.block_index.x,
           g.block_index.y, g.block_index.z, done, n);
    }
  }
  for (int i = 0; i < n; ++i) {
    if (!g.threads[static_cast<size_t>(i)].copies.empty()) {
      fail("thread %d leaves with cp.async copies that it never waited for", i);
    }
  }
  // Behind the arrays nothing was allocated, so nothing may have been written.
  const unsigned char* end = g.shared_base() + g.dynamic_bytes + g.static_bytes;
  for (size_t i = 0; i < 1024; ++i) {
    if (end[i] != kPoison) {
      fail("shared memory was written %zu bytes behind its end (%zu bytes)", i, g.dynamic_bytes + g.static_bytes);
    }
  }
}

inline void run(dim3 blocks, dim3 block, size_t dynamic_shared, std::function<void()> body) {
  Grid& g = grid();
  const int n = static_cast<int>(block.x * block.y * block.z);
  if (n % kWarp != 0 || n > 1024) {
    fail("a block of %d threads: use whole warps, at most 1024 threads", n);
  }
  if (blocks.y > 65535 || blocks.z > 65535 || blocks.x > 0x7FFFFFFFu) {
    fail("a grid of (%u, %u, %u) blocks is larger than CUDA allows", blocks.x, blocks.y, blocks.z);
  }
  if (dynamic_shared > kMaxShared) {
    fail("%zu bytes of dynamic shared memory, at most %zu", dynamic_shared, kMaxShared);
  }
  g.grid = blocks;
  g.block = block;
  g.num_threads = n;
  g.dynamic_bytes = (dynamic_shared + 63) & ~size_t{63};
  g.static_bytes = 0;
  g.body = std::move(body);
  if (g.threads.size() < static_cast<size_t>(n)) {
    g.threads = std::vector<Thread>(static_cast<size_t>(n));
    g.warps = std::vector<Warp>(static_cast<size_t>(n / kWarp));
  }
  const unsigned count = blocks.x * blocks.y * blocks.z;
  for (int linear : order_of(static_cast<int>(count))) {
    const auto i = static_cast<unsigned>(linear);
    g.block_index = dim3(i % blocks.x, i / blocks.x % blocks.y, i / blocks.x / blocks.y);
    run_block();
  }
  g.current = nullptr;
}

// The array that belongs to `key` in this block; the first thread that asks makes it.
inline void* shared_array(const void* key, size_t bytes, size_t alignment) {
  Grid& g = grid();
  for (const auto& array : g.arrays) {
    if (array.key == key) {
      return g.shared_base() + array.offset;
    }
  }
  size_t offset = g.dynamic_bytes + g.static_bytes;
  offset = (offset + alignment - 1) / alignment * alignment;
  g.static_bytes = offset + bytes - g.dynamic_bytes;
  if (g.static_bytes > kMaxStaticShared || g.dynamic_bytes + g.static_bytes > kMaxShared) {
    fail("%zu bytes of static and %zu of dynamic shared memory are too many", g.static_bytes, g.dynamic_bytes);
  }
  std::memset(g.shared_base() + offset, kPoison, bytes + 4096 > kMaxShared - offset ? kMaxShared - offset : bytes + 4096);
  g.arrays.push_back({key, offset});
  return g.shared_base() + offset;
}

inline void arrive(const PendingCopy& copy) {
  std::memset(copy.to, 0, copy.bytes);
  std::memcpy(copy.to, copy.from, copy.source_bytes);
}

// An asynchronous copy may land at once or at the wait: one order tries this, one that, the third mixes them.
inline bool copies_arrive_early() {
  Grid& g = grid();
  return g.schedule == Schedule::kDescending || (g.schedule == Schedule::kShuffled && (g.random() & 1) != 0);
}

inline void* dynamic_shared() { return grid().shared_base(); }

}  // namespace emulation
