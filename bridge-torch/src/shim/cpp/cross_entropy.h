#pragma once

#include <ATen/core/Tensor.h>

#include <memory>

namespace bridge_shim {

// sum over targets of -log softmax(hidden weight^T)[target] / normalizer, a scalar in float32 (float64 for float64).
// hidden [n, h], weight [V, h], targets [n] int64 (-100 is ignored). Gradients are computed in the forward pass, over
// the logits: pieces of rows in the inputs' dtype, of which a few rows at a time exist in float32.
std::unique_ptr<at::Tensor> linear_cross_entropy(const at::Tensor& hidden, const at::Tensor& weight,
                                                 const at::Tensor& targets, double normalizer);

}  // namespace bridge_shim
