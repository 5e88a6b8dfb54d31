#pragma once

#include <ATen/core/Tensor.h>

#include <cstddef>
#include <memory>
#include <vector>

namespace bridge_shim {

// Several results of one call.
class Tensors {
 public:
  explicit Tensors(std::vector<at::Tensor> items) : items_(std::move(items)) {}
  std::unique_ptr<at::Tensor> at(size_t index) const {
    return std::make_unique<at::Tensor>(items_.at(index));
  }

 private:
  std::vector<at::Tensor> items_;
};

}  // namespace bridge_shim
