// The gated delta rule, forward, in two kernels: prepare_kernel (gdn_prepare.cuh) and scan_kernel. Operator: gdn_forward.hpp.
//
// Chunk of m <= 64 tokens, K and Q as stored, rho their inverse lengths, G the running sum of g, Gamma_ij = e^(G_i - G_j) for
// i >= j (the exponent is masked before exp, so nothing overflows), T = inverse o Gamma, S the state in front:
//   R = V - e^G o rho_k o (K S);  Delta = T (beta o R)
//   O = rho_q / sqrt(128) o (e^G o (Q S) + (Q K^T o Gamma o rho_k) Delta);  S = e^(G_m) S + K^T (rho_k o e^(G_m - G) o Delta)
// q and k are never normalised in memory: their lengths go into float32 epilogues.
//
// scan_kernel: a block of 4 warps a sequence, value head and 32 columns of S, which never mix. S stays in registers in
// float32 (32 keys x 32 columns a warp) and goes to shared memory in bf16 as an operand. A warp has 16 tokens of everything
// else; Gamma is applied to operands in registers; products above the diagonal are left out. Chunk i + 1 is copied while
// chunk i is worked on: 2 x (K 17, Q 17, inverse 9, V 5) + S 10 + R 5 + Delta 5 KB = 116 KB.
//
// bf16 operands, float32 sums; heads of 128; sm_80 and newer (mma.sync, cp.async, ldmatrix). Defined by: transformers,
// torch_recurrent_gated_delta_rule and torch_chunk_gated_delta_rule (qwen3_5).
//
// sass scan_kernel: HMMA.16816.F32.BF16 LDGSTS LDSM
// sass prepare_kernel: HMMA.16816.F32.BF16 LDGSTS LDSM STG.E.128

#include "gdn_forward.hpp"

#include "gdn_prepare.cuh"

