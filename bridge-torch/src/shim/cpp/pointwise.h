#pragma once

#include <ATen/core/Tensor.h>

#include <memory>

namespace bridge_shim {

// x [.., d], weight [d] -> x rsqrt(mean(x^2) + eps) (1 + weight), float32 inside (float64 for float64).
std::unique_ptr<at::Tensor> rms_norm(const at::Tensor& x, const at::Tensor& weight, double eps);

// x [.., 2 I], gate first -> silu(gate) up [.., I].
std::unique_ptr<at::Tensor> swiglu(const at::Tensor& x);

}  // namespace bridge_shim
