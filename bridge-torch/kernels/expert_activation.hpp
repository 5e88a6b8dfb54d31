#pragma once

#include "cuda_types.hpp"

namespace bridge {

// Between the two products of the routed experts' backward, a row r an assignment a = assignment_of[r] of a token to an expert:
//   act = silu(gate) up;  d_pre = SwiGLU's gradient for weights[a] d_act
//   act_scaled = weights[a] act;  d_weights[a] = <d_act, act>
// d_act, the gradient of act for a weight of 1, is d_out of the row's token times W2. So <d_act, act> is <d_out, W2 act>: the
// router's gradient without the experts' outputs. act_scaled is what the gradient of W2 takes together with d_out.
struct ExpertActivation {
  const void* pre;           // [rows, 2 width]: gate[width], then up
  const void* d_act;         // [rows, width]
  const void* weights;       // [tokens, top_k], rows in all
  const int* assignment_of;  // [rows], of dispatch_plan: every assignment once
  void* d_pre;               // [rows, 2 width]; may be pre
  void* act_scaled;          // [rows, width]; may be d_act
  void* d_weights;           // [tokens, top_k]
  int64_t rows;              // fewer than 2^31
  int width;                 // in whole pieces of 16 bytes
  DType dtype;               // of all tensors
};

// Contiguous and 16-byte aligned.
cudaError_t expert_activation_backward(const ExpertActivation& p, cudaStream_t stream);

}  // namespace bridge