namespace bridge {

namespace {

using namespace gdn;


struct Stage {
  Bf16 keys[kC * kPitchD];
  Bf16 queries[kC * kPitchD];
  Bf16 inverse[kC * kPitchC];
  Bf16 values[kC * kPitchV];
  float rho_k[kC], rho_q[kC], decay[kC], beta[kC];
};

struct Scan {
  Stage stage[2];
  Bf16 state[kD * kPitchV];
  Bf16 residual[kC * kPitchV];  // beta o R
  Bf16 delta[kC * kPitchV];
  Bf16 scaled[kC * kPitchV];    // rho_k o e^(G_m - G) o Delta
};

__device__ __forceinline__ void fetch(const GdnForward& p, Stage& stage, const Chunk& chunk, int head, int first_column) {
  const int key_head = head / (p.value_heads / p.key_heads);
  const int64_t token = chunk.first;
  copy_rows<kD, kPitchD>(stage.keys, static_cast<const Bf16*>(p.k) + token * p.k_stride + key_head * kD, p.k_stride, chunk.tokens);
  copy_rows<kD, kPitchD>(stage.queries, static_cast<const Bf16*>(p.q) + token * p.q_stride + key_head * kD, p.q_stride,
                         chunk.tokens);
  copy_rows<kC, kPitchC>(stage.inverse, static_cast<const Bf16*>(p.inverse) + (token * p.value_heads + head) * kC,
                         static_cast<int64_t>(p.value_heads) * kC, chunk.tokens);
  copy_rows<kColumns, kPitchV>(stage.values, static_cast<const Bf16*>(p.v) + token * p.v_stride + head * kD + first_column,
                               p.v_stride, chunk.tokens);
  // Behind the chunk: no key, no beta, and the last decay goes on.
  const int i = static_cast<int>(threadIdx.x) % kC;
  const bool valid = i < chunk.tokens;
  const int64_t row = token + (valid ? i : chunk.tokens - 1);
  if (threadIdx.x < kC) {
    copy_async_word(stage.rho_k + i, p.rho_k + row * p.key_heads + key_head, valid);
    copy_async_word(stage.rho_q + i, p.rho_q + row * p.key_heads + key_head, valid);
  } else {
    copy_async_word(stage.beta + i, p.beta + row * p.value_heads + head, valid);
    copy_async_word(stage.decay + i, p.decay + row * p.value_heads + head, true);
  }
  copy_commit();
}

__global__ void __launch_bounds__(kBlock) scan_kernel(GdnForward p) {
  BRIDGE_DYNAMIC_SHARED(memory);
  Scan& s = *reinterpret_cast<Scan*>(memory);
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  const int group = lane / 4, pair = lane % 4 * 2;
  const int64_t sequence = blockIdx.x;
  const int head = static_cast<int>(blockIdx.y), first_column = static_cast<int>(blockIdx.z) * kColumns;
  const int begin = p.first_chunk[sequence], end = p.first_chunk[sequence + 1];
  Bf16* out = static_cast<Bf16*>(p.out) + static_cast<int64_t>(head) * kD + first_column;
  const int64_t out_stride = static_cast<int64_t>(p.value_heads) * kD;

  if (sequence == p.sequences) {  // tokens of no sequence
    const float zeros[8] = {};
    for (int i = begin; i < end; ++i) {
      const Chunk chunk = p.chunks[i];
      for (int piece = thread; piece < chunk.tokens * (kColumns / 8); piece += kBlock) {
        store(out + (chunk.first + piece / (kColumns / 8)) * out_stride + piece % (kColumns / 8) * 8, zeros);
      }
    }
    return;
  }

  // Keys warp * 32 + m * 16 + group (+ 8), columns n * 8 + pair (+ 1).
  float state[2][4][4] = {};
  const int64_t state_at = (sequence * p.value_heads + head) * kD * kD + first_column;
  if (p.initial_state != nullptr) {
    BRIDGE_UNROLL
    for (int m = 0; m < 2; ++m) {
      BRIDGE_UNROLL
      for (int n = 0; n < 4; ++n) {
        BRIDGE_UNROLL
        for (int i = 0; i < 4; ++i) {
          state[m][n][i] = p.initial_state[state_at + (warp * 32 + m * 16 + group + i / 2 * 8) * kD + n * 8 + pair + i % 2];
        }
      }
    }
  }

  if (begin < end) {
    fetch(p, s.stage[0], p.chunks[begin], head, first_column);
  }
  for (int at = begin; at < end; ++at) {
    const Chunk chunk = p.chunks[at];
    Stage& now = s.stage[(at - begin) % 2];
    BRIDGE_UNROLL
    for (int m = 0; m < 2; ++m) {
      BRIDGE_UNROLL
      for (int n = 0; n < 4; ++n) {
        BRIDGE_UNROLL
        for (int half = 0; half < 2; ++half) {
          put_pair(s.state + (warp * 32 + m * 16 + group + half * 8) * kPitchV + n * 8 + pair, state[m][n][2 * half],
                   state[m][n][2 * half + 1]);
        }
      }
    }
    copy_wait<0>();
    __syncthreads();  // this chunk and the state are in shared memory, and the chunk before is done with
    if (at + 1 < end) {
      fetch(p, s.stage[(at + 1 - begin) % 2], p.chunks[at + 1], head, first_column);
    }
    if (p.chunk_states != nullptr) {
      Bf16* kept = static_cast<Bf16*>(p.chunk_states) + (static_cast<int64_t>(at) * p.value_heads + head) * kD * kD + first_column;
      for (int piece = thread; piece < kD * (kColumns / 8); piece += kBlock) {
        const int row = piece / (kColumns / 8), column = piece % (kColumns / 8) * 8;
        store_bits(kept + row * kD + column, load_bits(s.state + row * kPitchV + column));
      }
    }

    // K S and Q S of the warp's 16 tokens.
    float from_keys[4][4] = {}, output[4][4] = {};
    BRIDGE_UNROLL
    for (int step = 0; step < kD / 16; ++step) {
      unsigned keys[4], queries[4];
      load_a<kPitchD>(keys, now.keys, warp * 16, step * 16);
      load_a<kPitchD>(queries, now.queries, warp * 16, step * 16);
      BRIDGE_UNROLL
      for (int n = 0; n < 2; ++n) {
        unsigned right[4];
        load_b<kPitchV>(right, s.state, step * 16, n * 16);
        mma_pair(from_keys[2 * n], from_keys[2 * n + 1], keys, right);
        mma_pair(output[2 * n], output[2 * n + 1], queries, right);
      }
    }
    BRIDGE_UNROLL
    for (int half = 0; half < 2; ++half) {
      const int row = warp * 16 + group + half * 8;
      const float decayed = __expf(now.decay[row]), beta = now.beta[row], rho = now.rho_k[row];
      BRIDGE_UNROLL
      for (int n = 0; n < 4; ++n) {
        const unsigned value = *reinterpret_cast<const unsigned*>(now.values + row * kPitchV + n * 8 + pair);
        const float low = __uint_as_float(value << 16) - decayed * rho * from_keys[n][2 * half];
        const float high = __uint_as_float(value & 0xFFFF0000u) - decayed * rho * from_keys[n][2 * half + 1];
        put_pair(s.residual + row * kPitchV + n * 8 + pair, beta * low, beta * high);
        output[n][2 * half] *= decayed;
        output[n][2 * half + 1] *= decayed;
      }
    }
    __syncthreads();  // beta o R of all tokens

    // Delta = T (beta o R): tokens behind the warp's own have no part in it.
    float delta[4][4] = {};
    for (int step = 0; step <= warp; ++step) {
      unsigned left[4];
      load_a<kPitchC>(left, now.inverse, warp * 16, step * 16);
      BRIDGE_UNROLL
      for (int word = 0; word < 4; ++word) {
        const int row = warp * 16 + group + word % 2 * 8, column = step * 16 + pair + word / 2 * 8;
        const float decay = now.decay[row];
        const float low = column <= row ? between(decay, now.decay[column]) : 0.0f;
        const float high = column + 1 <= row ? between(decay, now.decay[column + 1]) : 0.0f;
        left[word] = pack_bf16(__uint_as_float(left[word] << 16) * low, __uint_as_float(left[word] & 0xFFFF0000u) * high);
      }
      BRIDGE_UNROLL
      for (int n = 0; n < 2; ++n) {
        unsigned right[4];
        load_b<kPitchV>(right, s.residual, step * 16, n * 16);
        mma_pair(delta[2 * n], delta[2 * n + 1], left, right);
      }
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
          put_pair(static_cast<Bf16*>(p.delta) + (static_cast<int64_t>(chunk.first) + row) * out_stride +
                       static_cast<int64_t>(head) * kD + first_column + n * 8 + pair,
                   low, high);
        }
      }
    }
    __syncthreads();  // Delta of all tokens

