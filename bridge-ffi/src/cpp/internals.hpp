// What the classes of the header hold, and how calls into Rust become exceptions.
#pragma once

#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "bridge-ffi/src/cxx_bridge.rs.h"
#include "megatron_bridge/megatron_bridge.hpp"
#include "rust/cxx.h"

namespace megatron_bridge {

// The friend of all handles: makes them, and looks into them.
struct Internals {
  template <class Handle>
  static const typename Handle::Impl& of(const Handle& handle) {
    return *handle.impl_;
  }

  template <class Handle, class... Args>
  static Handle make(Args&&... args) {
    using Impl = typename Handle::Impl;
    return Handle(std::make_shared<const Impl>(std::forward<Args>(args)...));
  }

  static const core::Cancellation& of_cancellation(const Cancellation& cancellation);
  static const core::Checkpoint& of_checkpoint(const Checkpoint& checkpoint);
};

// Throws what came out of Rust as "NUMBER TEXT".
[[noreturn]] void throw_error(const char* crossing);

template <class Work>
auto crossed(Work&& work) -> decltype(work()) {
  try {
    return work();
  } catch (const rust::Error& error) {
    throw_error(error.what());
  }
}

std::string to_std(const rust::String& from);
std::vector<TensorInfo> tensors_of(const core::Plan& plan);
RankPlace place_of(const core::Plan& plan);
core::LayoutNumbers numbers_of(const ParallelLayout& layout);
core::RankNumbers numbers_of(const RankCoord& rank);

// Calls `work(memory, args, watch, cancellation)`, a function of the bridge; what the progress
// callback throws comes out unchanged.
template <class Work>
LoadReport moved(const LoadOptions& options, Work&& work) {
  core::Watch watch(options.progress);
  const core::LoadArgs args{options.threads, options.allow_non_finite, options.partial};
  const Cancellation own = options.cancellation ? *options.cancellation : Cancellation();
  try {
    const core::LoadResult done = work(args, watch, Internals::of_cancellation(own));
    return LoadReport{done.tensors, done.bytes, done.rounded, done.seconds};
  } catch (const rust::Error& error) {
    watch.rethrow();
    throw_error(error.what());
  }
}

}  // namespace megatron_bridge
