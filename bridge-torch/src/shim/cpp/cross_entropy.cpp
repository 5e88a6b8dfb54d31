#include "cross_entropy.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/_softmax.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/logsumexp.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/graph_task.h>

#include <algorithm>

namespace bridge_shim {

namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

constexpr int64_t kIgnored = -100;
// Rows whose logits exist at one time, and the number of logits that may.
constexpr int64_t kPieceRows = 1024;
constexpr int64_t kPieceLogits = int64_t{1} << 27;
// Rows whose float32 logits exist at one time: as many as stay in the cache.
constexpr int64_t kBlockRows = 64;
constexpr int64_t kBlockLogits = int64_t{1} << 20;
// Below this the logarithm of a float32 probability loses digits.
constexpr double kSmallest = 1e-30;

struct Gradients {
  at::Tensor hidden, weight;  // undefined where not needed
};

// Adds up -log softmax(logits)[target]. With `write`, the logits become softmax(logits) - onehot(target).
class Blocks {
 public:
  Blocks(const at::Tensor& logits, at::ScalarType wide)
      : rows_(std::clamp<int64_t>(kBlockLogits / logits.size(1), 1, kBlockRows)),
        block_(at::empty({rows_, logits.size(1)}, logits.options().dtype(wide))),
        probabilities_(at::empty_like(block_)) {}

  void add(const at::Tensor& logits, const at::Tensor& targets, bool write, at::Tensor& sum) {
    for (int64_t start = 0; start < logits.size(0); start += rows_) {
      const int64_t rows = std::min(rows_, logits.size(0) - start);
      at::Tensor raw = logits.narrow(0, start, rows);
      const at::Tensor target = targets.narrow(0, start, rows).unsqueeze(1);
      at::Tensor wide = raw;
      if (raw.scalar_type() != block_.scalar_type()) {
        wide = block_.narrow(0, 0, rows).copy_(raw);
      }
      at::Tensor p = probabilities_.narrow(0, 0, rows);
      at::_softmax_out(p, wide, 1, false);
      const at::Tensor chosen = p.gather(1, target);
      if (chosen.min().item<double>() > kSmallest) {
        sum.sub_(chosen.log().sum());
      } else {
        sum.add_(at::logsumexp(wide, {1}, true).sub_(wide.gather(1, target)).sum());
      }
      if (write) {
        p.scatter_(1, target, chosen.sub(1));
        raw.copy_(p);
      }
    }
  }

 private:
  int64_t rows_;
  at::Tensor block_, probabilities_;
};

// Sums into `sum` and, where they are defined, into the gradients (of the sum, not of the mean).
void run(const at::Tensor& hidden, const at::Tensor& weight, const at::Tensor& targets, at::Tensor& sum,
         Gradients& gradients) {
  const int64_t n = hidden.size(0);
  if (n == 0) {
    return;
  }
  const bool write = gradients.hidden.defined() || gradients.weight.defined();
  const int64_t piece = std::min(n, std::clamp<int64_t>(kPieceLogits / weight.size(0), 1, kPieceRows));
  const at::Tensor buffer = at::empty({piece, weight.size(0)}, hidden.options());
  Blocks blocks(buffer, sum.scalar_type());
  for (int64_t start = 0; start < n; start += piece) {
    const int64_t rows = std::min(piece, n - start);
    const at::Tensor x = hidden.narrow(0, start, rows);
    at::Tensor logits = buffer.narrow(0, 0, rows);
    at::mm_out(logits, x, weight.t());
    blocks.add(logits, targets.narrow(0, start, rows), write, sum);
    if (gradients.hidden.defined()) {
      at::Tensor out = gradients.hidden.narrow(0, start, rows);
      at::mm_out(out, logits, weight);
    }
    if (!gradients.weight.defined()) {
      continue;
    }
    if (start == 0 && gradients.weight.scalar_type() == x.scalar_type()) {
      at::mm_out(gradients.weight, logits.t(), x);
    } else if (gradients.weight.scalar_type() == x.scalar_type()) {
      gradients.weight.addmm_(logits.t(), x);
    } else if (start == 0) {
      gradients.weight.copy_(at::mm(logits.t(), x));
    } else {
      gradients.weight.add_(at::mm(logits.t(), x));
    }
  }
}

class LinearCrossEntropyNode : public torch::autograd::Function<LinearCrossEntropyNode> {
 public:
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& hidden, const at::Tensor& weight,
                            const at::Tensor& targets, double normalizer, bool hidden_grad, bool weight_grad) {
    const at::ScalarType kind = hidden.scalar_type();
    const at::ScalarType wide = kind == at::kDouble ? at::kDouble : at::kFloat;
    at::Tensor sum = at::zeros({}, hidden.options().dtype(wide));

    // Rows without a target cost nothing.
    const at::Tensor counted = targets.ne(kIgnored).nonzero().squeeze(1);
    const bool all = counted.size(0) == targets.size(0);
    at::Tensor x = all ? hidden : hidden.index_select(0, counted);
    const at::Tensor y = all ? targets : targets.index_select(0, counted);

    Gradients gradients;
    if (hidden_grad) {
      gradients.hidden = at::empty(x.sizes(), x.options());
    }
    if (weight_grad) {
      // Pieces are added up in float32.
      const bool pieces = x.size(0) > std::min(kPieceRows, kPieceLogits / weight.size(0));
      gradients.weight = at::empty(weight.sizes(), weight.options().dtype(pieces ? wide : kind));
      if (x.size(0) == 0) {
        gradients.weight.zero_();
      }
    }
    run(x, weight, y, sum, gradients);

    at::Tensor hidden_out, weight_out;
    if (hidden_grad) {
      gradients.hidden.div_(normalizer);
      hidden_out = all ? gradients.hidden : at::zeros_like(hidden).index_copy_(0, counted, gradients.hidden);
    }
    if (weight_grad) {
      weight_out = gradients.weight.div_(normalizer).to(kind);
    }
    ctx->saved_data["hidden"] = hidden_out;
    ctx->saved_data["weight"] = weight_out;
    return sum.div_(normalizer);
  }

  static variable_list backward(AutogradContext* ctx, variable_list upstream) {
    // The last use of the graph may take the buffers.
    const bool keep = torch::autograd::get_current_graph_task_keep_graph();
    const auto take = [&](const char* name) {
      at::Tensor gradient = ctx->saved_data[name].toTensor();
      if (!keep) {
        ctx->saved_data.erase(name);
      }
      if (!gradient.defined()) {
        return gradient;
      }
      const at::Tensor& scale = upstream[0];
      if (scale.device().is_cpu() && scale.item<double>() == 1.0) {
        return gradient;
      }
      return keep ? gradient.mul(scale) : gradient.mul_(scale);
    };
    at::Tensor hidden = take("hidden");
    at::Tensor weight = take("weight");
    return {hidden, weight, {}, {}, {}, {}};
  }
};

}  // namespace

std::unique_ptr<at::Tensor> linear_cross_entropy(const at::Tensor& hidden, const at::Tensor& weight,
                                                 const at::Tensor& targets, double normalizer) {
  const bool grads = at::GradMode::is_enabled();
  return std::make_unique<at::Tensor>(
      LinearCrossEntropyNode::apply(hidden, weight, targets, normalizer, grads && hidden.requires_grad(),
                                    grads && weight.requires_grad()));
}

}  // namespace bridge_shim
