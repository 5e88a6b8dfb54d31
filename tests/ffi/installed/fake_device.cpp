#include "fake_device.hpp"

#include <ATen/EmptyTensor.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/view_native.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/DeviceType.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <deque>
#include <functional>
#include <iterator>
#include <map>
#include <utility>

namespace {

constexpr c10::DeviceType kType = c10::DeviceType::PrivateUse1;
constexpr std::size_t kStreams = 2;
constexpr c10::StreamId kCopyStream = 1;

/// Work in order; `done` counts what was finished since the beginning.
struct Queue {
  std::deque<std::function<void()>> waiting;
  std::size_t done = 0;

  void run_until(std::size_t position) {
    while (done < position && !waiting.empty()) {
      const std::function<void()> work = std::move(waiting.front());
      waiting.pop_front();
      work();
      ++done;
    }
  }
  std::size_t end() const { return done + waiting.size(); }
};

std::array<Queue, kStreams> queues;
c10::StreamId current_stream = 0;
std::size_t pending_copies = 0;
std::size_t most_pending_copies = 0;
std::size_t unpinned = 0;
/// Begin to end of each piece of pinned memory; none is ever taken back.
std::map<const char*, const char*> pinned;

bool is_pinned(const void* data) {
  const auto* address = static_cast<const char*>(data);
  const auto after = pinned.upper_bound(address);
  return after != pinned.begin() && address < std::prev(after)->second;
}

Queue& queue(c10::StreamId stream) {
  return queues.at(static_cast<std::size_t>(stream));
}

struct Event {
  c10::StreamId stream;
  std::size_t position;
};

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return kType; }
  c10::Device exchangeDevice(c10::Device) const override { return fake_device::device(); }
  c10::Device getDevice() const override { return fake_device::device(); }
  void setDevice(c10::Device) const override {}
  void uncheckedSetDevice(c10::Device) const noexcept override {}
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }

  c10::Stream getStream(c10::Device device) const override {
    return c10::Stream(c10::Stream::UNSAFE, device, current_stream);
  }
  c10::Stream getStreamFromGlobalPool(c10::Device device, bool) const override {
    return c10::Stream(c10::Stream::UNSAFE, device, kCopyStream);
  }
  c10::Stream exchangeStream(c10::Stream stream) const override {
    return c10::Stream(c10::Stream::UNSAFE, stream.device(),
                       std::exchange(current_stream, stream.id()));
  }
  void record(void** event, const c10::Stream& stream, c10::DeviceIndex,
              c10::EventFlag) const override {
    if (*event == nullptr) {
      *event = new Event{};
    }
    *static_cast<Event*>(*event) = {stream.id(), queue(stream.id()).end()};
  }
  void block(void* event, const c10::Stream& stream) const override {
    if (event != nullptr) {
      const Event awaited = *static_cast<Event*>(event);
      queue(stream.id()).waiting.emplace_back([awaited] {
        queue(awaited.stream).run_until(awaited.position);
      });
    }
  }
  void synchronizeEvent(void* event) const override {
    if (event != nullptr) {
      const Event awaited = *static_cast<Event*>(event);
      queue(awaited.stream).run_until(awaited.position);
    }
  }
  void destroyEvent(void* event, c10::DeviceIndex) const noexcept override {
    delete static_cast<Event*>(event);
  }
};

/// Memory of the host that calls itself the device's.
struct DeviceAllocator final : c10::Allocator {
  c10::DataPtr allocate(std::size_t bytes) override {
    c10::DataPtr host = c10::GetCPUAllocator()->allocate(bytes);
    void* const data = host.get();
    const c10::DeleterFnPtr free = host.get_deleter();
    return {data, host.release_context(), free, fake_device::device()};
  }
  void copy_data(void*, const void*, std::size_t) const override {
    TORCH_CHECK(false, "the fake device copies in queues only");
  }
};

