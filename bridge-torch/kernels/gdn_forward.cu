// The gated delta rule, forward, in two kernels: prepare_kernel (gdn_prepare.cuh) and scan_kernel. Operator: gdn_forward.hpp.
//
// Chunk of m <= 64 tokens, K and Q as stored, rho their inverse lengths, G the running sum of g, Gamma_ij = e^(G_i - G_j) for
// i >= j (the exponent is masked before exp, so nothing overflows), T of gdn_forward.hpp, S the state in front:
//   R = V - e^G o rho_k o (K S);  Delta = T (beta o R)
//   O = rho_q / sqrt(128) o (e^G o (Q S) + (Q K^T o Gamma o rho_k) Delta);  S = e^(G_m) S + K^T (rho_k o e^(G_m - G) o Delta)
// q and k are never normalised in memory: their lengths go into float32 epilogues.
//
// scan_kernel (blocks and tiles: gdn_scan.cuh): S stays in registers in float32 (32 keys x 32 columns a warp) and goes to shared
// memory in bf16 as an operand. T's diagonal is added in float32, products above it are left out. Chunk
// i + 1 is copied while chunk i is worked on: 2 x (K 17, Q 17, inverse 9, V 5, scalars 1) + S 10 + R 5 + Delta 2 x 5 KB = 123 KB.
//
// bf16 operands, float32 sums; heads of 128; sm_80 and newer (mma.sync, cp.async, ldmatrix). Defined by: transformers,
// torch_recurrent_gated_delta_rule and torch_chunk_gated_delta_rule (qwen3_5).
//
// sass scan_kernel: HMMA.16816.F32.BF16 LDGSTS LDSM
// sass prepare_kernel: HMMA.16816.F32.BF16 LDGSTS LDSM STG.E.128

#include "gdn_forward.hpp"

#include "gdn_prepare.cuh"
#include "gdn_scan.cuh"

