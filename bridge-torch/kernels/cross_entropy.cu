// Cross entropy of rows of logits, with the gradient written over them. Formulas: cross_entropy.hpp.
//
// A block of 512 threads a row (497 KB at the published vocabulary). First walk: every thread keeps a running maximum and
// the sum of exponentials below it; the pairs are merged over the block in a fixed order. Second walk, with the row partly in
// L2: exponential, minus one at the target, times the scale, rounded once. The number of counted targets stays on the device.
//
// bf16 and f32, any vocabulary; sm_80 and newer. Bound by memory: two reads and a write of the logits.
// Defined by: transformers, ForCausalLMLoss.
//
// sass rows_kernel: LDG.E.128 STG.E.128

#include "cross_entropy.hpp"

#include "reduce.cuh"

namespace bridge {

namespace {

constexpr int kBlock = 512, kWarps = kBlock / 32;
constexpr float kInfinity = __builtin_huge_valf();

// exp(x - maximum), 0 where both are -inf.
__device__ __forceinline__ float below(float x, float maximum) { return x == maximum ? 1.0f : __expf(x - maximum); }

struct Running {
  float maximum = -kInfinity, sum = 0.0f;

  __device__ __forceinline__ void merge(float other_maximum, float other_sum) {
    const float highest = fmaxf(maximum, other_maximum);
    sum = sum * below(maximum, highest) + other_sum * below(other_maximum, highest);
    maximum = highest;
  }
};

template <class T>
__global__ void __launch_bounds__(kBlock, 2) rows_kernel(CrossEntropyRows p) {
  constexpr int kV = kVec<T>;
  BRIDGE_SHARED(float, maxima, kWarps);
  BRIDGE_SHARED(float, sums, kWarps);
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t row = blockIdx.x;
  T* logits = static_cast<T*>(p.logits) + row * p.row_stride;
  const int64_t target = p.targets[row];
  const int whole = p.vocabulary / kV * kV;  // what 16-byte pieces cover; the rest one by one
  const bool ignored = target == p.ignored, inside = target >= 0 && target < p.vocabulary;

  Running own;
  if (!ignored && inside) {
    for (int column = thread * kV; column < whole; column += kBlock * kV) {
      float x[kV];
      load(logits + column, x);
      float highest = x[0];
      BRIDGE_UNROLL
      for (int j = 1; j < kV; ++j) {
        highest = fmaxf(highest, x[j]);
      }
      highest = fmaxf(highest, own.maximum);
      float sum = own.sum * below(own.maximum, highest);
      BRIDGE_UNROLL
      for (int j = 0; j < kV; ++j) {
        sum += highest == -kInfinity ? 0.0f : __expf(x[j] - highest);
      }
      own.maximum = highest;
      own.sum = sum;
    }
    if (whole + thread < p.vocabulary) {
      own.merge(to_float(logits[whole + thread]), 1.0f);
    }
  }
  BRIDGE_UNROLL
  for (int bits = 16; bits > 0; bits /= 2) {
    const float other_maximum = __shfl_xor_sync(kWholeWarp, own.maximum, bits);
    const float other_sum = __shfl_xor_sync(kWholeWarp, own.sum, bits);
    own.merge(other_maximum, other_sum);
  }
  if (thread % 32 == 0) {
    maxima[thread / 32] = own.maximum;
    sums[thread / 32] = own.sum;
  }
  const float target_logit = !ignored && inside ? to_float(logits[target]) : 0.0f;
  __syncthreads();  // also: every thread has read the target's logit before anyone writes
  Running all;
  for (int i = 0; i < kWarps; ++i) {
    all.merge(maxima[i], sums[i]);
  }
  const bool sound = inside && all.maximum != -kInfinity;
  if (thread == 0) {
    p.losses[row] = ignored ? 0.0f : sound ? logf(all.sum) + (all.maximum - target_logit) : kInfinity;
  }
  if (!p.write_gradient) {
    return;
  }
  const bool zero = ignored || !sound;
  const float scale = *p.scale, factor = zero ? 0.0f : __fdividef(scale, all.sum);
  for (int column = thread * kV; column < whole; column += kBlock * kV) {
    float x[kV];
    if (!zero) {
      load(logits + column, x);
    }
    BRIDGE_UNROLL
    for (int j = 0; j < kV; ++j) {
      x[j] = zero ? 0.0f : __expf(x[j] - all.maximum) * factor;
      x[j] -= !zero && column + j == target ? scale : 0.0f;
    }
    store(logits + column, x);
  }
  if (whole + thread < p.vocabulary) {
    const int column = whole + thread;
    float x = zero ? 0.0f : __expf(to_float(logits[column]) - all.maximum) * factor;
    x -= !zero && column == target ? scale : 0.0f;
    logits[column] = from_float<T>(x);
  }
}

__global__ void __launch_bounds__(kBlock) scale_kernel(CrossEntropyScale p) {
  BRIDGE_SHARED(int, counts, kWarps);
  int count = 0;
  for (int64_t row = threadIdx.x; row < p.rows; row += kBlock) {
    count += p.targets[row] != p.ignored;
  }
  BRIDGE_UNROLL
  for (int bits = 16; bits > 0; bits /= 2) {
    count += __shfl_xor_sync(kWholeWarp, count, bits);
  }
  if (threadIdx.x % 32 == 0) {
    counts[threadIdx.x / 32] = count;
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    count = 0;
    for (int i = 0; i < kWarps; ++i) {
      count += counts[i];
    }
    *p.scale = __fdividef(1.0f, static_cast<float>(count > 0 ? count : 1));
  }
}

__global__ void __launch_bounds__(kBlock) total_kernel(CrossEntropyTotal p) {
  float sum = 0.0f, unused = 0.0f;
  for (int64_t row = threadIdx.x; row < p.rows; row += kBlock) {
    sum += p.losses[row];
  }
  sum2<kBlock>(sum, unused);
  if (threadIdx.x == 0) {
    *p.total = sum * *p.scale;
  }
}

}  // namespace

cudaError_t cross_entropy_scale(const CrossEntropyScale& p, cudaStream_t stream) {
  return launch(scale_kernel, dim3(1), dim3(kBlock), 0, stream, p);
}

cudaError_t cross_entropy_rows(const CrossEntropyRows& p, cudaStream_t stream) {
  const int piece = p.dtype == DType::kBf16 ? kVec<Bf16> : kVec<float>;
  if (p.rows < 0 || p.rows > int64_t{0x7FFFFFFF} || p.vocabulary <= 0 || p.row_stride < p.vocabulary ||
      p.row_stride % piece != 0) {
    return cudaErrorInvalidValue;
  }
  auto* kernel = p.dtype == DType::kBf16 ? rows_kernel<Bf16> : rows_kernel<float>;
  return launch(kernel, dim3(static_cast<unsigned>(p.rows)), dim3(kBlock), 0, stream, p);
}

cudaError_t cross_entropy_total(const CrossEntropyTotal& p, cudaStream_t stream) {
  return launch(total_kernel, dim3(1), dim3(kBlock), 0, stream, p);
}

}  // namespace bridge
