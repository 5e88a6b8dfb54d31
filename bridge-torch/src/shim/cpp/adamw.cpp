#include "adamw.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/_foreach_add.h>
#include <ATen/ops/_foreach_copy.h>
#include <ATen/ops/_foreach_mul.h>
#include <ATen/ops/_foreach_norm.h>
#include <ATen/ops/_fused_adamw.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/full.h>
#include <ATen/ops/linalg_vector_norm.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>

#include <algorithm>
#include <cmath>
#include <map>
#include <utility>

#include "sum_of_squares.h"

namespace bridge_shim {

namespace {

using Tensors = std::vector<at::Tensor>;

bool has_master_copy(const at::Tensor& param, const at::Tensor& stepped) {
  return !param.is_same(stepped);
}

// In float64, whatever the gradients' kind: a bfloat16 result would be off by 0.4 %.
double global_norm(const Tensors& grads) {
  double sum = 0;
  Tensors others;
  for (const auto& grad : grads) {
    if (grad.device().is_cpu() && grad.scalar_type() == at::kBFloat16 && grad.is_contiguous()) {
      sum += sum_of_squares(grad);
    } else {
      others.push_back(grad);
    }
  }
  if (!others.empty()) {
    for (const auto& norm : at::_foreach_norm(others)) {
      const double value = norm.item<double>();
      sum += value * value;
    }
  }
  return std::sqrt(sum);
}

}  // namespace

AdamW::AdamW(double beta1, double beta2, double eps, bool masters)
    : beta1_(beta1), beta2_(beta2), eps_(eps), masters_(masters) {}

void AdamW::add(const at::Tensor& param, double weight_decay) {
  const at::AutoGradMode no_grad(false);
  Slot slot;
  slot.param = param;
  slot.weight_decay = weight_decay;
  const bool master = masters_ && param.scalar_type() == at::kBFloat16;
  slot.stepped = master ? param.to(at::kFloat) : param;
  if (master) {
    slot.grad = at::empty_like(slot.stepped);
  }
  slot.exp_avg = at::zeros_like(slot.stepped).requires_grad_(false);
  slot.exp_avg_sq = at::zeros_like(slot.stepped).requires_grad_(false);
  slot.steps = at::zeros({}, param.options().dtype(at::kFloat).requires_grad(false));
  slots_.push_back(std::move(slot));
}

double AdamW::step(double lr, double max_norm) {
  const at::AutoGradMode no_grad(false);
  struct Group {
    Tensors params, grads, exp_avgs, exp_avg_sqs, steps;
  };
  std::map<std::pair<double, at::ScalarType>, Group> groups;
  Tensors raw, wide, params, masters, all;
  for (const auto& slot : slots_) {
    const at::Tensor& grad = slot.param.grad();
    if (!grad.defined()) {
      continue;
    }
    const bool master = has_master_copy(slot.param, slot.stepped);
    if (master) {
      raw.push_back(grad);
      wide.push_back(slot.grad);
      params.push_back(slot.param);
      masters.push_back(slot.stepped);
    }
    Group& group = groups[{slot.weight_decay, slot.stepped.scalar_type()}];
    group.params.push_back(slot.stepped);
    group.grads.push_back(master ? slot.grad : grad.contiguous());
    group.exp_avgs.push_back(slot.exp_avg);
    group.exp_avg_sqs.push_back(slot.exp_avg_sq);
    group.steps.push_back(slot.steps);
    all.push_back(group.grads.back());
  }
  if (!raw.empty()) {
    at::_foreach_copy_(wide, raw);
  }
  const double norm = global_norm(all);
  if (!std::isfinite(norm)) {
    return norm;
  }
  // torch.nn.utils.clip_grad_norm_ multiplies by min(1, max / (norm + 1e-6)).
  const double divisor = max_norm > 0 ? std::max(1.0, (norm + 1e-6) / max_norm) : 1.0;
  for (auto& [key, group] : groups) {
    std::optional<at::Tensor> grad_scale;
    if (divisor != 1.0 && key.second == at::kDouble) {
      at::_foreach_mul_(group.grads, 1.0 / divisor);  // the fused scale is a float32
    } else if (divisor != 1.0) {
      grad_scale = at::full({}, divisor, group.steps.front().options());
    }
    at::_foreach_add_(group.steps, 1);  // the fused step divides by 1 - beta^steps
    at::_fused_adamw_(group.params, group.grads, group.exp_avgs, group.exp_avg_sqs, {}, group.steps,
                      lr, beta1_, beta2_, key.first, eps_, /*amsgrad=*/false, /*maximize=*/false,
                      grad_scale, std::nullopt);
  }
  if (!params.empty()) {
    at::_foreach_copy_(params, masters);
  }
  return norm;
}

void AdamW::zero_grad() const {
  for (const auto& slot : slots_) {
    slot.param.mutable_grad().reset();
  }
}

std::unique_ptr<at::Tensor> AdamW::exp_avg(size_t index) const {
  return std::make_unique<at::Tensor>(slots_.at(index).exp_avg);
}

std::unique_ptr<at::Tensor> AdamW::exp_avg_sq(size_t index) const {
  return std::make_unique<at::Tensor>(slots_.at(index).exp_avg_sq);
}

std::unique_ptr<at::Tensor> AdamW::steps(size_t index) const {
  return std::make_unique<at::Tensor>(slots_.at(index).steps);
}

std::unique_ptr<at::Tensor> AdamW::stepped(size_t index) const {
  return std::make_unique<at::Tensor>(slots_.at(index).stepped);
}

bool AdamW::has_master(size_t index) const {
  return has_master_copy(slots_.at(index).param, slots_.at(index).stepped);
}

void AdamW::publish() const {
  const at::AutoGradMode no_grad(false);
  for (const auto& slot : slots_) {
    if (has_master_copy(slot.param, slot.stepped)) {
      slot.param.copy_(slot.stepped);
    }
  }
}

std::unique_ptr<AdamW> new_adamw(double beta1, double beta2, double eps, bool masters) {
  return std::make_unique<AdamW>(beta1, beta2, eps, masters);
}

}  // namespace bridge_shim
