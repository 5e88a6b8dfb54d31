#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

#include "rust/cxx.h"
#include "tensors.h"

namespace bridge_shim {

// The operators torch.ops.megatron_bridge.* of the kernel library (kernels/torch has their shapes), called by name: they may
// be linked in, loaded later, or absent. Undefined tensors stand for absent ones.

// Here and not in Rust, because its initialisers throw where libtorch refuses an operator.
void load_operators(rust::Str path);

// Whether the kernels of operator `name` are there for the CPU or for CUDA.
bool has_operator(rust::Str name, bool cuda);

std::unique_ptr<at::Tensor> kernel_rms_norm(const at::Tensor& x, const at::Tensor& weight, double eps);
std::unique_ptr<Tensors> kernel_add_rms_norm(const at::Tensor& x, const at::Tensor& residual, const at::Tensor& weight,
                                             double eps);
std::unique_ptr<at::Tensor> kernel_swiglu(const at::Tensor& x);
std::unique_ptr<Tensors> kernel_mrope_table(const at::Tensor& positions, const at::Tensor& frequencies,
                                            rust::Slice<const int64_t> section, const at::Tensor& like);
std::unique_ptr<Tensors> kernel_mrope(const at::Tensor& q, const at::Tensor& k, const at::Tensor& cos, const at::Tensor& sin);
std::unique_ptr<at::Tensor> kernel_chunk_map(const at::Tensor& cu_seqlens, int64_t tokens);
std::unique_ptr<Tensors> kernel_gdn_core(const at::Tensor& x, const at::Tensor& conv1d, const at::Tensor& a_log,
                                         const at::Tensor& dt_bias, const at::Tensor& out_norm, const at::Tensor& conv_state,
                                         const at::Tensor& state, const at::Tensor& cu_seqlens, const at::Tensor& chunk_map,
                                         int64_t key_heads, double eps, bool output_final_state);
std::unique_ptr<Tensors> kernel_route(const at::Tensor& logits, int64_t top_k);
std::unique_ptr<at::Tensor> kernel_routed_experts(const at::Tensor& x, const at::Tensor& weights, const at::Tensor& fc1,
                                                  const at::Tensor& fc2, const at::Tensor& experts,
                                                  const at::Tensor& shared, const at::Tensor& gate);
std::unique_ptr<at::Tensor> kernel_linear_cross_entropy(const at::Tensor& hidden, const at::Tensor& weight,
                                                        const at::Tensor& targets, double normalizer);

// What a step of AdamW goes through, an entry a parameter.
struct AdamWLists {
  std::vector<at::Tensor> parameters, exp_avg, exp_avg_sq, counts;
  std::vector<std::optional<at::Tensor>> masters, exp_avg_scale, exp_avg_sq_scale;
  std::vector<double> weight_decays;
};
std::vector<at::Tensor> kernel_adamw_table(const AdamWLists& lists);
at::Tensor kernel_adamw_step(const std::vector<at::Tensor>& table, const std::vector<std::optional<at::Tensor>>& gradients,
                             double lr, double beta1, double beta2, double eps, double max_norm, bool stochastic, int64_t seed);

}  // namespace bridge_shim
