// The gated delta rule, backward: back_scan_kernel (gdn_backward_scan.cuh) along the sequences, then chunk_kernel for all chunks
// at once. Operator: gdn_forward.hpp.
//
// chunk_kernel, a block of 8 warps a chunk and key head, the value heads of the key head one after the other, with S in front
// and B behind the chunk (unit K and Q; Gamma as in the forward; X = K S, R = V - e^G o X; Y and Delta from the scans):
//   dP = (dO Delta^T) o Gamma / sqrt(128);  F = Y Delta^T;  dA = -beta o F o Gamma below the diagonal
//   dQ = e^G o (dO S^T) / sqrt(128) + dP K;  dK = dX S^T + dA K + e^(G_m - G) o (Delta B^T) + dP^T Q + dA^T K
//   dbeta_i = Y_i R_i - sum_j F_ij A_ij Gamma_ij
//   dg_t = sum over i >= t > j of H_ij + sum_(i >= t) a_i + sum_(i < t) c_i + e^(G_m) <S, B>
//     with H = dP o Q K^T + dA o A below the diagonal, a = q (its first term of dQ) + k (dX S^T), c = k e^(G_m - G) (Delta B^T)
// dg in this form adds and never subtracts large terms. C x C results stay float32 until they become operands; 1 / sqrt(128)
// never enters one. Gradients of lengths and gates are taken at the end; dQ and dK of a key head's value heads are added in
// float32 registers.
//
// Shared memory 159,776 bytes: five tiles of 64 x 128, one of 128 x 128 (S, then B; before them H), two float32 squares.
// bf16 operands, heads of 128; sm_80 and newer. Defined by: the gradient of torch_recurrent_gated_delta_rule (qwen3_5).
//
// sass back_scan_kernel: HMMA.16816.F32.BF16 LDGSTS LDSM
// sass chunk_kernel: HMMA.16816.F32.BF16 LDGSTS LDSM

#include "gdn_backward.hpp"

#include "gdn_backward_scan.cuh"
#include "reduce.cuh"
#include "sum_parts.cuh"