    // O: attention of the warp's tokens to those of the chunk up to them, 16 at a time.
    for (int step = 0; step <= warp; ++step) {
      float scores[2][4] = {};
      BRIDGE_UNROLL
      for (int inner = 0; inner < kD / 16; ++inner) {
        unsigned queries[4], keys[4];
        load_a<kPitchD>(queries, now.queries, warp * 16, inner * 16);
        load_b_transposed<kPitchD>(keys, now.keys, step * 16, inner * 16);
        mma_pair(scores[0], scores[1], queries, keys);
      }
      unsigned left[4];  // the scores' fragments are the operand's: rows by word % 2, columns by word / 2
      BRIDGE_UNROLL
      for (int word = 0; word < 4; ++word) {
        const int row = warp * 16 + group + word % 2 * 8, column = step * 16 + pair + word / 2 * 8;
        const float decay = now.decay[row];
        const float low = column <= row ? now.rho_k[column] * between(decay, now.decay[column]) : 0.0f;
        const float high = column + 1 <= row ? now.rho_k[column + 1] * between(decay, now.decay[column + 1]) : 0.0f;
        left[word] = pack_bf16(scores[word / 2][word % 2 * 2] * low, scores[word / 2][word % 2 * 2 + 1] * high);
      }
      BRIDGE_UNROLL
      for (int n = 0; n < 2; ++n) {
        unsigned right[4];
        load_b<kPitchV>(right, s.delta, step * 16, n * 16);
        mma_pair(output[2 * n], output[2 * n + 1], left, right);
      }
    }
    BRIDGE_UNROLL
    for (int half = 0; half < 2; ++half) {
      const int row = warp * 16 + group + half * 8;
      if (row < chunk.tokens) {
        const float scale = kQueryScale * now.rho_q[row];
        BRIDGE_UNROLL
        for (int n = 0; n < 4; ++n) {
          put_pair(out + (static_cast<int64_t>(chunk.first) + row) * out_stride + n * 8 + pair, scale * output[n][2 * half],
                   scale * output[n][2 * half + 1]);
        }
      }
    }

