#pragma once

#include "cuda_types.hpp"

namespace bridge {

// out = silu(gate) up, where a row of x is gate[dim], then up[dim].
struct SwigluForward {
  const void* x;     // [rows, 2 dim], rows x_stride elements apart
  void* out;         // [rows, dim]
  int64_t rows;
  int64_t x_stride;
  int dim;           // a multiple of 16 bytes
  DType dtype;
};

// d_up = d_out silu(gate); d_gate = d_out up silu'(gate), both into one tensor of x's shape.
struct SwigluBackward {
  const void* x;      // [rows, 2 dim], rows x_stride elements apart
  const void* d_out;  // [rows, dim]
  void* d_x;          // [rows, 2 dim]
  int64_t rows;
  int64_t x_stride;
  int dim;
  DType dtype;
};

// Contiguous but for the stated stride, 16-byte aligned, fewer than 2^32 pieces of 16 bytes.
cudaError_t swiglu_forward(const SwigluForward& p, cudaStream_t stream);
cudaError_t swiglu_backward(const SwigluBackward& p, cudaStream_t stream);

}  // namespace bridge
