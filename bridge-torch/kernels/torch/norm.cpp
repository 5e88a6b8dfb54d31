// Zero-centred RMSNorm, alone and behind a residual sum, and the gated norm of the delta net.
#include <ATen/ops/empty_like.h>

#include "../gated_rms_norm.hpp"
#include "../rms_norm.hpp"
#include "library.hpp"

namespace bridge::operators {

namespace {

at::Tensor rms_norm_gradient(const at::Tensor& s, const at::Tensor& weight, const at::Tensor& grad, const at::Tensor& grad_sum,
                             double eps, at::Tensor& grad_weight) {
  const at::Tensor rows = rows_of(s), d_out = grad.contiguous();
  const at::Tensor d_sum = grad_sum.defined() ? grad_sum.contiguous() : at::Tensor();
  at::Tensor d_x = at::empty(s.sizes(), s.options());
  grad_weight = at::empty_like(weight);
  const int dim = static_cast<int>(s.size(-1));
  const at::Tensor scratch = workspace(rms_norm_backward_workspace_bytes(rows.size(0), dim), s);
  RmsNormBackward p{};
  p.s = rows.const_data_ptr();
  p.weight = weight.const_data_ptr();
  p.d_out = d_out.const_data_ptr();
  p.d_sum = d_sum.defined() ? d_sum.const_data_ptr() : nullptr;
  p.d_x = d_x.data_ptr();
  p.d_weight = grad_weight.data_ptr();
  p.workspace = reinterpret_cast<float*>(scratch.data_ptr());
  p.rows = rows.size(0);
  p.s_stride = row_stride(rows);
  p.dim = dim;
  p.eps = static_cast<float>(eps);
  p.weight_offset = 1.0f;
  p.dtype = dtype_of(s, "x");
  p.weight_dtype = dtype_of(weight, "weight");
  Launch("rms_norm", s)(rms_norm_backward, p);
  return d_x;
}

// out = n (1 + weight) of s = x, or of s = x + residual, which is returned too.
at::Tensor rms_norm_value(const at::Tensor& x, const OptionalTensor& residual, const at::Tensor& weight, double eps,
                          at::Tensor& sum) {
  const at::Tensor rows = rows_of(x);
  check(weight, "weight", x, weight.scalar_type(), {x.size(-1)});
  at::Tensor added;
  if (residual) {
    TORCH_CHECK(residual->sizes() == x.sizes() && residual->scalar_type() == x.scalar_type(), "residual has shape ",
                residual->sizes(), " and dtype ", residual->scalar_type(), ", x has ", x.sizes(), " and ", x.scalar_type());
    added = residual->contiguous();
    sum = at::empty(x.sizes(), x.options());
  }
  at::Tensor out = at::empty(x.sizes(), x.options());
  RmsNormForward p{};
  p.x = rows.const_data_ptr();
  p.residual = residual ? added.const_data_ptr() : nullptr;
  p.weight = weight.const_data_ptr();
  p.sum = residual ? sum.data_ptr() : nullptr;
  p.out = out.data_ptr();
  p.rows = rows.size(0);
  p.x_stride = row_stride(rows);
  p.dim = static_cast<int>(x.size(-1));
  p.eps = static_cast<float>(eps);
  p.weight_offset = 1.0f;
  p.dtype = dtype_of(x, "x");
  p.weight_dtype = dtype_of(weight, "weight");
  Launch("rms_norm", x)(rms_norm_forward, p);
  return out;
}

class RmsNormNode : public torch::autograd::Function<RmsNormNode> {
 public:
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& x, const at::Tensor& weight, double eps) {
    ctx->save_for_backward({x, weight});
    ctx->saved_data["eps"] = eps;
    at::Tensor no_sum;
    return rms_norm_value(x, std::nullopt, weight, eps, no_sum);
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const variable_list saved = ctx->get_saved_variables();
    at::Tensor grad_weight;
    const at::Tensor grad_x = rms_norm_gradient(saved[0], saved[1], grads[0], at::Tensor(),
                                                ctx->saved_data["eps"].toDouble(), grad_weight);
    return {grad_x, grad_weight, at::Tensor()};
  }
};

class AddRmsNormNode : public torch::autograd::Function<AddRmsNormNode> {
 public:
  static variable_list forward(AutogradContext* ctx, const at::Tensor& x, const at::Tensor& residual,
                               const at::Tensor& weight, double eps) {
    at::Tensor sum;
    at::Tensor out = rms_norm_value(x, residual, weight, eps, sum);
    ctx->save_for_backward({sum, weight});
    ctx->saved_data["eps"] = eps;
    ctx->set_materialize_grads(false);
    return {out, sum};
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const variable_list saved = ctx->get_saved_variables();
    at::Tensor grad_weight;
    const at::Tensor grad = rms_norm_gradient(saved[0], saved[1], arrived(grads[0], saved[0]), grads[1],
                                              ctx->saved_data["eps"].toDouble(), grad_weight);
    return {grad, grad, grad_weight, at::Tensor()};
  }
};

class GatedRmsNormNode : public torch::autograd::Function<GatedRmsNormNode> {
 public:
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& x, const at::Tensor& gate, const at::Tensor& weight,
                            double eps) {
    check(x, "x", gate, gate.scalar_type(), {-1, -1, kGatedNormDim});
    check(gate, "gate", x, x.scalar_type(), x.sizes());
    check(weight, "weight", x, weight.scalar_type(), {kGatedNormDim});
    const at::Tensor values = x.contiguous(), gates = rows_of(gate.flatten(1));
    at::Tensor out = at::empty(x.sizes(), x.options());
    GatedRmsNormForward p{};
    p.x = values.const_data_ptr();
    p.gate = gates.const_data_ptr();
    p.weight = weight.const_data_ptr();
    p.out = out.data_ptr();
    p.tokens = x.size(0);
    p.gate_stride = row_stride(gates);
    p.heads = static_cast<int>(x.size(1));
    p.eps = static_cast<float>(eps);
    p.weight_offset = 1.0f;
    p.dtype = dtype_of(x, "x");
    p.weight_dtype = dtype_of(weight, "weight");
    Launch("rms_norm_gated", x)(gated_rms_norm_forward, p);
    ctx->save_for_backward({values, gates, weight});
    ctx->saved_data["eps"] = eps;
    return out;
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const variable_list saved = ctx->get_saved_variables();
    const at::Tensor &x = saved[0], &gate = saved[1], &weight = saved[2];
    const at::Tensor d_out = grads[0].contiguous();
    at::Tensor d_x = at::empty(x.sizes(), x.options()), d_gate = at::empty(x.sizes(), x.options());
    at::Tensor d_weight = at::empty_like(weight);
    const int heads = static_cast<int>(x.size(1));
    GatedRmsNormBackward p{};
    p.dtype = dtype_of(x, "x");
    const at::Tensor scratch = workspace(gated_rms_norm_backward_workspace_bytes(x.size(0), heads, p.dtype), x);
    p.x = x.const_data_ptr();
    p.gate = gate.const_data_ptr();
    p.weight = weight.const_data_ptr();
    p.d_out = d_out.const_data_ptr();
    p.d_x = d_x.data_ptr();
    p.d_gate = d_gate.data_ptr();
    p.d_weight = d_weight.data_ptr();
    p.workspace = reinterpret_cast<float*>(scratch.data_ptr());
    p.tokens = x.size(0);
    p.gate_stride = row_stride(gate);
    p.d_gate_stride = d_gate.stride(0);
    p.heads = heads;
    p.eps = static_cast<float>(ctx->saved_data["eps"].toDouble());
    p.weight_offset = 1.0f;
    p.weight_dtype = dtype_of(weight, "weight");
    Launch("rms_norm_gated", x)(gated_rms_norm_backward, p);
    return {d_x, d_gate, d_weight, at::Tensor()};
  }
};

