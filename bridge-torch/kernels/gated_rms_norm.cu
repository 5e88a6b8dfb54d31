// Gated RMSNorm over heads of 128. Formulas: gated_rms_norm.hpp.
//
// A head is 16 lanes of 8 bfloat16 (32 lanes of 4 floats): one 16-byte access a lane and tensor, sums by shuffles. The
// backward's blocks walk over heads with a fixed stride, with their part of d_weight in registers; the parts are added by
// sum_parts in a fixed order. The root is computed again: its sum rides on the one that the gradient needs.
//
// bf16 and f32, head width 128; sm_80 and newer; shared memory 8 KB in the backward. Bound by memory: 3 tensors forward, 5
// backward. Defined by: transformers, Qwen3_5RMSNormGated (the product with the weight stays float32 here).
//
// sass forward_kernel: LDG.E.128 STG.E.128
// sass backward_kernel: LDG.E.128 STG.E.128

#include "gated_rms_norm.hpp"

#include "reduce.cuh"
#include "sum_parts.cuh"

namespace bridge {

namespace {

constexpr int kBlock = 256;

template <class T>
inline constexpr int kLanes = kGatedNormDim / kVec<T>;
// Heads that a block takes at one time.
template <class T>
inline constexpr int kHeads = kBlock / kLanes<T>;

template <class T>
__global__ void __launch_bounds__(kBlock) forward_kernel(GatedRmsNormForward p) {
  constexpr int kV = kVec<T>;
  const int column = static_cast<int>(threadIdx.x) % kLanes<T> * kV;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kHeads<T> + static_cast<int>(threadIdx.x) / kLanes<T>;
  const bool in_rows = row < p.tokens * p.heads;
  const unsigned token = static_cast<unsigned>(row) / static_cast<unsigned>(p.heads);
  const unsigned head = static_cast<unsigned>(row) - token * static_cast<unsigned>(p.heads);

  float x[kV] = {}, gate[kV] = {}, w[kV];
  if (in_rows) {
    load(static_cast<const T*>(p.x) + row * kGatedNormDim + column, x);
    load(static_cast<const T*>(p.gate) + token * p.gate_stride + head * kGatedNormDim + column, gate);
  }
  load_parameter(p.weight, column, p.weight_dtype, w);
  float squares = 0.0f;
  BRIDGE_UNROLL
  for (int j = 0; j < kV; ++j) {
    squares += x[j] * x[j];
  }
  squares = lanes_sum<kLanes<T>>(squares);
  const float scale = rsqrtf(squares / kGatedNormDim + p.eps);
  if (in_rows) {
    BRIDGE_UNROLL
    for (int j = 0; j < kV; ++j) {
      x[j] = rounded<T>(x[j] * scale) * (p.weight_offset + w[j]) * silu(gate[j]);
    }
    store(static_cast<T*>(p.out) + row * kGatedNormDim + column, x);
  }
}

template <class T>
__global__ void __launch_bounds__(kBlock) backward_kernel(GatedRmsNormBackward p) {
  constexpr int kV = kVec<T>;
  BRIDGE_SHARED(float, box, kHeads<T> * kGatedNormDim);
  const int column = static_cast<int>(threadIdx.x) % kLanes<T> * kV;
  const int group = static_cast<int>(threadIdx.x) / kLanes<T>;
  const int64_t rows = p.tokens * p.heads;

  float w[kV], d_weight[kV] = {};
  load_parameter(p.weight, column, p.weight_dtype, w);
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kHeads<T>;
  for (int64_t first = static_cast<int64_t>(blockIdx.x) * kHeads<T>; first < rows; first += stride) {
    const int64_t row = first + group;
    const bool in_rows = row < rows;
    const unsigned token = static_cast<unsigned>(row) / static_cast<unsigned>(p.heads);
    const unsigned head = static_cast<unsigned>(row) - token * static_cast<unsigned>(p.heads);
    float x[kV] = {}, gate[kV] = {}, g[kV] = {};
    if (in_rows) {
      load(static_cast<const T*>(p.x) + row * kGatedNormDim + column, x);
      load(static_cast<const T*>(p.gate) + token * p.gate_stride + head * kGatedNormDim + column, gate);
      load(static_cast<const T*>(p.d_out) + row * kGatedNormDim + column, g);
    }
    float squares = 0.0f, along = 0.0f;
    BRIDGE_UNROLL
    for (int j = 0; j < kV; ++j) {
      squares += x[j] * x[j];
      along += g[j] * silu(gate[j]) * (p.weight_offset + w[j]) * x[j];
    }
    squares = lanes_sum<kLanes<T>>(squares);
    along = lanes_sum<kLanes<T>>(along);
    constexpr float kInverse = 1.0f / kGatedNormDim;
    const float scale = rsqrtf(squares * kInverse + p.eps);
    const float pull = along * kInverse * scale * scale;  // mean(h n) n = x pull
    if (in_rows) {
      float d_gate[kV], d_x[kV];
      BRIDGE_UNROLL
      for (int j = 0; j < kV; ++j) {
        const float s = sigmoid(gate[j]), weight = p.weight_offset + w[j];
        const float n = rounded<T>(x[j] * scale);
        d_x[j] = scale * (g[j] * gate[j] * s * weight - x[j] * pull);
        d_gate[j] = g[j] * weight * n * s * (1.0f + gate[j] * (1.0f - s));
        d_weight[j] += g[j] * gate[j] * s * n;
      }
      store(static_cast<T*>(p.d_x) + row * kGatedNormDim + column, d_x);
      store(static_cast<T*>(p.d_gate) + token * p.d_gate_stride + head * kGatedNormDim + column, d_gate);
    }
  }

  BRIDGE_UNROLL
  for (int j = 0; j < kV; ++j) {
    box[group * kGatedNormDim + column + j] = d_weight[j];
  }
  __syncthreads();
  if (threadIdx.x < kGatedNormDim) {
    float sum = 0.0f;
    for (int i = 0; i < kHeads<T>; ++i) {
      sum += box[i * kGatedNormDim + static_cast<int>(threadIdx.x)];
    }
    p.workspace[static_cast<int64_t>(blockIdx.x) * kGatedNormDim + threadIdx.x] = sum;
  }
}

int64_t parts_of(int64_t rows, DType dtype) {
  const int64_t heads = dtype == DType::kBf16 ? kHeads<Bf16> : kHeads<float>;
  const int64_t groups = (rows + heads - 1) / heads;
  // Blocks are light here: four an SM hide the memory's latency, and a part is only 512 bytes.
  return groups < 2 * kRowParts ? groups : 2 * kRowParts;
}

bool supported(int64_t tokens, int heads, int64_t stride, DType dtype) {
  const int piece = dtype == DType::kBf16 ? kVec<Bf16> : kVec<float>;
  return tokens >= 0 && heads > 0 && stride % piece == 0 && tokens <= int64_t{0x7FFFFFFF} / heads;
}

}  // namespace

size_t gated_rms_norm_backward_workspace_bytes(int64_t tokens, int heads, DType dtype) {
  return static_cast<size_t>(parts_of(tokens * heads, dtype)) * kGatedNormDim * sizeof(float);
}

cudaError_t gated_rms_norm_forward(const GatedRmsNormForward& p, cudaStream_t stream) {
  if (!supported(p.tokens, p.heads, p.gate_stride, p.dtype)) {
    return cudaErrorInvalidValue;
  }
  const bool half = p.dtype == DType::kBf16;
  const int64_t heads = half ? kHeads<Bf16> : kHeads<float>;
  const dim3 grid(static_cast<unsigned>((p.tokens * p.heads + heads - 1) / heads));
  return launch(half ? forward_kernel<Bf16> : forward_kernel<float>, grid, dim3(kBlock), 0, stream, p);
}

cudaError_t gated_rms_norm_backward(const GatedRmsNormBackward& p, cudaStream_t stream) {
  if (!supported(p.tokens, p.heads, p.gate_stride, p.dtype) || !supported(p.tokens, p.heads, p.d_gate_stride, p.dtype)) {
    return cudaErrorInvalidValue;
  }
  const int64_t parts = parts_of(p.tokens * p.heads, p.dtype);
  auto* kernel = p.dtype == DType::kBf16 ? backward_kernel<Bf16> : backward_kernel<float>;
  const cudaError_t error = launch(kernel, dim3(static_cast<unsigned>(parts)), dim3(kBlock), 0, stream, p);
  if (error != cudaSuccess) {
    return error;
  }
  return sum_parts(p.workspace, parts, nullptr, kGatedNormDim, p.d_weight, p.weight_dtype, stream);
}

}  // namespace bridge
