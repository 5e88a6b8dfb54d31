// Router and routed experts. Rows are sorted by expert on the device and multiplied by libtorch's grouped product.
#include <ATen/ops/_grouped_mm.h>
#include <ATen/ops/empty_like.h>

#include "../dispatch.hpp"
#include "../expert_activation.hpp"
#include "../router.hpp"
#include "../swiglu.hpp"
#include "library.hpp"

namespace bridge::operators {

namespace {

class RouteNode : public torch::autograd::Function<RouteNode> {
 public:
  static variable_list forward(AutogradContext* ctx, const at::Tensor& logits, int64_t top_k) {
    check(logits, "logits", logits, logits.scalar_type(), {-1, -1});
    const at::Tensor rows = logits.contiguous();
    const int64_t tokens = rows.size(0);
    at::Tensor weights = at::empty({tokens, top_k}, rows.options());
    at::Tensor chosen = at::empty({tokens, top_k}, rows.options().dtype(at::kInt));
    RouterForward p{};
    p.logits = rows.const_data_ptr();
    p.weights = weights.data_ptr();
    p.chosen = chosen.data_ptr<int>();
    p.tokens = tokens;
    p.experts = static_cast<int>(rows.size(1));
    p.top_k = static_cast<int>(top_k);
    p.dtype = dtype_of(rows, "logits");
    Launch("route", rows)(router_forward, p);
    const at::Tensor experts = chosen.to(at::kLong);
    ctx->save_for_backward({rows, chosen});
    ctx->mark_non_differentiable({experts});
    return {weights, experts};
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const variable_list saved = ctx->get_saved_variables();
    const at::Tensor &logits = saved[0], &chosen = saved[1];
    const at::Tensor d_weights = grads[0].contiguous();
    at::Tensor d_logits = at::empty_like(logits);
    RouterBackward p{};
    p.logits = logits.const_data_ptr();
    p.chosen = chosen.const_data_ptr<int>();
    p.d_weights = d_weights.const_data_ptr();
    p.d_logits = d_logits.data_ptr();
    p.tokens = logits.size(0);
    p.experts = static_cast<int>(logits.size(1));
    p.top_k = static_cast<int>(chosen.size(1));
    p.dtype = dtype_of(logits, "logits");
    Launch("route", logits)(router_backward, p);
    return {d_logits, at::Tensor()};
  }
};

// Where each (token, choice) lies when rows are sorted by expert; all int32, on the device.
struct Places {
  at::Tensor offsets, row_of, assignment_of;
  int64_t tokens;
  int top_k;

