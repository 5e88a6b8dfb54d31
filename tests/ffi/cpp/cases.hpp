// Cases are C++ functions that Rust tests call by name, in the same process as the library.
#pragma once

#include <map>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "megatron_bridge/megatron_bridge.hpp"

namespace cases {

namespace mb = megatron_bridge;

// What a case is run on.
struct Args {
  std::string checkpoint;  // a Hugging Face directory
  std::string scratch;     // a directory of the test's own
  std::string more;        // whatever else the case wants to know
};

using Case = void (*)(const Args&);

std::map<std::string, Case>& all();

struct Register {
  Register(const char* name, Case run) { all()[name] = run; }
};

#define BRIDGE_CASE(name)                                       \
  static void name(const ::cases::Args& args);                  \
  static const ::cases::Register register_##name(#name, &name); \
  static void name([[maybe_unused]] const ::cases::Args& args)

#define BRIDGE_CHECK(condition)                                  \
  do {                                                           \
    if (!(condition)) {                                          \
      std::ostringstream text;                                   \
      text << __FILE__ << ":" << __LINE__ << ": " << #condition; \
      throw std::runtime_error(text.str());                      \
    }                                                            \
  } while (false)

#define BRIDGE_CHECK_EQ(left, right)                                                           \
  do {                                                                                         \
    const auto left_value = (left);                                                            \
    const auto right_value = (right);                                                          \
    if (!(left_value == right_value)) {                                                        \
      std::ostringstream text;                                                                 \
      text << __FILE__ << ":" << __LINE__ << ": " << #left << " is " << left_value << ", not " \
           << right_value;                                                                     \
      throw std::runtime_error(text.str());                                                    \
    }                                                                                          \
  } while (false)

// Runs what must fail with this code and all of these texts; gives the message.
template <class Work>
std::string fails(mb::ErrorCode code, const std::vector<std::string>& wanted, Work&& work) {
  try {
    work();
  } catch (const mb::Error& error) {
    const std::string message = error.what();
    for (const std::string& one : wanted) {
      if (message.find(one) == std::string::npos) {
        throw std::runtime_error("\"" + message + "\" lacks \"" + one + "\"");
      }
    }
    if (error.code() != code) {
      throw std::runtime_error("code " + std::to_string(static_cast<int>(error.code())) +
                               " instead of " + std::to_string(static_cast<int>(code)) + ": " +
                               message);
    }
    return message;
  }
  throw std::runtime_error("nothing failed, wanted: " + (wanted.empty() ? "" : wanted[0]));
}

// Memory for every tensor of a rank.
struct Memory {
  std::vector<mb::TensorInfo> tensors;
  std::vector<std::vector<double>> data;  // of doubles, so that every dtype is aligned

  explicit Memory(const std::vector<mb::TensorInfo>& from) : tensors(from) {
    for (const mb::TensorInfo& tensor : tensors) {
      data.emplace_back((tensor.bytes + 7) / 8);
    }
  }

  std::vector<mb::Destination> destinations() {
    std::vector<mb::Destination> list;
    for (std::size_t at = 0; at < tensors.size(); ++at) {
      list.push_back({tensors[at].name, data[at].data(), tensors[at].bytes, tensors[at].dtype});
    }
    return list;
  }

  std::vector<mb::Source> sources() const {
    std::vector<mb::Source> list;
    for (std::size_t at = 0; at < tensors.size(); ++at) {
      list.push_back({tensors[at].name, data[at].data(), tensors[at].bytes, tensors[at].dtype});
    }
    return list;
  }
};

}  // namespace cases
