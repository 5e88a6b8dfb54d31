// One line a check, and a count of what failed.
#pragma once

#include <iostream>
#include <megatron_bridge/megatron_bridge.hpp>
#include <string>

inline int failures = 0;

inline void check(const std::string& what, bool good) {
  std::cout << (good ? "ok     " : "FAILED ") << what << std::endl;
  failures += good ? 0 : 1;
}

/// That `work` is refused with this code, and that the text says `text`.
template <class Work>
void check_refused(const std::string& what, megatron_bridge::ErrorCode code,
                   const std::string& text, const Work& work) {
  try {
    work();
    check(what + " (nothing was thrown)", false);
  } catch (const megatron_bridge::Error& error) {
    const bool said = std::string(error.what()).find(text) != std::string::npos;
    check(what, error.code() == code && said);
    if (error.code() != code || !said) {
      std::cout << "       code " << static_cast<int>(error.code()) << ": " << error.what()
                << std::endl;
    }
  }
}
