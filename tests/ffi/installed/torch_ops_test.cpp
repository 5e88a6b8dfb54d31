// torch.ops.megatron_bridge without Python: the operator of a loaded library, found by its name.
//   torch_ops_test LIBRARY CHECKPOINT

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/stack.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/equal.h>
#include <dlfcn.h>

#include <exception>
#include <megatron_bridge/torch.hpp>

#include "check.hpp"

namespace mb = megatron_bridge;

namespace {

std::int64_t call(const std::string& path, const std::string& layout, std::int64_t rank,
                  const mb::StateDict& state_dict) {
  const c10::OperatorHandle load =
      c10::Dispatcher::singleton().findSchemaOrThrow("megatron_bridge::load_state_dict", "");
  c10::Dict<std::string, at::Tensor> tensors;
  for (const auto& [name, tensor] : state_dict) {
    tensors.insert(name, tensor);
  }
  torch::jit::Stack stack = {path, layout, rank, tensors, std::int64_t{0}, std::string()};
  load.callBoxed(stack);
  return stack.at(0).toInt();
}

/// The text of what the operator throws; the library has its own copy of the error's type.
std::string refusal(const std::string& path, const std::string& layout, std::int64_t rank,
                    const mb::StateDict& state_dict) {
  try {
    call(path, layout, rank, state_dict);
    return "nothing was thrown";
  } catch (const std::exception& error) {
    return error.what();
  }
}

void check_said(const std::string& what, const std::string& said, const std::string& wanted) {
  const bool good = said.find(wanted) != std::string::npos;
  check(what, good);
  if (!good) {
    std::cout << "       " << said << std::endl;
  }
}

void run(const std::string& path) {
  mb::ParallelLayout layout;
  layout.tensor_model_parallel_size = 2;
  layout.pipeline_model_parallel_size = 2;
  layout.expert_model_parallel_size = 2;
  layout.expert_tensor_parallel_size = 2;
  const mb::Checkpoint checkpoint = mb::Checkpoint::open(path);
  for (std::int64_t rank = 0; rank < 8; ++rank) {
    const mb::Plan plan =
        checkpoint.plan(layout, mb::RankCoord::of(static_cast<std::size_t>(rank)));
    const mb::StateDict expected = mb::empty_state_dict(plan);
    mb::load_state_dict(plan, expected);
    const mb::StateDict found = mb::empty_state_dict(plan);
    // Short names and Megatron's mean the same.
    const std::string text = rank % 2 == 0 ? "tp=2,pp=2,ep=2,etp=2"
                                           : "expert_tensor_parallel_size=2,ep=2,"
                                             "pipeline_model_parallel_size=2,tp=2";
    const std::int64_t loaded = call(path, text, rank, found);
    bool same = loaded == static_cast<std::int64_t>(plan.size());
    for (const auto& [name, tensor] : expected) {
      same = same && at::equal(tensor, found.at(name));
    }
    check("the operator loads rank " + std::to_string(rank), same);
  }
  check_said("a layout with an unknown key", refusal(path, "tp=2,qp=2", 0, {}), "`qp`");
  check_said("a layout without a number", refusal(path, "tp=two", 0, {}), "`two`");
  check_said("a key without a value", refusal(path, "tp", 0, {}), "ends in `tp`");
  check_said("a key that comes twice", refusal(path, "tp=2,tensor_model_parallel_size=2", 0, {}),
             "twice");
  check_said("a switch that is neither 0 nor 1", refusal(path, "without_mtp=2", 0, {}), "0 or 1");
  check_said("a dtype that no weights have", refusal(path, "params_dtype=int8", 0, {}), "`int8`");
  check_said("a rank below 0", refusal(path, "", -1, {}), "-1");
  check_said("tensors that are missing", refusal(path, "", 0, {}), "are not in the state dict");
  check_said("a stage layout with commas of its own",
             refusal(path, "tp=1,pipeline_model_parallel_layout=Ett,tt", 0, {}),
             "must end with loss");
}

}  // namespace

int main(int count, char** words) {
  if (count != 3) {
    std::cerr << "usage: torch_ops_test LIBRARY CHECKPOINT\n";
    return 2;
  }
  if (dlopen(words[1], RTLD_NOW | RTLD_LOCAL) == nullptr) {
    std::cerr << "error: " << dlerror() << '\n';
    return 1;
  }
  try {
    run(words[2]);
  } catch (const std::exception& error) {
    std::cerr << "error: " << error.what() << '\n';
    return 1;
  }
  return failures == 0 ? 0 : 1;
}