namespace bridge {

namespace {

using namespace gdn;

struct Scan {
  Stage stage[2];
  Bf16 state[kD * kPitchV];
  Bf16 residual[kC * kPitchV];  // beta o R
  Bf16 delta[kC * kPitchV];
  Bf16 scaled[kC * kPitchV];    // rho_k o e^(G_m - G) o Delta
};

__global__ void __launch_bounds__(kBlock) scan_kernel(GdnForward p) {
  BRIDGE_DYNAMIC_SHARED(memory);
  Scan& s = *reinterpret_cast<Scan*>(memory);
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  const int group = lane / 4, pair = lane % 4 * 2;
  const ScanBlock block(p);
  const int64_t heads = p.value_heads, stride = heads * kD;
  const int64_t columns = static_cast<int64_t>(block.head) * kD + block.first_column;
  Bf16* out = static_cast<Bf16*>(p.out) + columns;

  if (block.sequence == p.sequences) {
    for (int at = block.begin; at < block.end; ++at) {
      zero_rows<kColumns, kBlock>(out + p.chunks[at].first * stride, stride, p.chunks[at].tokens);
    }
    return;
  }

  StateTile state;
  const int64_t state_at = (block.sequence * heads + block.head) * kD * kD + block.first_column;
  if (p.initial_state != nullptr) {
    state.read(p.initial_state + state_at);
  }

  if (block.begin < block.end) {
    fetch(p, s.stage[0], p.chunks[block.begin], block, p.v, p.v_stride);
  }
  for (int at = block.begin; at < block.end; ++at) {
    const Chunk chunk = p.chunks[at];
    Stage& now = s.stage[(at - block.begin) % 2];
    state.put(s.state);
    copy_wait<0>();
    __syncthreads();  // this chunk and the state are in shared memory, and the chunk before is done with
    if (at + 1 < block.end) {
      fetch(p, s.stage[(at + 1 - block.begin) % 2], p.chunks[at + 1], block, p.v, p.v_stride);
    }
    if (p.chunk_states != nullptr) {
      keep_columns(static_cast<Bf16*>(p.chunk_states) + (at * heads + block.head) * kD * kD + block.first_column, s.state);
    }

    float products[2][4][4] = {};  // K S and Q S of the warp's 16 tokens
    add_from_state(products, {now.keys, now.queries}, warp * 16, s.state);
    auto& from_keys = products[0];
    auto& output = products[1];
    float delta[4][4];
    BRIDGE_UNROLL
    for (int half = 0; half < 2; ++half) {
      const int row = warp * 16 + group + half * 8;
      const float decayed = __expf(now.decay[row]), beta = now.beta[row], scale = decayed * now.rho_k[row];
      BRIDGE_UNROLL
      for (int n = 0; n < 4; ++n) {
        const unsigned value = pair_at<kPitchV>(now.columns, row, n * 8 + pair);
        delta[n][2 * half] = beta * (low_of(value) - scale * from_keys[n][2 * half]);
        delta[n][2 * half + 1] = beta * (high_of(value) - scale * from_keys[n][2 * half + 1]);
        put_pair(s.residual + row * kPitchV + n * 8 + pair, delta[n][2 * half], delta[n][2 * half + 1]);
        output[n][2 * half] *= decayed;
        output[n][2 * half + 1] *= decayed;
      }
    }
    __syncthreads();  // beta o R of all tokens

    // Delta = beta o R + (T - 1) (beta o R): tokens behind the warp's own have no part in it.
    for (int step = 0; step <= warp; ++step) {
      unsigned left[4];
      load_a<kPitchC>(left, now.inverse, warp * 16, step * 16);
      add_product<kPitchV>(delta, left, s.residual, step * 16, 0);
    }
    const float last = now.decay[kC - 1];
    BRIDGE_UNROLL
    for (int half = 0; half < 2; ++half) {
      const int row = warp * 16 + group + half * 8;
      const float scale = now.rho_k[row] * between(last, now.decay[row]);
      BRIDGE_UNROLL
      for (int n = 0; n < 4; ++n) {
        const float low = delta[n][2 * half], high = delta[n][2 * half + 1];
        put_pair(s.delta + row * kPitchV + n * 8 + pair, low, high);
        put_pair(s.scaled + row * kPitchV + n * 8 + pair, scale * low, scale * high);
        if (p.delta != nullptr && row < chunk.tokens) {
          const int64_t token = static_cast<int64_t>(chunk.first) + row;
          put_pair(static_cast<Bf16*>(p.delta) + token * stride + columns + n * 8 + pair, low, high);
        }
      }
    }
    __syncthreads();  // Delta of all tokens

    // O: attention of the warp's tokens to those of the chunk up to them, 16 at a time.
    for (int step = 0; step <= warp; ++step) {
      float scores[2][4] = {};
      add_row_products(scores, now.queries, warp * 16, now.keys, step * 16);
      unsigned left[4];
      make_a(left, warp * 16, step * 16, [&](int row, int column, int i, int j) {
        return scores[i][j] * (now.rho_k[column] * gamma_of(now.decay, row, column));
      });
      add_product<kPitchV>(output, left, s.delta, step * 16, 0);
    }
    BRIDGE_UNROLL
    for (int half = 0; half < 2; ++half) {
      const int row = warp * 16 + group + half * 8;
      if (row < chunk.tokens) {
        const float scale = kQueryScale * now.rho_q[row];
        BRIDGE_UNROLL
        for (int n = 0; n < 4; ++n) {
          put_pair(out + (static_cast<int64_t>(chunk.first) + row) * stride + n * 8 + pair, scale * output[n][2 * half],
                   scale * output[n][2 * half + 1]);
        }
      }
    }

    // S = e^(G_m) S + K^T (scaled Delta).
    state.multiply(__expf(last));
    BRIDGE_UNROLL
    for (int step = 0; step < kC / 16; ++step) {
      state.add_tokens(now.keys, s.scaled, step * 16);
    }
  }

  if (p.final_state != nullptr) {
    state.write(p.final_state + state_at);
  }
}

}  // namespace

cudaError_t gdn_forward(const GdnForward& p, cudaStream_t stream) {
  if (!heads_supported(p)) {
    return cudaErrorInvalidValue;
  }
  const auto chunks = static_cast<unsigned>(max_chunks(p.tokens, p.sequences, kGdnChunk));
  const cudaError_t error = launch(prepare_kernel, dim3(chunks, static_cast<unsigned>(p.key_heads)), dim3(kBlock),
                                   kPrepareBytes, stream, p);
  if (error != cudaSuccess) {
    return error;
  }
  return launch(scan_kernel, scan_grid(p), dim3(kBlock), sizeof(Scan), stream, p);
}

}  // namespace bridge
