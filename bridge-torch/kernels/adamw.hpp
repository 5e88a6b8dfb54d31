#pragma once

#include "cuda_types.hpp"

namespace bridge {

// One tensor to train; an array of these lies in device memory. Starts of all arrays are 16-byte aligned.
struct AdamWTensor {
  void* parameter;       // [numel], dtype
  float* master;         // [numel] or null: then `parameter` itself is stepped
  const void* gradient;  // [numel], gradient_dtype
  void* exp_avg;         // [numel]: float, or codes of 8 bits
  void* exp_avg_sq;
  float* exp_avg_scale;     // [ceil(numel / 256)]: the largest magnitude of a block of 256; null for float moments
  float* exp_avg_sq_scale;
  int64_t numel;
  float weight_decay;    // decoupled
  DType dtype, gradient_dtype;
};

// 65536 elements of a tensor, the work of one block.
struct AdamWChunk {
  int64_t first;  // a multiple of kAdamWChunk
  int tensor;
};

inline constexpr int64_t kAdamWChunk = 65536;

// What the steps so far left on the device.
struct AdamWProgress {
  double norm;              // of all gradients before clipping, in the last call
  float clip;               // what gradients were multiplied by: min(1, max_norm / (norm + 1e-6))
  float correction1;        // 1 - beta1^step
  float root_correction2;   // sqrt(1 - beta2^step)
  int step;                 // steps made; a norm that is not finite makes none
  int finite;
};

// As torch.optim.AdamW: w -= lr wd w; m += (1 - beta1)(g - m); v = beta2 v + (1 - beta2) g^2;
// w -= lr / correction1 * m / (sqrt(v) / root_correction2 + eps).
struct AdamW {
  const AdamWTensor* tensors;
  const AdamWChunk* chunks;
  AdamWProgress* progress;
  double* workspace;       // [num_chunks]
  int64_t num_chunks;
  float lr;
  double beta1, beta2;
  float eps;
  float max_norm;          // 0: no clipping
  bool eight_bit;          // moments as codes of 8 bits with a scale a block of 256, rounded at random, without bias
  bool stochastic;         // bf16 parameters without a master are rounded at random, without bias
  uint64_t seed;           // of the roundings; with the step and the element's place it fixes every bit
};

// Clips by the global norm and steps every tensor; three launches. Nothing but `norm` and `finite` changes if the norm is
// not finite.
cudaError_t adamw_step(const AdamW& p, cudaStream_t stream);

}  // namespace bridge
