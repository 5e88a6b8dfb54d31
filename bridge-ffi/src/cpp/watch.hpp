// The progress callback of a call, as Rust sees it.
#pragma once

#include <cstdint>
#include <exception>

#include "megatron_bridge/megatron_bridge.hpp"

namespace megatron_bridge::core {

// No exception may cross into Rust: what the callback throws is kept, and thrown again when the
// call has come back.
class Watch {
 public:
  explicit Watch(const std::function<void(const Progress&)>& callback) : callback_(callback) {}

  bool is_wanted() const noexcept { return static_cast<bool>(callback_); }

  bool report(std::uint64_t done, std::uint64_t total) const noexcept {
    try {
      callback_(Progress{done, total});
      return true;
    } catch (...) {
      thrown_ = std::current_exception();
      return false;
    }
  }

  void rethrow() const {
    if (thrown_) {
      std::rethrow_exception(thrown_);
    }
  }

 private:
  const std::function<void(const Progress&)>& callback_;
  mutable std::exception_ptr thrown_;
};

}  // namespace megatron_bridge::core
