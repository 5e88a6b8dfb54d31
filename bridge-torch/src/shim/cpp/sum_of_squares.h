#pragma once

#include <ATen/core/Tensor.h>

namespace bridge_shim {

// Of a contiguous bfloat16 tensor on the CPU, accumulated in float32 by blocks and in float64 beyond.
// libtorch's own norm either rounds its result to bfloat16 or copies the tensor to float32 first.
double sum_of_squares(const at::Tensor& values);

}  // namespace bridge_shim
