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
#include <string>
#include <utility>

#include "bridge-torch/src/shim/ffi.rs.h"
#include "kernels.h"
#include "sum_of_squares.h"

namespace bridge_shim {

namespace {

using List = std::vector<at::Tensor>;

bool has_master_copy(const at::Tensor& param, const at::Tensor& stepped) {
  return !param.is_same(stepped);
}

// In float64, whatever the gradients' kind: a bfloat16 result would be off by 0.4 %.
double global_norm(const List& grads) {
  double sum = 0;
  List others;
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

AdamW::AdamW(const AdamWSettings& settings) : settings_(std::make_unique<AdamWSettings>(settings)) {}

AdamW::~AdamW() = default;

void AdamW::add(const at::Tensor& param, double weight_decay) {
  const at::AutoGradMode no_grad(false);
  Slot slot;
  slot.param = param;
  slot.weight_decay = weight_decay;
  const bool master = settings_->masters && param.scalar_type() == at::kBFloat16;
  slot.stepped = master ? param.to(at::kFloat) : param;
  const auto plain = param.options().requires_grad(false);
  auto moments = plain.dtype(slot.stepped.scalar_type());
  if (settings_->kernels) {
    moments = plain.dtype(settings_->eight_bit ? at::kByte : at::kFloat);
  } else if (master) {
    slot.grad = at::empty_like(slot.stepped);
  }
  slot.exp_avg = at::zeros_like(slot.stepped, moments);
  slot.exp_avg_sq = at::zeros_like(slot.stepped, moments);
  if (settings_->eight_bit) {
    slot.exp_avg_scale = at::zeros({(param.numel() + 255) / 256}, plain.dtype(at::kFloat));
    slot.exp_avg_sq_scale = at::zeros_like(slot.exp_avg_scale);
  }
  slot.steps = at::zeros({}, plain.dtype(at::kFloat));
  slots_.push_back(std::move(slot));
  table_.clear();
}

double AdamW::step(double lr, double max_norm) {
  const at::AutoGradMode no_grad(false);
  return settings_->kernels ? kernel_step(lr, max_norm) : fused_step(lr, max_norm);
}

double AdamW::kernel_step(double lr, double max_norm) {
  using Optional = std::optional<at::Tensor>;
  const auto present = [](const at::Tensor& x) { return x.defined() ? Optional(x) : std::nullopt; };
  if (table_.empty()) {
    AdamWLists lists;
    for (const auto& slot : slots_) {
      lists.parameters.push_back(slot.param);
      lists.masters.push_back(has_master_copy(slot.param, slot.stepped) ? Optional(slot.stepped) : std::nullopt);
      lists.exp_avg.push_back(slot.exp_avg);
      lists.exp_avg_sq.push_back(slot.exp_avg_sq);
      lists.exp_avg_scale.push_back(present(slot.exp_avg_scale));
      lists.exp_avg_sq_scale.push_back(present(slot.exp_avg_sq_scale));
      lists.counts.push_back(slot.steps);
      lists.weight_decays.push_back(slot.weight_decay);
    }
    table_ = kernel_adamw_table(lists);
  }
  std::vector<Optional> gradients;
  for (const auto& slot : slots_) {
    gradients.push_back(present(slot.param.grad()));
  }
  const at::Tensor norm =
      kernel_adamw_step(table_, gradients, lr, settings_->beta1, settings_->beta2, settings_->eps, std::max(max_norm, 0.0),
                        settings_->stochastic, static_cast<int64_t>(settings_->seed));
  for (const auto& slot : slots_) {
    slot.param.unsafeGetTensorImpl()->bump_version();  // a backward pass through an older graph must notice
  }
  return norm.item<double>();
}

double AdamW::fused_step(double lr, double max_norm) {
  struct Group {
    List params, grads, exp_avgs, exp_avg_sqs, steps;
  };
  std::map<std::pair<double, at::ScalarType>, Group> groups;
  List raw, wide, params, masters, all;
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
                      lr, settings_->beta1, settings_->beta2, key.first, settings_->eps, /*amsgrad=*/false, /*maximize=*/false,
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

std::unique_ptr<at::Tensor> AdamW::state(size_t index, rust::Str part) const {
  const Slot& slot = slots_.at(index);
  const std::map<std::string, at::Tensor> parts = {
      {"exp_avg", slot.exp_avg},
      {"exp_avg_sq", slot.exp_avg_sq},
      {"exp_avg_scale", slot.exp_avg_scale},
      {"exp_avg_sq_scale", slot.exp_avg_sq_scale},
      {"step", slot.steps},
      {"master", has_master_copy(slot.param, slot.stepped) ? slot.stepped : at::Tensor()},
  };
  const at::Tensor& found = parts.at(std::string(part));
  return found.defined() ? std::make_unique<at::Tensor>(found) : nullptr;
}

void AdamW::publish() const {
  const at::AutoGradMode no_grad(false);
  for (const auto& slot : slots_) {
    if (has_master_copy(slot.param, slot.stepped)) {
      slot.param.copy_(slot.stepped);
    }
  }
}

std::unique_ptr<AdamW> new_adamw(const AdamWSettings& settings) { return std::make_unique<AdamW>(settings); }

}  // namespace bridge_shim
