// Routing: the best experts of a token and their weights. Formulas: router.hpp.
//
// A warp a token; a lane holds every 32nd logit in registers as an integer that rises with the logit. top_k rounds: the
// largest value by one warp-wide maximum, the lowest number among its holders by one minimum. Only the chosen logits are
// ever put through exp.
//
// bf16 and f32 logits, up to 512 experts, top_k up to 32; sm_80 and newer; no shared memory. Bound by launches: 4 MB at
// 8192 tokens of 256 experts. Defined by: transformers, Qwen3_5MoeTopKRouter.
//
// sass forward_kernel sm_80: REDUX
// sass forward_kernel sm_90a: REDUX
// sass forward_kernel sm_100a: CREDUX

#include "router.hpp"

#include "reduce.cuh"

namespace bridge {

namespace {

constexpr int kBlock = 128, kWarps = kBlock / 32;

// Rises with x; NaN is above everything, so that it is chosen and shows in the weights.
__device__ __forceinline__ unsigned rank_of(float x) {
  const unsigned bits = __float_as_uint(x);
  return x != x ? 0xFFFFFFFFu : (bits & 0x80000000u) != 0 ? ~bits : bits | 0x80000000u;
}

template <class T, int kLogits>
__global__ void __launch_bounds__(kBlock, 8) forward_kernel(RouterForward p) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int64_t token = static_cast<int64_t>(blockIdx.x) * kWarps + static_cast<int>(threadIdx.x) / 32;
  if (token >= p.tokens) {
    return;  // a whole warp
  }
  const T* logits = static_cast<const T*>(p.logits) + token * p.experts;
  unsigned rank[kLogits];
  BRIDGE_UNROLL
  for (int i = 0; i < kLogits; ++i) {
    const int expert = i * 32 + lane;
    // 0 is below the rank of -inf: no expert, or one that was chosen before.
    rank[i] = expert < p.experts ? rank_of(to_float(logits[expert])) : 0u;
  }
  int mine = 0;  // what lane r keeps of round r
  float best_logit = 0.0f, chosen_logit = 0.0f;
  BRIDGE_NO_UNROLL
  for (int round = 0; round < p.top_k; ++round) {
    unsigned best = 0;
    BRIDGE_UNROLL
    for (int i = 0; i < kLogits; ++i) {
      best = rank[i] > best ? rank[i] : best;
    }
    best = __reduce_max_sync(kWholeWarp, best);
    unsigned expert = 0xFFFFFFFFu;
    BRIDGE_UNROLL
    for (int i = kLogits - 1; i >= 0; --i) {
      expert = rank[i] == best ? static_cast<unsigned>(i * 32 + lane) : expert;
    }
    expert = __reduce_min_sync(kWholeWarp, expert);
    BRIDGE_UNROLL
    for (int i = 0; i < kLogits; ++i) {
      rank[i] = static_cast<unsigned>(i * 32 + lane) == expert ? 0u : rank[i];
    }
    const float logit = to_float(logits[expert]);
    best_logit = round == 0 ? logit : best_logit;
    if (lane == round) {
      mine = static_cast<int>(expert);
      chosen_logit = logit;
    }
  }
  // -inf - -inf is NaN, which is what a row of nothing but -inf is to get.
  const float weight = lane < p.top_k ? __expf(chosen_logit - best_logit) : 0.0f;
  const float sum = lanes_sum<32>(weight);
  if (lane < p.top_k) {
    static_cast<T*>(p.weights)[token * p.top_k + lane] = from_float<T>(__fdividef(weight, sum));
    p.chosen[token * p.top_k + lane] = mine;
  }
}

template <class T>
__global__ void __launch_bounds__(kBlock) backward_kernel(RouterBackward p) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int64_t token = static_cast<int64_t>(blockIdx.x) * kWarps + static_cast<int>(threadIdx.x) / 32;
  if (token >= p.tokens) {
    return;
  }
  const bool used = lane < p.top_k;
  const int64_t at = token * p.top_k + lane;
  const int expert = used ? p.chosen[at] : -1;
  const T* logits = static_cast<const T*>(p.logits) + token * p.experts;
  const float logit = used ? to_float(logits[expert]) : 0.0f;
  const float best = __shfl_sync(kWholeWarp, logit, 0);
  float weight = used ? __expf(logit - best) : 0.0f;
  weight = __fdividef(weight, lanes_sum<32>(weight));
  const float d_weight = used ? to_float(static_cast<const T*>(p.d_weights)[at]) : 0.0f;
  const float mean = lanes_sum<32>(weight * d_weight);
  const float d_logit = weight * (d_weight - mean);

  T* d_logits = static_cast<T*>(p.d_logits) + token * p.experts;
  for (int first = 0; first < p.experts; first += 32) {
    float value = 0.0f;
    for (int i = 0; i < p.top_k; ++i) {
      const int chosen = __shfl_sync(kWholeWarp, expert, i);
      const float gradient = __shfl_sync(kWholeWarp, d_logit, i);
      value = chosen == first + lane ? gradient : value;
    }
    if (first + lane < p.experts) {
      d_logits[first + lane] = from_float<T>(value);
    }
  }
}

template <class Parameters>
bool supported(const Parameters& p) {
  return p.tokens >= 0 && p.tokens <= int64_t{0x7FFFFFFF} && p.experts > 0 && p.experts <= kMaxExperts && p.top_k > 0 &&
         p.top_k <= kMaxTopK && p.top_k <= p.experts;
}

dim3 grid_of(int64_t tokens) { return dim3(static_cast<unsigned>((tokens + kWarps - 1) / kWarps)); }

template <class T>
cudaError_t forward(const RouterForward& p, cudaStream_t stream) {
  return launch(p.experts <= 256 ? forward_kernel<T, 8> : forward_kernel<T, 16>, grid_of(p.tokens), dim3(kBlock), 0, stream, p);
}

}  // namespace

cudaError_t router_forward(const RouterForward& p, cudaStream_t stream) {
  if (!supported(p)) {
    return cudaErrorInvalidValue;
  }
  return p.dtype == DType::kBf16 ? forward<Bf16>(p, stream) : forward<float>(p, stream);
}

cudaError_t router_backward(const RouterBackward& p, cudaStream_t stream) {
  if (!supported(p)) {
    return cudaErrorInvalidValue;
  }
  return launch(p.dtype == DType::kBf16 ? backward_kernel<Bf16> : backward_kernel<float>, grid_of(p.tokens), dim3(kBlock), 0,
                stream, p);
}

}  // namespace bridge
