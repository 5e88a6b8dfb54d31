// The middle of the routed experts' backward in one pass over the rows. Formulas: expert_activation.hpp.
//
// A warp a row: 16 bytes of gate, of up and of d_act a lane and turn, so that all that belongs to a row, its dot product too,
// stays within a warp. Arithmetic is float32 with one rounding at the end of each result; the dot product goes over a lane's
// turns, then over the lanes in one fixed order. A lane reads what it replaces before it writes: outputs may lie on inputs.
//
// bf16 and f32, any width of whole 16 bytes; sm_80 and newer; no shared memory. Bound by memory: six times [rows, width].
// Defined by: the gradient of transformers' Qwen3_5MoeExperts.
//
// sass activation_kernel: LDG.E.128 STG.E.128

#include "expert_activation.hpp"

#include "reduce.cuh"

namespace bridge {

namespace {

constexpr int kBlock = 256, kWarps = kBlock / 32;

template <class T>
__global__ void __launch_bounds__(kBlock) activation_kernel(ExpertActivation p) {
  constexpr int kV = kVec<T>;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kWarps + static_cast<int>(threadIdx.x) / 32;
  if (row >= p.rows) {
    return;
  }
  const int assignment = p.assignment_of[row];
  const float weight = to_float(static_cast<const T*>(p.weights)[assignment]);
  const T* pre = static_cast<const T*>(p.pre) + row * 2 * p.width;
  const T* d_act = static_cast<const T*>(p.d_act) + row * p.width;
  T* d_pre = static_cast<T*>(p.d_pre) + row * 2 * p.width;
  T* act_scaled = static_cast<T*>(p.act_scaled) + row * p.width;
  float sum = 0.0f;
  for (int column = lane * kV; column < p.width; column += 32 * kV) {
    float gate[kV], up[kV], g[kV];
    load(pre + column, gate);
    load(pre + p.width + column, up);
    load(d_act + column, g);
    BRIDGE_UNROLL
    for (int j = 0; j < kV; ++j) {
      const float d = g[j], act = silu(gate[j]) * up[j];
      sum += d * act;
      swiglu_gradient(gate[j], up[j], weight * d);
      g[j] = weight * act;
    }
    store(d_pre + column, gate);
    store(d_pre + p.width + column, up);
    store(act_scaled + column, g);
  }
  sum = lanes_sum<32>(sum);
  if (lane == 0) {
    static_cast<T*>(p.d_weights)[assignment] = from_float<T>(sum);
  }
}

}  // namespace

cudaError_t expert_activation_backward(const ExpertActivation& p, cudaStream_t stream) {
  const int piece = p.dtype == DType::kBf16 ? kVec<Bf16> : kVec<float>;
  if (p.rows < 0 || p.rows > int64_t{0x7FFFFFFF} || p.width <= 0 || p.width % piece != 0) {
    return cudaErrorInvalidValue;
  }
  auto* kernel = p.dtype == DType::kBf16 ? activation_kernel<Bf16> : activation_kernel<float>;
  const dim3 grid(static_cast<unsigned>((p.rows + kWarps - 1) / kWarps));
  return launch(kernel, grid, dim3(kBlock), 0, stream, p);
}

}  // namespace bridge
