#pragma once

#include "cuda_types.hpp"

namespace bridge {

// out = n (offset + weight) with n = s / sqrt(mean(s^2) + eps), over rows of `dim` elements.
struct RmsNormForward {
  const void* x;         // [rows, dim], rows x_stride elements apart
  const void* residual;  // [rows, dim] or null: then s = x, else s = x + residual, rounded to dtype
  const void* weight;    // [dim], weight_dtype
  void* sum;             // [rows, dim]: s, the new residual stream; null without a residual
  void* out;             // [rows, dim]
  int64_t rows;
  int64_t x_stride;
  int dim;               // a multiple of 16 bytes, at most kRmsNormMaxDim
  float eps;
  float weight_offset;   // 1 for zero-centred weights, 0 for plain ones
  DType dtype, weight_dtype;
};

// With g = d loss / d out: h = g (offset + weight); d_x = (h - n mean(h n)) / sqrt(mean(s^2) + eps) + d_sum;
// d_weight = sum over rows of g n. The root is computed again: both of its sums are taken in one reduction.
struct RmsNormBackward {
  const void* s;         // [rows, dim], rows s_stride elements apart: what was normalised
  const void* weight;    // [dim]
  const void* d_out;     // [rows, dim]
  const void* d_sum;     // [rows, dim] or null: the gradient that reaches s past the norm
  void* d_x;             // [rows, dim]: the gradient of x and of the residual alike
  void* d_weight;        // [dim], weight_dtype
  float* workspace;      // rms_norm_backward_workspace_bytes
  int64_t rows;
  int64_t s_stride;
  int dim;
  float eps;
  float weight_offset;
  DType dtype, weight_dtype;
};

inline constexpr int kRmsNormMaxDim = 8192;

size_t rms_norm_backward_workspace_bytes(int64_t rows, int dim);

// Contiguous but for the stated stride; every row 16-byte aligned. cudaErrorInvalidValue for what is not supported.
cudaError_t rms_norm_forward(const RmsNormForward& p, cudaStream_t stream);
cudaError_t rms_norm_backward(const RmsNormBackward& p, cudaStream_t stream);

}  // namespace bridge
