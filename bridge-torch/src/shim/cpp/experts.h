#pragma once

#include <ATen/core/Tensor.h>

#include <memory>

namespace bridge_shim {

// sum_k weights[n, k] fc2[e] swiglu(fc1[e] x[n]) with e = experts[n, k].
// x [n, h], weights [n, k], experts [n, k] int64, fc1 [E, 2 I, h] (gate first), fc2 [E, h, I]; gives [n, h].
// Choices are sorted by expert, so that each expert is two products and every gradient a gather.
std::unique_ptr<at::Tensor> routed_experts(const at::Tensor& x, const at::Tensor& weights, const at::Tensor& fc1,
                                           const at::Tensor& fc2, const at::Tensor& experts);

}  // namespace bridge_shim