struct PinnedAllocator final : c10::Allocator {
  c10::DataPtr allocate(std::size_t bytes) override {
    c10::DataPtr host = c10::GetCPUAllocator()->allocate(bytes);
    const auto* begin = static_cast<const char*>(host.get());
    pinned[begin] = begin + bytes;
    return host;
  }
  void copy_data(void*, const void*, std::size_t) const override {
    TORCH_CHECK(false, "pinned memory is not copied here");
  }
};

DeviceAllocator device_allocator;
PinnedAllocator pinned_allocator;

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  bool isPinnedPtr(const void* data) const override { return is_pinned(data); }
  c10::Allocator* getPinnedMemoryAllocator() const override { return &pinned_allocator; }
};

/// The same memory, seen as the host's.
at::Tensor on_host(const at::Tensor& tensor) {
  return at::from_blob(tensor.data_ptr(), tensor.sizes(), tensor.strides(),
                       tensor.options().device(at::kCPU));
}

at::Tensor copy_from(const at::Tensor& source, const at::Tensor& target, bool non_blocking) {
  Queue& own = queue(current_stream);
  ++pending_copies;
  unpinned += non_blocking && source.is_cpu() && !is_pinned(source.data_ptr()) ? 1 : 0;
  most_pending_copies = std::max(most_pending_copies, pending_copies);
  // The target stays alive as it does on a GPU, whose allocator knows its streams; the source is
  // the caller's to keep: only its address is held here.
  own.waiting.emplace_back([from = on_host(source), to = on_host(target), keep = target] {
    --pending_copies;
    at::Tensor host = to;
    host.copy_(from);
  });
  if (!non_blocking) {
    own.run_until(own.end());
  }
  return target;
}

at::Tensor empty_strided(c10::IntArrayRef size, c10::IntArrayRef stride,
                         std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
                         std::optional<at::Device>, std::optional<bool>) {
  return at::detail::empty_strided_generic(size, stride, &device_allocator,
                                           c10::DispatchKeySet(c10::DispatchKey::PrivateUse1),
                                           dtype.value_or(at::kFloat));
}

at::Tensor empty(c10::IntArrayRef size, std::optional<at::ScalarType> dtype,
                 std::optional<at::Layout>, std::optional<at::Device>, std::optional<bool>,
                 std::optional<at::MemoryFormat> format) {
  return at::detail::empty_generic(size, &device_allocator,
                                   c10::DispatchKeySet(c10::DispatchKey::PrivateUse1),
                                   dtype.value_or(at::kFloat), format);
}

at::Tensor as_strided(const at::Tensor& self, c10::IntArrayRef size, c10::IntArrayRef stride,
                      std::optional<std::int64_t> offset) {
  return at::native::as_strided_tensorimpl(self, size, stride, offset);
}

}  // namespace

// libtorch's macro cannot be used within a function, and both are no more than static objects.
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard)

TORCH_LIBRARY_IMPL(aten, PrivateUse1, library) {
  library.impl("empty.memory_format", TORCH_FN(empty));
  library.impl("empty_strided", TORCH_FN(empty_strided));
  library.impl("as_strided", TORCH_FN(as_strided));
  library.impl("view", TORCH_FN(at::native::view));
  library.impl("_copy_from", TORCH_FN(copy_from));
}

namespace fake_device {

void install() {
  static Hooks hooks;
  c10::register_privateuse1_backend("fake");
  at::RegisterPrivateUse1HooksInterface(&hooks);
  c10::SetAllocator(kType, &device_allocator);
}

at::Device device() {
  return {kType, 0};
}

std::size_t pending() {
  return pending_copies;
}

std::size_t most_pending() {
  return most_pending_copies;
}

std::size_t unpinned_copies() {
  return unpinned;
}

void reset_statistics() {
  most_pending_copies = pending_copies;
  unpinned = 0;
}

void synchronize() {
  for (Queue& queue : queues) {
    queue.run_until(queue.end());
  }
}

}  // namespace fake_device
