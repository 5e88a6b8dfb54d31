#include "cases.hpp"

#include <algorithm>
#include <cstring>

#include "megatron_bridge/megatron_bridge.h"

namespace cases {

std::map<std::string, Case>& all() {
  static std::map<std::string, Case> cases;
  return cases;
}

}  // namespace cases

// Runs a case: 0 when it held, else 1 and why not.
extern "C" int ffi_run(const char* name, const char* checkpoint, const char* scratch,
                       const char* more, char* text, std::size_t capacity) {
  std::string message;
  try {
    const auto found = cases::all().find(name);
    if (found == cases::all().end()) {
      message = std::string("there is no case ") + name;
    } else {
      found->second(cases::Args{checkpoint, scratch, more});
      return 0;
    }
  } catch (const std::exception& error) {
    message = error.what();
  } catch (...) {
    message = "something that is no std::exception";
  }
  const std::size_t length = std::min(message.size(), capacity - 1);
  std::memcpy(text, message.data(), length);
  text[length] = '\0';
  return 1;
}

using Visit = void (*)(void* user, const char* name, std::int32_t dtype, const std::size_t* shape,
                       std::size_t num_dims, const void* data, std::size_t bytes);

// Loads one virtual stage of one rank and shows every tensor; the layout comes as C's.
extern "C" int ffi_load(const char* checkpoint, const char* reference,
                        const bridge_parallel_layout* from, std::size_t rank, std::size_t vp_stage,
                        Visit visit, void* user, char* text, std::size_t capacity) {
  namespace mb = megatron_bridge;
  try {
    mb::ParallelLayout layout;
    const auto some = [](std::size_t number) {
      return number == 0 ? std::nullopt : std::optional<std::size_t>(number);
    };
    layout.tensor_model_parallel_size = from->tensor_model_parallel_size;
    layout.pipeline_model_parallel_size = from->pipeline_model_parallel_size;
    layout.virtual_pipeline_model_parallel_size = some(from->virtual_pipeline_model_parallel_size);
    layout.context_parallel_size = from->context_parallel_size;
    layout.expert_model_parallel_size = from->expert_model_parallel_size;
    layout.expert_tensor_parallel_size = from->expert_tensor_parallel_size;
    if (from->pipeline_model_parallel_layout != nullptr) {
      layout.pipeline_model_parallel_layout = from->pipeline_model_parallel_layout;
    }
    layout.num_layers_in_first_pipeline_stage = some(from->num_layers_in_first_pipeline_stage);
    layout.num_layers_in_last_pipeline_stage = some(from->num_layers_in_last_pipeline_stage);
    layout.account_for_embedding_in_pipeline_split =
        from->account_for_embedding_in_pipeline_split != 0;
    layout.account_for_loss_in_pipeline_split = from->account_for_loss_in_pipeline_split != 0;
    layout.make_vocab_size_divisible_by = some(from->make_vocab_size_divisible_by);
    layout.sequential_experts = from->sequential_experts != 0;
    layout.without_mtp = from->without_mtp != 0;
    if (from->params_dtype != BRIDGE_DTYPE_NONE) {
      layout.params_dtype = static_cast<mb::Dtype>(from->params_dtype);
    }
    const mb::Checkpoint opened = mb::Checkpoint::open(checkpoint, {reference});
    const mb::Plan plan = opened.plan(layout, mb::RankCoord::of(rank, vp_stage));
    BRIDGE_CHECK_EQ(plan.place().global_rank, rank);
    BRIDGE_CHECK_EQ(plan.place().vp_stage, vp_stage);
    cases::Memory memory(plan.tensors());
    mb::LoadOptions options;
    options.threads = 2;
    const mb::LoadReport report = plan.load_all(memory.destinations(), options);
    BRIDGE_CHECK_EQ(report.tensors, plan.size());
    BRIDGE_CHECK_EQ(report.bytes, plan.bytes());
    for (std::size_t at = 0; at < plan.size(); ++at) {
      const mb::TensorInfo& tensor = plan[at];
      visit(user, tensor.name.c_str(), static_cast<std::int32_t>(tensor.dtype), tensor.shape.data(),
            tensor.shape.size(), memory.data[at].data(), tensor.bytes);
    }
    return 0;
  } catch (const std::exception& error) {
    const std::string message = error.what();
    const std::size_t length = std::min(message.size(), capacity - 1);
    std::memcpy(text, message.data(), length);
    text[length] = '\0';
    return 1;
  }
}
