#pragma once

#include "cuda_types.hpp"

namespace bridge {

inline constexpr int kMaxExperts = 512, kMaxTopK = 32;

// The top_k experts of each token by falling logit, the lower number first among equals, and their weights: the softmax of
// all logits, divided by its sum over the chosen, which is the softmax of the chosen logits alone.
// A row that holds NaN, or nothing but -inf, gets NaN weights, with valid and distinct expert numbers all the same.
struct RouterForward {
  const void* logits;  // [tokens, experts]
  void* weights;       // [tokens, top_k], dtype
  int* chosen;         // [tokens, top_k]
  int64_t tokens;
  int experts, top_k;
  DType dtype;
};

// d_logit of a chosen expert = w (d_w - sum w d_w), of all others zero. The weights are computed again in float32.
struct RouterBackward {
  const void* logits;
  const int* chosen;
  const void* d_weights;  // [tokens, top_k], dtype
  void* d_logits;         // [tokens, experts], dtype
  int64_t tokens;
  int experts, top_k;
  DType dtype;
};

cudaError_t router_forward(const RouterForward& p, cudaStream_t stream);
cudaError_t router_backward(const RouterBackward& p, cudaStream_t stream);

}  // namespace bridge
