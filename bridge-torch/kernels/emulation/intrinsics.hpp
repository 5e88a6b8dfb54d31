// What kernels call by CUDA's own names: indices, barriers, shuffles, votes, arithmetic.
#pragma once

#include <cmath>
#include <cstring>

#include "grid.hpp"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

#define threadIdx (::emulation::grid().current->index)
#define blockIdx (::emulation::grid().block_index)
#define blockDim (::emulation::grid().block)
#define gridDim (::emulation::grid().grid)

#define __syncthreads() ::emulation::wait(::emulation::State::kAtBarrier, __FILE__, __LINE__)
#define __syncwarp() ::emulation::wait(::emulation::State::kAtWarp, __FILE__, __LINE__)

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1 };

namespace emulation {

// Every lane gives `words` and sees those of all lanes until its next exchange but one.
struct Exchange {
  uint64_t (*lanes)[4];
  int lane;
};

template <class T>
Exchange exchange(const T& mine, const char* where, int line) {
  static_assert(sizeof(T) <= 32, "an exchange carries 32 bytes a lane");
  Thread& self = *grid().current;
  Warp& warp = grid().warps[static_cast<size_t>(self.linear / kWarp)];
  const int lane = self.linear % kWarp;
  auto* box = warp.box[self.exchanges++ & 1];
  std::memcpy(box[lane], &mine, sizeof(T));
  wait(State::kAtWarp, where, line);
  return {box, lane};
}

template <class T>
T taken(const Exchange& all, int lane) {
  T value;
  std::memcpy(&value, all.lanes[lane], sizeof(T));
  return value;
}

inline void whole_warp(unsigned mask) {
  if (mask != 0xFFFFFFFFu) {
    fail("only shuffles of whole warps are emulated");
  }
}

template <class T>
T shuffle(unsigned mask, T value, int source, const char* where, int line) {
  whole_warp(mask);
  const Exchange all = exchange(value, where, line);
  return taken<T>(all, source >= 0 && source < kWarp ? source : all.lane);
}

inline int lane_now() { return grid().current->linear % kWarp; }

template <class T, class Better>
T reduce(unsigned mask, T value, Better better, const char* where, int line) {
  whole_warp(mask);
  const Exchange all = exchange(value, where, line);
  T best = taken<T>(all, 0);
  for (int i = 1; i < kWarp; ++i) {
    const T other = taken<T>(all, i);
    best = better(other, best) ? other : best;
  }
  return best;
}

template <class T>
unsigned match(unsigned mask, T value, const char* where, int line) {
  whole_warp(mask);
  const Exchange all = exchange(value, where, line);
  unsigned same = 0;
  for (int i = 0; i < kWarp; ++i) {
    same |= taken<T>(all, i) == value ? 1u << i : 0u;
  }
  return same;
}

}  // namespace emulation

#define __shfl_xor_sync(mask, value, bits) \
  ::emulation::shuffle(mask, value, ::emulation::lane_now() ^ (bits), __FILE__, __LINE__)
#define __shfl_sync(mask, value, source) ::emulation::shuffle(mask, value, source, __FILE__, __LINE__)
#define __shfl_up_sync(mask, value, delta) \
  ::emulation::shuffle(mask, value, ::emulation::lane_now() - (delta), __FILE__, __LINE__)
#define __shfl_down_sync(mask, value, delta) \
  ::emulation::shuffle(mask, value, ::emulation::lane_now() + (delta), __FILE__, __LINE__)
#define __match_any_sync(mask, value) ::emulation::match(mask, value, __FILE__, __LINE__)
#define __reduce_max_sync(mask, value) \
  ::emulation::reduce(mask, value, [](auto a, auto b) { return a > b; }, __FILE__, __LINE__)
#define __reduce_min_sync(mask, value) \
  ::emulation::reduce(mask, value, [](auto a, auto b) { return a < b; }, __FILE__, __LINE__)

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline float __uint_as_float(unsigned x) {
  float y;
  std::memcpy(&y, &x, 4);
  return y;
}
inline unsigned __float_as_uint(float x) {
  unsigned y;
  std::memcpy(&y, &x, 4);
  return y;
}
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline float __expf(float x) { return std::exp(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline unsigned __umulhi(unsigned a, unsigned b) {
  return static_cast<unsigned>((static_cast<uint64_t>(a) * b) >> 32);
}
inline void sincospif(float x, float* sine, float* cosine) {
  const double angle = 3.14159265358979323846 * static_cast<double>(x);
  *sine = static_cast<float>(std::sin(angle));
  *cosine = static_cast<float>(std::cos(angle));
}
