// First kernel of the gated delta rule: all that does not depend on the state. A block a chunk and key head.
//
// rho of q and k, A = K K^T once for the r value heads of the key head (mma, then scaled in float32), and for each value head
// the gates, their running sum and the inverse of 1 + tril(diag(beta) A, -1): four 16x16 blocks by forward substitution, a
// column a lane, then 16 -> 32 -> 64 by T21 = -T22 (L21 T11) in float32. Gamma goes over the finished inverse, which is the same
// as inverting with it and never divides by a decay; then comes the one rounding. The ones on the diagonal are left to the scans,
// which add them in float32.
#pragma once

#include "gdn_forward.hpp"
#include "gdn_tiles.cuh"
#include "reduce.cuh"

namespace bridge {

namespace gdn {

struct Prepare {
  float a[kC * kPitchA];
  float inverse[kC * kPitchA];
  float scratch[32 * 33];
  float rho[kC];
  float beta[kC];
  float gate[kC];  // g, then its running sum
};

// inverse[row0.., column0..] = -T22 (L21 T11) for all pairs of finished diagonal blocks of kSize.
template <int kSize>
__device__ __forceinline__ void merge(Prepare& s) {
  constexpr int kPairs = kC / (2 * kSize), kOutputs = kPairs * kSize * kSize;
  static_assert(kOutputs <= 32 * 33, "the scratch holds all pairs");
  for (int i = static_cast<int>(threadIdx.x); i < kOutputs; i += kBlock) {
    const int first = i / (kSize * kSize) * 2 * kSize, row = i / kSize % kSize, column = i % kSize;
    const float* l = s.a + (first + kSize + row) * kPitchA + first;
    float sum = 0.0f;
    for (int k = 0; k < kSize; ++k) {
      sum += l[k] * s.inverse[(first + k) * kPitchA + first + column];
    }
    s.scratch[i] = sum * s.beta[first + kSize + row];
  }
  __syncthreads();
  for (int i = static_cast<int>(threadIdx.x); i < kOutputs; i += kBlock) {
    const int pair = i / (kSize * kSize), first = pair * 2 * kSize, row = i / kSize % kSize, column = i % kSize;
    const float* left = s.inverse + (first + kSize + row) * kPitchA + first + kSize;
    float sum = 0.0f;
    for (int k = 0; k < kSize; ++k) {
      sum += left[k] * s.scratch[(pair * kSize + k) * kSize + column];
    }
    s.inverse[(first + kSize + row) * kPitchA + first + column] = -sum;
  }
  __syncthreads();
}

static __global__ void __launch_bounds__(kBlock) prepare_kernel(GdnForward p) {
  BRIDGE_DYNAMIC_SHARED(memory);
  Prepare& s = *reinterpret_cast<Prepare*>(memory);
  Bf16* keys = reinterpret_cast<Bf16*>(memory + sizeof(Prepare));
  const Chunk chunk = p.chunks[blockIdx.x];
  if (chunk.sequence < 0 || chunk.sequence == p.sequences) {
    return;
  }
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  const int key_head = static_cast<int>(blockIdx.y);
  const Bf16* k = static_cast<const Bf16*>(p.k) + chunk.first * p.k_stride + static_cast<int64_t>(key_head) * kD;
  const Bf16* q = static_cast<const Bf16*>(p.q) + chunk.first * p.q_stride + static_cast<int64_t>(key_head) * kD;
  copy_rows<kD, kPitchD>(keys, k, p.k_stride, chunk.tokens);
  copy_commit();
  copy_wait<0>();
  __syncthreads();

  // Half a warp a row.
  for (int i = 0; i < 8; ++i) {
    const int row = warp * 16 + i * 2 + lane / 16, column = lane % 16 * 8;
    float x[8], y[8] = {};
    load(keys + row * kPitchD + column, x);
    if (row < chunk.tokens) {
      load(q + row * p.q_stride + column, y);
    }
    float k_squares = 0.0f, q_squares = 0.0f;
    BRIDGE_UNROLL
    for (int j = 0; j < 8; ++j) {
      k_squares += x[j] * x[j];
      q_squares += y[j] * y[j];
    }
    k_squares = lanes_sum<16>(k_squares);
    q_squares = lanes_sum<16>(q_squares);
    if (lane % 16 == 0) {
      const float rho = rsqrtf(k_squares + 1e-6f);
      s.rho[row] = rho;
      if (row < chunk.tokens) {
        const int64_t at = (static_cast<int64_t>(chunk.first) + row) * p.key_heads + key_head;
        p.rho_k[at] = rho;
        p.rho_q[at] = rsqrtf(q_squares + 1e-6f);
      }
    }
  }
  __syncthreads();

  float products[8][4] = {};
  add_row_products(products, keys, warp * 16, keys, 0);
  BRIDGE_UNROLL
  for (int n = 0; n < 8; ++n) {
    BRIDGE_UNROLL
    for (int i = 0; i < 4; ++i) {
      const int row = warp * 16 + lane / 4 + i / 2 * 8, column = n * 8 + lane % 4 * 2 + i % 2;
      s.a[row * kPitchA + column] = products[n][i] * s.rho[row] * s.rho[column];
    }
  }

  const int ratio = p.value_heads / p.key_heads;
  for (int r = 0; r < ratio; ++r) {
    const int head = key_head * ratio + r;
    __syncthreads();  // A is complete; the head before has been written
    if (thread < kC) {
      const int64_t token = static_cast<int64_t>(chunk.first) + thread;
      float g = 0.0f, beta = 0.0f;
      if (thread < chunk.tokens) {
        const float a = load_scalar(p.a, token * p.a_stride + head, p.gate_dtype);
        const float b = sigmoid(load_scalar(p.b, token * p.b_stride + head, p.gate_dtype));
        const float speed = expf(load_scalar(p.a_log, head, p.parameter_dtype));
        g = -speed * softplus(a + load_scalar(p.dt_bias, head, p.parameter_dtype));
        beta = p.gate_dtype == DType::kBf16 ? rounded<Bf16>(b) : b;
        p.beta[token * p.value_heads + head] = beta;
      }
      s.gate[thread] = g;
      s.beta[thread] = beta;
    }
    for (int i = thread; i < kC * kPitchA; i += kBlock) {
      s.inverse[i] = 0.0f;
    }
    __syncthreads();
    if (warp == 0) {  // two tokens a lane
      const float first = s.gate[2 * lane], second = s.gate[2 * lane + 1];
      float sum = first + second;
      BRIDGE_UNROLL
      for (int delta = 1; delta < 32; delta *= 2) {
        const float below = __shfl_up_sync(kWholeWarp, sum, delta);
        sum += lane >= delta ? below : 0.0f;
      }
      float before = __shfl_up_sync(kWholeWarp, sum, 1);
      before = lane > 0 ? before : 0.0f;
      BRIDGE_UNROLL
      for (int i = 0; i < 2; ++i) {
        before += i == 0 ? first : second;
        s.gate[2 * lane + i] = before;
        if (2 * lane + i < chunk.tokens) {
          p.decay[(static_cast<int64_t>(chunk.first) + 2 * lane + i) * p.value_heads + head] = before;
        }
      }
    }
    // Column `lane` of the warp's diagonal block.
    if (lane < 16) {
      float x[16];
      BRIDGE_UNROLL
      for (int i = 0; i < 16; ++i) {
        const float* row = s.a + (warp * 16 + i) * kPitchA + warp * 16;
        float sum = 0.0f;
        BRIDGE_UNROLL
        for (int j = 0; j < i; ++j) {
          sum += row[j] * x[j];
        }
        x[i] = (i == lane ? 1.0f : 0.0f) - s.beta[warp * 16 + i] * sum;
        s.inverse[(warp * 16 + i) * kPitchA + warp * 16 + lane] = x[i];
      }
    }
    __syncthreads();
    merge<16>(s);
    merge<32>(s);
    for (int i = thread; i < kC * (kC / 8); i += kBlock) {
      const int row = i / (kC / 8), column = i % (kC / 8) * 8;
      if (row < chunk.tokens) {
        float values[8];
        BRIDGE_UNROLL
        for (int j = 0; j < 8; ++j) {
          values[j] = column + j < row ? s.inverse[row * kPitchA + column + j] * gamma_of(s.gate, row, column + j) : 0.0f;
        }
        store(static_cast<Bf16*>(p.inverse) + ((static_cast<int64_t>(chunk.first) + row) * p.value_heads + head) * kC + column,
              values);
      }
    }
  }
}

inline constexpr size_t kPrepareBytes = sizeof(Prepare) + kC * kPitchD * sizeof(Bf16);

}  // namespace gdn

}  // namespace bridge
