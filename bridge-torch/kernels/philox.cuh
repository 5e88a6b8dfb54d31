// Philox4x32-10 (Salmon et al. 2011): 128 random bits from a counter and a key, the same on every machine.
#pragma once

#include "device.cuh"

namespace bridge {

struct Random4 {
  unsigned word[4];
};

__device__ __forceinline__ Random4 philox(unsigned c0, unsigned c1, unsigned c2, unsigned c3, uint64_t key) {
  auto k0 = static_cast<unsigned>(key), k1 = static_cast<unsigned>(key >> 32);
  BRIDGE_UNROLL
  for (int round = 0; round < 10; ++round) {
    const unsigned high0 = __umulhi(0xD2511F53u, c0), low0 = 0xD2511F53u * c0;
    const unsigned high1 = __umulhi(0xCD9E8D57u, c2), low1 = 0xCD9E8D57u * c2;
    c0 = high1 ^ c1 ^ k0;
    c1 = low1;
    c2 = high0 ^ c3 ^ k1;
    c3 = low0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return Random4{{c0, c1, c2, c3}};
}

// 16 of the bits, i from 0 to 7.
__device__ __forceinline__ unsigned bits16(const Random4& random, int i) {
  return i % 2 == 0 ? random.word[i / 2] & 0xFFFFu : random.word[i / 2] >> 16;
}

}  // namespace bridge
