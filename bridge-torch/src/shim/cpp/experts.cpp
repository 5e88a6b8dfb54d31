#include "experts.h"

#include <ATen/ops/arange.h>
#include <ATen/ops/bincount.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/linalg_vecdot.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/mul.h>
#include <ATen/ops/silu.h>
#include <ATen/ops/silu_backward.h>
#include <torch/csrc/autograd/custom_function.h>

#include <vector>

namespace bridge_shim {

namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// Runs `job(expert, first row, rows)` for each expert, those without rows too.
template <class Job>
void each_expert(const std::vector<int64_t>& sizes, const Job& job) {
  int64_t start = 0;
  for (size_t expert = 0; expert < sizes.size(); ++expert) {
    job(static_cast<int64_t>(expert), start, sizes[expert]);
    start += sizes[expert];
  }
}

// out[start..] = a[start..] w, per expert.
void product(at::Tensor& out, const at::Tensor& a, const at::Tensor& w, const std::vector<int64_t>& sizes) {
  each_expert(sizes, [&](int64_t expert, int64_t start, int64_t rows) {
    if (rows > 0) {
      at::Tensor slice = out.narrow(0, start, rows);
      at::mm_out(slice, a.narrow(0, start, rows), w.select(0, expert));
    }
  });
}

// Per expert a^T b; zero for experts without rows.
at::Tensor weight_gradient(const at::Tensor& a, const at::Tensor& b, const std::vector<int64_t>& sizes) {
  at::Tensor out = at::empty({static_cast<int64_t>(sizes.size()), a.size(1), b.size(1)}, a.options());
  each_expert(sizes, [&](int64_t expert, int64_t start, int64_t rows) {
    at::Tensor slice = out.select(0, expert);
    if (rows > 0) {
      at::mm_out(slice, a.narrow(0, start, rows).t(), b.narrow(0, start, rows));
    } else {
      slice.zero_();
    }
  });
  return out;
}

class ExpertsNode : public torch::autograd::Function<ExpertsNode> {
 public:
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& x, const at::Tensor& weights,
                            const at::Tensor& fc1, const at::Tensor& fc2, const at::Tensor& experts) {
    const int64_t n = x.size(0), top_k = experts.size(1), inner = fc2.size(2);
    const at::Tensor flat = experts.reshape({-1});
    const at::Tensor order = flat.argsort(true, 0, false);
    const at::Tensor inverse = at::empty_like(order);
    inverse.scatter_(0, order, at::arange(order.size(0), order.options()));
    const at::Tensor counts = at::bincount(flat, {}, fc1.size(0)).cpu();
    const std::vector<int64_t> sizes(counts.const_data_ptr<int64_t>(),
                                     counts.const_data_ptr<int64_t>() + counts.size(0));
    const at::Tensor token = order.div(top_k, "floor");

    const at::Tensor rows = x.index_select(0, token);
    at::Tensor pre = at::empty({rows.size(0), 2 * inner}, x.options());
    product(pre, rows, fc1.transpose(1, 2), sizes);
    at::Tensor act = at::silu(pre.narrow(1, 0, inner)).mul_(pre.narrow(1, inner, inner));
    at::Tensor out = at::empty_like(rows);
    product(out, act, fc2.transpose(1, 2), sizes);

    // Each token adds its terms in ascending expert number, each rounded to the model's dtype, as transformers does.
    const at::Tensor ascending = experts.argsort(true, 1, false);
    const at::Tensor place = inverse.view({n, top_k}).gather(1, ascending);
    const at::Tensor share = weights.gather(1, ascending);
    at::Tensor sum;
    for (int64_t slot = 0; slot < top_k; ++slot) {
      at::Tensor term = out.index_select(0, place.select(1, slot)).mul_(share.narrow(1, slot, 1));
      sum = slot == 0 ? term : sum.add_(term);
    }

    ctx->save_for_backward({weights, fc1, fc2, rows, pre, act, order, inverse, token});
    ctx->saved_data["sizes"] = sizes;
    return sum;
  }

  static variable_list backward(AutogradContext* ctx, variable_list upstream) {
    const auto saved = ctx->get_saved_variables();
    const at::Tensor &weights = saved[0], &fc1 = saved[1], &fc2 = saved[2], &rows = saved[3], &pre = saved[4],
                     &act = saved[5], &order = saved[6], &inverse = saved[7], &token = saved[8];
    const std::vector<int64_t> sizes = ctx->saved_data["sizes"].toIntVector();
    const int64_t inner = act.size(1);
    const bool need_x = ctx->needs_input_grad(0), need_weights = ctx->needs_input_grad(1),
               need_fc1 = ctx->needs_input_grad(2), need_fc2 = ctx->needs_input_grad(3);
    variable_list grads(5);

    const at::Tensor grad = upstream[0].index_select(0, token);                          // [n k, h]
    const at::Tensor share = weights.reshape({-1}).index_select(0, order).unsqueeze(1);  // [n k, 1]
    if (need_fc2) {
      grads[3] = weight_gradient(grad, act.mul(share), sizes);
    }
    at::Tensor grad_act = at::empty_like(act);
    product(grad_act, grad, fc2, sizes);
    if (need_weights) {
      grads[1] = at::linalg_vecdot(grad_act, act).index_select(0, inverse).view(weights.sizes());
    }
    if (!need_x && !need_fc1) {
      return grads;
    }
    grad_act.mul_(share);
    const at::Tensor gate = pre.narrow(1, 0, inner), up = pre.narrow(1, inner, inner);
    at::Tensor grad_pre = at::empty_like(pre);
    at::Tensor grad_gate = grad_pre.narrow(1, 0, inner), grad_up = grad_pre.narrow(1, inner, inner);
    at::mul_out(grad_up, grad_act, at::silu(gate));
    at::silu_backward_out(grad_gate, grad_act.mul_(up), gate);
    if (need_fc1) {
      grads[2] = weight_gradient(grad_pre, rows, sizes);
    }
    if (need_x) {
      at::Tensor grad_rows = at::empty_like(rows);
      product(grad_rows, grad_pre, fc1, sizes);
      grads[0] = grad_rows.index_select(0, inverse).view({weights.size(0), weights.size(1), -1}).sum(1);
    }
    return grads;
  }
};

}  // namespace

std::unique_ptr<at::Tensor> routed_experts(const at::Tensor& x, const at::Tensor& weights, const at::Tensor& fc1,
                                           const at::Tensor& fc2, const at::Tensor& experts) {
  return std::make_unique<at::Tensor>(ExpertsNode::apply(x, weights, fc1, fc2, experts));
}

}  // namespace bridge_shim
