// Tiles of the gated delta rule in shared memory: copies of a chunk's rows, operands of matrix instructions out of them, and the
// products that more than one kernel takes.
//
// A warp's fragments are those of mma_bf16: of 16 rows a lane has `group` and `group + 8`, of every 8 columns `pair` and
// `pair + 1`, where group = lane / 4 and pair = lane % 4 * 2.
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

// The values of a word of two bfloat16.
__device__ __forceinline__ float low_of(unsigned word) { return __uint_as_float(word << 16); }
__device__ __forceinline__ float high_of(unsigned word) { return __uint_as_float(word & 0xFFFF0000u); }

template <int kPitch>
__device__ __forceinline__ unsigned pair_at(const Bf16* tile, int row, int column) {
  return *reinterpret_cast<const unsigned*>(tile + row * kPitch + column);
}

__device__ __forceinline__ void put_pair(Bf16* to, float low, float high) {
  *reinterpret_cast<unsigned*>(to) = pack_bf16(low, high);
}

// A 16x16 A operand out of value(row, column, i, j), rounded: the element at (row, column) of the whole, which an accumulator of
// the same 16x16 tile has at [i][j] and an operand in half j % 2 of word i * 2 + j / 2.
template <class Value>
__device__ __forceinline__ void make_a(unsigned (&a)[4], int first_row, int first_column, Value value) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  BRIDGE_UNROLL
  for (int word = 0; word < 4; ++word) {
    const int row = first_row + lane / 4 + word % 2 * 8, column = first_column + lane % 4 * 2 + word / 2 * 8;
    const int i = word / 2, j = word % 2 * 2;
    a[word] = pack_bf16(value(row, column, i, j), value(row, column + 1, i, j + 1));
  }
}

// out[16 rows, 8 kTiles columns] += a right[row.. + 16, column..].
template <int kPitch, int kTiles>
__device__ __forceinline__ void add_product(float (&out)[kTiles][4], const unsigned (&a)[4], const Bf16* right, int row,
                                            int column) {
  BRIDGE_UNROLL
  for (int n = 0; n < kTiles / 2; ++n) {
    unsigned b[4];
    load_b<kPitch>(b, right, row, column + n * 16);
    mma_pair(out[2 * n], out[2 * n + 1], a, b);
  }
}

// out[16 rows, 8 kTiles columns] += left[row.., 128] right[first.., 128]^T.
template <int kTiles>
__device__ __forceinline__ void add_row_products(float (&out)[kTiles][4], const Bf16* left, int row, const Bf16* right,
                                                 int first) {
  BRIDGE_UNROLL
  for (int step = 0; step < kD / 16; ++step) {
    unsigned a[4];
    load_a<kPitchD>(a, left, row, step * 16);
    BRIDGE_UNROLL
    for (int n = 0; n < kTiles / 2; ++n) {
      unsigned b[4];
      load_b_transposed<kPitchD>(b, right, first + n * 16, step * 16);
      mma_pair(out[2 * n], out[2 * n + 1], a, b);
    }
  }
}

// e^(high - low) for two running sums, high of the later token.
__device__ __forceinline__ float between(float high, float low) { return __expf(high - low); }

// How much of what token `earlier` writes token `later` sees; nothing where it is not later. The exponent is masked before exp.
__device__ __forceinline__ float gamma_of(const float* decay, int later, int earlier) {
  return earlier <= later ? between(decay[later], decay[earlier]) : 0.0f;
}

// log(1 + e^x).
__device__ __forceinline__ float softplus(float x) { return x > 20.0f ? x : log1pf(__expf(x)); }

}  // namespace gdn

}  // namespace bridge
