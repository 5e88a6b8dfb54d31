// The gated delta rule's backward along a sequence: the gradient B of the state, chunk after chunk from the end.
//
//   dDelta = P^T dO + e^(G_m - G) o K B;  Y = T^T dDelta;  dV = beta o Y;  dX = -e^G o beta o Y
//   B in front = e^(G_m) B + Q^T (e^G o dO / sqrt(128)) + K^T dX                    (K, Q of unit length)
// Blocks and tiles: gdn_scan.cuh. Leaves B behind every chunk and Y for the kernel of chunks, writes dV and the gradient of the
// initial state.
#pragma once

#include "gdn_backward.hpp"
#include "gdn_scan.cuh"

namespace bridge {

namespace gdn {

struct Back {
  Stage stage[2];
  Bf16 gradient[kD * kPitchV];  // B
  Bf16 d_delta[kC * kPitchV];
  Bf16 scaled_out[kC * kPitchV];  // rho_q e^G / sqrt(128) o dO
  Bf16 d_x[kC * kPitchV];         // what rounding took from d_delta; from Y on rho_k o dX
};

// Rows of the workspace: B behind every chunk, Y, partial sums of d_a_log and d_dt_bias.
struct Workspace {
  Bf16* gradients;  // [max_chunks, value_heads, 128, 128]
  Bf16* y;          // [tokens, value_heads, 128]
  float* a_log;     // [max_chunks, value_heads]
  float* dt_bias;   // [max_chunks, value_heads]
};

static __global__ void __launch_bounds__(kBlock) back_scan_kernel(GdnBackward p, Workspace work) {
  BRIDGE_DYNAMIC_SHARED(memory);
  Back& s = *reinterpret_cast<Back*>(memory);
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  const int group = lane / 4, pair = lane % 4 * 2;
  const ScanBlock block(p);
  const int64_t heads = p.value_heads, stride = heads * kD;
  const int64_t columns = static_cast<int64_t>(block.head) * kD + block.first_column;
  Bf16* d_v = static_cast<Bf16*>(p.d_v) + columns;

  if (block.sequence == p.sequences) {
    for (int at = block.begin; at < block.end; ++at) {
      zero_rows<kColumns, kBlock>(d_v + p.chunks[at].first * p.d_v_stride, p.d_v_stride, p.chunks[at].tokens);
    }
    return;
  }

  StateTile gradient;
  const int64_t state_at = (block.sequence * heads + block.head) * kD * kD + block.first_column;
  if (p.d_final_state != nullptr) {
    gradient.read(p.d_final_state + state_at);
  }

  if (block.begin < block.end) {
    fetch(p, s.stage[0], p.chunks[block.end - 1], block, p.d_out, stride);
  }
  for (int at = block.end - 1; at >= block.begin; --at) {
    const Chunk chunk = p.chunks[at];
    Stage& now = s.stage[(block.end - 1 - at) % 2];
    gradient.put(s.gradient);
    copy_wait<0>();
    __syncthreads();  // this chunk and B are in shared memory, and the chunk before is done with
    if (at > block.begin) {
      fetch(p, s.stage[(block.end - at) % 2], p.chunks[at - 1], block, p.d_out, stride);
    }
    keep_columns(work.gradients + (at * heads + block.head) * kD * kD + block.first_column, s.gradient);

    float from_keys[1][4][4] = {};  // K B of the warp's 16 tokens
    add_from_state(from_keys, {now.keys}, warp * 16, s.gradient);
    // P^T dO: the warp's tokens as keys, those behind them as queries. It becomes dDelta, then Y.
    float y[4][4] = {};
    for (int step = warp; step < kC / 16; ++step) {
      float scores[2][4] = {};
      add_row_products(scores, now.keys, warp * 16, now.queries, step * 16);
      unsigned left[4];
      make_a(left, warp * 16, step * 16, [&](int row, int column, int i, int j) {
        return scores[i][j] * (now.rho_k[row] * now.rho_q[column] * gamma_of(now.decay, column, row));
      });
      add_product<kPitchV>(y, left, now.columns, step * 16, 0);
    }
    const float last = now.decay[kC - 1];
    BRIDGE_UNROLL
    for (int half = 0; half < 2; ++half) {
      const int row = warp * 16 + group + half * 8;
      const float scale = now.rho_k[row] * between(last, now.decay[row]);
      const float out_scale = kQueryScale * now.rho_q[row] * __expf(now.decay[row]);
      BRIDGE_UNROLL
      for (int n = 0; n < 4; ++n) {
        y[n][2 * half] = kQueryScale * y[n][2 * half] + scale * from_keys[0][n][2 * half];
        y[n][2 * half + 1] = kQueryScale * y[n][2 * half + 1] + scale * from_keys[0][n][2 * half + 1];
        const unsigned rounded = pack_bf16(y[n][2 * half], y[n][2 * half + 1]);
        put_pair(s.d_delta + row * kPitchV + n * 8 + pair, low_of(rounded), high_of(rounded));
        put_pair(s.d_x + row * kPitchV + n * 8 + pair, y[n][2 * half] - low_of(rounded), y[n][2 * half + 1] - high_of(rounded));
        const unsigned value = pair_at<kPitchV>(now.columns, row, n * 8 + pair);
        put_pair(s.scaled_out + row * kPitchV + n * 8 + pair, out_scale * low_of(value), out_scale * high_of(value));
      }
    }
    __syncthreads();  // dDelta of all tokens

    // Y = dDelta + (T - 1)^T dDelta: where keys are alike a small difference of large terms. Most of the sum comes from the
    // tokens next behind, so those of the warp's own count with all their digits.
    for (int step = warp; step < kC / 16; ++step) {
      unsigned left[4];
      load_a_transposed<kPitchC>(left, now.inverse, step * 16, warp * 16);
      add_product<kPitchV>(y, left, s.d_delta, step * 16, 0);
      if (step == warp) {
        add_product<kPitchV>(y, left, s.d_x, step * 16, 0);
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
          put_pair(work.y + token * stride + columns + n * 8 + pair, low, high);
        }
      }
    }
    __syncthreads();  // dX of all tokens

    gradient.multiply(__expf(last));
    BRIDGE_UNROLL
    for (int step = 0; step < kC / 16; ++step) {
      gradient.add_tokens(now.queries, s.scaled_out, step * 16);
      gradient.add_tokens(now.keys, s.d_x, step * 16);
    }
  }

  if (p.d_initial_state != nullptr) {
    gradient.write(p.d_initial_state + state_at);
  }
}

}  // namespace gdn

}  // namespace bridge
