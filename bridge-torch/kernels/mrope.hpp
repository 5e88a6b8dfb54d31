#pragma once

#include "cuda_types.hpp"

namespace bridge {

inline constexpr int kRotary = 64;       // dimensions of a head that turn
inline constexpr int kFrequencies = 32;  // each turns dimension i with dimension i + 32

// cos and sin of every token and frequency, once a step for all layers. Frequency j turns with the height if j % 3 == 1 and
// j < 3 section[1], with the width if j % 3 == 2 and j < 3 section[2], else with the temporal position.
struct MropeTable {
  const int64_t* positions;  // [3, tokens]: temporal, height, width
  const float* frequencies;  // [32], theta^(-2j/64) as the reference computes it
  void* cos;                 // [tokens, 32]
  void* sin;                 // [tokens, 32]
  int64_t tokens;
  int height_limit, width_limit;  // 3 section[1], 3 section[2]
  DType dtype;
};

// Turns the first 64 dimensions of every head of q and k in place; the others are not touched. Angles with `inverse` are
// negated: that is the gradient.
struct MropeApply {
  void* q;          // [tokens, q_heads, .]: tokens q_token_stride, heads q_head_stride elements apart
  void* k;          // [tokens, k_heads, .]
  const void* cos;  // [tokens, 32], dtype
  const void* sin;
  int64_t tokens;
  int64_t q_token_stride, q_head_stride, k_token_stride, k_head_stride;
  int q_heads, k_heads;
  bool inverse;
  DType dtype;
};

cudaError_t mrope_table(const MropeTable& p, cudaStream_t stream);
// 16-byte aligned heads; fewer than 2^31 heads in all tokens together.
cudaError_t mrope_apply(const MropeApply& p, cudaStream_t stream);

}  // namespace bridge