  // Where each expert's rows end, as the grouped product wants it.
  at::Tensor ends() const { return offsets.narrow(0, 1, offsets.size(0) - 1); }
};

Places places_of(const at::Tensor& experts, int64_t num_experts) {
  const at::Tensor chosen = experts.to(at::kInt).contiguous();
  const int64_t assignments = chosen.numel();
  Places places{at::empty({num_experts + 1}, chosen.options()), at::empty({assignments}, chosen.options()),
                at::empty({assignments}, chosen.options()), chosen.size(0), static_cast<int>(chosen.size(1))};
  const at::Tensor scratch = workspace(dispatch_workspace_bytes(assignments, static_cast<int>(num_experts)), chosen);
  DispatchPlan p{};
  p.chosen = chosen.const_data_ptr<int>();
  p.offsets = places.offsets.data_ptr<int>();
  p.row_of = places.row_of.data_ptr<int>();
  p.assignment_of = places.assignment_of.data_ptr<int>();
  p.workspace = reinterpret_cast<int*>(scratch.data_ptr());
  p.assignments = assignments;
  p.experts = static_cast<int>(num_experts);
  Launch("routed_experts", chosen)(dispatch_plan, p);
  return places;
}

// x [tokens, width] as rows in the experts' order.
at::Tensor permuted(const at::Tensor& x, const Places& places) {
  at::Tensor rows = at::empty({places.tokens * places.top_k, x.size(1)}, x.options());
  Permute p{};
  p.x = x.const_data_ptr();
  p.assignment_of = places.assignment_of.const_data_ptr<int>();
  p.rows = rows.data_ptr();
  p.tokens = places.tokens;
  p.width = static_cast<int>(x.size(1));
  p.top_k = places.top_k;
  p.dtype = dtype_of(x, "x");
  Launch("routed_experts", x)(permute, p);
  return rows;
}

// The shared expert's result [tokens, h] and the logits of its gate [tokens, 1]; both undefined without one.
struct Shared {
  at::Tensor output, gate;
};

// The rows of each token added up, times `weights` where they are defined, and the shared expert's term.
at::Tensor combined(const at::Tensor& rows, const at::Tensor& weights, const Places& places, const Shared& shared) {
  at::Tensor out = at::empty({places.tokens, rows.size(1)}, rows.options());
  Combine p{};
  p.rows = rows.const_data_ptr();
  p.weights = weights.defined() ? weights.const_data_ptr() : nullptr;
  p.row_of = places.row_of.const_data_ptr<int>();
  if (shared.output.defined()) {
    p.shared = shared.output.const_data_ptr();
    p.gate = shared.gate.const_data_ptr();
  }
  p.out = out.data_ptr();
  p.tokens = places.tokens;
  p.width = static_cast<int>(rows.size(1));
  p.top_k = places.top_k;
  p.dtype = dtype_of(rows, "rows");
  Launch("routed_experts", rows)(combine, p);
  return out;
}

// The gradients of the shared expert's result and of its gate.
Shared shared_gradients(const at::Tensor& d_out, const Shared& shared) {
  Shared d{at::empty_like(shared.output), at::empty_like(shared.gate)};
  CombineShared p{};
  p.d_out = d_out.const_data_ptr();
  p.shared = shared.output.const_data_ptr();
  p.gate = shared.gate.const_data_ptr();
  p.d_shared = d.output.data_ptr();
  p.d_gate = d.gate.data_ptr();
  p.tokens = d_out.size(0);
  p.width = static_cast<int>(d_out.size(1));
  p.dtype = dtype_of(d_out, "the gradient");
  Launch("routed_experts", d_out)(combine_shared, p);
  return d;
}

at::Tensor activated(const at::Tensor& pre) {
  at::Tensor act = at::empty({pre.size(0), pre.size(1) / 2}, pre.options());
  SwigluForward p{};
  p.x = pre.const_data_ptr();
  p.out = act.data_ptr();
  p.rows = pre.size(0);
  p.x_stride = pre.size(1);
  p.dim = static_cast<int>(act.size(1));
  p.dtype = dtype_of(pre, "x");
  Launch("routed_experts", pre)(swiglu_forward, p);
  return act;
}

// The gradient of `pre`, the activations times their weights, and the gradient of the weights. `pre` is kept for another
// backward through the same graph, `d_act` is written over.
std::tuple<at::Tensor, at::Tensor, at::Tensor> activation_gradients(const at::Tensor& pre, at::Tensor d_act,
                                                                    const at::Tensor& weights, const Places& places) {
  at::Tensor d_pre = at::empty_like(pre), d_weights = at::empty_like(weights);
  ExpertActivation p{};
  p.pre = pre.const_data_ptr();
  p.d_act = d_act.const_data_ptr();
  p.weights = weights.const_data_ptr();
  p.assignment_of = places.assignment_of.const_data_ptr<int>();
  p.d_pre = d_pre.data_ptr();
  p.act_scaled = d_act.data_ptr();
  p.d_weights = d_weights.data_ptr();
  p.rows = pre.size(0);
  p.width = static_cast<int>(d_act.size(1));
  p.dtype = dtype_of(pre, "pre");
  Launch("routed_experts", pre)(expert_activation_backward, p);
  return {d_pre, d_act, d_weights};
}

class ExpertsNode : public torch::autograd::Function<ExpertsNode> {
 public:
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& x, const at::Tensor& weights, const at::Tensor& fc1,
                            const at::Tensor& fc2, const at::Tensor& experts, const OptionalTensor& maybe_shared,
                            const OptionalTensor& maybe_gate) {
    const int64_t num_experts = fc1.size(0), hidden = x.size(1), inner = fc2.size(2);
    check(x, "x", x, at::kBFloat16, {-1, -1});
    check(weights, "weights", x, at::kBFloat16, {x.size(0), -1});
    check(experts, "experts", x, at::kLong, weights.sizes());
    check(fc1, "fc1", x, at::kBFloat16, {num_experts, 2 * inner, hidden});
    check(fc2, "fc2", x, at::kBFloat16, {num_experts, hidden, inner});
    TORCH_CHECK(maybe_shared.has_value() == maybe_gate.has_value(), "a shared expert needs its gate, and a gate its expert");
    Shared shared;
    if (maybe_shared) {
      check(*maybe_shared, "shared", x, at::kBFloat16, x.sizes());
      check(*maybe_gate, "gate", x, at::kBFloat16, {x.size(0), 1});
      shared = {maybe_shared->contiguous(), maybe_gate->contiguous()};
    }
    const Places places = places_of(experts, num_experts);
    const at::Tensor tokens = x.contiguous(), shares = weights.contiguous();
    const at::Tensor pre = at::_grouped_mm(permuted(tokens, places), fc1.transpose(1, 2), places.ends());
    const at::Tensor rows = at::_grouped_mm(activated(pre), fc2.transpose(1, 2), places.ends());
    ctx->save_for_backward({tokens, shares, fc1, fc2, pre, places.offsets, places.row_of, places.assignment_of, shared.output,
                            shared.gate});
    return combined(rows, shares, places, shared);
  }

