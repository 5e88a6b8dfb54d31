// The output layer's cross entropy, in blocks of tokens: product, rows, and the two products of the gradient.
#include "../cross_entropy.hpp"

#include <ATen/ops/addmm.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/full.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/zeros.h>

#include <algorithm>

#include "library.hpp"

namespace bridge::operators {

namespace {

constexpr int64_t kIgnored = -100;
// Of a block's logits. Tests see several blocks.
#if defined(BRIDGE_EMULATION)
constexpr int64_t kWorkspaceBytes = int64_t{1} << 14;
#else
constexpr int64_t kWorkspaceBytes = int64_t{1} << 30;
#endif

// sum += a b in float32.
void accumulate(at::Tensor& sum, const at::Tensor& a, const at::Tensor& b) {
  if (a.is_cuda() && a.scalar_type() != at::kFloat) {
    at::addmm_out(sum, sum, a, b, at::kFloat);
  } else {
    sum.addmm_(a.to(at::kFloat), b.to(at::kFloat));
  }
}

class LinearCrossEntropyNode : public torch::autograd::Function<LinearCrossEntropyNode> {
 public:
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& hidden, const at::Tensor& weight, const at::Tensor& targets,
                            double normalizer, bool hidden_grad, bool weight_grad) {
    const int64_t n = hidden.size(0), vocabulary = weight.size(0);
    check(hidden, "hidden", hidden, hidden.scalar_type(), {-1, -1});
    check(weight, "weight", hidden, hidden.scalar_type(), {-1, hidden.size(1)});
    check(targets, "targets", hidden, at::kLong, {n});
    const at::Tensor labels = targets.contiguous();
    const auto wide = hidden.options().dtype(at::kFloat);
    const int64_t piece = 16 / hidden.element_size(), row = (vocabulary + piece - 1) / piece * piece;
    const int64_t block = std::clamp<int64_t>(kWorkspaceBytes / (row * hidden.element_size()), 1, std::max<int64_t>(n, 1));
    const at::Tensor buffer = at::empty({std::min(block, n), row}, hidden.options());
    const at::Tensor scale = at::full({1}, 1.0 / normalizer, wide);
    at::Tensor losses = at::empty({n}, wide), loss = at::empty({}, wide);
    at::Tensor d_hidden, d_weight;
    if (hidden_grad) {
      d_hidden = at::empty(hidden.sizes(), hidden.options());
    }
    if (weight_grad) {
      d_weight = at::zeros(weight.sizes(), wide);
    }
    const Launch launch("linear_cross_entropy", hidden);
    for (int64_t start = 0; start < n; start += block) {
      const int64_t rows = std::min(block, n - start);
      const at::Tensor x = hidden.narrow(0, start, rows);
      at::Tensor logits = buffer.narrow(0, 0, rows).narrow(1, 0, vocabulary);
      at::mm_out(logits, x, weight.t());
      CrossEntropyRows p{};
      p.logits = logits.data_ptr();
      p.targets = labels.const_data_ptr<int64_t>() + start;
      p.scale = scale.const_data_ptr<float>();
      p.losses = losses.data_ptr<float>() + start;
      p.rows = rows;
      p.row_stride = row;
      p.vocabulary = static_cast<int>(vocabulary);
      p.ignored = kIgnored;
      p.write_gradient = hidden_grad || weight_grad;
      p.dtype = dtype_of(hidden, "hidden");
      launch(cross_entropy_rows, p);
      if (hidden_grad) {
        at::Tensor out = d_hidden.narrow(0, start, rows);
        at::mm_out(out, logits, weight);
      }
      if (weight_grad) {
        accumulate(d_weight, logits.t(), x);
      }
    }
    CrossEntropyTotal total{};
    total.losses = losses.const_data_ptr<float>();
    total.scale = scale.const_data_ptr<float>();
    total.total = loss.data_ptr<float>();
    total.rows = n;
    launch(cross_entropy_total, total);
    ctx->saved_data["hidden"] = d_hidden;
    ctx->saved_data["weight"] = weight_grad ? d_weight.to(weight.scalar_type()) : d_weight;
    return loss;
  }

  // The gradients are there since the forward; the last use of the graph may take them.
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const bool keep = torch::autograd::get_current_graph_task_keep_graph();
    const auto scaled = [&](const char* name) {
      at::Tensor gradient = ctx->saved_data[name].toTensor();
      if (!keep) {
        ctx->saved_data.erase(name);
      }
      return !gradient.defined() ? gradient : keep ? gradient.mul(grads[0]) : gradient.mul_(grads[0]);
    };
    const at::Tensor hidden = scaled("hidden"), weight = scaled("weight");
    return {hidden, weight, at::Tensor(), at::Tensor(), at::Tensor(), at::Tensor()};
  }
};

at::Tensor linear_cross_entropy(const at::Tensor& hidden, const at::Tensor& weight, const at::Tensor& targets,
                                double normalizer) {
  const bool grads = at::GradMode::is_enabled();
  return LinearCrossEntropyNode::apply(hidden, weight, targets, normalizer, grads && hidden.requires_grad(),
                                       grads && weight.requires_grad());
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(megatron_bridge, library) {
  // hidden [n, h], weight [V, h], targets [n] int64 with -100 for none: the sum of -log softmax(hidden weight^T)[target]
  // divided by `normalizer`, float32. The logits of all tokens never exist together.
  define(library, "linear_cross_entropy(Tensor hidden, Tensor weight, Tensor targets, float normalizer) -> Tensor",
         &linear_cross_entropy);
}

}  // namespace bridge::operators
