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

struct GdnGradients {
  Values q, k, v, g, beta, state;
  Values beta_terms;  // the sum of magnitudes of the dot product that a gradient of beta is
};

// The gradients of sum(out d_out) + sum(state d_state); d_state may be empty.
inline GdnGradients gdn_gradients(const GdnCase& c, const Values& d_out, const Values& d_state) {
  const auto hk = static_cast<size_t>(c.key_heads), hv = static_cast<size_t>(c.value_heads), dk = static_cast<size_t>(c.key_dim),
             dv = static_cast<size_t>(c.value_dim);
  GdnGradients grads{Values(c.q.size()), Values(c.k.size()), Values(c.v.size()), Values(c.g.size()), Values(c.beta.size()),
                     Values(c.lengths.size() * hv * dk * dv), Values(c.beta.size())};
  const double scale = 1.0 / std::sqrt(static_cast<double>(dk));
  const auto unit = [&](const double* x, Values& out) {
    double squares = 1e-6;
    for (size_t i = 0; i < dk; ++i) {
      squares += x[i] * x[i];
    }
    const double rho = 1.0 / std::sqrt(squares);
    for (size_t i = 0; i < dk; ++i) {
      out[i] = x[i] * rho;
    }
    return rho;
  };
  // d_x += rho (d - x (x d)) for a normalised x.
  const auto through_norm = [&](double* d_x, const Values& x, double rho, const Values& d) {
    double along = 0.0;
    for (size_t i = 0; i < dk; ++i) {
      along += x[i] * d[i];
    }
    for (size_t i = 0; i < dk; ++i) {
      d_x[i] += rho * (d[i] - x[i] * along);
    }
  };
  Values q(dk), k(dk), d_q(dk), d_k(dk), delta(dv), d_delta(dv), d_write(dv);
  for (size_t head = 0; head < hv; ++head) {
    const size_t key_head = head / (hv / hk);
    size_t first = 0;
    for (size_t s = 0; s < c.lengths.size(); ++s) {
      const auto length = static_cast<size_t>(c.lengths[s]);
      const size_t at = (s * hv + head) * dk * dv;
      std::vector<Values> states(length + 1, Values(dk * dv));  // decayed, before the write of the token
      Values state(dk * dv), d(dk * dv);
      if (!c.state.empty()) {
        std::copy_n(c.state.data() + at, dk * dv, state.data());
      }
      const auto write = [&](size_t token, const Values& decayed, Values& out) {
        unit(c.k.data() + (token * hk + key_head) * dk, k);
        for (size_t j = 0; j < dv; ++j) {
          delta[j] = c.v[(token * hv + head) * dv + j];
          for (size_t i = 0; i < dk; ++i) {
            delta[j] -= k[i] * decayed[i * dv + j];
          }
        }
        for (size_t i = 0; i < dk; ++i) {
          for (size_t j = 0; j < dv; ++j) {
            out[i * dv + j] = decayed[i * dv + j] + k[i] * c.beta[token * hv + head] * delta[j];
          }
        }
      };
      for (size_t t = 0; t < length; ++t) {
        const double decay = std::exp(c.g[(first + t) * hv + head]);
        for (size_t i = 0; i < dk * dv; ++i) {
          states[t][i] = decay * state[i];
        }
        write(first + t, states[t], state);
      }
      if (!d_state.empty()) {
        std::copy_n(d_state.data() + at, dk * dv, d.data());
      }
      for (size_t t = length; t-- > 0;) {
        const size_t token = first + t;
        const double beta = c.beta[token * hv + head];
        const double* d_o = d_out.data() + (token * hv + head) * dv;
        write(token, states[t], state);
        const double rho_q = unit(c.q.data() + (token * hk + key_head) * dk, q);
        const double rho_k = unit(c.k.data() + (token * hk + key_head) * dk, k);
        double d_beta = 0.0, d_g = 0.0;
        std::fill(d_q.begin(), d_q.end(), 0.0);
        std::fill(d_k.begin(), d_k.end(), 0.0);
        std::fill(d_delta.begin(), d_delta.end(), 0.0);
        std::fill(d_write.begin(), d_write.end(), 0.0);
        for (size_t i = 0; i < dk; ++i) {
          for (size_t j = 0; j < dv; ++j) {
            d_q[i] += scale * state[i * dv + j] * d_o[j];
            d[i * dv + j] += scale * q[i] * d_o[j];
            d_delta[j] += beta * k[i] * d[i * dv + j];
            d_write[j] += k[i] * d[i * dv + j];
            d_k[i] += beta * d[i * dv + j] * delta[j];
          }
        }
        for (size_t j = 0; j < dv; ++j) {
          d_beta += d_write[j] * delta[j];
          grads.beta_terms[token * hv + head] += std::abs(d_write[j] * delta[j]);
        }
        for (size_t i = 0; i < dk; ++i) {
          for (size_t j = 0; j < dv; ++j) {
            d_k[i] -= states[t][i * dv + j] * d_delta[j];
            d[i * dv + j] -= k[i] * d_delta[j];
            d_g += d[i * dv + j] * states[t][i * dv + j];
            d[i * dv + j] *= std::exp(c.g[token * hv + head]);
          }
        }
        std::copy_n(d_delta.data(), dv, grads.v.data() + (token * hv + head) * dv);
        grads.g[token * hv + head] = d_g;
        grads.beta[token * hv + head] = d_beta;
        through_norm(grads.q.data() + (token * hk + key_head) * dk, q, rho_q, d_q);
        through_norm(grads.k.data() + (token * hk + key_head) * dk, k, rho_k, d_k);
      }
      std::copy_n(d.data(), dk * dv, grads.state.data() + at);
      first += length;
    }
  }
  return grads;
}

}  // namespace check
