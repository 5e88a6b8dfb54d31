// What the kernels that walk along a sequence share (scan_kernel forward, back_scan_kernel from its end): the rows of a chunk and
// how they come, and the tile of the state, or of its gradient, that a block keeps in registers.
//
// A block of 4 warps has a sequence, a value head and 32 columns of the state, which never mix. A warp has 32 keys of the state
// and 16 tokens of everything else.
#pragma once

#include "gdn_forward.hpp"
#include "gdn_tiles.cuh"

namespace bridge {

namespace gdn {

inline constexpr int kColumns = 32, kPitchV = kColumns + 8;

// Lengths and gates of a chunk's tokens.
struct Scalars {
  float rho_k[kC], rho_q[kC], decay[kC], beta[kC];
};

// The rows of a chunk that a scan works on.
struct Stage : Scalars {
  Bf16 keys[kC * kPitchD];
  Bf16 queries[kC * kPitchD];
  Bf16 inverse[kC * kPitchC];
  Bf16 columns[kC * kPitchV];  // the block's columns of V, or of dO
};

// Behind the chunk: no key, no beta, and the last decay goes on. `i`: the token of the chunk that the thread copies for.
struct TokenOf {
  int64_t row;
  bool valid;
  __device__ __forceinline__ TokenOf(const Chunk& chunk, int i)
      : row(chunk.first + (i < chunk.tokens ? i : chunk.tokens - 1)), valid(i < chunk.tokens) {}
};

template <class Parameters>
__device__ __forceinline__ void fetch_lengths(const Parameters& p, Scalars& s, const Chunk& chunk, int key_head, int i) {
  const TokenOf token(chunk, i);
  const int64_t at = token.row * p.key_heads + key_head;
  copy_async_word(s.rho_k + i, p.rho_k + at, token.valid);
  copy_async_word(s.rho_q + i, p.rho_q + at, token.valid);
}

template <class Parameters>
__device__ __forceinline__ void fetch_gates(const Parameters& p, Scalars& s, const Chunk& chunk, int head, int i) {
  const TokenOf token(chunk, i);
  const int64_t at = token.row * p.value_heads + head;
  copy_async_word(s.beta + i, p.beta + at, token.valid);
  copy_async_word(s.decay + i, p.decay + at, true);
}

// Starts the copy of the keys and queries of a chunk.
template <int kThreads, class Parameters>
__device__ __forceinline__ void fetch_keys(const Parameters& p, Bf16* keys, Bf16* queries, const Chunk& chunk, int key_head) {
  const Bf16* k = static_cast<const Bf16*>(p.k) + chunk.first * p.k_stride + key_head * kD;
  const Bf16* q = static_cast<const Bf16*>(p.q) + chunk.first * p.q_stride + key_head * kD;
  copy_rows<kD, kPitchD, kThreads>(keys, k, p.k_stride, chunk.tokens);
  copy_rows<kD, kPitchD, kThreads>(queries, q, p.q_stride, chunk.tokens);
}

// Where a block of a scan is.
struct ScanBlock {
  int64_t sequence;
  int head, first_column, begin, end;  // chunks begin to end - 1
  template <class Parameters>
  __device__ __forceinline__ explicit ScanBlock(const Parameters& p)
      : sequence(blockIdx.x), head(static_cast<int>(blockIdx.y)), first_column(static_cast<int>(blockIdx.z) * kColumns),
        begin(p.first_chunk[sequence]), end(p.first_chunk[sequence + 1]) {}
};

// Starts the copy of a chunk's rows; those of `columns` are kD wide a head, with tokens `stride` elements apart.
template <class Parameters>
__device__ __forceinline__ void fetch(const Parameters& p, Stage& stage, const Chunk& chunk, const ScanBlock& at,
                                      const void* columns, int64_t stride) {
  const int key_head = at.head / (p.value_heads / p.key_heads), thread = static_cast<int>(threadIdx.x);
  const int64_t token = chunk.first, heads = p.value_heads;
  fetch_keys<kBlock>(p, stage.keys, stage.queries, chunk, key_head);
  const Bf16* inverse = static_cast<const Bf16*>(p.inverse) + (token * heads + at.head) * kC;
  const Bf16* first = static_cast<const Bf16*>(columns) + token * stride + at.head * kD + at.first_column;
  copy_rows<kC, kPitchC>(stage.inverse, inverse, heads * kC, chunk.tokens);
  copy_rows<kColumns, kPitchV>(stage.columns, first, stride, chunk.tokens);
  if (thread < kC) {
    fetch_lengths(p, stage, chunk, key_head, thread);
  } else {
    fetch_gates(p, stage, chunk, at.head, thread - kC);
  }
  copy_commit();
}

// Zeros to the first kWidth elements of a chunk's rows: tokens of no sequence. `first`: the chunk's first row.
template <int kWidth, int kThreads>
__device__ __forceinline__ void zero_rows(Bf16* first, int64_t stride, int tokens) {
  const float zeros[8] = {};
  for (int piece = static_cast<int>(threadIdx.x); piece < tokens * (kWidth / 8); piece += kThreads) {
    store(first + piece / (kWidth / 8) * stride + piece % (kWidth / 8) * 8, zeros);
  }
}

// A block's columns of [128 keys, 128] of the state or its gradient in float32: keys warp * 32 + m * 16 + group (+ 8), columns
// n * 8 + pair (+ 1) at x[m][n].
struct StateTile {
  float x[2][4][4] = {};

