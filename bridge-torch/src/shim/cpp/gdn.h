#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <memory>

#include "rust/cxx.h"
#include "tensors.h"

namespace bridge_shim {

// Undefined tensors stand for absent ones: mask [batch, seq], states.
// cu_seqlens: empty for padded batches.

// q, k [b, s, g, dk], v [b, s, h, dv], decay, beta [b, s, h] -> {out like v, state [n, h, dk, dv]}; all differentiable.
std::unique_ptr<Tensors> gated_delta_rule(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                          const at::Tensor& decay, const at::Tensor& beta,
                                          const at::Tensor& state, const at::Tensor& mask,
                                          rust::Slice<const int64_t> cu_seqlens);

// Convolution, gates, delta rule and gated norm as one autograd node.
// x [b, s, q k v z b a], conv [2 K + V, taps], a_log, dt_bias [h], norm [dv] (zero-centred) -> {out [b, s, h dv], state}.
// conv_state [n, 2 K + V, taps - 1]; the states take no part in the gradient.
std::unique_ptr<Tensors> gdn_core(const at::Tensor& x, const at::Tensor& conv, const at::Tensor& a_log,
                                  const at::Tensor& dt_bias, const at::Tensor& norm,
                                  const at::Tensor& conv_state, const at::Tensor& state,
                                  const at::Tensor& mask, rust::Slice<const int64_t> cu_seqlens,
                                  int64_t key_heads, int64_t key_dim, double eps);

}  // namespace bridge_shim
