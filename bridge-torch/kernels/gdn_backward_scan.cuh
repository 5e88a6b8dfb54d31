// The gated delta rule's backward along a sequence: the gradient B of the state, chunk after chunk from the end.
//
//   dDelta = P^T dO + e^(G_m - G) o K B;  Y = T^T dDelta;  dV = beta o Y;  dX = -e^G o beta o Y
//   B in front = e^(G_m) B + Q^T (e^G o dO / sqrt(128)) + K^T dX                    (K, Q of unit length)
// A block of 4 warps a sequence, value head and 32 columns, as scan_kernel. Leaves B behind every chunk and Y for the kernel
// of chunks, writes dV and the gradient of the initial state.
#pragma once

#include "gdn_backward.hpp"
#include "gdn_tiles.cuh"

namespace bridge {

namespace gdn {

struct Back {
  struct Stage {
    Bf16 keys[kC * kPitchD];
    Bf16 queries[kC * kPitchD];
    Bf16 inverse[kC * kPitchC];
    Bf16 d_out[kC * kPitchV];
    float rho_k[kC], rho_q[kC], decay[kC], beta[kC];
  };
  Stage stage[2];
  Bf16 gradient[kD * kPitchV];  // B
  Bf16 d_delta[kC * kPitchV];
  Bf16 scaled_out[kC * kPitchV];  // rho_q e^G / sqrt(128) o dO
  Bf16 d_x[kC * kPitchV];         // rho_k o dX
};

// Rows of the workspace: B behind every chunk, Y, partial sums of d_a_log and d_dt_bias.
struct Workspace {
  Bf16* gradients;  // [max_chunks, value_heads, 128, 128]
  Bf16* y;          // [tokens, value_heads, 128]
  float* a_log;     // [max_chunks, value_heads]
  float* dt_bias;   // [max_chunks, value_heads]
};

__device__ __forceinline__ void fetch_back(const GdnBackward& p, Back::Stage& stage, const Chunk& chunk, int head,
                                           int first_column) {
  const int key_head = head / (p.value_heads / p.key_heads);
  const int64_t token = chunk.first, heads = p.value_heads;
  copy_rows<kD, kPitchD>(stage.keys, static_cast<const Bf16*>(p.k) + token * p.k_stride + key_head * kD, p.k_stride, chunk.tokens);
  copy_rows<kD, kPitchD>(stage.queries, static_cast<const Bf16*>(p.q) + token * p.q_stride + key_head * kD, p.q_stride,
                         chunk.tokens);
  copy_rows<kC, kPitchC>(stage.inverse, static_cast<const Bf16*>(p.inverse) + (token * heads + head) * kC, heads * kC, chunk.tokens);
  copy_rows<kColumns, kPitchV>(stage.d_out, static_cast<const Bf16*>(p.d_out) + (token * heads + head) * kD + first_column,
                               heads * kD, chunk.tokens);
  const int i = static_cast<int>(threadIdx.x) % kC;
  const bool valid = i < chunk.tokens;
  const int64_t row = token + (valid ? i : chunk.tokens - 1);
  if (threadIdx.x < kC) {
    copy_async_word(stage.rho_k + i, p.rho_k + row * p.key_heads + key_head, valid);
    copy_async_word(stage.rho_q + i, p.rho_q + row * p.key_heads + key_head, valid);
  } else {
    copy_async_word(stage.beta + i, p.beta + row * heads + head, valid);
    copy_async_word(stage.decay + i, p.decay + row * heads + head, true);
  }
  copy_commit();
}

static __global__ void __launch_bounds__(kBlock) back_scan_kernel(GdnBackward p, Workspace work) {
  BRIDGE_DYNAMIC_SHARED(memory);
  Back& s = *reinterpret_cast<Back*>(memory);
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  const int group = lane / 4, pair = lane % 4 * 2;
  const int64_t sequence = blockIdx.x, heads = p.value_heads;
  const int head = static_cast<int>(blockIdx.y), first_column = static_cast<int>(blockIdx.z) * kColumns;
  const int begin = p.first_chunk[sequence], end = p.first_chunk[sequence + 1];
  Bf16* d_v = static_cast<Bf16*>(p.d_v) + static_cast<int64_t>(head) * kD + first_column;

  if (sequence == p.sequences) {  // tokens of no sequence
    const float zeros[8] = {};
    for (int i = begin; i < end; ++i) {
      const Chunk chunk = p.chunks[i];
      for (int piece = thread; piece < chunk.tokens * (kColumns / 8); piece += kBlock) {
        store(d_v + (chunk.first + piece / (kColumns / 8)) * p.d_v_stride + piece % (kColumns / 8) * 8, zeros);
      }
    }
    return;
  }

  float gradient[2][4][4] = {};
  const int64_t state_at = (sequence * heads + head) * kD * kD + first_column;
  if (p.d_final_state != nullptr) {
    BRIDGE_UNROLL
    for (int m = 0; m < 2; ++m) {
      BRIDGE_UNROLL
      for (int n = 0; n < 4; ++n) {
        BRIDGE_UNROLL
        for (int i = 0; i < 4; ++i) {
          gradient[m][n][i] = p.d_final_state[state_at + (warp * 32 + m * 16 + group + i / 2 * 8) * kD + n * 8 + pair + i % 2];
        }
      }
    }
  }

  if (begin < end) {
    fetch_back(p, s.stage[0], p.chunks[end - 1], head, first_column);
  }
  for (int at = end - 1; at >= begin; --at) {
    const Chunk chunk = p.chunks[at];
    Back::Stage& now = s.stage[(end - 1 - at) % 2];
    BRIDGE_UNROLL
    for (int m = 0; m < 2; ++m) {
      BRIDGE_UNROLL
      for (int n = 0; n < 4; ++n) {
        BRIDGE_UNROLL
        for (int half = 0; half < 2; ++half) {
          put_pair(s.gradient + (warp * 32 + m * 16 + group + half * 8) * kPitchV + n * 8 + pair, gradient[m][n][2 * half],
                   gradient[m][n][2 * half + 1]);
        }
      }
    }
    copy_wait<0>();
    __syncthreads();  // this chunk and B are in shared memory, and the chunk before is done with
    if (at > begin) {
      fetch_back(p, s.stage[(end - at) % 2], p.chunks[at - 1], head, first_column);
    }
    Bf16* kept = work.gradients + (static_cast<int64_t>(at) * heads + head) * kD * kD + first_column;
    for (int piece = thread; piece < kD * (kColumns / 8); piece += kBlock) {
      const int row = piece / (kColumns / 8), column = piece % (kColumns / 8) * 8;
      store_bits(kept + row * kD + column, load_bits(s.gradient + row * kPitchV + column));
    }

    // K B of the warp's 16 tokens.
    float from_keys[4][4] = {};
    BRIDGE_UNROLL
    for (int step = 0; step < kD / 16; ++step) {
      unsigned keys[4];
      load_a<kPitchD>(keys, now.keys, warp * 16, step * 16);
      BRIDGE_UNROLL
      for (int n = 0; n < 2; ++n) {
        unsigned right[4];
        load_b<kPitchV>(right, s.gradient, step * 16, n * 16);
        mma_pair(from_keys[2 * n], from_keys[2 * n + 1], keys, right);
      }
    }
    // P^T dO: the warp's tokens as keys, those behind them as queries.
    float d_delta[4][4] = {};
    for (int step = warp; step < kC / 16; ++step) {
      float scores[2][4] = {};
      BRIDGE_UNROLL
      for (int inner = 0; inner < kD / 16; ++inner) {
        unsigned keys[4], queries[4];
        load_a<kPitchD>(keys, now.keys, warp * 16, inner * 16);
        load_b_transposed<kPitchD>(queries, now.queries, step * 16, inner * 16);
        mma_pair(scores[0], scores[1], keys, queries);
      }
      unsigned left[4];
      BRIDGE_UNROLL
      for (int word = 0; word < 4; ++word) {
        const int row = warp * 16 + group + word % 2 * 8, column = step * 16 + pair + word / 2 * 8;
        const float decay = now.decay[row], rho = now.rho_k[row];
        const float low = row <= column ? rho * now.rho_q[column] * between(now.decay[column], decay) : 0.0f;
        const float high = row <= column + 1 ? rho * now.rho_q[column + 1] * between(now.decay[column + 1], decay) : 0.0f;
        left[word] = pack_bf16(scores[word / 2][word % 2 * 2] * low, scores[word / 2][word % 2 * 2 + 1] * high);
      }
      BRIDGE_UNROLL
      for (int n = 0; n < 2; ++n) {
        unsigned right[4];
        load_b<kPitchV>(right, now.d_out, step * 16, n * 16);
        mma_pair(d_delta[2 * n], d_delta[2 * n + 1], left, right);
      }
    }
    const float last = now.decay[kC - 1];
    BRIDGE_UNROLL
    for (int half = 0; half < 2; ++half) {
      const int row = warp * 16 + group + half * 8;
      const float scale = now.rho_k[row] * between(last, now.decay[row]);
      const float out_scale = kQueryScale * now.rho_q[row] * __expf(now.decay[row]);
      BRIDGE_UNROLL
      for (int n = 0; n < 4; ++n) {
        put_pair(s.d_delta + row * kPitchV + n * 8 + pair, kQueryScale * d_delta[n][2 * half] + scale * from_keys[n][2 * half],
                 kQueryScale * d_delta[n][2 * half + 1] + scale * from_keys[n][2 * half + 1]);
        const unsigned value = *reinterpret_cast<const unsigned*>(now.d_out + row * kPitchV + n * 8 + pair);
        put_pair(s.scaled_out + row * kPitchV + n * 8 + pair, out_scale * __uint_as_float(value << 16),
                 out_scale * __uint_as_float(value & 0xFFFF0000u));
      }
    }
    __syncthreads();  // dDelta of all tokens

    float y[4][4] = {};
    for (int step = warp; step < kC / 16; ++step) {
      unsigned left[4];
      load_a_transposed<kPitchC>(left, now.inverse, step * 16, warp * 16);
      BRIDGE_UNROLL
      for (int word = 0; word < 4; ++word) {
        const int row = warp * 16 + group + word % 2 * 8, column = step * 16 + pair + word / 2 * 8;
        const float decay = now.decay[row];
        const float low = row <= column ? between(now.decay[column], decay) : 0.0f;
        const float high = row <= column + 1 ? between(now.decay[column + 1], decay) : 0.0f;
        left[word] = pack_bf16(__uint_as_float(left[word] << 16) * low, __uint_as_float(left[word] & 0xFFFF0000u) * high);
      }
      BRIDGE_UNROLL
      for (int n = 0; n < 2; ++n) {
        unsigned right[4];
        load_b<kPitchV>(right, s.d_delta, step * 16, n * 16);
        mma_pair(y[2 * n], y[2 * n + 1], left, right);
      }
    }
    BRIDGE_UNROLL
    for (int half = 0; half < 2; ++half) {
      const int row = warp * 16 + group + half * 8;
      const float beta = now.beta[row], scale = -now.rho_k[row] * __expf(now.decay[row]) * beta;
      const int64_t token = static_cast<int64_t>(chunk.first) + row;
      BRIDGE_UNROLL
      for (int n = 0; n < 4; ++n) {
        const float low = y[n][2 * half], high = y[n][2 * half + 1];
        put_pair(s.d_x + row * kPitchV + n * 8 + pair, scale * low, scale * high);
        if (row < chunk.tokens) {
          put_pair(d_v + token * p.d_v_stride + n * 8 + pair, beta * low, beta * high);
          put_pair(work.y + (token * heads + head) * kD + first_column + n * 8 + pair, low, high);
        }
      }
    }
    __syncthreads();  // dX of all tokens

    const float decayed = __expf(last);
    BRIDGE_UNROLL
    for (int m = 0; m < 2; ++m) {
      BRIDGE_UNROLL
      for (int n = 0; n < 4; ++n) {
        BRIDGE_UNROLL
        for (int i = 0; i < 4; ++i) {
          gradient[m][n][i] *= decayed;
        }
      }
    }
    BRIDGE_UNROLL
    for (int step = 0; step < kC / 16; ++step) {
      unsigned from_out[2][4], from_x[2][4];
      BRIDGE_UNROLL
      for (int n = 0; n < 2; ++n) {
        load_b<kPitchV>(from_out[n], s.scaled_out, step * 16, n * 16);
        load_b<kPitchV>(from_x[n], s.d_x, step * 16, n * 16);
      }
      BRIDGE_UNROLL
      for (int m = 0; m < 2; ++m) {
        unsigned left[4];
        load_a_transposed<kPitchD>(left, now.queries, step * 16, warp * 32 + m * 16);
        mma_pair(gradient[m][0], gradient[m][1], left, from_out[0]);
        mma_pair(gradient[m][2], gradient[m][3], left, from_out[1]);
        load_a_transposed<kPitchD>(left, now.keys, step * 16, warp * 32 + m * 16);
        mma_pair(gradient[m][0], gradient[m][1], left, from_x[0]);
        mma_pair(gradient[m][2], gradient[m][3], left, from_x[1]);
      }
    }
  }

  if (p.d_initial_state != nullptr) {
    BRIDGE_UNROLL
    for (int m = 0; m < 2; ++m) {
      BRIDGE_UNROLL
      for (int n = 0; n < 4; ++n) {
        BRIDGE_UNROLL
        for (int i = 0; i < 4; ++i) {
          p.d_initial_state[state_at + (warp * 32 + m * 16 + group + i / 2 * 8) * kD + n * 8 + pair + i % 2] = gradient[m][n][i];
        }
      }
    }
  }
}

}  // namespace gdn

}  // namespace bridge