  // Neither the experts' outputs nor the sorted rows are kept: the weights' gradient comes from the activations (with
  // dA = dO W2, <dO, W2 a> = <dA, a>), and rows are gathered again.
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const variable_list saved = ctx->get_saved_variables();
    const at::Tensor &x = saved[0], &weights = saved[1], &fc1 = saved[2], &fc2 = saved[3], &pre = saved[4];
    const Places places{saved[5], saved[6], saved[7], x.size(0), static_cast<int>(weights.size(1))};
    const Shared shared{saved[8], saved[9]};
    const at::Tensor d_out = grads[0].contiguous();
    const at::Tensor d_rows = permuted(d_out, places);
    const at::Tensor d_act = at::_grouped_mm(d_rows, fc2, places.ends());
    const auto [d_pre, scaled, d_weights] = activation_gradients(pre, d_act, weights, places);
    variable_list out(7);
    if (ctx->needs_input_grad(0)) {
      out[0] = combined(at::_grouped_mm(d_pre, fc1, places.ends()), at::Tensor(), places, {});
    }
    out[1] = d_weights;
    if (ctx->needs_input_grad(2)) {
      out[2] = at::_grouped_mm(d_pre.t(), permuted(x, places), places.ends());
    }
    if (ctx->needs_input_grad(3)) {
      out[3] = at::_grouped_mm(d_rows.t(), scaled, places.ends());
    }
    if (shared.output.defined()) {
      const Shared d_shared = shared_gradients(d_out, shared);
      out[5] = d_shared.output;
      out[6] = d_shared.gate;
    }
    return out;
  }
};

std::tuple<at::Tensor, at::Tensor> route(const at::Tensor& logits, int64_t top_k) {
  const variable_list results = RouteNode::apply(logits, top_k);
  return {results[0], results[1]};
}

at::Tensor routed_experts(const at::Tensor& x, const at::Tensor& weights, const at::Tensor& fc1, const at::Tensor& fc2,
                          const at::Tensor& experts, const OptionalTensor& shared, const OptionalTensor& gate) {
  return ExpertsNode::apply(x, weights, fc1, fc2, experts, shared, gate);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(megatron_bridge, library) {
  // logits [tokens, experts]: the weights of the top_k experts, which sum to 1, and their numbers, int64.
  define(library, "route(Tensor logits, int top_k) -> (Tensor weights, Tensor experts)", &route);
  // x [tokens, h], weights and experts [tokens, top_k], fc1 [experts, 2 I, h], gate first, fc2 [experts, h, I], bfloat16:
  // the weighted sum of each token's experts, [tokens, h]; with shared [tokens, h] and gate [tokens, 1] also
  // sigmoid(gate) shared.
  define(library,
         "routed_experts(Tensor x, Tensor weights, Tensor fc1, Tensor fc2, Tensor experts, Tensor? shared=None, "
         "Tensor? gate=None) -> Tensor",
         &routed_experts);
}

}  // namespace bridge::operators
