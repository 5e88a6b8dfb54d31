// The gated delta rule token by token in float64, with its gradients: the oracle of the kernels, itself held against the
// goldens. Any head widths.
#pragma once

#include "check.hpp"

namespace check {

struct GdnCase {
  std::vector<int> lengths;
  int tail = 0;
  int key_heads = 1, value_heads = 1, key_dim = 128, value_dim = 128;
  Values q, k, v;  // [tokens, key_heads, key_dim], [tokens, value_heads, value_dim]
  Values g, beta;  // [tokens, value_heads]
  Values state;    // [sequences, value_heads, key_dim, value_dim] or empty

  size_t tokens() const {
    size_t sum = static_cast<size_t>(tail);
    for (int length : lengths) {
      sum += static_cast<size_t>(length);
    }
    return sum;
  }
};

struct GdnResult {
  Values out, state;
};

inline GdnResult gdn_reference(const GdnCase& c) {
  const auto hk = static_cast<size_t>(c.key_heads), hv = static_cast<size_t>(c.value_heads), dk = static_cast<size_t>(c.key_dim),
             dv = static_cast<size_t>(c.value_dim);
  GdnResult result{Values(c.tokens() * hv * dv), Values(c.lengths.size() * hv * dk * dv)};
  for (size_t head = 0; head < hv; ++head) {
    const size_t key_head = head / (hv / hk);
    size_t token = 0;
    for (size_t s = 0; s < c.lengths.size(); ++s) {
      double* state = result.state.data() + (s * hv + head) * dk * dv;
      if (!c.state.empty()) {
        std::copy_n(c.state.data() + (s * hv + head) * dk * dv, dk * dv, state);
      }
      for (int t = 0; t < c.lengths[s]; ++t, ++token) {
        const double* q = c.q.data() + (token * hk + key_head) * dk;
        const double* k = c.k.data() + (token * hk + key_head) * dk;
        const double* v = c.v.data() + (token * hv + head) * dv;
        double* out = result.out.data() + (token * hv + head) * dv;
        double q_squares = 0.0, k_squares = 0.0;
        for (size_t i = 0; i < dk; ++i) {
          q_squares += q[i] * q[i];
          k_squares += k[i] * k[i];
        }
        const double q_scale = 1.0 / std::sqrt((q_squares + 1e-6) * static_cast<double>(dk)), k_scale = 1.0 / std::sqrt(k_squares + 1e-6);
        const double decay = std::exp(c.g[token * hv + head]), beta = c.beta[token * hv + head];
        Values delta(v, v + dv);
        for (size_t i = 0; i < dk; ++i) {
          for (size_t j = 0; j < dv; ++j) {
            state[i * dv + j] *= decay;
            delta[j] -= k[i] * k_scale * state[i * dv + j];
          }
        }
        for (size_t i = 0; i < dk; ++i) {
          for (size_t j = 0; j < dv; ++j) {
            state[i * dv + j] += k[i] * k_scale * beta * delta[j];
            out[j] += q[i] * q_scale * state[i * dv + j];
          }
        }
      }
    }
  }
  return result;
}

}  // namespace check
