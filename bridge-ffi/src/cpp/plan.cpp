// Plan of the header.
#include <limits>

#include "internals.hpp"

namespace megatron_bridge {

struct Plan::Impl {
  explicit Impl(rust::Box<core::Plan> from)
      : plan(std::move(from)), tensors(tensors_of(*plan)), place(place_of(*plan)) {
    for (std::size_t index = 0; index < tensors.size(); ++index) {
      by_name.emplace(tensors[index].name, index);
      bytes += tensors[index].bytes;
    }
  }

  rust::Box<core::Plan> plan;
  std::vector<TensorInfo> tensors;
  std::unordered_map<std::string, std::size_t> by_name;
  RankPlace place;
  std::uint64_t bytes = 0;
};

Plan::Plan(std::shared_ptr<const Impl> impl) noexcept : impl_(std::move(impl)) {}
Plan::Plan(const Plan&) = default;
Plan::Plan(Plan&&) noexcept = default;
Plan& Plan::operator=(const Plan&) = default;
Plan& Plan::operator=(Plan&&) noexcept = default;
Plan::~Plan() = default;

Plan Checkpoint::plan(const ParallelLayout& layout, const RankCoord& rank) const {
  return Internals::make<Plan>(crossed([&] {
    return core::checkpoint_plan(Internals::of_checkpoint(*this), numbers_of(layout),
                                 layout.pipeline_model_parallel_layout, numbers_of(rank));
  }));
}

const std::vector<TensorInfo>& Plan::tensors() const noexcept {
  return impl_->tensors;
}
const RankPlace& Plan::place() const noexcept {
  return impl_->place;
}
std::uint64_t Plan::bytes() const noexcept {
  return impl_->bytes;
}

const TensorInfo* Plan::find(const std::string& name) const noexcept {
  const auto found = impl_->by_name.find(name);
  return found == impl_->by_name.end() ? nullptr : &impl_->tensors[found->second];
}

const TensorInfo& Plan::at(const std::string& name) const {
  const auto found = impl_->by_name.find(name);
  if (found != impl_->by_name.end()) {
    return impl_->tensors[found->second];
  }
  // Rust knows no more names, but which one is nearest.
  return impl_->tensors[crossed([&] { return core::plan_find(*impl_->plan, name); })];
}

void Plan::load(const std::string& name, void* data, std::size_t bytes, Dtype dtype) const {
  Destination destination;
  destination.name = name;
  destination.data = data;
  destination.bytes = bytes;
  destination.dtype = dtype;
  load(destination);
}

void Plan::load(const Destination& destination) const {
  LoadOptions options;
  options.threads = 1;
  options.partial = true;
  load_all(Span<const Destination>(&destination, 1), options);
}

LoadReport Plan::load_all(Span<const Destination> destinations, const LoadOptions& options) const {
  std::vector<core::MemoryArgs> memory;
  memory.reserve(destinations.size());
  for (const Destination& one : destinations) {
    memory.push_back({reinterpret_cast<const std::uint8_t*>(one.name.data()), one.name.size(),
                      static_cast<std::uint8_t*>(one.data), one.bytes,
                      static_cast<std::int32_t>(one.dtype), one.row_stride_bytes, one.first_row,
                      one.num_rows.value_or(std::numeric_limits<std::size_t>::max())});
  }
  return moved(options, [&](const core::LoadArgs& args, const core::Watch& watch,
                            const core::Cancellation& cancellation) {
    const rust::Slice<const core::MemoryArgs> list(memory.data(), memory.size());
    return core::plan_load(*impl_->plan, list, args, watch, cancellation);
  });
}

}  // namespace megatron_bridge
