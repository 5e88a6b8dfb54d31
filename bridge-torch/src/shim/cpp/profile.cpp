#include "profile.h"

#include <ATen/core/Tensor.h>
#include <ATen/record_function.h>
#include <c10/util/StringUtil.h>

#include <chrono>
#include <map>
#include <mutex>
#include <string>

#include "bridge-torch/src/shim/ffi.rs.h"

namespace bridge_shim {
namespace {

using Clock = std::chrono::steady_clock;

// An operator that runs now, and the time of those that it called.
struct Running : at::ObserverContext {
  std::string name;
  Clock::time_point start;
  Running* caller = nullptr;
  Clock::duration called{};
};

struct Total {
  uint64_t calls = 0;
  Clock::duration own{};
};

thread_local Running* innermost = nullptr;
std::mutex mutex;
std::map<std::string, Total> totals;
at::CallbackHandle handle = at::INVALID_CALLBACK_HANDLE;

// "aten::bmm [128, 64, 64] [128, 64, 64]"
std::string described(const at::RecordFunction& function) {
  std::string text = function.name();
  for (const c10::IValue& input : function.inputs()) {
    if (input.isTensor() && input.toTensor().defined()) {
      text += ' ' + c10::str(input.toTensor().sizes());
    }
  }
  return text;
}

std::unique_ptr<at::ObserverContext> enter(const at::RecordFunction& function) {
  auto running = std::make_unique<Running>();
  running->name = described(function);
  running->caller = innermost;
  innermost = running.get();
  running->start = Clock::now();
  return running;
}

void leave(const at::RecordFunction&, at::ObserverContext* context) {
  auto* running = static_cast<Running*>(context);
  const auto elapsed = Clock::now() - running->start;
  innermost = running->caller;
  if (innermost != nullptr) innermost->called += elapsed;
  const std::lock_guard<std::mutex> lock(mutex);
  auto& total = totals[running->name];
  ++total.calls;
  total.own += elapsed - running->called;
}

}  // namespace

void start_profile() {
  totals.clear();
  handle = at::addGlobalCallback(
      at::RecordFunctionCallback(&enter, &leave)
          .needsInputs(true)
          .scopes({at::RecordScope::FUNCTION, at::RecordScope::BACKWARD_FUNCTION, at::RecordScope::USER_SCOPE}));
}

rust::Vec<OpTime> stop_profile() {
  at::removeCallback(handle);
  rust::Vec<OpTime> ops;
  const std::lock_guard<std::mutex> lock(mutex);
  for (const auto& [name, total] : totals) {
    const auto nanoseconds = std::chrono::duration_cast<std::chrono::nanoseconds>(total.own).count();
    ops.push_back(OpTime{name, total.calls, static_cast<uint64_t>(nanoseconds)});
  }
  return ops;
}

}  // namespace bridge_shim
