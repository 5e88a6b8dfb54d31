// Where kernels run: on CUDA, or with BRIDGE_EMULATION on the CPU. Launches and shared memory look the same.
#pragma once

#include <cstddef>
#include <cstdint>

#if !defined(BRIDGE_EMULATION)
#include <cuda_runtime.h>
#define BRIDGE_SHARED(type, name, count) __shared__ type name[count]
#define BRIDGE_DYNAMIC_SHARED(name) extern __shared__ __align__(128) unsigned char name[]
#define BRIDGE_UNROLL _Pragma("unroll")
#define BRIDGE_NO_UNROLL _Pragma("unroll 1")
#else
#include "emulation/intrinsics.hpp"
#define BRIDGE_SHARED(type, name, count)          \
  static const char bridge_key_##name = 0;        \
  type* const name = static_cast<type*>(          \
      ::emulation::shared_array(&bridge_key_##name, sizeof(type) * (count), 16))
#define BRIDGE_DYNAMIC_SHARED(name) \
  unsigned char* const name = static_cast<unsigned char*>(::emulation::dynamic_shared())
#define BRIDGE_UNROLL
#define BRIDGE_NO_UNROLL
#endif

namespace bridge {

// For a pointer that a kernel finds in memory: what it points to is in global memory.
__device__ __forceinline__ void assume_global(const void* pointer) {
#if !defined(BRIDGE_EMULATION)
  __builtin_assume(__isGlobal(pointer));
#else
  static_cast<void>(pointer);
#endif
}

inline constexpr unsigned kWholeWarp = 0xFFFFFFFFu;

// Starts `kernel`; a grid without blocks is no launch. The error is the launch's own.
template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream,
                   Arguments... arguments) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) {
    return cudaSuccess;
  }
#if !defined(BRIDGE_EMULATION)
  const auto* function = reinterpret_cast<const void*>(kernel);
  if (shared_bytes > (size_t{48} << 10)) {
    const cudaError_t allowed = cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                     static_cast<int>(shared_bytes));
    if (allowed != cudaSuccess) {
      return allowed;
    }
  }
  const auto start = [&](Parameters... parameters) {
    void* pointers[] = {&parameters...};
    return cudaLaunchKernel(function, grid, block, pointers, shared_bytes, stream);
  };
  return start(arguments...);
#else
  static_cast<void>(stream);
  ::emulation::run(grid, block, shared_bytes, [=] { kernel(arguments...); });
  return cudaSuccess;
#endif
}

}  // namespace bridge
