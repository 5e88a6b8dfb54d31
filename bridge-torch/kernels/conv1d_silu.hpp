#pragma once

#include "chunks.hpp"
#include "cuda_types.hpp"

namespace bridge {

inline constexpr int kTaps = 4;
// Tokens a chunk of the map that the convolution wants: the delta rule's, so that one map serves both.
inline constexpr int kConvChunk = 64;

// Depthwise causal convolution and silu, sequence by sequence: y_t = sum_j weight[c, j] x_{t - 3 + j}, out = silu(y).
struct ConvForward {
  const void* x;       // [tokens, channels], tokens x_stride elements apart
  const void* weight;  // [channels, 4], weight_dtype
  const void* state;   // [sequences, channels, 3] or null: the inputs before each sequence, else zeros
  void* out;           // [tokens, channels], tokens out_stride elements apart; zero behind the last border
  const Chunk* chunks; // of chunk_map with size kConvChunk
  int64_t tokens, sequences;
  int64_t x_stride, out_stride;
  int channels;
  DType dtype, weight_dtype;
};

// dy = d_out silu'(y) with y computed again; d_x_t = sum_j weight[c, j] dy_{t + 3 - j} inside of the sequence;
// d_weight[c, j] = sum_t dy_t x_{t - 3 + j}.
struct ConvBackward {
  const void* x;
  const void* weight;
  const void* state;        // as in the forward
  const void* d_out;        // [tokens, channels], tokens d_out_stride elements apart
  void* d_x;                // [tokens, channels], tokens d_x_stride elements apart; zero behind the last border
  void* d_weight;           // [channels, 4], weight_dtype
  void* d_state;            // [sequences, channels, 3], dtype, or null
  const Chunk* chunks;
  const int* first_chunk;   // of chunk_map
  const void* cu_seqlens;   // for d_state
  bool wide;
  float* workspace;         // conv_backward_workspace_bytes
  int64_t tokens, sequences;
  int64_t x_stride, d_out_stride, d_x_stride;
  int channels;
  DType dtype, weight_dtype;
};

size_t conv_backward_workspace_bytes(int64_t tokens, int64_t sequences, int channels);

// `channels` and strides are multiples of 16 bytes, at most 2^22 channels.
cudaError_t conv1d_silu_forward(const ConvForward& p, cudaStream_t stream);
cudaError_t conv1d_silu_backward(const ConvBackward& p, cudaStream_t stream);

}  // namespace bridge