    // S = e^(G_m) S + K^T (scaled Delta).
    const float decayed = __expf(last);
    BRIDGE_UNROLL
    for (int m = 0; m < 2; ++m) {
      BRIDGE_UNROLL
      for (int n = 0; n < 4; ++n) {
        BRIDGE_UNROLL
        for (int i = 0; i < 4; ++i) {
          state[m][n][i] *= decayed;
        }
      }
    }
    BRIDGE_UNROLL
    for (int step = 0; step < kC / 16; ++step) {
      unsigned right[2][4];
      load_b<kPitchV>(right[0], s.scaled, step * 16, 0);
      load_b<kPitchV>(right[1], s.scaled, step * 16, 16);
      BRIDGE_UNROLL
      for (int m = 0; m < 2; ++m) {
        unsigned left[4];
        load_a_transposed<kPitchD>(left, now.keys, step * 16, warp * 32 + m * 16);
        mma_pair(state[m][0], state[m][1], left, right[0]);
        mma_pair(state[m][2], state[m][3], left, right[1]);
      }
    }
  }

  if (p.final_state != nullptr) {
    BRIDGE_UNROLL
    for (int m = 0; m < 2; ++m) {
      BRIDGE_UNROLL
      for (int n = 0; n < 4; ++n) {
        BRIDGE_UNROLL
        for (int i = 0; i < 4; ++i) {
          p.final_state[state_at + (warp * 32 + m * 16 + group + i / 2 * 8) * kD + n * 8 + pair + i % 2] = state[m][n][i];
        }
      }
    }
  }
}

bool supported(const GdnForward& p) {
  const int64_t strides = p.q_stride | p.k_stride | p.v_stride;
  return p.tokens >= 0 && p.sequences >= 0 && p.key_heads > 0 && p.value_heads > 0 && p.value_heads <= 65535 &&
         p.value_heads % p.key_heads == 0 && strides % 8 == 0;
}

}  // namespace

cudaError_t gdn_forward(const GdnForward& p, cudaStream_t stream) {
  if (!supported(p)) {
    return cudaErrorInvalidValue;
  }
  const auto chunks = static_cast<unsigned>(max_chunks(p.tokens, p.sequences, kGdnChunk));
  const cudaError_t error = launch(prepare_kernel, dim3(chunks, static_cast<unsigned>(p.key_heads)), dim3(kBlock),
                                   kPrepareBytes, stream, p);
  if (error != cudaSuccess) {
    return error;
  }
  const dim3 grid(static_cast<unsigned>(p.sequences + 1), static_cast<unsigned>(p.value_heads), kD / kColumns);
  return launch(scan_kernel, grid, dim3(kBlock), sizeof(Scan), stream, p);
}

}  // namespace bridge
