#pragma once

#include "chunks.hpp"
#include "cuda_types.hpp"

namespace bridge {

// The gradients of gdn_forward. Inputs and what the forward kept are as there; chunk_states and delta must have been kept.
struct GdnBackward {
  const void* q;
  const void* k;
  const void* v;
  const void* a;
  const void* b;
  const void* a_log;
  const void* dt_bias;
  const float* rho_q;
  const float* rho_k;
  const float* decay;
  const float* beta;
  const void* inverse;
  const void* chunk_states;
  const void* delta;
  const void* d_out;           // [tokens, value_heads, 128] bf16, contiguous
  const float* d_final_state;  // [sequences, value_heads, 128, 128] or null
  void* d_q;                   // [tokens, key_heads, 128] bf16, tokens d_q_stride elements apart; zero behind the last border
  void* d_k;                   // as d_q, tokens d_k_stride apart
  void* d_v;                   // [tokens, value_heads, 128] bf16, tokens d_v_stride apart
  void* d_a;                   // [tokens, value_heads], gate_dtype, tokens d_a_stride apart
  void* d_b;                   // as d_a, tokens d_b_stride apart
  void* d_a_log;               // [value_heads], parameter_dtype
  void* d_dt_bias;             // [value_heads], parameter_dtype
  float* d_initial_state;      // as d_final_state, or null
  void* workspace;             // gdn_backward_workspace_bytes
  const Chunk* chunks;         // of chunk_map with size kGdnChunk
  const int* first_chunk;
  int64_t tokens, sequences;
  int64_t q_stride, k_stride, v_stride, a_stride, b_stride;
  int64_t d_q_stride, d_k_stride, d_v_stride, d_a_stride, d_b_stride;
  int key_heads, value_heads;
  DType gate_dtype, parameter_dtype;
};

size_t gdn_backward_workspace_bytes(int64_t tokens, int64_t sequences, int value_heads);

// As gdn_forward demands; three launches and two sums.
cudaError_t gdn_backward(const GdnBackward& p, cudaStream_t stream);

}  // namespace bridge
