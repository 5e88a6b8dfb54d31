#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

#include "chunks.h"

namespace bridge_shim {

// The chunked gated delta rule and its gradient, in the kind of its inputs (float32 or float64).
//
// Legend: X chunks, C their size, h value heads, g key heads, r = h / g, dk, dv.
// Per chunk, with c the running sum of the log decay and D_ij = exp(c_i - c_j) for j <= i:
//   A = strictly_lower(beta (k k^T) D),  T = (I + A)^-1,  [u | w] = T [beta v | beta k e^c],  P = (q k^T) D,
//   v' = u - w S,  o = (q e^c) S + P v',  S = e^c_last S + (k e^(c_last - c))^T v'.
// Source: Yang, Kautz, Hatamizadeh 2024, "Gated Delta Networks", section 3.3.
struct DeltaRule {
  // Everything that the gradient needs, in this order.
  enum Saved { kQ, kK, kV, kC, kBeta, kUnitQ, kUnitK, kInverse, kUw, kP, kD, kKk, kStates, kVNew, kCount };

  // q, k: [tokens, g, dk] raw; v: [tokens, h, dv]; decay, beta: [tokens, h]; state: [n, h, dk, dv] or undefined.
  // Returns [tokens, h, dv] and fills final_state [n, h, dk, dv] and saved.
  static at::Tensor forward(const Chunks& chunks, const at::Tensor& q, const at::Tensor& k,
                            const at::Tensor& v, const at::Tensor& decay, const at::Tensor& beta,
                            const at::Tensor& state, at::Tensor& final_state,
                            std::vector<at::Tensor>& saved);

  struct Gradients {
    at::Tensor q, k, v, decay, beta, state;
  };
  // grad_out: [tokens, h, dv]; grad_state: like final_state, or undefined.
  static Gradients backward(const Chunks& chunks, const std::vector<at::Tensor>& saved,
                            const at::Tensor& grad_out, const at::Tensor& grad_state);
};

}  // namespace bridge_shim
