#include "pointwise.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/addcmul.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/linalg_vecdot.h>
#include <ATen/ops/linalg_vector_norm.h>
#include <ATen/ops/mul.h>
#include <ATen/ops/silu.h>
#include <ATen/ops/silu_backward.h>
#include <torch/csrc/autograd/custom_function.h>

namespace bridge_shim {

namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

at::ScalarType wide_kind(const at::Tensor& x) {
  return x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

// y = x s (1 + w) with s = rsqrt(mean(x^2) + eps): keeps x and one s a row, nothing as large as x.
class RmsNormNode : public torch::autograd::Function<RmsNormNode> {
 public:
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& x, const at::Tensor& weight, double eps) {
    const at::ScalarType kind = wide_kind(x);
    const at::Tensor wide = x.to(kind);
    const double d = static_cast<double>(x.size(-1));
    const at::Tensor scale = at::linalg_vector_norm(wide, 2, {-1}, true).square_().div_(d).add_(eps).rsqrt_();
    ctx->save_for_backward({x, weight, scale});
    return (wide * scale).mul_(weight.to(kind) + 1).to(x.scalar_type());
  }

  // With h = g (1 + w): dx = s h - x s^3 (h . x) / d, dw = sum over rows of g x s.
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const variable_list saved = ctx->get_saved_variables();
    const at::Tensor &x = saved[0], &weight = saved[1], &scale = saved[2];
    const at::ScalarType kind = scale.scalar_type();
    const at::Tensor wide = x.to(kind), grad = grads[0].to(kind);
    at::Tensor grad_x, grad_weight;
    if (ctx->needs_input_grad(0)) {
      const at::Tensor gained = grad * (weight.to(kind) + 1);
      const at::Tensor along = at::linalg_vecdot(gained, wide, -1).unsqueeze(-1);
      const at::Tensor pull = along.mul_(scale.pow(3)).div_(static_cast<double>(x.size(-1)));
      grad_x = at::addcmul(gained.mul_(scale), wide, pull, -1).to(x.scalar_type());
    }
    if (ctx->needs_input_grad(1)) {
      const at::Tensor rows = (grad * wide).mul_(scale);
      grad_weight = rows.reshape({-1, x.size(-1)}).sum(0).to(weight.scalar_type());
    }
    return {grad_x, grad_weight, at::Tensor()};
  }
};

// Both halves of the gradient are written into one buffer, which autograd would join from two of full size.
class SwigluNode : public torch::autograd::Function<SwigluNode> {
 public:
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& x) {
    ctx->save_for_backward({x});
    const int64_t width = x.size(-1) / 2;
    return at::silu(x.narrow(-1, 0, width)).mul_(x.narrow(-1, width, width));
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const at::Tensor x = ctx->get_saved_variables()[0];
    const int64_t width = x.size(-1) / 2;
    const at::Tensor gate = x.narrow(-1, 0, width), up = x.narrow(-1, width, width);
    at::Tensor grad_x = at::empty(x.sizes(), x.options());
    at::Tensor grad_gate = grad_x.narrow(-1, 0, width), grad_up = grad_x.narrow(-1, width, width);
    at::silu_backward_out(grad_gate, grads[0] * up, gate);
    at::mul_out(grad_up, grads[0], at::silu(gate));
    return {grad_x};
  }
};

}  // namespace

std::unique_ptr<at::Tensor> rms_norm(const at::Tensor& x, const at::Tensor& weight, double eps) {
  return std::make_unique<at::Tensor>(RmsNormNode::apply(x, weight, eps));
}

std::unique_ptr<at::Tensor> swiglu(const at::Tensor& x) {
  return std::make_unique<at::Tensor>(SwigluNode::apply(x));
}

}  // namespace bridge_shim
