// Weight gradients: blocks write partial sums, a second kernel adds them. No atomics, one fixed order.
#pragma once

#include "numbers.cuh"

namespace bridge {

// How many blocks share the rows of a backward pass that also sums over rows. A constant, so that the order of the sums and
// with it every bit of a weight gradient is the same on every card; two blocks an SM on an H100.
inline constexpr int64_t kRowParts = 264;

// out[column] = sum over parts of partial[part, column], a part after the other within a lane, then lane by lane.
// `count`: how many parts there are, read on the device; null for `parts`.
inline constexpr int kSumColumns = 32, kSumLanes = 32;

static __global__ void sum_parts_kernel(const float* partial, int64_t parts, const int* count, int64_t columns, void* out,
                                        DType dtype) {
  BRIDGE_SHARED(float, box, kSumLanes * kSumColumns);
  const int64_t column = static_cast<int64_t>(blockIdx.x) * kSumColumns + threadIdx.x;
  const int64_t used = count != nullptr ? *count : parts;
  float sum = 0.0f;
  if (column < columns) {
    for (int64_t part = threadIdx.y; part < used; part += kSumLanes) {
      sum += partial[part * columns + column];
    }
  }
  box[threadIdx.y * kSumColumns + threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y == 0 && column < columns) {
    sum = 0.0f;
    for (int lane = 0; lane < kSumLanes; ++lane) {
      sum += box[lane * kSumColumns + threadIdx.x];
    }
    store_scalar(out, column, dtype, sum);
  }
}

inline cudaError_t sum_parts(const float* partial, int64_t parts, const int* count, int64_t columns, void* out, DType dtype,
                             cudaStream_t stream) {
  const auto blocks = static_cast<unsigned>((columns + kSumColumns - 1) / kSumColumns);
  return launch(sum_parts_kernel, dim3(blocks), dim3(kSumColumns, kSumLanes), 0, stream, partial, parts, count, columns, out,
                dtype);
}

}  // namespace bridge
