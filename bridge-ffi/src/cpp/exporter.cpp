// Exporter of the header.
#include <limits>

#include "internals.hpp"

namespace megatron_bridge {

struct Exporter::Impl {
  explicit Impl(rust::Box<core::Exporter> from)
      : exporter(std::move(from)),
        tensors(tensors_of(core::exporter_plan(*exporter))),
        place(place_of(core::exporter_plan(*exporter))) {}

  rust::Box<core::Exporter> exporter;
  std::vector<TensorInfo> tensors;
  RankPlace place;
};

Exporter::Exporter(std::shared_ptr<const Impl> impl) noexcept : impl_(std::move(impl)) {}
Exporter::Exporter(const Exporter&) = default;
Exporter::Exporter(Exporter&&) noexcept = default;
Exporter& Exporter::operator=(const Exporter&) = default;
Exporter& Exporter::operator=(Exporter&&) noexcept = default;
Exporter::~Exporter() = default;

Exporter Exporter::open(const Checkpoint& reference, const ParallelLayout& layout,
                        const RankCoord& rank, const std::string& target,
                        const ExportOptions& options) {
  return Internals::make<Exporter>(crossed([&] {
    return core::exporter_open(Internals::of_checkpoint(reference), numbers_of(layout),
                               layout.pipeline_model_parallel_layout, numbers_of(rank), target,
                               options.export_id, options.overwrite,
                               static_cast<std::int32_t>(options.missing));
  }));
}

std::size_t Exporter::discard(const std::string& target) {
  return crossed([&] { return core::exporter_discard(target); });
}

const std::vector<TensorInfo>& Exporter::tensors() const noexcept {
  return impl_->tensors;
}
const RankPlace& Exporter::place() const noexcept {
  return impl_->place;
}

bool Exporter::is_needed() const noexcept {
  return core::exporter_is_needed(*impl_->exporter);
}

void Exporter::write(const std::string& name, const void* data, std::size_t bytes,
                     Dtype dtype) const {
  Source source;
  source.name = name;
  source.data = data;
  source.bytes = bytes;
  source.dtype = dtype;
  LoadOptions options;
  options.threads = 1;
  write_all(Span<const Source>(&source, 1), options);
}

LoadReport Exporter::write_all(Span<const Source> sources, const LoadOptions& options) const {
  std::vector<core::MemoryArgs> memory;
  memory.reserve(sources.size());
  for (const Source& one : sources) {
    // The bridge has one struct for both ways; memory of sources is only read.
    auto* data = static_cast<std::uint8_t*>(const_cast<void*>(one.data));
    memory.push_back({reinterpret_cast<const std::uint8_t*>(one.name.data()), one.name.size(), data,
                      one.bytes, static_cast<std::int32_t>(one.dtype), one.row_stride_bytes, 0,
                      std::numeric_limits<std::size_t>::max()});
  }
  return moved(options, [&](const core::LoadArgs& args, const core::Watch& watch,
                            const core::Cancellation& cancellation) {
    const rust::Slice<const core::MemoryArgs> list(memory.data(), memory.size());
    return core::exporter_write(*impl_->exporter, list, args, watch, cancellation);
  });
}

ExportState Exporter::finish() const {
  const core::State state = crossed([&] { return core::exporter_finish(*impl_->exporter); });
  return ExportState{state.complete, state.finished, state.needed};
}

}  // namespace megatron_bridge
