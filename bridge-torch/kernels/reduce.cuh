// Sums and maxima over warps and blocks, each in one fixed order.
#pragma once

#include "numbers.cuh"

namespace bridge {

// The sum over groups of kLanes neighbouring lanes, in every lane.
template <int kLanes>
__device__ __forceinline__ float lanes_sum(float x) {
  BRIDGE_UNROLL
  for (int bits = kLanes / 2; bits > 0; bits /= 2) {
    x += __shfl_xor_sync(kWholeWarp, x, bits);
  }
  return x;
}

__device__ __forceinline__ float warp_max(float x) {
  BRIDGE_UNROLL
  for (int bits = 16; bits > 0; bits /= 2) {
    x = fmaxf(x, __shfl_xor_sync(kWholeWarp, x, bits));
  }
  return x;
}

// Two sums over kThreads threads (one warp or a whole block), in every thread. Call it from all threads.
template <int kThreads>
__device__ __forceinline__ void sum2(float& a, float& b) {
  a = lanes_sum<32>(a);
  b = lanes_sum<32>(b);
  if constexpr (kThreads > 32) {
    constexpr int kWarps = kThreads / 32;
    BRIDGE_SHARED(float, box, 2 * kWarps);
    const int warp = static_cast<int>(threadIdx.x) / 32;
    __syncthreads();  // the sums of the call before have been read
    if (threadIdx.x % 32 == 0) {
      box[warp] = a;
      box[kWarps + warp] = b;
    }
    __syncthreads();
    a = b = 0.0f;
    BRIDGE_UNROLL
    for (int i = 0; i < kWarps; ++i) {
      a += box[i];
      b += box[kWarps + i];
    }
  }
}

}  // namespace bridge
