#include "internals.hpp"

#include <cstdlib>
#include <limits>

namespace megatron_bridge {

namespace {

constexpr std::size_t kNone = std::numeric_limits<std::size_t>::max();

}  // namespace

[[noreturn]] void throw_error(const char* crossing) {
  char* blank = nullptr;
  const long number = std::strtol(crossing, &blank, 10);
  const char* message = *blank == ' ' ? blank + 1 : blank;
  throw Error(static_cast<ErrorCode>(number), message);
}

std::string to_std(const rust::String& from) {
  return std::string(from.data(), from.size());
}

std::vector<TensorInfo> tensors_of(const core::Plan& plan) {
  std::vector<TensorInfo> tensors;
  rust::Vec<core::Tensor> found = core::plan_tensors(plan);
  tensors.reserve(found.size());
  for (const core::Tensor& one : found) {
    TensorInfo info;
    info.name = to_std(one.name);
    info.dtype = static_cast<Dtype>(one.dtype);
    info.shape.assign(one.shape.begin(), one.shape.end());
    info.bytes = one.bytes;
    tensors.push_back(std::move(info));
  }
  return tensors;
}

RankPlace place_of(const core::Plan& plan) {
  const core::Place at = core::plan_place(plan);
  return RankPlace{at.global_rank, at.tp_rank, at.cp_rank,  at.dp_rank, at.pp_rank,
                   at.etp_rank,    at.ep_rank, at.edp_rank, at.vp_stage};
}

core::LayoutNumbers numbers_of(const ParallelLayout& layout) {
  core::LayoutNumbers numbers{};
  numbers.tensor_model_parallel_size = layout.tensor_model_parallel_size;
  numbers.pipeline_model_parallel_size = layout.pipeline_model_parallel_size;
  numbers.virtual_pipeline_model_parallel_size =
      layout.virtual_pipeline_model_parallel_size.value_or(kNone);
  numbers.context_parallel_size = layout.context_parallel_size;
  numbers.expert_model_parallel_size = layout.expert_model_parallel_size;
  numbers.expert_tensor_parallel_size = layout.expert_tensor_parallel_size;
  numbers.data_parallel_size = layout.data_parallel_size.value_or(kNone);
  numbers.world_size = layout.world_size.value_or(kNone);
  numbers.num_layers_in_first_pipeline_stage =
      layout.num_layers_in_first_pipeline_stage.value_or(kNone);
  numbers.num_layers_in_last_pipeline_stage =
      layout.num_layers_in_last_pipeline_stage.value_or(kNone);
  numbers.make_vocab_size_divisible_by = layout.make_vocab_size_divisible_by.value_or(kNone);
  numbers.account_for_embedding_in_pipeline_split = layout.account_for_embedding_in_pipeline_split;
  numbers.account_for_loss_in_pipeline_split = layout.account_for_loss_in_pipeline_split;
  numbers.sequential_experts = layout.sequential_experts;
  numbers.without_mtp = layout.without_mtp;
  numbers.params_dtype = layout.params_dtype ? static_cast<std::int32_t>(*layout.params_dtype) : 0;
  return numbers;
}

core::RankNumbers numbers_of(const RankCoord& rank) {
  return core::RankNumbers{rank.global_rank.value_or(kNone),
                           rank.tp_rank,
                           rank.pp_rank,
                           rank.ep_rank,
                           rank.etp_rank,
                           rank.vp_stage};
}

}  // namespace megatron_bridge