  // do_it(value, key, column) for every element that the thread has.
  template <class Work>
  __device__ __forceinline__ void each(Work do_it) {
    const int thread = static_cast<int>(threadIdx.x), lane = thread % 32;
    BRIDGE_UNROLL
    for (int m = 0; m < 2; ++m) {
      BRIDGE_UNROLL
      for (int n = 0; n < 4; ++n) {
        BRIDGE_UNROLL
        for (int i = 0; i < 4; ++i) {
          do_it(x[m][n][i], thread / 32 * 32 + m * 16 + lane / 4 + i / 2 * 8, n * 8 + lane % 4 * 2 + i % 2);
        }
      }
    }
  }
  // From and to the block's columns in memory.
  __device__ __forceinline__ void read(const float* columns) {
    each([=](float& value, int key, int column) { value = columns[key * kD + column]; });
  }
  __device__ __forceinline__ void write(float* columns) {
    each([=](float& value, int key, int column) { columns[key * kD + column] = value; });
  }
  __device__ __forceinline__ void multiply(float factor) {
    each([=](float& value, int, int) { value *= factor; });
  }

  // Rounded, to rows of kPitchV: an operand.
  __device__ __forceinline__ void put(Bf16* shared) const {
    const int thread = static_cast<int>(threadIdx.x), lane = thread % 32;
    BRIDGE_UNROLL
    for (int m = 0; m < 2; ++m) {
      BRIDGE_UNROLL
      for (int n = 0; n < 4; ++n) {
        BRIDGE_UNROLL
        for (int half = 0; half < 2; ++half) {
          put_pair(shared + (thread / 32 * 32 + m * 16 + lane / 4 + half * 8) * kPitchV + n * 8 + lane % 4 * 2, x[m][n][2 * half],
                   x[m][n][2 * half + 1]);
        }
      }
    }
  }

  // += rows^T right, over tokens first to first + 15.
  __device__ __forceinline__ void add_tokens(const Bf16* rows, const Bf16* right, int first) {
    unsigned b[2][4];
    load_b<kPitchV>(b[0], right, first, 0);
    load_b<kPitchV>(b[1], right, first, 16);
    BRIDGE_UNROLL
    for (int m = 0; m < 2; ++m) {
      unsigned a[4];
      load_a_transposed<kPitchD>(a, rows, first, static_cast<int>(threadIdx.x) / 32 * 32 + m * 16);
      mma_pair(x[m][0], x[m][1], a, b[0]);
      mma_pair(x[m][2], x[m][3], a, b[1]);
    }
  }
};

// The operand that StateTile::put made, to the block's columns in memory.
__device__ __forceinline__ void keep_columns(Bf16* columns, const Bf16* shared) {
  for (int piece = static_cast<int>(threadIdx.x); piece < kD * (kColumns / 8); piece += kBlock) {
    const int row = piece / (kColumns / 8), column = piece % (kColumns / 8) * 8;
    store_bits(columns + row * kD + column, load_bits(shared + row * kPitchV + column));
  }
}

// out[which] += rows[which][row.. + 16, 128] state: products of tokens with the block's columns of the state.
template <int kCount>
__device__ __forceinline__ void add_from_state(float (&out)[kCount][4][4], const Bf16* const (&rows)[kCount], int row,
                                               const Bf16* state) {
  BRIDGE_UNROLL
  for (int step = 0; step < kD / 16; ++step) {
    unsigned a[kCount][4];
    BRIDGE_UNROLL
    for (int which = 0; which < kCount; ++which) {
      load_a<kPitchD>(a[which], rows[which], row, step * 16);
    }
    BRIDGE_UNROLL
    for (int n = 0; n < 2; ++n) {
      unsigned b[4];
      load_b<kPitchV>(b, state, step * 16, n * 16);
      BRIDGE_UNROLL
      for (int which = 0; which < kCount; ++which) {
        mma_pair(out[which][2 * n], out[which][2 * n + 1], a[which], b);
      }
    }
  }
}

template <class Parameters>
bool heads_supported(const Parameters& p) {
  return p.tokens >= 0 && p.sequences >= 0 && p.key_heads > 0 && p.value_heads > 0 && p.value_heads <= 65535 &&
         p.value_heads % p.key_heads == 0 && (p.q_stride | p.k_stride | p.v_stride) % 8 == 0;
}

// A block a sequence, and for the tokens of no sequence, each with its value heads and columns.
template <class Parameters>
dim3 scan_grid(const Parameters& p) {
  return dim3(static_cast<unsigned>(p.sequences + 1), static_cast<unsigned>(p.value_heads), kD / kColumns);
}

}  // namespace gdn

}  // namespace bridge
