#pragma once

#include "cuda_types.hpp"

namespace bridge {

// The norm behind the delta rule, over heads of 128: out = round(n) (offset + weight) silu(gate) with
// n = x / sqrt(mean(x^2) + eps), where round is a rounding to dtype.
struct GatedRmsNormForward {
  const void* x;          // [tokens, heads, 128], contiguous
  const void* gate;       // [tokens, heads, 128], tokens gate_stride elements apart: a slice of in_proj's output
  const void* weight;     // [128], weight_dtype
  void* out;              // [tokens, heads, 128]
  int64_t tokens;
  int64_t gate_stride;
  int heads;
  float eps;
  float weight_offset;    // 1 for Megatron's zero-centred out_norm, 0 for Hugging Face's plain weight
  DType dtype, weight_dtype;
};

// With g = d_out, s = silu(gate), w = offset + weight, h = g s w: d_x = (h - n mean(h n)) / sqrt(mean(x^2) + eps),
// d_gate = g w n silu'(gate), d_weight = sum over tokens and heads of g s n. The rounding has the gradient of the identity.
struct GatedRmsNormBackward {
  const void* x;
  const void* gate;
  const void* weight;
  const void* d_out;      // [tokens, heads, 128]
  void* d_x;              // [tokens, heads, 128]
  void* d_gate;           // [tokens, heads, 128], tokens d_gate_stride elements apart
  void* d_weight;         // [128], weight_dtype
  float* workspace;       // gated_rms_norm_backward_workspace_bytes
  int64_t tokens;
  int64_t gate_stride, d_gate_stride;
  int heads;
  float eps;
  float weight_offset;
  DType dtype, weight_dtype;
};

inline constexpr int kGatedNormDim = 128;

size_t gated_rms_norm_backward_workspace_bytes(int64_t tokens, int heads, DType dtype);

// Contiguous but for the stated strides, 16-byte aligned, fewer than 2^31 heads in all tokens together.
cudaError_t gated_rms_norm_forward(const GatedRmsNormForward& p, cudaStream_t stream);
cudaError_t gated_rms_norm_backward(const GatedRmsNormBackward& p, cudaStream_t stream);

}  // namespace bridge
