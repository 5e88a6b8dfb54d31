// Tiles of the gated delta rule in shared memory: copies of a chunk's rows, and operands of matrix instructions out of them.
#pragma once

#include "gdn_forward.hpp"
#include "mma.cuh"

namespace bridge {

namespace gdn {

inline constexpr int kBlock = 128;
inline constexpr int kC = kGdnChunk, kD = kGdnDim;
// Rows in shared memory are 16 bytes longer than their values, so that the 8 rows of a matrix load fall on different banks.
inline constexpr int kPitchD = kD + 8, kPitchC = kC + 8;
inline constexpr int kPitchA = kC + 4;  // floats
// Columns of the state that one block of a scan holds.
inline constexpr int kColumns = 32, kPitchV = kColumns + 8;
inline constexpr float kQueryScale = 0.08838834764831845f;  // 1 / sqrt(128)

// Starts the copy of a chunk's rows of `kColumns` bf16 to shared memory; rows behind the chunk become zeros.
template <int kColumns, int kPitch, int kThreads = kBlock, int kRows = kC>
__device__ __forceinline__ void copy_rows(Bf16* to, const Bf16* from, int64_t stride, int tokens) {
  constexpr int kPieces = kColumns / 8;
  for (int i = static_cast<int>(threadIdx.x); i < kRows * kPieces; i += kThreads) {
    const int row = i / kPieces, column = i % kPieces * 8;
    const bool valid = row < tokens;
    copy_async(to + row * kPitch + column, from + (valid ? row * stride : 0) + column, valid);
  }
}

// The 16x16 tile at (row, column) of a row-major array as an A operand.
template <int kPitch>
__device__ __forceinline__ void load_a(unsigned (&a)[4], const Bf16* from, int row, int column) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  load_matrices<false>(a, from + (row + lane % 16) * kPitch + column + lane / 16 * 8);
}

// The transpose of the tile at (row, column) as an A operand: A[i, k] = from[row + k, column + i].
template <int kPitch>
__device__ __forceinline__ void load_a_transposed(unsigned (&a)[4], const Bf16* from, int row, int column) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  load_matrices<true>(a, from + (row + lane / 16 * 8 + lane % 8) * kPitch + column + lane / 8 % 2 * 8);
}

// Two B operands, of columns column.. and column + 8..: B[k, n] = from[row + k, column + n].
template <int kPitch>
__device__ __forceinline__ void load_b(unsigned (&b)[4], const Bf16* from, int row, int column) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  load_matrices<true>(b, from + (row + lane % 16) * kPitch + column + lane / 16 * 8);
}

// The same from a transposed array: B[k, n] = from[row + n, column + k], for n below 8 and the 8 behind them.
template <int kPitch>
__device__ __forceinline__ void load_b_transposed(unsigned (&b)[4], const Bf16* from, int row, int column) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  load_matrices<false>(b, from + (row + lane / 16 * 8 + lane % 8) * kPitch + column + lane / 8 % 2 * 8);
}

__device__ __forceinline__ void mma_pair(float (&low)[4], float (&high)[4], const unsigned (&a)[4], const unsigned (&b)[4]) {
  const unsigned first[2] = {b[0], b[1]}, second[2] = {b[2], b[3]};
  mma_bf16(low, a, first);
  mma_bf16(high, a, second);
}

// e^(high - low) for two running sums, high of the later token.
__device__ __forceinline__ float between(float high, float low) { return __expf(high - low); }

__device__ __forceinline__ void put_pair(Bf16* to, float low, float high) {
  *reinterpret_cast<unsigned*>(to) = pack_bf16(low, high);
}

// log(1 + e^x).
__device__ __forceinline__ float softplus(float x) { return x > 20.0f ? x : log1pf(__expf(x)); }

}  // namespace gdn

}  // namespace bridge