at::Tensor rms_norm(const at::Tensor& x, const at::Tensor& weight, double eps) { return RmsNormNode::apply(x, weight, eps); }

std::tuple<at::Tensor, at::Tensor> add_rms_norm(const at::Tensor& x, const at::Tensor& residual, const at::Tensor& weight,
                                                double eps) {
  const variable_list results = AddRmsNormNode::apply(x, residual, weight, eps);
  return {results[0], results[1]};
}

at::Tensor rms_norm_gated(const at::Tensor& x, const at::Tensor& gate, const at::Tensor& weight, double eps) {
  return GatedRmsNormNode::apply(x, gate, weight, eps);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(megatron_bridge, library) {
  // x [.., d], weight [d], zero-centred: x / sqrt(mean(x^2) + eps) (1 + weight).
  define(library, "rms_norm(Tensor x, Tensor weight, float eps) -> Tensor", &rms_norm);
  // The norm of x + residual, and x + residual.
  define(library, "add_rms_norm(Tensor x, Tensor residual, Tensor weight, float eps) -> (Tensor, Tensor)", &add_rms_norm);
  // x, gate [tokens, heads, 128], weight [128], zero-centred: norm(x) (1 + weight) silu(gate).
  define(library, "rms_norm_gated(Tensor x, Tensor gate, Tensor weight, float eps) -> Tensor", &rms_norm_gated);
}

}  // namespace bridge::operators
