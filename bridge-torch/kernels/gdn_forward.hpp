#pragma once

#include "chunks.hpp"
#include "cuda_types.hpp"

namespace bridge {

inline constexpr int kGdnDim = 128;   // of keys and values
inline constexpr int kGdnChunk = 64;  // tokens of a chunk of the map

// The gated delta rule with its L2 norms and gates, sequence by sequence. Per token and value head j, key head j / r:
//   g = -exp(A_log) softplus(a + dt_bias); beta = sigmoid(b), rounded as b is stored; q, k divided by sqrt(sum squares + 1e-6)
//   S = e^g S;  S += k (beta (v - S^T k))^T;  o = S^T q / sqrt(128)
struct GdnForward {
  const void* q;        // [tokens, key_heads, 128] bf16, tokens q_stride elements apart
  const void* k;        // as q
  const void* v;        // [tokens, value_heads, 128] bf16
  const void* a;        // [tokens, value_heads], gate_dtype, tokens a_stride elements apart
  const void* b;
  const void* a_log;    // [value_heads], parameter_dtype
  const void* dt_bias;  // [value_heads]
  const float* initial_state;  // [sequences, value_heads, 128 (key), 128 (value)] or null for zeros
  void* out;            // [tokens, value_heads, 128] bf16; zero behind the last border
  float* final_state;   // as initial_state, or null
  void* chunk_states;   // [max_chunks, value_heads, 128, 128] bf16 or null: S at the start of every chunk, for the backward
  // Kept for the backward, too; only the tokens of sequences are written.
  float* rho_q;         // [tokens, key_heads]: 1 / sqrt(sum squares + 1e-6)
  float* rho_k;
  float* decay;         // [tokens, value_heads]: sum of g from the chunk's start
  float* beta;          // [tokens, value_heads]
  void* inverse;        // [tokens, value_heads, 64] bf16: the token's row of T - 1 in its chunk, where
                        // T = (1 + tril(diag(beta) K K^T o Gamma, -1))^-1 and Gamma_ij = e^(decay_i - decay_j)
  void* delta;          // [tokens, value_heads, 128] bf16 or null: Delta, for the backward
  const Chunk* chunks;  // of chunk_map with size kGdnChunk
  const int* first_chunk;
  int64_t tokens, sequences;
  int64_t q_stride, k_stride, v_stride, a_stride, b_stride;
  int key_heads, value_heads;
  DType gate_dtype, parameter_dtype;
};

// bf16, heads of 128, value_heads a multiple of key_heads, 16-byte aligned tokens; at most 65535 heads.
cudaError_t gdn_forward(const GdnForward& p, cudaStream_t stream);

}  // namespace bridge
