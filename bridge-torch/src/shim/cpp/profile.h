#pragma once

#include "rust/cxx.h"

namespace bridge_shim {

struct OpTime;

// Times every libtorch operator and autograd node from now on, on all threads.
void start_profile();
// The operators since `start_profile`, by name and shapes.
rust::Vec<OpTime> stop_profile();

}  // namespace bridge_shim
