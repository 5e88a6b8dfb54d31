#include "kernels.h"

#include <ATen/core/List.h>
#include <ATen/core/dispatch/Dispatcher.h>

#include <dlfcn.h>

#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

namespace bridge_shim {

namespace {

using OptionalTensor = std::optional<at::Tensor>;
using Pair = std::tuple<at::Tensor, at::Tensor>;

OptionalTensor present(const at::Tensor& x) { return x.defined() ? OptionalTensor(x) : std::nullopt; }

// Looks the operator up at each call: a lookup costs less than a launch, and a library may come later.
template <class Signature, class... Arguments>
auto call(const char* name, const Arguments&... arguments) {
  const std::string full = std::string("megatron_bridge::") + name;
  return c10::Dispatcher::singleton().findSchemaOrThrow(full.c_str(), "").typed<Signature>().call(arguments...);
}

std::unique_ptr<at::Tensor> one(at::Tensor result) { return std::make_unique<at::Tensor>(std::move(result)); }

std::unique_ptr<Tensors> both(const Pair& results) {
  return std::make_unique<Tensors>(std::vector<at::Tensor>{std::get<0>(results), std::get<1>(results)});
}

}  // namespace

void load_operators(rust::Str path) {
  if (dlopen(std::string(path).c_str(), RTLD_NOW | RTLD_LOCAL) == nullptr) {
    throw std::runtime_error(dlerror());
  }
}

bool has_operator(rust::Str name, bool cuda) {
  const auto found = c10::Dispatcher::singleton().findSchema({"megatron_bridge::" + std::string(name), ""});
  return found && found->hasKernelForDispatchKey(cuda ? c10::DispatchKey::CUDA : c10::DispatchKey::CPU);
}

std::unique_ptr<at::Tensor> kernel_rms_norm(const at::Tensor& x, const at::Tensor& weight, double eps) {
  return one(call<at::Tensor(const at::Tensor&, const at::Tensor&, double)>("rms_norm", x, weight, eps));
}

std::unique_ptr<Tensors> kernel_add_rms_norm(const at::Tensor& x, const at::Tensor& residual, const at::Tensor& weight,
                                             double eps) {
  return both(call<Pair(const at::Tensor&, const at::Tensor&, const at::Tensor&, double)>("add_rms_norm", x, residual, weight,
                                                                                          eps));
}

std::unique_ptr<at::Tensor> kernel_swiglu(const at::Tensor& x) {
  return one(call<at::Tensor(const at::Tensor&)>("swiglu", x));
}

std::unique_ptr<Tensors> kernel_mrope_table(const at::Tensor& positions, const at::Tensor& frequencies,
                                            rust::Slice<const int64_t> section, const at::Tensor& like) {
  return both(call<Pair(const at::Tensor&, const at::Tensor&, at::IntArrayRef, at::ScalarType)>(
      "mrope_table", positions, frequencies, at::IntArrayRef(section.data(), section.size()), like.scalar_type()));
}

std::unique_ptr<Tensors> kernel_mrope(const at::Tensor& q, const at::Tensor& k, const at::Tensor& cos, const at::Tensor& sin) {
  return both(call<Pair(at::Tensor, at::Tensor, const at::Tensor&, const at::Tensor&)>("mrope_", q, k, cos, sin));
}

std::unique_ptr<at::Tensor> kernel_chunk_map(const at::Tensor& cu_seqlens, int64_t tokens) {
  return one(call<at::Tensor(const at::Tensor&, int64_t)>("chunk_map", cu_seqlens, tokens));
}

std::unique_ptr<Tensors> kernel_gdn_core(const at::Tensor& x, const at::Tensor& conv1d, const at::Tensor& a_log,
                                         const at::Tensor& dt_bias, const at::Tensor& out_norm, const at::Tensor& conv_state,
                                         const at::Tensor& state, const at::Tensor& cu_seqlens, const at::Tensor& chunk_map,
                                         int64_t key_heads, double eps, bool output_final_state) {
  return both(call<Pair(const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&,
                        const OptionalTensor&, const OptionalTensor&, const at::Tensor&, const at::Tensor&, int64_t, double,
                        bool)>("gdn_core", x, conv1d, a_log, dt_bias, out_norm, present(conv_state), present(state), cu_seqlens,
                               chunk_map, key_heads, eps, output_final_state));
}

std::unique_ptr<Tensors> kernel_route(const at::Tensor& logits, int64_t top_k) {
  return both(call<Pair(const at::Tensor&, int64_t)>("route", logits, top_k));
}

std::unique_ptr<at::Tensor> kernel_routed_experts(const at::Tensor& x, const at::Tensor& weights, const at::Tensor& fc1,
                                                  const at::Tensor& fc2, const at::Tensor& experts,
                                                  const at::Tensor& shared, const at::Tensor& gate) {
  return one(call<at::Tensor(const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&,
                             const OptionalTensor&, const OptionalTensor&)>("routed_experts", x, weights, fc1, fc2, experts,
                                                                            present(shared), present(gate)));
}

std::unique_ptr<at::Tensor> kernel_linear_cross_entropy(const at::Tensor& hidden, const at::Tensor& weight,
                                                        const at::Tensor& targets, double normalizer) {
  return one(call<at::Tensor(const at::Tensor&, const at::Tensor&, const at::Tensor&, double)>(
      "linear_cross_entropy", hidden, weight, targets, normalizer));
}

std::vector<at::Tensor> kernel_adamw_table(const AdamWLists& lists) {
  using Optionals = c10::List<OptionalTensor>;
  return call<std::vector<at::Tensor>(at::TensorList, const Optionals&, at::TensorList, at::TensorList, const Optionals&,
                                      const Optionals&, at::TensorList, at::ArrayRef<double>)>(
      "adamw_table", lists.parameters, Optionals(lists.masters), lists.exp_avg, lists.exp_avg_sq, Optionals(lists.exp_avg_scale),
      Optionals(lists.exp_avg_sq_scale), lists.counts, lists.weight_decays);
}

at::Tensor kernel_adamw_step(const std::vector<at::Tensor>& table, const std::vector<OptionalTensor>& gradients, double lr,
                             double beta1, double beta2, double eps, double max_norm, bool stochastic, int64_t seed) {
  return call<at::Tensor(at::TensorList, const c10::List<OptionalTensor>&, double, double, double, double, double, bool,
                         int64_t)>("adamw_step", table, c10::List<OptionalTensor>(gradients), lr, beta1, beta2, eps, max_norm,
                                   stochastic, seed);
}

}  // namespace bridge_shim