namespace bridge {

namespace {

using namespace gdn;

constexpr int kThreads = 256;

struct Tiles : Scalars {
  Bf16 keys[kC * kPitchD];
  Bf16 queries[kC * kPitchD];
  Bf16 d_out[kC * kPitchD];
  Bf16 delta[kC * kPitchD];
  Bf16 y[kC * kPitchD];
  union {
    Bf16 state[kD * kPitchD];
    float h[kC * kPitchA];
  };
  float d_p[kC * kPitchA];
  float d_a[kC * kPitchA];
  float along[4][2][kC];  // sums of a row, one a half of the columns; at the end those of q dq and k dk
  float box[kThreads / 32];
};

// a, c, Y R and F A Gamma.
enum Sum { kA = 0, kCt = 1, kYR = 2, kFA = 3 };

// Adds over the four lanes that share a row and leaves the sum of the warp's half of the columns.
__device__ __forceinline__ void put_row(Tiles& s, Sum which, int row, float value) {
  value += __shfl_xor_sync(kWholeWarp, value, 1);
  value += __shfl_xor_sync(kWholeWarp, value, 2);
  if (threadIdx.x % 4 == 0) {
    s.along[which][threadIdx.x / 128][row] = value;
  }
}

// out[16 rows, 64 columns] += M o scale of columns, times `right`; M[row, j] for j up to the row's block.
__device__ __forceinline__ void times_lower(float (&out)[8][4], const float* m, const float* scale, const Bf16* right, int block,
                                            int first_column) {
  for (int step = 0; step <= block; ++step) {
    unsigned a[4];
    make_a(a, block * 16, step * 16, [=](int row, int column, int, int) { return m[row * kPitchA + column] * scale[column]; });
    add_product<kPitchD>(out, a, right, step * 16, first_column);
  }
}

// out[16 rows, 64 columns] += M^T o scale of columns, times `right`: M[i, row] for i from the row's block on.
__device__ __forceinline__ void times_upper(float (&out)[8][4], const float* m, const float* scale, const Bf16* right, int block,
                                            int first_column) {
  for (int step = block; step < kC / 16; ++step) {
    unsigned a[4];
    make_a(a, block * 16, step * 16, [=](int row, int column, int, int) { return m[column * kPitchA + row] * scale[column]; });
    add_product<kPitchD>(out, a, right, step * 16, first_column);
  }
}

// dP, dA, H and the row sums of F A Gamma: the warp has 16 rows and 32 columns.
__device__ __forceinline__ void squares(Tiles& s, int block, int half) {
  const int lane = static_cast<int>(threadIdx.x) % 32, group = lane / 4, pair = lane % 4 * 2;
  float from_out[4][4] = {}, from_y[4][4] = {}, attention[4][4] = {}, products[4][4] = {};
  add_row_products(from_out, s.d_out, block * 16, s.delta, half * 32);
  add_row_products(from_y, s.y, block * 16, s.delta, half * 32);
  add_row_products(attention, s.queries, block * 16, s.keys, half * 32);
  add_row_products(products, s.keys, block * 16, s.keys, half * 32);
  float sums[2] = {};
  BRIDGE_UNROLL
  for (int n = 0; n < 4; ++n) {
    BRIDGE_UNROLL
    for (int i = 0; i < 4; ++i) {
      const int row = block * 16 + group + i / 2 * 8, column = half * 32 + n * 8 + pair + i % 2;
      const float gamma = gamma_of(s.decay, row, column);
      const float below = column < row ? gamma : 0.0f;
      const float d_p = kQueryScale * from_out[n][i] * gamma, d_a = -s.beta[row] * from_y[n][i] * below;
      const float a = products[n][i] * s.rho_k[row] * s.rho_k[column];
      const float score = attention[n][i] * s.rho_q[row] * s.rho_k[column];
      s.d_p[row * kPitchA + column] = d_p;
      s.d_a[row * kPitchA + column] = d_a;
      s.h[row * kPitchA + column] = column < row ? d_p * score + d_a * a : 0.0f;
      sums[i / 2] += from_y[n][i] * a * below;
    }
  }
  put_row(s, kFA, block * 16 + group, sums[0]);
  put_row(s, kFA, block * 16 + group + 8, sums[1]);
}

__global__ void __launch_bounds__(kThreads) chunk_kernel(GdnBackward p, Workspace work) {
  BRIDGE_DYNAMIC_SHARED(memory);
  Tiles& s = *reinterpret_cast<Tiles*>(memory);
  const Chunk chunk = p.chunks[blockIdx.x];
  if (chunk.sequence < 0) {
    return;
  }
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  const int group = lane / 4, pair = lane % 4 * 2, block = warp % 4, half = warp / 4;
  const int key_head = static_cast<int>(blockIdx.y), ratio = p.value_heads / p.key_heads;
  const int64_t token = chunk.first, heads = p.value_heads;
  Bf16* d_q_rows = static_cast<Bf16*>(p.d_q) + token * p.d_q_stride + static_cast<int64_t>(key_head) * kD;
  Bf16* d_k_rows = static_cast<Bf16*>(p.d_k) + token * p.d_k_stride + static_cast<int64_t>(key_head) * kD;

  if (chunk.sequence == p.sequences) {  // tokens of no sequence
    zero_rows<kD, kThreads>(d_q_rows, p.d_q_stride, chunk.tokens);
    zero_rows<kD, kThreads>(d_k_rows, p.d_k_stride, chunk.tokens);
    for (int i = thread; i < chunk.tokens * ratio; i += kThreads) {
      const int head = key_head * ratio + i % ratio;
      store_scalar(p.d_a, (token + i / ratio) * p.d_a_stride + head, p.gate_dtype, 0.0f);
      store_scalar(p.d_b, (token + i / ratio) * p.d_b_stride + head, p.gate_dtype, 0.0f);
    }
    return;
  }

  fetch_keys<kThreads>(p, s.keys, s.queries, chunk, key_head);
  if (thread < kC) {
    fetch_lengths(p, s, chunk, key_head, thread);
  }

  float d_q[8][4] = {}, d_k[8][4] = {};  // tokens block * 16 + group (+ 8), dimensions half * 64 + n * 8 + pair (+ 1)
  for (int r = 0; r < ratio; ++r) {
    const int head = key_head * ratio + r;
    const int64_t stride = heads * kD, rows = token * stride + static_cast<int64_t>(head) * kD;
    copy_rows<kD, kPitchD, kThreads>(s.d_out, static_cast<const Bf16*>(p.d_out) + rows, stride, chunk.tokens);
    copy_rows<kD, kPitchD, kThreads>(s.delta, static_cast<const Bf16*>(p.delta) + rows, stride, chunk.tokens);
    copy_rows<kD, kPitchD, kThreads>(s.y, work.y + rows, stride, chunk.tokens);
    if (thread < kC) {
      fetch_gates(p, s, chunk, head, thread);
    }
    copy_commit();
    copy_wait<0>();
    __syncthreads();
    squares(s, block, half);
    __syncthreads();  // H
    if (thread < kC) {
      float sum = 0.0f;
      for (int j = 0; j < kC; ++j) {
        sum += s.h[thread * kPitchA + j];
        s.h[thread * kPitchA + j] = sum;
      }
    }
    __syncthreads();  // its sums along rows
    float d_g = 0.0f;
    if (thread > 0 && thread < kC) {
      for (int i = thread; i < kC; ++i) {
        d_g += s.h[i * kPitchA + thread - 1];
      }
    }
    __syncthreads();  // H has been read
    const int64_t state_at = (static_cast<int64_t>(blockIdx.x) * heads + head) * kD * kD;
    copy_rows<kD, kPitchD, kThreads, kD>(s.state, static_cast<const Bf16*>(p.chunk_states) + state_at, kD, kD);
    copy_commit();
    copy_wait<0>();
    __syncthreads();

    {  // R = V - e^G o rho_k o (K S): columns of values
      float x[8][4] = {}, sums[2] = {};
      BRIDGE_UNROLL
      for (int step = 0; step < kD / 16; ++step) {
        unsigned a[4];
        load_a<kPitchD>(a, s.keys, block * 16, step * 16);
        add_product<kPitchD>(x, a, s.state, step * 16, half * 64);
      }
      BRIDGE_UNROLL
      for (int i = 0; i < 2; ++i) {
        const int row = block * 16 + group + i * 8;
        const float scale = __expf(s.decay[row]) * s.rho_k[row];
        const Bf16* v = static_cast<const Bf16*>(p.v) + (token + (row < chunk.tokens ? row : 0)) * p.v_stride + head * kD;
        BRIDGE_UNROLL
        for (int n = 0; n < 8; ++n) {
          const int column = half * 64 + n * 8 + pair;
          const unsigned value = *reinterpret_cast<const unsigned*>(v + column), y = pair_at<kPitchD>(s.y, row, column);
          sums[i] += low_of(y) * (low_of(value) - scale * x[n][2 * i]) + high_of(y) * (high_of(value) - scale * x[n][2 * i + 1]);
        }
        put_row(s, kYR, row, sums[i]);
      }
    }
    {  // dO S^T and dX S^T: columns of keys
      float from_out[8][4] = {}, from_y[8][4] = {}, sums[2] = {};
      add_row_products(from_out, s.d_out, block * 16, s.state, half * 64);
      add_row_products(from_y, s.y, block * 16, s.state, half * 64);
      BRIDGE_UNROLL
      for (int i = 0; i < 2; ++i) {
        const int row = block * 16 + group + i * 8;
        const float decayed = __expf(s.decay[row]), scale_y = -decayed * s.beta[row];
        BRIDGE_UNROLL
        for (int n = 0; n < 8; ++n) {
          const int column = half * 64 + n * 8 + pair;
          const unsigned q = pair_at<kPitchD>(s.queries, row, column), k = pair_at<kPitchD>(s.keys, row, column);
          const float q_low = kQueryScale * decayed * from_out[n][2 * i], q_high = kQueryScale * decayed * from_out[n][2 * i + 1];
          const float k_low = scale_y * from_y[n][2 * i], k_high = scale_y * from_y[n][2 * i + 1];
          sums[i] += s.rho_q[row] * (low_of(q) * q_low + high_of(q) * q_high) + s.rho_k[row] * (low_of(k) * k_low + high_of(k) * k_high);
          d_q[n][2 * i] += q_low;
          d_q[n][2 * i + 1] += q_high;
          d_k[n][2 * i] += k_low;
          d_k[n][2 * i + 1] += k_high;
        }
        put_row(s, kA, row, sums[i]);
      }
    }
    // <S, B>, and B in the place of S.
    const Bf16* gradients = work.gradients + state_at;
    float inner = 0.0f;
    for (int piece = thread; piece < kD * (kD / 8); piece += kThreads) {
      const int row = piece / (kD / 8), column = piece % (kD / 8) * 8;
      float x[8], y[8];
      load(s.state + row * kPitchD + column, x);
      load(gradients + row * kD + column, y);
      BRIDGE_UNROLL
      for (int j = 0; j < 8; ++j) {
        inner += x[j] * y[j];
      }
    }
    inner = lanes_sum<32>(inner);
    if (lane == 0) {
      s.box[warp] = inner;
    }
    __syncthreads();  // S has been read
    copy_rows<kD, kPitchD, kThreads, kD>(s.state, gradients, kD, kD);
    copy_commit();
    copy_wait<0>();
    __syncthreads();
    const float last = s.decay[kC - 1];
    {  // Delta B^T: columns of keys
      float from_delta[8][4] = {}, sums[2] = {};
      add_row_products(from_delta, s.delta, block * 16, s.state, half * 64);
      BRIDGE_UNROLL
      for (int i = 0; i < 2; ++i) {
        const int row = block * 16 + group + i * 8;
        const float scale = between(last, s.decay[row]);
        BRIDGE_UNROLL
        for (int n = 0; n < 8; ++n) {
          const unsigned k = pair_at<kPitchD>(s.keys, row, half * 64 + n * 8 + pair);
          const float low = scale * from_delta[n][2 * i], high = scale * from_delta[n][2 * i + 1];
          sums[i] += s.rho_k[row] * (low_of(k) * low + high_of(k) * high);
          d_k[n][2 * i] += low;
          d_k[n][2 * i + 1] += high;
        }
        put_row(s, kCt, row, sums[i]);
      }
    }
    times_lower(d_q, s.d_p, s.rho_k, s.keys, block, half * 64);
    times_lower(d_k, s.d_a, s.rho_k, s.keys, block, half * 64);
    times_upper(d_k, s.d_p, s.rho_q, s.queries, block, half * 64);
    times_upper(d_k, s.d_a, s.rho_k, s.keys, block, half * 64);
    __syncthreads();  // sums of rows

    float d_dt = 0.0f, d_speed = 0.0f;
    if (thread < kC) {
      for (int i = 0; i < kC; ++i) {
        d_g += i >= thread ? s.along[kA][0][i] + s.along[kA][1][i] : s.along[kCt][0][i] + s.along[kCt][1][i];
      }
      float whole = 0.0f;
      for (int i = 0; i < kThreads / 32; ++i) {
        whole += s.box[i];
      }
      d_g += __expf(last) * whole;
      if (thread < chunk.tokens) {
        const float beta = s.beta[thread];
        const float d_beta = s.along[kYR][0][thread] + s.along[kYR][1][thread] - s.along[kFA][0][thread] - s.along[kFA][1][thread];
        const float x = load_scalar(p.a, (token + thread) * p.a_stride + head, p.gate_dtype) +
                        load_scalar(p.dt_bias, head, p.parameter_dtype);
        const float speed = expf(load_scalar(p.a_log, head, p.parameter_dtype));
        d_dt = -d_g * speed * sigmoid(x);
        d_speed = -d_g * speed * softplus(x);
        store_scalar(p.d_a, (token + thread) * p.d_a_stride + head, p.gate_dtype, d_dt);
        store_scalar(p.d_b, (token + thread) * p.d_b_stride + head, p.gate_dtype, d_beta * beta * (1.0f - beta));
      }
    }
    d_dt = lanes_sum<32>(d_dt);
    d_speed = lanes_sum<32>(d_speed);
    __syncthreads();  // the box has been read
    if (lane == 0 && warp < 2) {
      s.box[warp] = d_dt;
      s.box[2 + warp] = d_speed;
    }
    __syncthreads();
    if (thread == 0) {
      work.dt_bias[static_cast<int64_t>(blockIdx.x) * heads + head] = s.box[0] + s.box[1];
      work.a_log[static_cast<int64_t>(blockIdx.x) * heads + head] = s.box[2] + s.box[3];
    }
  }

  // Through the norms: d = rho (d - x (x d)) with x of unit length.
  BRIDGE_UNROLL
  for (int which = 0; which < 2; ++which) {
    auto& d = which == 0 ? d_q : d_k;
    const Bf16* x = which == 0 ? s.queries : s.keys;
    const float* rho = which == 0 ? s.rho_q : s.rho_k;
    BRIDGE_UNROLL
    for (int i = 0; i < 2; ++i) {
      const int row = block * 16 + group + i * 8;
      float sum = 0.0f;
      BRIDGE_UNROLL
      for (int n = 0; n < 8; ++n) {
        const unsigned pair_x = pair_at<kPitchD>(x, row, half * 64 + n * 8 + pair);
        sum += low_of(pair_x) * d[n][2 * i] + high_of(pair_x) * d[n][2 * i + 1];
      }
      put_row(s, which == 0 ? kA : kCt, row, sum * rho[row]);
    }
  }
  __syncthreads();
  BRIDGE_UNROLL
  for (int which = 0; which < 2; ++which) {
    auto& d = which == 0 ? d_q : d_k;
    const Bf16* x = which == 0 ? s.queries : s.keys;
    const float* rho = which == 0 ? s.rho_q : s.rho_k;
    Bf16* rows = which == 0 ? d_q_rows : d_k_rows;
    const int64_t stride = which == 0 ? p.d_q_stride : p.d_k_stride;
    BRIDGE_UNROLL
    for (int i = 0; i < 2; ++i) {
      const int row = block * 16 + group + i * 8;
      const float along = s.along[which == 0 ? kA : kCt][0][row] + s.along[which == 0 ? kA : kCt][1][row];
      if (row < chunk.tokens) {
        BRIDGE_UNROLL
        for (int n = 0; n < 8; ++n) {
          const int column = half * 64 + n * 8 + pair;
          const unsigned pair_x = pair_at<kPitchD>(x, row, column);
          put_pair(rows + row * stride + column, rho[row] * (d[n][2 * i] - rho[row] * low_of(pair_x) * along),
                   rho[row] * (d[n][2 * i + 1] - rho[row] * high_of(pair_x) * along));
        }
      }
    }
  }
}

Workspace workspace_of(void* memory, int64_t tokens, int64_t sequences, int value_heads) {
  const int64_t chunks = max_chunks(tokens, sequences, kGdnChunk);
  Workspace work{};
  work.gradients = static_cast<Bf16*>(memory);
  work.y = work.gradients + chunks * value_heads * kD * kD;
  work.a_log = reinterpret_cast<float*>(work.y + tokens * value_heads * kD);
  work.dt_bias = work.a_log + chunks * value_heads;
  return work;
}

bool supported(const GdnBackward& p) {
  return heads_supported(p) && (p.d_q_stride | p.d_k_stride | p.d_v_stride) % 8 == 0;
}

}  // namespace

size_t gdn_backward_workspace_bytes(int64_t tokens, int64_t sequences, int value_heads) {
  const Workspace work = workspace_of(nullptr, tokens, sequences, value_heads);
  return reinterpret_cast<size_t>(work.dt_bias + max_chunks(tokens, sequences, kGdnChunk) * value_heads);
}

cudaError_t gdn_backward(const GdnBackward& p, cudaStream_t stream) {
  if (!supported(p)) {
    return cudaErrorInvalidValue;
  }
  const Workspace work = workspace_of(p.workspace, p.tokens, p.sequences, p.value_heads);
  const int64_t chunks = max_chunks(p.tokens, p.sequences, kGdnChunk);
  cudaError_t error = launch(back_scan_kernel, scan_grid(p), dim3(kBlock), sizeof(Back), stream, p, work);
  if (error == cudaSuccess) {
    error = launch(chunk_kernel, dim3(static_cast<unsigned>(chunks), static_cast<unsigned>(p.key_heads)), dim3(kThreads),
                   sizeof(Tiles), stream, p, work);
  }
  const int* count = p.first_chunk + p.sequences;
  if (error == cudaSuccess) {
    error = sum_parts(work.a_log, chunks, count, p.value_heads, p.d_a_log, p.parameter_dtype, stream);
  }
  if (error == cudaSuccess) {
    error = sum_parts(work.dt_bias, chunks, count, p.value_heads, p.d_dt_bias, p.parameter_dtype, stream);
  }
  return error;
}

}  // namespace bridge
