// What the operators torch.ops.megatron_bridge.* share. An operator checks its tensors in words, makes its results, launches
// kernels on the device's current stream and, with autograd, keeps what its gradient needs. One file a family.
//
// They are for CUDA. With BRIDGE_EMULATION the same sources are operators for the CPU: so they are tested without a GPU.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros_like.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <mutex>
#include <string_view>

#include "../cuda_types.hpp"

namespace bridge::operators {

#if defined(BRIDGE_EMULATION)
inline constexpr c10::DispatchKey kBackend = c10::DispatchKey::CPU, kAutograd = c10::DispatchKey::AutogradCPU;
#else
inline constexpr c10::DispatchKey kBackend = c10::DispatchKey::CUDA, kAutograd = c10::DispatchKey::AutogradCUDA;
#endif

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using OptionalTensor = std::optional<at::Tensor>;

// Declares the operator of `schema`, unless the library for another device has, and lets `function`, which has a gradient of its
// own, serve it with and without autograd.
template <class Function>
void define(torch::Library& library, std::string_view schema, Function* function) {
  const std::string name(schema.substr(0, schema.find('(')));
  if (!c10::Dispatcher::singleton().findSchema({"megatron_bridge::" + name, ""})) {
    library.def(std::string(schema).c_str());
  }
  library.impl(name.c_str(), torch::dispatch(kBackend, function));
  library.impl(name.c_str(), torch::dispatch(kAutograd, function));
}

inline DType dtype_of(const at::Tensor& x, const char* name) {
  const at::ScalarType kind = x.scalar_type();
  TORCH_CHECK(kind == at::kBFloat16 || kind == at::kFloat, name, " is ", kind,
              ", but kernels take bfloat16 and float32; give it in one of them");
  return kind == at::kFloat ? DType::kF32 : DType::kBf16;
}

// Refuses what lies elsewhere, has another dtype or another shape, or is a vector with gaps; a size of -1 is any.
inline void check(const at::Tensor& x, const char* name, const at::Tensor& like, at::ScalarType kind, at::IntArrayRef shape) {
  TORCH_CHECK(x.device() == like.device(), name, " is on ", x.device(), ", but its neighbours are on ", like.device());
  TORCH_CHECK(x.scalar_type() == kind, name, " is ", x.scalar_type(), ", but ", kind, " is needed here");
  bool fits = x.dim() == static_cast<int64_t>(shape.size());
  for (size_t i = 0; fits && i < shape.size(); ++i) {
    fits = shape[i] < 0 || x.size(static_cast<int64_t>(i)) == shape[i];
  }
  TORCH_CHECK(fits, name, " has shape ", x.sizes(), ", expected ", shape);
  TORCH_CHECK(x.dim() != 1 || x.is_contiguous(), name, " has gaps between its elements; give its contiguous() form");
}

// [rows, width] of [.., width]: a view where the rows are evenly apart and begin at 16 bytes, else a copy.
inline at::Tensor rows_of(const at::Tensor& x) {
  const at::Tensor rows = x.reshape({-1, x.size(-1)});
  const bool apart = (static_cast<size_t>(rows.stride(0)) * rows.element_size()) % 16 == 0 || rows.size(0) <= 1;
  const bool begins = reinterpret_cast<uintptr_t>(rows.const_data_ptr()) % 16 == 0;
  return rows.stride(1) == 1 && apart && begins ? rows : rows.clone(at::MemoryFormat::Contiguous);
}

// The distance of rows for a launcher: that of a single row says nothing.
inline int64_t row_stride(const at::Tensor& rows) { return rows.size(0) <= 1 ? rows.size(1) : rows.stride(0); }

#if defined(BRIDGE_EMULATION)
// There is one for all threads.
inline std::mutex emulated_device;
#endif

// Kernels go to the stream that libtorch's own operators would take.
class Launch {
 public:
  Launch(const char* name, const at::Tensor& like) : name_(name), guard_(like.device()) {
#if !defined(BRIDGE_EMULATION)
    const c10::impl::VirtualGuardImpl device(like.device().type());
    stream_ = static_cast<cudaStream_t>(device.getStream(like.device()).native_handle());
#endif
  }
  template <class Parameters>
  void operator()(cudaError_t (*launcher)(const Parameters&, cudaStream_t), const Parameters& parameters) const {
#if defined(BRIDGE_EMULATION)
    const std::lock_guard<std::mutex> alone(emulated_device);
#endif
    const cudaError_t error = launcher(parameters, stream_);
    TORCH_CHECK(error != cudaErrorInvalidValue, name_, ": its kernels do not take these sizes, strides or addresses");
#if !defined(BRIDGE_EMULATION)
    TORCH_CHECK(error == cudaSuccess, name_, ": ", cudaGetErrorString(error));
#endif
  }

 private:
  const char* name_;
  c10::DeviceGuard guard_;
  cudaStream_t stream_ = nullptr;
};

// Scratch memory; libtorch's allocator keeps it for the stream's later work.
inline at::Tensor workspace(size_t bytes, const at::Tensor& like) {
  return at::empty({static_cast<int64_t>(bytes)}, like.options().dtype(at::kByte));
}

// A gradient as the node receives it: zeros where none arrived.
inline at::Tensor arrived(const at::Tensor& gradient, const at::Tensor& like) {
  return gradient.defined() ? gradient : at::zeros_like(like);
}

}  // namespace bridge::operators
