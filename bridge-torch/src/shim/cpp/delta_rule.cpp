#include "delta_rule.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/baddbmm.h>
#include <ATen/ops/bmm.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/eye.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>

#include <cmath>

namespace bridge_shim {

namespace {

constexpr double kL2Eps = 1e-6;
constexpr int64_t kBase = 8;  // powers of an 8 x 8 block stay small even for equal keys

// [.., a, b] -> [n, a, b]
at::Tensor flat(const at::Tensor& x) {
  return x.reshape({-1, x.size(-2), x.size(-1)});
}

at::Tensor product(const at::Tensor& a, const at::Tensor& b) {
  return at::bmm(a, b);
}

at::Tensor transposed(const at::Tensor& x) {
  return x.transpose(-1, -2);
}

// Blocks (row, column) of size m on the diagonal of 2m-blocks, as a view [n, pairs, m, m].
at::Tensor pair_blocks(const at::Tensor& x, int64_t m, int64_t row, int64_t column) {
  const int64_t pairs = x.size(-1) / (2 * m);
  return x.view({x.size(0), pairs, 2, m, pairs, 2, m})
      .select(2, row)
      .select(4, column)
      .diagonal(0, 1, 3)
      .permute({0, 3, 1, 2});
}

// (I + a)^-1 of strictly lower triangular a [n, C, C]: 8 x 8 blocks by (I - a)(I + a^2)(I + a^4), then joined in pairs.
at::Tensor unit_lower_inverse(const at::Tensor& a) {
  const int64_t n = a.size(0), size = a.size(1), blocks = size / kBase;
  const auto diagonal = [&](const at::Tensor& x) {
    return x.view({n, blocks, kBase, blocks, kBase}).diagonal(0, 1, 3).permute({0, 3, 1, 2});
  };
  at::Tensor power = diagonal(a).reshape({n * blocks, kBase, kBase});
  at::Tensor inverse = at::eye(kBase, a.options()) - power;
  for (int64_t degree = 2; degree < kBase; degree *= 2) {
    power = product(power, power);
    inverse = at::baddbmm(inverse, inverse, power);
  }
  at::Tensor out = at::zeros_like(a);
  diagonal(out).copy_(inverse.view({n, blocks, kBase, kBase}));
  for (int64_t m = kBase; m < size; m *= 2) {
    const at::Tensor upper = flat(pair_blocks(out, m, 0, 0)), lower = flat(pair_blocks(out, m, 1, 1));
    const at::Tensor corner = product(product(lower, flat(pair_blocks(a, m, 1, 0))), upper);
    pair_blocks(out, m, 1, 0).copy_(corner.view({n, -1, m, m}).neg());
  }
  return out;
}

// x [X, g, C, d] for every value head: a view [X, g, 1, C, d] that broadcasts over [X, g, r, C, d].
at::Tensor per_key_head(const at::Tensor& x) {
  return x.unsqueeze(2);
}

// [X, h, ..] -> [X, g, r, ..]
at::Tensor grouped(const at::Tensor& x, int64_t key_heads) {
  std::vector<int64_t> shape = x.sizes().vec();
  shape.insert(shape.begin() + 1, key_heads);
  shape[2] /= key_heads;
  return x.view(shape);
}

// exp(c_i - c_j) for j <= i, else 0: [.., C, 1] -> [.., C, C].
at::Tensor decays(const at::Tensor& c) {
  // Vectorised exp is some twenty times slower on infinities and on results below the smallest normal number.
  const double smallest = c.scalar_type() == at::kDouble ? -700 : -87;
  return (c - transposed(c)).clamp_(smallest, 0).exp_().tril_();
}

at::Tensor unit_backward(const at::Tensor& x, const at::Tensor& inverse_length, const at::Tensor& grad) {
  const at::Tensor along = (x * grad).sum(-1, true) * inverse_length.square();
  return (grad - x * along) * inverse_length;
}

}  // namespace

at::Tensor DeltaRule::forward(const Chunks& chunks, const at::Tensor& q_raw, const at::Tensor& k_raw,
                              const at::Tensor& v_raw, const at::Tensor& decay, const at::Tensor& beta_raw,
                              const at::Tensor& state, at::Tensor& final_state,
                              std::vector<at::Tensor>& saved) {
  const int64_t x = chunks.count, size = chunks.size;
  const int64_t g = q_raw.size(1), h = v_raw.size(1), dk = q_raw.size(2), dv = v_raw.size(2);
  const at::Tensor q = chunks.gather(q_raw), k = chunks.gather(k_raw), v = chunks.gather(v_raw);
  const at::Tensor c = chunks.gather(decay.unsqueeze(-1)).cumsum(2);  // [X, h, C, 1]
  const at::Tensor beta = chunks.gather(beta_raw.unsqueeze(-1));
  const at::Tensor unit_q = (q.square().sum(-1, true) + kL2Eps).rsqrt();
  const at::Tensor unit_k = (k.square().sum(-1, true) + kL2Eps).rsqrt();
  const at::Tensor k_hat = k * unit_k;
  const at::Tensor q_hat = q * (unit_q * std::pow(static_cast<double>(dk), -0.5));

  const at::Tensor products =
      product(flat(at::cat({q_hat, k_hat}, 2)), transposed(flat(k_hat))).view({x, g, 1, 2 * size, size});
  const at::Tensor kk = products.narrow(3, size, size);
  const at::Tensor d = decays(c);
  const at::Tensor d_grouped = grouped(d, g);  // [X, g, r, C, C]
  const at::Tensor p = products.narrow(3, 0, size) * d_grouped;
  const at::Tensor a = (kk * d_grouped).mul_(grouped(beta, g)).tril_(-1);
  const at::Tensor inverse = unit_lower_inverse(flat(a));

  const at::Tensor e = c.exp();
  const at::Tensor rhs = at::empty({x, h, size, dv + dk}, v.options());
  rhs.narrow(3, 0, dv).copy_(v * beta);
  grouped(rhs.narrow(3, dv, dk), g).copy_(per_key_head(k_hat) * grouped(beta * e, g));
  const at::Tensor uw = product(inverse, flat(rhs)).view({x, h, size, dv + dk});
  const at::Tensor u = uw.narrow(3, 0, dv), w = uw.narrow(3, dv, dk);
  const at::Tensor last = c.narrow(2, size - 1, 1);
  const at::Tensor k_decayed = (per_key_head(k_hat) * grouped((last - c).exp(), g)).reshape({x, h, size, dk});
  const at::Tensor e_last = last.exp();  // [X, h, 1, 1]

  at::Tensor states = at::empty({x, h, dk, dv}, v.options());
  at::Tensor v_new = at::empty({x, h, size, dv}, v.options());
  at::Tensor current = state.defined() ? chunks.by_length(state).contiguous()
                                       : at::zeros({chunks.samples, h, dk, dv}, v.options());
  at::Tensor finals = at::empty_like(current);
  int64_t start = 0, left = chunks.samples;
  for (const int64_t active : chunks.active) {
    finals.narrow(0, active, left - active).copy_(current.narrow(0, active, left - active));
    left = active;
    const auto step = [&](const at::Tensor& t) { return t.narrow(0, start, active); };
    current = current.narrow(0, 0, active);
    step(states).copy_(current);
    at::Tensor v_step = flat(step(v_new));
    at::baddbmm_out(v_step, flat(step(u)), flat(step(w)), flat(current), 1, -1);
    current = at::baddbmm(flat(current * step(e_last)), transposed(flat(step(k_decayed))), v_step)
                  .view({active, h, dk, dv});
    start += active;
  }
  finals.narrow(0, 0, left).copy_(current.narrow(0, 0, left));
  final_state = chunks.by_sample(finals);

  const at::Tensor q_decayed = (per_key_head(q_hat) * grouped(e, g)).reshape({x, h, size, dk});
  at::Tensor out = product(flat(q_decayed), flat(states));
  out.baddbmm_(p.view({x * h, size, size}), flat(v_new));
  saved = {q, k, v, c, beta, unit_q, unit_k, inverse, uw, p, d, kk, states, v_new};
  return chunks.scatter(out.view({x, h, size, dv}), false);
}

DeltaRule::Gradients DeltaRule::backward(const Chunks& chunks, const std::vector<at::Tensor>& saved,
                                         const at::Tensor& grad_out, const at::Tensor& grad_state) {
  const at::Tensor &q = saved[kQ], &k = saved[kK], &v = saved[kV], &c = saved[kC], &beta = saved[kBeta];
  const at::Tensor &uw = saved[kUw], &p = saved[kP], &d = saved[kD], &kk = saved[kKk];
  const at::Tensor &states = saved[kStates], &v_new = saved[kVNew], &inverse = saved[kInverse];
  const int64_t x = chunks.count, size = chunks.size;
  const int64_t g = q.size(1), h = v.size(1), dk = q.size(3), dv = v.size(3);
  const double scale = std::pow(static_cast<double>(dk), -0.5);
  const at::Tensor k_hat = k * saved[kUnitK], q_hat = q * (saved[kUnitQ] * scale);
  const at::Tensor e = c.exp(), last = c.narrow(2, size - 1, 1), e_last = last.exp();
  const at::Tensor to_last = (last - c).exp();
  const at::Tensor q_decayed = (per_key_head(q_hat) * grouped(e, g)).reshape({x, h, size, dk});
  const at::Tensor k_decayed = (per_key_head(k_hat) * grouped(to_last, g)).reshape({x, h, size, dk});
  const at::Tensor w = uw.narrow(3, dv, dk);

  const at::Tensor grad_o = chunks.gather(grad_out);
  const at::Tensor p_flat = p.view({x * h, size, size});
  const at::Tensor grad_uw = at::empty({x, h, size, dv + dk}, v.options());
  const at::Tensor from_out = product(transposed(p_flat), flat(grad_o)).view({x, h, size, dv});
  const at::Tensor state_from_out = product(transposed(flat(q_decayed)), flat(grad_o)).view({x, h, dk, dv});
  at::Tensor grad_v_new = at::empty({x, h, size, dv}, v.options());
  at::Tensor grad_states = at::empty({x, h, dk, dv}, v.options());  // of the state behind each chunk
  const at::Tensor running = grad_state.defined()
                                 ? chunks.by_length(grad_state).clone(at::MemoryFormat::Contiguous)
                                 : at::zeros({chunks.samples, h, dk, dv}, v.options());
  int64_t start = x;
  for (auto active = chunks.active.rbegin(); active != chunks.active.rend(); ++active) {
    start -= *active;
    const auto step = [&](const at::Tensor& t) { return t.narrow(0, start, *active); };
    at::Tensor behind = running.narrow(0, 0, *active);
    step(grad_states).copy_(behind);
    at::Tensor grad_step = flat(step(grad_v_new));
    at::baddbmm_out(grad_step, flat(step(from_out)), flat(step(k_decayed)), flat(behind));
    behind.mul_(step(e_last)).add_(step(state_from_out));
    at::Tensor behind_flat = behind.view({*active * h, dk, dv});
    behind_flat.baddbmm_(transposed(flat(step(w))), grad_step, 1, -1);
  }

  const at::Tensor states_t = transposed(flat(states));
  grad_uw.narrow(3, 0, dv).copy_(grad_v_new);
  grad_uw.narrow(3, dv, dk).copy_(product(flat(grad_v_new), states_t).view({x, h, size, dk}).neg_());
  const at::Tensor grad_rhs = product(transposed(inverse), flat(grad_uw));
  at::Tensor grad_a = product(grad_rhs, transposed(flat(uw))).neg_().tril_(-1);
  const at::Tensor rhs_v = grad_rhs.narrow(2, 0, dv).view({x, h, size, dv});
  const at::Tensor rhs_k = grad_rhs.narrow(2, dv, dk).view({x, h, size, dk});
  const at::Tensor grad_q_decayed = product(flat(grad_o), states_t).view({x, h, size, dk});
  const at::Tensor grad_k_decayed =
      product(flat(v_new), transposed(flat(grad_states))).view({x, h, size, dk});
  const at::Tensor grad_p = product(flat(grad_o), transposed(flat(v_new))).view({x, g, h / g, size, size});

  // Through A = beta kk D and P = qk D.
  const at::Tensor d_grouped = grouped(d, g);
  const at::Tensor a_d = grad_a.view({x, g, h / g, size, size}).mul_(d_grouped);
  const at::Tensor a_kk = a_d * kk;
  at::Tensor grad_beta = a_kk.sum(-1, true).view({x, h, size, 1});
  const at::Tensor through_decay = (a_kk * grouped(beta, g)).addcmul_(grad_p, p).view({x, h, size, size});
  at::Tensor grad_c = through_decay.sum(-1, true) - transposed(through_decay.sum(-2, true));
  const at::Tensor grad_kk = flat((a_d * grouped(beta, g)).sum(2));
  const at::Tensor grad_qk = flat((grad_p * d_grouped).sum(2));  // [X g, C, C]

  // Through the right sides and the decayed q and k.
  const at::Tensor rhs_k_along = (grouped(rhs_k, g) * per_key_head(k_hat)).sum(-1, true).view({x, h, size, 1}) * e;
  grad_beta += (rhs_v * v).sum(-1, true) + rhs_k_along;
  const at::Tensor k_along = (grad_k_decayed * k_decayed).sum(-1, true);
  grad_c += rhs_k_along * beta + (grad_q_decayed * q_decayed).sum(-1, true) - k_along;
  grad_c.narrow(2, size - 1, 1) +=
      k_along.sum(2, true) + e_last * (states * grad_states).sum(at::IntArrayRef{2, 3}, true);
  at::Tensor grad_q = grouped(grad_q_decayed * e, g).sum(2);
  at::Tensor grad_k = grouped((rhs_k * (beta * e)).addcmul_(grad_k_decayed, to_last), g).sum(2);
  const at::Tensor k_flat = flat(k_hat), q_flat = flat(q_hat);
  grad_q.view({x * g, size, dk}).baddbmm_(grad_qk, k_flat);
  at::Tensor grad_k_flat = grad_k.view({x * g, size, dk});
  grad_k_flat.baddbmm_(transposed(grad_qk), q_flat);
  grad_k_flat.baddbmm_(grad_kk + transposed(grad_kk), k_flat);

  Gradients out;
  out.q = chunks.scatter(unit_backward(q, saved[kUnitQ], grad_q * scale), true);
  out.k = chunks.scatter(unit_backward(k, saved[kUnitK], grad_k), true);
  out.v = chunks.scatter(rhs_v * beta, true);
  out.decay = chunks.scatter(grad_c.flip(2).cumsum(2).flip(2), true).squeeze(-1);
  out.beta = chunks.scatter(grad_beta, true).squeeze(-1);
  out.state = chunks.by_sample(running);
  return out;
}

}  // namespace bridge_shim
