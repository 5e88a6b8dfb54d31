#pragma once

#include <ATen/core/Tensor.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "rust/cxx.h"

namespace bridge_shim {

struct AdamWSettings;  // shared with Rust

// AdamW with global-norm clipping inside the pass: at::_fused_adamw_, or the kernels.
// With masters, bfloat16 parameters are stepped in float32 and copied back; every buffer lives as long as this object.
class AdamW {
 public:
  explicit AdamW(const AdamWSettings& settings);
  ~AdamW();

  void add(const at::Tensor& param, double weight_decay);
  // One step on the gradients that exist; returns their global L2 norm before clipping.
  // max_norm <= 0 does not clip. A norm that is not finite changes nothing.
  double step(double lr, double max_norm);
  void zero_grad() const;

  // A part of what a saved state holds of a parameter: exp_avg, exp_avg_sq, exp_avg_scale, exp_avg_sq_scale, step or master;
  // null where it has none.
  std::unique_ptr<at::Tensor> state(size_t index, rust::Str part) const;
  // Copies masters into their parameters, after a state was loaded.
  void publish() const;

 private:
  struct Slot {
    at::Tensor param, stepped, grad, exp_avg, exp_avg_sq, exp_avg_scale, exp_avg_sq_scale, steps;
    double weight_decay;
  };

  double fused_step(double lr, double max_norm);
  double kernel_step(double lr, double max_norm);

  std::unique_ptr<AdamWSettings> settings_;
  std::vector<Slot> slots_;
  std::vector<at::Tensor> table_;  // of the kernels; made by the first step
};

std::unique_ptr<AdamW> new_adamw(const AdamWSettings& settings);

}  // namespace bridge_shim
