// Error, Dtype, Cancellation, Checkpoint and Provider of the header.
#include "internals.hpp"

namespace megatron_bridge {

std::string version() {
  const rust::Str found = core::version();
  return std::string(found.data(), found.size());
}

std::size_t size_bytes(Dtype dtype) noexcept {
  return core::dtype_size(static_cast<std::int32_t>(dtype));
}

std::string to_string(Dtype dtype) {
  const rust::Str word = core::dtype_word(static_cast<std::int32_t>(dtype));
  return std::string(word.data(), word.size());
}

Error::Error(ErrorCode code, const std::string& message)
    : std::runtime_error(message), code_(code) {}
Error::Error(const Error&) noexcept = default;
Error& Error::operator=(const Error&) noexcept = default;
Error::~Error() = default;

// ---- Cancellation

struct Cancellation::Impl {
  rust::Box<core::Cancellation> cancellation = core::new_cancellation();
};

Cancellation::Cancellation() : impl_(std::make_shared<const Impl>()) {}
Cancellation::Cancellation(const Cancellation&) = default;
Cancellation::Cancellation(Cancellation&&) noexcept = default;
Cancellation& Cancellation::operator=(const Cancellation&) = default;
Cancellation& Cancellation::operator=(Cancellation&&) noexcept = default;
Cancellation::~Cancellation() = default;

void Cancellation::cancel() const noexcept {
  impl_->cancellation->cancel();
}
bool Cancellation::is_cancelled() const noexcept {
  return impl_->cancellation->is_cancelled();
}

const core::Cancellation& Internals::of_cancellation(const Cancellation& cancellation) {
  return *of(cancellation).cancellation;
}

// ---- Provider

struct Provider::Impl {
  explicit Impl(rust::Box<core::Provider> from)
      : provider(std::move(from)),
        class_name(to_std(core::provider_class_name(*provider))),
        json(to_std(core::provider_json(*provider))) {}

  rust::Box<core::Provider> provider;
  std::string class_name;
  std::string json;
};

Provider::Provider(std::shared_ptr<const Impl> impl) noexcept : impl_(std::move(impl)) {}
Provider::Provider(const Provider&) = default;
Provider::Provider(Provider&&) noexcept = default;
Provider& Provider::operator=(const Provider&) = default;
Provider& Provider::operator=(Provider&&) noexcept = default;
Provider::~Provider() = default;

const std::string& Provider::class_name() const noexcept {
  return impl_->class_name;
}
const std::string& Provider::json() const noexcept {
  return impl_->json;
}

std::vector<std::string> Provider::fields() const {
  std::vector<std::string> names;
  for (const rust::String& name : core::provider_fields(*impl_->provider)) {
    names.push_back(to_std(name));
  }
  return names;
}

bool Provider::has(const std::string& field) const noexcept {
  return core::provider_has(*impl_->provider, field);
}

std::int64_t Provider::integer(const std::string& field) const {
  return crossed([&] { return core::provider_integer(*impl_->provider, field); });
}

double Provider::number(const std::string& field) const {
  return crossed([&] { return core::provider_number(*impl_->provider, field); });
}

bool Provider::boolean(const std::string& field) const {
  return crossed([&] { return core::provider_boolean(*impl_->provider, field); });
}

std::string Provider::text(const std::string& field) const {
  return to_std(crossed([&] { return core::provider_text(*impl_->provider, field); }));
}

std::vector<std::int64_t> Provider::integers(const std::string& field) const {
  const rust::Vec<std::int64_t> found =
      crossed([&] { return core::provider_integers(*impl_->provider, field); });
  return std::vector<std::int64_t>(found.begin(), found.end());
}

std::optional<std::int64_t> Provider::optional_integer(const std::string& field) const {
  return has(field) ? std::optional<std::int64_t>(integer(field)) : std::nullopt;
}

std::optional<double> Provider::optional_number(const std::string& field) const {
  return has(field) ? std::optional<double>(number(field)) : std::nullopt;
}

std::optional<bool> Provider::optional_boolean(const std::string& field) const {
  return has(field) ? std::optional<bool>(boolean(field)) : std::nullopt;
}

std::optional<std::string> Provider::optional_text(const std::string& field) const {
  return has(field) ? std::optional<std::string>(text(field)) : std::nullopt;
}

std::optional<std::vector<std::int64_t>> Provider::optional_integers(
    const std::string& field) const {
  return has(field) ? std::optional<std::vector<std::int64_t>>(integers(field)) : std::nullopt;
}

// ---- Checkpoint

struct Checkpoint::Impl {
  explicit Impl(rust::Box<core::Checkpoint> from) : checkpoint(std::move(from)) {}

  rust::Box<core::Checkpoint> checkpoint;
};

Checkpoint::Checkpoint(std::shared_ptr<const Impl> impl) noexcept : impl_(std::move(impl)) {}
Checkpoint::Checkpoint(const Checkpoint&) = default;
Checkpoint::Checkpoint(Checkpoint&&) noexcept = default;
Checkpoint& Checkpoint::operator=(const Checkpoint&) = default;
Checkpoint& Checkpoint::operator=(Checkpoint&&) noexcept = default;
Checkpoint::~Checkpoint() = default;

Checkpoint Checkpoint::open(const std::string& path, const OpenOptions& options) {
  return Internals::make<Checkpoint>(
      crossed([&] { return core::checkpoint_open(path, options.reference, options.not_strict); }));
}

Provider Checkpoint::provider() const {
  return Internals::make<Provider>(
      crossed([&] { return core::checkpoint_provider(*impl_->checkpoint); }));
}

LayoutInfo Checkpoint::layout(const ParallelLayout& layout) const {
  const core::LayoutResult found = crossed([&] {
    return core::checkpoint_layout(*impl_->checkpoint, numbers_of(layout),
                                   layout.pipeline_model_parallel_layout);
  });
  LayoutInfo info;
  info.world_size = found.world_size;
  info.data_parallel_size = found.data_parallel_size;
  info.expert_data_parallel_size = found.expert_data_parallel_size;
  info.virtual_pipeline_model_parallel_size = found.virtual_pipeline_model_parallel_size;
  info.padded_vocab_size = found.padded_vocab_size;
  info.pipeline_model_parallel_layout = to_std(found.pipeline_model_parallel_layout);
  return info;
}

const core::Checkpoint& Internals::of_checkpoint(const Checkpoint& checkpoint) {
  return *of(checkpoint).checkpoint;
}

}  // namespace megatron_bridge
