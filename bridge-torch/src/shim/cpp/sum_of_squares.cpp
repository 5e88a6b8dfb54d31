#include "sum_of_squares.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>

namespace bridge_shim {

namespace {

constexpr int64_t kBlock = 4096;
constexpr int64_t kLanes = 16;

double block_sum(const uint16_t* values, int64_t count) {
  std::array<float, kLanes> lanes{};
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      const uint32_t bits = static_cast<uint32_t>(values[i + lane]) << 16;  // bfloat16 is a float32's upper half
      float value;
      std::memcpy(&value, &bits, sizeof(value));
      lanes[lane] += value * value;
    }
  }
  double sum = 0;
  for (; i < count; ++i) {
    const uint32_t bits = static_cast<uint32_t>(values[i]) << 16;
    float value;
    std::memcpy(&value, &bits, sizeof(value));
    sum += static_cast<double>(value) * value;
  }
  for (const float lane : lanes) {
    sum += lane;
  }
  return sum;
}

}  // namespace

double sum_of_squares(const at::Tensor& values) {
  const auto* data = static_cast<const uint16_t*>(values.const_data_ptr());
  const int64_t count = values.numel();
  const int64_t blocks = (count + kBlock - 1) / kBlock;
  return at::parallel_reduce(
      0, blocks, 64, 0.0,
      [&](int64_t begin, int64_t end, double sum) {
        for (int64_t block = begin; block < end; ++block) {
          const int64_t start = block * kBlock;
          sum += block_sum(data + start, std::min(kBlock, count - start));
        }
        return sum;
      },
      [](double a, double b) { return a + b; });
}

}  // namespace bridge_shim
