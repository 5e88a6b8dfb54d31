// torch.ops.megatron_bridge: what megatron_bridge/torch.hpp does, for jobs in Python.

#include <torch/library.h>

#include <cstdint>
#include <megatron_bridge/torch.hpp>
#include <string>

#include "layout_text.hpp"

namespace mb = megatron_bridge;

namespace {

/// A number that counts something.
std::size_t count(const char* what, std::int64_t value) {
  if (value < 0) {
    throw mb::Error(mb::ErrorCode::argument,
                    std::string(what) + " is " + std::to_string(value) + ", but counts from 0");
  }
  return static_cast<std::size_t>(value);
}

std::int64_t load_state_dict(const std::string& path, const std::string& layout, std::int64_t rank,
                             const c10::Dict<std::string, at::Tensor>& tensors,
                             std::int64_t vp_stage, const std::string& reference) {
  mb::OpenOptions open;
  open.reference = reference;
  const mb::RankCoord coord =
      mb::RankCoord::of(count("the rank", rank), count("the virtual stage", vp_stage));
  const mb::ParallelLayout parallel = parse_layout(layout);
  const mb::Plan plan = mb::Checkpoint::open(path, open).plan(parallel, coord);
  mb::StateDict state_dict;
  for (const auto& entry : tensors) {
    state_dict.emplace(entry.key(), entry.value());
  }
  return static_cast<std::int64_t>(mb::load_state_dict(plan, state_dict).tensors);
}

}  // namespace

// Fills `tensors`, one rank's parameters by Megatron-Core's local names, in place from the
// checkpoint directory at `path`, and returns how many there were. `layout` is as parse_layout
// reads it, `rank` the global rank. Each virtual stage of a rank is a call of its own. `reference`
// is for a torch_dist directory: the Hugging Face directory or config of its model.
TORCH_LIBRARY(megatron_bridge, library) {
  library.def(
      "load_state_dict(str path, str layout, int rank, Dict(str, Tensor) tensors, "
      "int vp_stage=0, str reference=\"\") -> int",
      &load_state_dict);
}
