#pragma once

#include <ATen/core/Tensor.h>

#include <cstddef>
#include <memory>
#include <vector>

namespace bridge_shim {

// AdamW over at::_fused_adamw_ with global-norm clipping inside the fused pass.
// With masters, bfloat16 parameters are stepped in float32 and copied back; every buffer lives as long as this object.
class AdamW {
 public:
  AdamW(double beta1, double beta2, double eps, bool masters);

  void add(const at::Tensor& param, double weight_decay);
  // One step on the gradients that exist; returns their global L2 norm before clipping.
  // max_norm <= 0 does not clip. A norm that is not finite changes nothing.
  double step(double lr, double max_norm);
  void zero_grad() const;

  std::unique_ptr<at::Tensor> exp_avg(size_t index) const;
  std::unique_ptr<at::Tensor> exp_avg_sq(size_t index) const;
  std::unique_ptr<at::Tensor> steps(size_t index) const;
  // The tensor that is stepped: the float32 master, or the parameter itself.
  std::unique_ptr<at::Tensor> stepped(size_t index) const;
  bool has_master(size_t index) const;
  // Copies masters into their parameters, after a state was loaded.
  void publish() const;

 private:
  struct Slot {
    at::Tensor param, stepped, grad, exp_avg, exp_avg_sq, steps;
    double weight_decay;
  };

  double beta1_, beta2_, eps_;
  bool masters_;
  std::vector<Slot> slots_;
};

std::unique_ptr<AdamW> new_adamw(double beta1, double beta2, double eps, bool masters);

}  // namespace bridge_shim
