// Interleaved multimodal rotary embedding: a table of cos and sin, and the rotation in place. Formulas: mrope.hpp.
//
// Table: a thread an angle, angle = float(position) frequency in float32, as the reference has it; it is reduced by turns in
// float64 and handed to sincospi, because cosf's own path for large angles wants local memory. Rotation: a head is 4 threads
// of 16 bytes of each half (8 with floats); q and k in one launch. Arithmetic float32, one rounding.
//
// bf16 and f32, 64 turning dimensions; sm_80 and newer; no shared memory. Bound by memory: the 64 dimensions of q and k,
// read and written. Defined by: transformers, Qwen3_5TextRotaryEmbedding and apply_rotary_pos_emb.
//
// sass apply_kernel: LDG.E.128 STG.E.128

#include "mrope.hpp"

#include "numbers.cuh"

namespace bridge {

namespace {

constexpr int kBlock = 256;

__global__ void __launch_bounds__(kBlock) table_kernel(MropeTable p) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kBlock + threadIdx.x;
  if (index >= p.tokens * kFrequencies) {
    return;
  }
  const int64_t token = index / kFrequencies;
  const int j = static_cast<int>(index % kFrequencies);
  const int row = j % 3 == 1 && j < p.height_limit ? 1 : j % 3 == 2 && j < p.width_limit ? 2 : 0;
  const float angle = static_cast<float>(p.positions[row * p.tokens + token]) * p.frequencies[j];
  constexpr double kInversePi = 0.31830988618379067154;
  const double half_turns = static_cast<double>(angle) * kInversePi;
  const auto rest = static_cast<float>(half_turns - 2.0 * rint(half_turns * 0.5));
  float sine, cosine;
  sincospif(rest, &sine, &cosine);
  store_scalar(p.cos, index, p.dtype, cosine);
  store_scalar(p.sin, index, p.dtype, sine);
}

template <class T>
__global__ void __launch_bounds__(kBlock) apply_kernel(MropeApply p) {
  constexpr int kV = kVec<T>, kThreads = kFrequencies / kV;
  const unsigned heads = static_cast<unsigned>(p.q_heads + p.k_heads);
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kBlock + threadIdx.x;
  const int64_t row = index / kThreads;
  if (row >= p.tokens * heads) {
    return;
  }
  const int column = static_cast<int>(index % kThreads) * kV;
  const unsigned token = static_cast<unsigned>(row) / heads;
  const int head = static_cast<int>(static_cast<unsigned>(row) - token * heads);
  T* x = head < p.q_heads
             ? static_cast<T*>(p.q) + token * p.q_token_stride + head * p.q_head_stride
             : static_cast<T*>(p.k) + token * p.k_token_stride + (head - p.q_heads) * p.k_head_stride;
  float first[kV], second[kV], c[kV], s[kV];
  load(x + column, first);
  load(x + kFrequencies + column, second);
  load(static_cast<const T*>(p.cos) + static_cast<int64_t>(token) * kFrequencies + column, c);
  load(static_cast<const T*>(p.sin) + static_cast<int64_t>(token) * kFrequencies + column, s);
  const float sign = p.inverse ? -1.0f : 1.0f;
  BRIDGE_UNROLL
  for (int j = 0; j < kV; ++j) {
    const float turned = first[j] * c[j] - sign * s[j] * second[j];
    second[j] = second[j] * c[j] + sign * s[j] * first[j];
    first[j] = turned;
  }
  store(x + column, first);
  store(x + kFrequencies + column, second);
}

}  // namespace

cudaError_t mrope_table(const MropeTable& p, cudaStream_t stream) {
  if (p.tokens < 0 || p.tokens > int64_t{0x7FFFFFFF}) {
    return cudaErrorInvalidValue;
  }
  const dim3 grid(static_cast<unsigned>((p.tokens * kFrequencies + kBlock - 1) / kBlock));
  return launch(table_kernel, grid, dim3(kBlock), 0, stream, p);
}

cudaError_t mrope_apply(const MropeApply& p, cudaStream_t stream) {
  const int piece = p.dtype == DType::kBf16 ? kVec<Bf16> : kVec<float>;
  const int64_t heads = int64_t{p.q_heads} + p.k_heads;
  const bool aligned = (p.q_token_stride | p.q_head_stride | p.k_token_stride | p.k_head_stride) % piece == 0;
  if (p.tokens < 0 || p.q_heads < 0 || p.k_heads < 0 || heads == 0 || p.tokens > int64_t{0x7FFFFFFF} / heads || !aligned) {
    return cudaErrorInvalidValue;
  }
  const int64_t threads = p.tokens * heads * (kFrequencies / piece);
  const dim3 grid(static_cast<unsigned>((threads + kBlock - 1) / kBlock));
  return launch(p.dtype == DType::kBf16 ? apply_kernel<Bf16> : apply_kernel<float>, grid, dim3(kBlock), 0, stream, p);
}

}  // namespace bridge
