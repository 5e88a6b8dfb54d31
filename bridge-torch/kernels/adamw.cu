// AdamW over many tensors at once, with clipping by the global norm. Operator: adamw.hpp.
//
// norm_kernel: a block a chunk, squares in float32 within a thread's 256 values, then float64. progress_kernel: one block adds
// the chunks in a fixed order, works out the clip factor, counts the step of each tensor and works out its corrections, so the
// host never waits for the norm. step_kernel: a block a chunk, 8 neighbouring elements a lane, so that a warp holds one block of
// 256 of the 8-bit moments.
//
// 8-bit moments are floats of few bits below the largest magnitude of their block: exp_avg has a sign, 4 bits of exponent and
// 3 of mantissa (2^-15 to 1), exp_avg_sq 5 bits of exponent and 3 of mantissa (2^-31 to 1). Rounding to nearest would stop
// a moving average whose change is below half a step (6 %); at random, in proportion, it goes on without bias.
//
// Parameters and gradients bf16 or f32; sm_80 and newer. Bound by memory: 28 bytes an element with masters and bf16
// gradients, 10 with 8-bit moments and no master. Defined by: Loshchilov and Hutter 2019, torch.optim.AdamW.
//
// sass step_kernel: LDG.E.128 STG.E.128
// sass norm_kernel: LDG.E.128

#include "adamw.hpp"

#include "philox.cuh"
#include "reduce.cuh"

