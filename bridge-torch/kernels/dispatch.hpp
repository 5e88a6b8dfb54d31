#pragma once

#include "cuda_types.hpp"

namespace bridge {

// Where each (token, choice) goes when rows are sorted by expert, stable in the order of tokens. All on the device.
struct DispatchPlan {
  const int* chosen;   // [assignments]: the expert of assignment token * top_k + choice, 0 to experts - 1
  int* offsets;        // [experts + 1]: where an expert's rows start
  int* row_of;         // [assignments]
  int* assignment_of;  // [assignments]: the inverse
  int* workspace;      // dispatch_workspace_bytes
  int64_t assignments; // fewer than 2^31
  int experts;         // at most 512
};

size_t dispatch_workspace_bytes(int64_t assignments, int experts);
cudaError_t dispatch_plan(const DispatchPlan& p, cudaStream_t stream);

// rows[r] = x[assignment_of[r] / top_k], optionally times weight[assignment_of[r]]: tokens in the experts' order, and the
// gradient of `combine` with respect to its rows.
struct Permute {
  const void* x;        // [tokens, width]
  const void* weights;  // [tokens, top_k] or null for 1
  const int* assignment_of;
  void* rows;           // [tokens top_k, width]
  int64_t tokens;
  int width, top_k;
  DType dtype;
};

// out[t] = sum over choices of weight rows[row_of[t, choice]] + sigmoid(gate[t]) shared[t], in float32 in this order: the
// experts' results back together, and with null weights and no shared expert the gradient of `permute`.
struct Combine {
  const void* rows;
  const void* weights;  // [tokens, top_k] or null for 1
  const int* row_of;
  const void* shared;   // [tokens, width], the shared expert's result, or null
  const void* gate;     // [tokens], logits; null where `shared` is
  void* out;            // [tokens, width]
  int64_t tokens;
  int width, top_k;
  DType dtype;
};

// Of the shared expert's term: d_shared[t] = sigmoid(gate[t]) d_out[t], d_gate[t] = <d_out[t], shared[t]> sigmoid'(gate[t]).
struct CombineShared {
  const void* d_out;    // [tokens, width]
  const void* shared;   // [tokens, width]
  const void* gate;     // [tokens]
  void* d_shared;       // [tokens, width]; may be shared
  void* d_gate;         // [tokens], dtype
  int64_t tokens;
  int width;
  DType dtype;
};

// `width` in whole pieces of 16 bytes.
cudaError_t permute(const Permute& p, cudaStream_t stream);
cudaError_t combine(const Combine& p, cudaStream_t stream);
cudaError_t combine_shared(const CombineShared& p, cudaStream_t stream);

}  // namespace bridge
