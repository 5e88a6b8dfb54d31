#include "gdn.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/sigmoid.h>
#include <ATen/ops/silu.h>
#include <ATen/ops/silu_backward.h>
#include <ATen/ops/softplus.h>
#include <torch/csrc/autograd/custom_function.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "delta_rule.h"

namespace bridge_shim {

namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

at::ScalarType wide_kind(const at::Tensor& x) {
  return x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

// An autograd node refuses undefined inputs.
std::optional<at::Tensor> present(const at::Tensor& x) {
  return x.defined() ? std::optional<at::Tensor>(x) : std::nullopt;
}

Chunks chunks_of(AutogradContext* ctx, const at::Tensor& like) {
  return Chunks(ctx->saved_data["batch"].toInt(), ctx->saved_data["seq"].toInt(),
                ctx->saved_data["cu_seqlens"].toIntVector(), ctx->saved_data["mask"].toTensor(), like);
}

void remember(AutogradContext* ctx, int64_t batch, int64_t seq, const std::vector<int64_t>& cu_seqlens,
              const at::Tensor& mask) {
  ctx->saved_data["batch"] = batch;
  ctx->saved_data["seq"] = seq;
  ctx->saved_data["cu_seqlens"] = cu_seqlens;
  ctx->saved_data["mask"] = mask;
}

// [b, s, h, ..] -> [tokens, h, ..]
at::Tensor tokens(const at::Tensor& x, at::ScalarType kind) {
  return x.flatten(0, 1).to(kind);
}

class DeltaRuleNode : public torch::autograd::Function<DeltaRuleNode> {
 public:
  static variable_list forward(AutogradContext* ctx, const at::Tensor& q, const at::Tensor& k,
                               const at::Tensor& v, const at::Tensor& decay, const at::Tensor& beta,
                               const std::optional<at::Tensor>& maybe_state,
                               const std::optional<at::Tensor>& maybe_mask,
                               const std::vector<int64_t>& cu_seqlens) {
    const at::Tensor state = maybe_state.value_or(at::Tensor()), mask = maybe_mask.value_or(at::Tensor());
    const at::ScalarType kind = wide_kind(v);
    remember(ctx, v.size(0), v.size(1), cu_seqlens, mask);
    const at::Tensor v_rows = tokens(v, kind);
    const Chunks chunks = chunks_of(ctx, v_rows);
    at::Tensor final_state;
    std::vector<at::Tensor> saved;
    const at::Tensor out =
        DeltaRule::forward(chunks, tokens(q, kind), tokens(k, kind), v_rows, tokens(decay, kind),
                           tokens(beta, kind), state.defined() ? state.to(kind) : state, final_state, saved);
    ctx->save_for_backward(std::move(saved));
    ctx->saved_data["has_state"] = state.defined();
    ctx->saved_data["kinds"] = std::vector<int64_t>{
        static_cast<int64_t>(q.scalar_type()), static_cast<int64_t>(k.scalar_type()),
        static_cast<int64_t>(v.scalar_type()), static_cast<int64_t>(decay.scalar_type()),
        static_cast<int64_t>(beta.scalar_type())};
    return {out.reshape(v.sizes()).to(v.scalar_type()), final_state};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const variable_list saved = ctx->get_saved_variables();
    const at::Tensor& v = saved[DeltaRule::kV];
    const Chunks chunks = chunks_of(ctx, v);
    const int64_t batch = ctx->saved_data["batch"].toInt(), seq = ctx->saved_data["seq"].toInt();
    const at::Tensor grad_out = grads[0].defined() ? tokens(grads[0], v.scalar_type())
                                                   : v.new_zeros({batch * seq, v.size(1), v.size(3)});
    DeltaRule::Gradients d = DeltaRule::backward(chunks, saved, grad_out, grads[1]);
    const std::vector<int64_t> kinds = ctx->saved_data["kinds"].toIntVector();
    const auto shaped = [&](const at::Tensor& x, size_t i) {
      return x.unflatten(0, {batch, seq}).to(static_cast<at::ScalarType>(kinds[i]));
    };
    const at::Tensor grad_state = ctx->saved_data["has_state"].toBool() ? d.state : at::Tensor();
    return {shaped(d.q, 0),    shaped(d.k, 1), shaped(d.v, 2), shaped(d.decay, 3),
            shaped(d.beta, 4), grad_state,     at::Tensor(),   at::Tensor()};
  }
};

// Start, length and number of each sample along dim 1; a padded batch is one span over all rows.
std::vector<std::pair<int64_t, int64_t>> spans(int64_t seq, const std::vector<int64_t>& cu_seqlens) {
  if (cu_seqlens.empty()) {
    return {{0, seq}};
  }
  std::vector<std::pair<int64_t, int64_t>> out;
  for (size_t i = 0; i + 1 < cu_seqlens.size(); ++i) {
    out.emplace_back(cu_seqlens[i], cu_seqlens[i + 1] - cu_seqlens[i]);
  }
  return out;
}

// Inputs from..from + count of state [n, c, taps - 1] that span i sees before it: [its rows, count, c].
at::Tensor inputs_before(const at::Tensor& state, const std::vector<int64_t>& cu_seqlens, size_t i,
                         int64_t from, int64_t count) {
  const at::Tensor before = cu_seqlens.empty() ? state : state.narrow(0, static_cast<int64_t>(i), 1);
  return before.narrow(2, from, count).transpose(1, 2);
}

// x [b, s, c] in any kind, weight [c, taps]; inputs before a sample are zero, or state [n, c, taps - 1].
at::Tensor convolve(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& state,
                    const std::vector<int64_t>& cu_seqlens) {
  const int64_t taps = weight.size(1);
  at::Tensor y = x * weight.select(1, taps - 1);
  const auto pieces = spans(x.size(1), cu_seqlens);
  for (int64_t back = 1; back < taps; ++back) {
    const at::Tensor tap = weight.select(1, taps - 1 - back).contiguous();
    for (size_t i = 0; i < pieces.size(); ++i) {
      const auto [start, length] = pieces[i];
      if (length > back) {
        y.narrow(1, start + back, length - back).addcmul_(x.narrow(1, start, length - back), tap);
      }
      const int64_t early = std::min(back, length);
      if (state.defined() && early > 0) {
        const at::Tensor before = inputs_before(state, cu_seqlens, i, taps - 1 - back, early);
        y.narrow(1, start, early).addcmul_(before.to(y.scalar_type()), tap);
      }
    }
  }
  return y;
}

class GdnNode : public torch::autograd::Function<GdnNode> {
 public:
  // After the delta rule's own tensors.
  enum Saved { kU = DeltaRule::kCount, kPre, kZ, kA, kB, kConv, kALog, kDtBias, kNorm, kOut };

  static variable_list forward(AutogradContext* ctx, const at::Tensor& x, const at::Tensor& conv,
                               const at::Tensor& a_log, const at::Tensor& dt_bias, const at::Tensor& norm,
                               const std::optional<at::Tensor>& maybe_conv_state,
                               const std::optional<at::Tensor>& maybe_state,
                               const std::optional<at::Tensor>& maybe_mask,
                               const std::vector<int64_t>& cu_seqlens, int64_t key_heads, int64_t key_dim,
                               double eps) {
    const at::Tensor conv_state = maybe_conv_state.value_or(at::Tensor());
    const at::Tensor state = maybe_state.value_or(at::Tensor()), mask = maybe_mask.value_or(at::Tensor());
    const at::ScalarType kind = wide_kind(x);
    const int64_t batch = x.size(0), seq = x.size(1), h = a_log.size(0), dv = norm.size(0);
    const int64_t keys = key_heads * key_dim, values = h * dv;
    remember(ctx, batch, seq, cu_seqlens, mask);
    at::Tensor all = x.to(kind);
    if (mask.defined()) {
      all = all * mask.unsqueeze(-1).to(kind);
    }
    const at::Tensor u = all.narrow(2, 0, 2 * keys + values);
    const at::Tensor z = all.narrow(2, 2 * keys + values, values).reshape({batch * seq, h, dv});
    const at::Tensor b = all.narrow(2, 2 * (keys + values), h).reshape({batch * seq, h});
    const at::Tensor a = all.narrow(2, 2 * (keys + values) + h, h).reshape({batch * seq, h});
    const at::Tensor conv_wide = conv.to(kind), norm_wide = norm.to(kind) + 1;
    const at::Tensor a_log_wide = a_log.to(kind), dt_wide = dt_bias.to(kind);

    const at::Tensor pre = convolve(u, conv_wide, conv_state, cu_seqlens);
    const at::Tensor mixed = at::silu(pre).flatten(0, 1);
    const auto heads = [&](int64_t from, int64_t count, int64_t dim) {
      return mixed.narrow(1, from, count * dim).unflatten(1, {count, dim});
    };
    const at::Tensor decay = at::softplus(a + dt_wide) * a_log_wide.exp().neg();
    const at::Tensor v = heads(2 * keys, h, dv);
    const Chunks chunks = chunks_of(ctx, pre);
    at::Tensor final_state;
    std::vector<at::Tensor> saved;
    const at::Tensor out =
        DeltaRule::forward(chunks, heads(0, key_heads, key_dim), heads(keys, key_heads, key_dim), v, decay,
                           at::sigmoid(b), state.defined() ? state.to(kind) : state, final_state, saved);
    const at::Tensor normed = out * (out.square().mean(-1, true) + eps).rsqrt();
    const at::Tensor y = (normed * norm_wide).mul_(at::silu(z));
    saved.insert(saved.end(), {u, pre, z, a, b, conv_wide, a_log_wide, dt_wide, norm_wide, out});
    ctx->save_for_backward(std::move(saved));
    ctx->saved_data["eps"] = eps;
    ctx->saved_data["conv_state"] = conv_state;
    ctx->saved_data["kinds"] = std::vector<int64_t>{
        static_cast<int64_t>(x.scalar_type()), static_cast<int64_t>(conv.scalar_type()),
        static_cast<int64_t>(a_log.scalar_type()), static_cast<int64_t>(dt_bias.scalar_type()),
        static_cast<int64_t>(norm.scalar_type())};
    ctx->mark_non_differentiable({final_state});
    return {y.reshape({batch, seq, values}).to(x.scalar_type()), final_state};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const variable_list saved = ctx->get_saved_variables();
    const at::Tensor &u = saved[kU], &pre = saved[kPre], &z = saved[kZ], &out = saved[kOut];
    const at::Tensor &conv = saved[kConv], &norm = saved[kNorm];
    const at::ScalarType kind = pre.scalar_type();
    const int64_t batch = pre.size(0), seq = pre.size(1), width = pre.size(2);
    const int64_t h = z.size(1), dv = z.size(2), values = h * dv, keys = (width - values) / 2;
    const int64_t taps = conv.size(1);
    const std::vector<int64_t> kinds = ctx->saved_data["kinds"].toIntVector();
    const auto as = [&](const at::Tensor& x, size_t i) { return x.to(static_cast<at::ScalarType>(kinds[i])); };
    const at::Tensor mask = ctx->saved_data["mask"].toTensor();

    // Through y = normed norm silu(z).
    const at::Tensor grad_y = grads[0].reshape({batch * seq, h, dv}).to(kind);
    const at::Tensor scale = (out.square().mean(-1, true) + ctx->saved_data["eps"].toDouble()).rsqrt();
    const at::Tensor normed = out * scale;
    const at::Tensor gated = grad_y * at::silu(z);
    const at::Tensor grad_norm = (gated * normed).sum(at::IntArrayRef{0, 1});
    const at::Tensor grad_normed = gated * norm;
    const at::Tensor grad_z = at::silu_backward((grad_y * normed).mul_(norm), z);
    const at::Tensor grad_out =
        (grad_normed - normed * (grad_normed * normed).mean(-1, true)).mul_(scale);

    const Chunks chunks = chunks_of(ctx, pre);
    const DeltaRule::Gradients d = DeltaRule::backward(chunks, saved, grad_out, at::Tensor());

    const at::Tensor grad_mixed = at::empty({batch * seq, width}, pre.options());
    grad_mixed.narrow(1, 0, keys).copy_(d.q.flatten(1));
    grad_mixed.narrow(1, keys, keys).copy_(d.k.flatten(1));
    grad_mixed.narrow(1, 2 * keys, values).copy_(d.v.flatten(1));
    const at::Tensor grad_pre = at::silu_backward(grad_mixed.view({batch, seq, width}), pre);
    at::Tensor grad_u = grad_pre * conv.select(1, taps - 1);
    const at::Tensor grad_conv = at::empty({taps, width}, pre.options());
    grad_conv.select(0, taps - 1).copy_((grad_pre * u).sum(at::IntArrayRef{0, 1}));
    const std::vector<int64_t> cu_seqlens = ctx->saved_data["cu_seqlens"].toIntVector();
    const at::Tensor conv_state = ctx->saved_data["conv_state"].toTensor();
    const auto pieces = spans(seq, cu_seqlens);
    for (int64_t back = 1; back < taps; ++back) {
      const at::Tensor tap = conv.select(1, taps - 1 - back).contiguous();
      at::Tensor sum = grad_conv.select(0, taps - 1 - back).zero_();
      for (size_t i = 0; i < pieces.size(); ++i) {
        const auto [start, length] = pieces[i];
        if (length > back) {
          const at::Tensor later = grad_pre.narrow(1, start + back, length - back);
          grad_u.narrow(1, start, length - back).addcmul_(later, tap);
          sum += (later * u.narrow(1, start, length - back)).sum(at::IntArrayRef{0, 1});
        }
        const int64_t early = std::min(back, length);
        if (conv_state.defined() && early > 0) {
          const at::Tensor before = inputs_before(conv_state, cu_seqlens, i, taps - 1 - back, early);
          sum += (grad_pre.narrow(1, start, early) * before).sum(at::IntArrayRef{0, 1});
        }
      }
    }

    const at::Tensor beta = at::sigmoid(saved[kB]);
    const at::Tensor shifted = saved[kA] + saved[kDtBias];
    const at::Tensor rate = saved[kALog].exp().neg();
    const at::Tensor grad_a = (d.decay * at::sigmoid(shifted)).mul_(rate);
    const at::Tensor grad_a_log = (d.decay * at::softplus(shifted)).sum(0) * rate;
    const at::Tensor grad_b = d.beta * beta * (1 - beta);

    at::Tensor grad_x = at::empty({batch, seq, 2 * (keys + values) + 2 * h},
                                  pre.options().dtype(static_cast<at::ScalarType>(kinds[0])));
    grad_x.narrow(2, 0, width).copy_(grad_u);
    grad_x.narrow(2, width, values).copy_(grad_z.reshape({batch, seq, values}));
    grad_x.narrow(2, width + values, h).copy_(grad_b.reshape({batch, seq, h}));
    grad_x.narrow(2, width + values + h, h).copy_(grad_a.reshape({batch, seq, h}));
    if (mask.defined()) {
      grad_x.mul_(mask.unsqueeze(-1).to(grad_x.scalar_type()));
    }
    const at::Tensor none;
    return {grad_x, as(grad_conv.t(), 1), as(grad_a_log, 2), as(grad_a.sum(0), 3), as(grad_norm, 4),
            none,   none,                 none,              none,                 none,
            none,   none};
  }
};

}  // namespace

std::unique_ptr<Tensors> gated_delta_rule(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                          const at::Tensor& decay, const at::Tensor& beta,
                                          const at::Tensor& state, const at::Tensor& mask,
                                          rust::Slice<const int64_t> cu_seqlens) {
  const std::vector<int64_t> borders(cu_seqlens.begin(), cu_seqlens.end());
  return std::make_unique<Tensors>(DeltaRuleNode::apply(q, k, v, decay, beta, present(state), present(mask), borders));
}

std::unique_ptr<Tensors> gdn_core(const at::Tensor& x, const at::Tensor& conv, const at::Tensor& a_log,
                                  const at::Tensor& dt_bias, const at::Tensor& norm,
                                  const at::Tensor& conv_state, const at::Tensor& state,
                                  const at::Tensor& mask, rust::Slice<const int64_t> cu_seqlens,
                                  int64_t key_heads, int64_t key_dim, double eps) {
  const std::vector<int64_t> borders(cu_seqlens.begin(), cu_seqlens.end());
  return std::make_unique<Tensors>(GdnNode::apply(x, conv, a_log, dt_bias, norm, present(conv_state),
                                                  present(state), present(mask), borders, key_heads, key_dim,
                                                  eps));
}

}  // namespace bridge_shim