namespace bridge {

namespace {

constexpr int kBlock = 256, kWarps = kBlock / 32, kEach = 8;
constexpr unsigned kAverageBase = (127u - 15u) << 3, kSquareBase = (127u - 31u) << 3;

// Up to 8 elements from `index`, which is a multiple of 8; zeros behind the last one.
__device__ __forceinline__ void load8(const void* from, int64_t index, int64_t numel, DType dtype, float (&out)[kEach]) {
  if (index + kEach <= numel) {
    load_parameter(from, index, dtype, out);
    return;
  }
  BRIDGE_UNROLL
  for (int i = 0; i < kEach; ++i) {
    out[i] = index + i < numel ? load_scalar(from, index + i, dtype) : 0.0f;
  }
}

__device__ __forceinline__ void store8(void* to, int64_t index, int64_t numel, DType dtype, const float (&values)[kEach]) {
  if (index + kEach <= numel) {
    if (dtype == DType::kBf16) {
      store(static_cast<Bf16*>(to) + index, values);
      return;
    }
    BRIDGE_UNROLL
    for (int i = 0; i < kEach; i += 4) {
      const float piece[4] = {values[i], values[i + 1], values[i + 2], values[i + 3]};
      store(static_cast<float*>(to) + index + i, piece);
    }
    return;
  }
  BRIDGE_UNROLL
  for (int i = 0; i < kEach; ++i) {
    if (index + i < numel) {
      store_scalar(to, index + i, dtype, values[i]);
    }
  }
}

// A moment as a code and back. `sign` is kept in the top bit of a code; without it the code has 8 bits of size.
template <bool kSigned>
__device__ __forceinline__ float decode(unsigned code, float scale) {
  const unsigned size = kSigned ? code & 0x7Fu : code;
  const float x = size == 0 ? 0.0f : __uint_as_float((size + (kSigned ? kAverageBase : kSquareBase)) << 20) * scale;
  return kSigned && (code & 0x80u) != 0 ? -x : x;
}

// `bits`: 16 random ones. The value lies between two codes and takes the upper one with the probability of its distance
// from the lower one; below the smallest code it becomes zero.
template <bool kSigned>
__device__ __forceinline__ unsigned encode(float x, float inverse_scale, unsigned bits) {
  constexpr unsigned kBase = kSigned ? kAverageBase : kSquareBase;
  const float size = fminf(fabsf(x) * inverse_scale, 1.0f);
  const unsigned rounded = (__float_as_uint(size) + (bits << 4)) >> 20;
  unsigned code = rounded > kBase ? rounded - kBase : 0u;
  constexpr unsigned kTop = (127u << 3) - kBase;  // 1.0
  code = code > kTop ? kTop : code;
  return kSigned && x < 0.0f && code != 0 ? code | 0x80u : code;
}

template <bool kSigned>
__device__ __forceinline__ void load_codes(const void* codes, const float* scales, int64_t index, int64_t numel,
                                           float (&out)[kEach]) {
  const float scale = index < numel ? scales[index / 256] : 0.0f;
  const auto* from = static_cast<const uint8_t*>(codes) + index;
  unsigned words[2] = {0, 0};
  if (index + kEach <= numel) {
    words[0] = reinterpret_cast<const unsigned*>(from)[0];
    words[1] = reinterpret_cast<const unsigned*>(from)[1];
  } else {
    BRIDGE_UNROLL
    for (int i = 0; i < kEach; ++i) {
      words[i / 4] |= index + i < numel ? static_cast<unsigned>(from[i]) << (8 * (i % 4)) : 0u;
    }
  }
  BRIDGE_UNROLL
  for (int i = 0; i < kEach; ++i) {
    out[i] = decode<kSigned>(words[i / 4] >> (8 * (i % 4)) & 0xFFu, scale);
  }
}

// All lanes of the warp call it together: they hold one block.
template <bool kSigned>
__device__ __forceinline__ void store_codes(void* codes, float* scales, int64_t index, int64_t numel,
                                            const float (&values)[kEach], const Random4& random) {
  float largest = 0.0f;
  BRIDGE_UNROLL
  for (int i = 0; i < kEach; ++i) {
    largest = fmaxf(largest, fabsf(values[i]));
  }
  largest = warp_max(largest);
  const float inverse = largest > 1e-38f ? __fdividef(1.0f, largest) : 0.0f;
  if (index >= numel) {
    return;
  }
  if (threadIdx.x % 32 == 0) {
    scales[index / 256] = largest;
  }
  unsigned words[2] = {0, 0};
  BRIDGE_UNROLL
  for (int i = 0; i < kEach; ++i) {
    words[i / 4] |= encode<kSigned>(values[i], inverse, bits16(random, i)) << (8 * (i % 4));
  }
  auto* to = static_cast<uint8_t*>(codes) + index;
  if (index + kEach <= numel) {
    reinterpret_cast<unsigned*>(to)[0] = words[0];
    reinterpret_cast<unsigned*>(to)[1] = words[1];
    return;
  }
  BRIDGE_UNROLL
  for (int i = 0; i < kEach; ++i) {
    if (index + i < numel) {
      to[i] = static_cast<uint8_t>(words[i / 4] >> (8 * (i % 4)));
    }
  }
}

__device__ __forceinline__ AdamWTensor tensor_of(const AdamW& p, const AdamWChunk& chunk) {
  const AdamWTensor tensor = p.tensors[chunk.tensor];
  assume_global(tensor.parameter);
  assume_global(tensor.master);
  assume_global(tensor.exp_avg);
  assume_global(tensor.exp_avg_sq);
  assume_global(tensor.exp_avg_scale);
  assume_global(tensor.exp_avg_sq_scale);
  return tensor;
}

__device__ __forceinline__ AdamWGradient gradient_of(const AdamW& p, const AdamWChunk& chunk) {
  const AdamWGradient gradient = p.gradients[chunk.tensor];
  assume_global(gradient.data);
  return gradient;
}

__global__ void __launch_bounds__(kBlock) norm_kernel(AdamW p) {
  BRIDGE_SHARED(double, sums, kWarps);
  const AdamWChunk chunk = p.chunks[blockIdx.x];
  const AdamWGradient gradient = gradient_of(p, chunk);
  const int64_t numel = gradient.data != nullptr ? p.tensors[chunk.tensor].numel : 0;
  float squares = 0.0f;
  BRIDGE_NO_UNROLL
  for (int64_t i = static_cast<int64_t>(threadIdx.x) * kEach; i < kAdamWChunk && chunk.first + i < numel; i += kBlock * kEach) {
    float g[kEach];
    load8(gradient.data, chunk.first + i, numel, gradient.dtype, g);
    BRIDGE_UNROLL
    for (int j = 0; j < kEach; ++j) {
      squares += g[j] * g[j];
    }
  }
  double sum = squares;
  BRIDGE_UNROLL
  for (int bits = 16; bits > 0; bits /= 2) {
    sum += __shfl_xor_sync(kWholeWarp, sum, bits);
  }
  if (threadIdx.x % 32 == 0) {
    sums[threadIdx.x / 32] = sum;
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    sum = 0.0;
    for (int i = 0; i < kWarps; ++i) {
      sum += sums[i];
    }
    p.workspace[blockIdx.x] = sum;
  }
}

// beta^step by squaring: pow wants local memory.
__device__ __forceinline__ double power(double beta, unsigned step) {
  double result = 1.0;
  for (; step > 0; step /= 2) {
    result *= step % 2 != 0 ? beta : 1.0;
    beta *= beta;
  }
  return result;
}

__global__ void __launch_bounds__(kBlock) progress_kernel(AdamW p) {
  BRIDGE_SHARED(double, sums, kBlock);
  double sum = 0.0;
  for (int64_t i = threadIdx.x; i < p.num_chunks; i += kBlock) {
    sum += p.workspace[i];
  }
  sums[threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.x == 0) {
    sum = 0.0;
    for (int i = 0; i < kBlock; ++i) {
      sum += sums[i];
    }
    const double norm = sqrt(sum);
    const double factor = p.max_norm > 0.0f ? static_cast<double>(p.max_norm) / (norm + 1e-6) : 1.0;
    p.progress->norm = norm;
    p.progress->clip = static_cast<float>(factor < 1.0 ? factor : 1.0);
    p.progress->finite = sum < 1.7e308 ? 1 : 0;  // false for NaN
  }
  __syncthreads();
  if (p.progress->finite == 0) {
    return;
  }
  for (int64_t i = threadIdx.x; i < p.num_tensors; i += kBlock) {
    if (p.gradients[i].data == nullptr) {
      continue;
    }
    float* count = p.tensors[i].count;
    *count += 1.0f;
    const auto step = static_cast<unsigned>(*count);
    p.corrections[i] = {static_cast<float>(1.0 - power(p.beta1, step)), static_cast<float>(sqrt(1.0 - power(p.beta2, step))), step};
  }
}

template <bool k8Bit>
__global__ void __launch_bounds__(kBlock, 2) step_kernel(AdamW p) {
  const AdamWProgress progress = *p.progress;
  if (progress.finite == 0) {
    return;
  }
  const AdamWChunk chunk = p.chunks[blockIdx.x];
  const AdamWGradient gradient = gradient_of(p, chunk);
  if (gradient.data == nullptr) {
    return;
  }
  const AdamWTensor tensor = tensor_of(p, chunk);
  const AdamWCorrection correction = p.corrections[chunk.tensor];
  const float step_size = __fdividef(p.lr, correction.first), keep = 1.0f - p.lr * tensor.weight_decay;
  const float inverse_root = __fdividef(1.0f, correction.root_second);
  const auto toward1 = static_cast<float>(1.0 - p.beta1), toward2 = static_cast<float>(1.0 - p.beta2);
  const auto beta2 = static_cast<float>(p.beta2);
  const auto* stepped = tensor.master != nullptr ? static_cast<const void*>(tensor.master) : tensor.parameter;
  const DType stepped_dtype = tensor.master != nullptr ? DType::kF32 : tensor.dtype;

  // Whole warps stay in the loop: they share the scale of a block.
  BRIDGE_NO_UNROLL
  for (int64_t i = 0; i < kAdamWChunk && chunk.first + i + (static_cast<int64_t>(threadIdx.x) / 32 * 256) < tensor.numel;
       i += kBlock * kEach) {
    const int64_t index = chunk.first + i + static_cast<int64_t>(threadIdx.x) * kEach;
    float g[kEach], w[kEach], m[kEach], v[kEach];
    load8(gradient.data, index, tensor.numel, gradient.dtype, g);
    load8(stepped, index, tensor.numel, stepped_dtype, w);
    if constexpr (k8Bit) {
      load_codes<true>(tensor.exp_avg, tensor.exp_avg_scale, index, tensor.numel, m);
      load_codes<false>(tensor.exp_avg_sq, tensor.exp_avg_sq_scale, index, tensor.numel, v);
    } else {
      load8(tensor.exp_avg, index, tensor.numel, DType::kF32, m);
      load8(tensor.exp_avg_sq, index, tensor.numel, DType::kF32, v);
    }
    BRIDGE_UNROLL
    for (int j = 0; j < kEach; ++j) {
      g[j] *= progress.clip;
      m[j] += toward1 * (g[j] - m[j]);
      v[j] = beta2 * v[j] + toward2 * g[j] * g[j];
      const float root = v[j] > 0.0f ? v[j] * rsqrtf(v[j]) : 0.0f;
      w[j] = w[j] * keep - step_size * __fdividef(m[j], root * inverse_root + p.eps);
    }
    const auto low = static_cast<unsigned>(index), high = static_cast<unsigned>(index >> 32);
    const auto which = static_cast<unsigned>(chunk.tensor) * 4;
    if constexpr (k8Bit) {
      const uint64_t seed = p.seed + (static_cast<uint64_t>(high) << 32);
      store_codes<true>(tensor.exp_avg, tensor.exp_avg_scale, index, tensor.numel, m, philox(low, correction.step, which + 1, 0, seed));
      store_codes<false>(tensor.exp_avg_sq, tensor.exp_avg_sq_scale, index, tensor.numel, v, philox(low, correction.step, which + 2, 0, seed));
    } else {
      store8(tensor.exp_avg, index, tensor.numel, DType::kF32, m);
      store8(tensor.exp_avg_sq, index, tensor.numel, DType::kF32, v);
    }
    if (tensor.master != nullptr) {
      store8(tensor.master, index, tensor.numel, DType::kF32, w);
    } else if (p.stochastic && tensor.dtype == DType::kBf16) {
      const Random4 random = philox(low, correction.step, which, 0, p.seed + (static_cast<uint64_t>(high) << 32));
      BRIDGE_UNROLL
      for (int j = 0; j < kEach; ++j) {
        // The upper neighbour with the probability of what is cut off; exact values stay.
        w[j] = __uint_as_float((__float_as_uint(w[j]) + bits16(random, j)) & 0xFFFF0000u);
      }
    }
    store8(tensor.parameter, index, tensor.numel, tensor.dtype, w);
  }
}

}  // namespace

cudaError_t adamw_step(const AdamW& p, cudaStream_t stream) {
  if (p.num_chunks < 0 || p.num_chunks > int64_t{0x7FFFFFFF}) {
    return cudaErrorInvalidValue;
  }
  const dim3 grid(static_cast<unsigned>(p.num_chunks));
  cudaError_t error = launch(norm_kernel, grid, dim3(kBlock), 0, stream, p);
  if (error == cudaSuccess) {
    error = launch(progress_kernel, dim3(1), dim3(kBlock), 0, stream, p);
  }
  if (error == cudaSuccess) {
    error = launch(p.eight_bit ? step_kernel<true> : step_kernel<false>, grid, dim3(kBlock), 0, stream, p);
  }
  return error;
}

}  // namespace bridge
