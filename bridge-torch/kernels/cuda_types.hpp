// The two types of CUDA that launchers show to their callers, and the number formats.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(BRIDGE_EMULATION)
#include "emulation/intrinsics.hpp"
#else
#include <cuda_runtime_api.h>
#endif

namespace bridge {

enum class DType : int { kBf16 = 0, kF32 = 1 };

}  // namespace bridge
