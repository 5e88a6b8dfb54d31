#pragma once

#include "cuda_types.hpp"

namespace bridge {

// One tensor to train; an array of these lies in device memory. Starts of all arrays are 16-byte aligned.
struct AdamWTensor {
  void* parameter;       // [numel], dtype
  float* master;         // [numel] or null: then `parameter` itself is stepped
  void* exp_avg;         // [numel]: float, or codes of 8 bits
  void* exp_avg_sq;
  float* exp_avg_scale;     // [ceil(numel / 256)]: the largest magnitude of a block of 256; null for float moments
  float* exp_avg_sq_scale;
  float* count;          // steps that this tensor has made
  int64_t numel;
  float weight_decay;    // decoupled
  DType dtype;
};

// The gradient of one tensor in this step.
struct AdamWGradient {
  const void* data;  // [numel], or null: the tensor is left as it is, its count too
  DType dtype;
};

// 65536 elements of a tensor, the work of one block.
struct AdamWChunk {
  int64_t first;  // a multiple of kAdamWChunk
  int tensor;
};

inline constexpr int64_t kAdamWChunk = 65536;

// What a step leaves on the device.
struct AdamWProgress {
  double norm;  // of all gradients before clipping
  float clip;   // what gradients were multiplied by: min(1, max_norm / (norm + 1e-6))
  int finite;   // whether the norm is, and so whether the step was made
};

// What the steps of one tensor so far make of its moments.
struct AdamWCorrection {
  float first;        // 1 - beta1^step
  float root_second;  // sqrt(1 - beta2^step)
  unsigned step;      // this one is the first: 1
};

// As torch.optim.AdamW: w -= lr wd w; m += (1 - beta1)(g - m); v = beta2 v + (1 - beta2) g^2;
// w -= lr / correction1 * m / (sqrt(v) / root_correction2 + eps).
struct AdamW {
  const AdamWTensor* tensors;      // [num_tensors]
  const AdamWGradient* gradients;  // [num_tensors]
  const AdamWChunk* chunks;        // [num_chunks], of all tensors
  AdamWCorrection* corrections;    // [num_tensors], to work in
  double* workspace;               // [num_chunks]
  AdamWProgress* progress;
  int64_t num_tensors, num_chunks;
  float lr;
  double beta1, beta2;
  float eps;
  float max_norm;          // 0: no clipping
  bool eight_bit;          // moments as codes of 8 bits with a scale a block of 256, rounded at random, without bias
  bool stochastic;         // bf16 parameters without a master are rounded at random, without bias
  uint64_t seed;           // of the roundings; with a tensor's number, its step and the element's place it fixes every bit
};

// Clips by the global norm and steps every tensor; three launches. Nothing but `norm` and `finite` changes if the norm is
// not finite.
cudaError_t adamw_step(const AdamW& p, cudaStream_t stream);

}  // namespace bridge
