// Depthwise causal convolution of width 4 and silu over packed sequences, channels last. Formulas: conv1d_silu.hpp.
//
// A block takes a chunk of 64 tokens and 16 pieces of 16 bytes of channels. A thread has one piece and 8 neighbouring tokens
// and slides a window of 4 inputs over them; its 3 tokens of halo are the neighbour's, so they come from the caches. The
// backward slides over 11 tokens, with a window of inputs and one of dy; d_weight of a chunk is added over the block's
// threads, then over chunks by sum_parts.
//
// bf16 and f32; sm_80 and newer; 16 KB of shared memory in the backward. Bound by memory: 2 tensors forward, 3 backward and
// a float4 a channel and chunk. Defined by: transformers, Qwen3_5GatedDeltaNet (causal conv1d and silu); boundaries of packs
// as in Megatron-Core's cu_seqlens.
//
// sass forward_kernel: LDG.E.128 STG.E.128
// sass backward_kernel: LDG.E.128 STG.E.128

#include "conv1d_silu.hpp"

#include "numbers.cuh"
#include "sum_parts.cuh"

namespace bridge {

namespace {

constexpr int kPieces = 16, kRuns = 8, kRun = kConvChunk / kRuns, kBlock = kPieces * kRuns;

template <class T>
struct Row {
  float value[kVec<T>];
};

template <class T>
__device__ __forceinline__ void load_weights(const void* weight, int channel, DType dtype, float (&w)[kTaps][kVec<T>]) {
  constexpr int kV = kVec<T>;
  BRIDGE_UNROLL
  for (int i = 0; i < kTaps; ++i) {
    float piece[kV];
    load_parameter(weight, static_cast<int64_t>(channel) * kTaps + i * kV, dtype, piece);
    BRIDGE_UNROLL
    for (int j = 0; j < kV; ++j) {
      w[(i * kV + j) % kTaps][(i * kV + j) / kTaps] = piece[j];
    }
  }
}

// The input at `position` of the chunk's sequence, which may be before its start: then the state or zero.
template <class T, class Parameters>
__device__ __forceinline__ void load_input(const Parameters& p, const Chunk& chunk, int position, int channel,
                                           float (&out)[kVec<T>]) {
  if (position >= 0) {
    const int64_t token = static_cast<int64_t>(chunk.first) - chunk.position + position;
    load(static_cast<const T*>(p.x) + token * p.x_stride + channel, out);
    return;
  }
  BRIDGE_UNROLL
  for (int j = 0; j < kVec<T>; ++j) {
    const int64_t at = (static_cast<int64_t>(chunk.sequence) * p.channels + channel + j) * (kTaps - 1) + kTaps - 1 + position;
    out[j] = p.state != nullptr ? to_float(static_cast<const T*>(p.state)[at]) : 0.0f;
  }
}

template <class T>
__global__ void __launch_bounds__(kBlock) forward_kernel(ConvForward p) {
  constexpr int kV = kVec<T>;
  const Chunk chunk = p.chunks[blockIdx.x];
  const int channel = (static_cast<int>(blockIdx.y) * kPieces + static_cast<int>(threadIdx.x) % kPieces) * kV;
  const int start = static_cast<int>(threadIdx.x) / kPieces * kRun;
  if (chunk.sequence < 0 || channel >= p.channels || start >= chunk.tokens) {
    return;
  }
  T* out = static_cast<T*>(p.out) + static_cast<int64_t>(chunk.first) * p.out_stride + channel;
  const int end = start + kRun < chunk.tokens ? start + kRun : chunk.tokens;
  if (chunk.sequence == p.sequences) {
    const float zeros[kV] = {};
    for (int i = start; i < end; ++i) {
      store(out + i * p.out_stride, zeros);
    }
    return;
  }
  float w[kTaps][kV], x[kTaps][kV];
  load_weights<T>(p.weight, channel, p.weight_dtype, w);
  BRIDGE_UNROLL
  for (int i = 0; i < kTaps - 1; ++i) {
    load_input<T>(p, chunk, chunk.position + start - (kTaps - 1) + i, channel, x[i]);
  }
  BRIDGE_UNROLL
  for (int i = 0; i < kRun; ++i) {
    if (start + i < end) {
      load_input<T>(p, chunk, chunk.position + start + i, channel, x[(i + kTaps - 1) % kTaps]);
      float y[kV];
      BRIDGE_UNROLL
      for (int j = 0; j < kV; ++j) {
        y[j] = w[0][j] * x[i % kTaps][j] + w[1][j] * x[(i + 1) % kTaps][j] + w[2][j] * x[(i + 2) % kTaps][j] +
               w[3][j] * x[(i + 3) % kTaps][j];
        y[j] = silu(y[j]);
      }
      store(out + (start + i) * p.out_stride, y);
    }
  }
}

template <class T>
__global__ void __launch_bounds__(kBlock) backward_kernel(ConvBackward p) {
  constexpr int kV = kVec<T>;
  BRIDGE_SHARED(float, box, kBlock * kTaps * kV);
  const Chunk chunk = p.chunks[blockIdx.x];
  if (chunk.sequence < 0) {
    return;
  }
  const int piece = static_cast<int>(threadIdx.x) % kPieces, run = static_cast<int>(threadIdx.x) / kPieces;
  const int channel = (static_cast<int>(blockIdx.y) * kPieces + piece) * kV;
  const int start = run * kRun;
  const int end = start + kRun < chunk.tokens ? start + kRun : chunk.tokens;
  T* d_x = static_cast<T*>(p.d_x) + static_cast<int64_t>(chunk.first) * p.d_x_stride + channel;
  if (chunk.sequence == p.sequences) {
    const float zeros[kV] = {};
    for (int i = start; i < end && channel < p.channels; ++i) {
      store(d_x + i * p.d_x_stride, zeros);
    }
    return;
  }
  // The sequence goes on for up to 3 tokens behind the chunk: there is a next chunk if this one is full.
  int limit = chunk.tokens;
  if (chunk.tokens == kConvChunk) {
    const Chunk next = p.chunks[blockIdx.x + 1];
    limit += next.sequence == chunk.sequence ? (next.tokens < kTaps - 1 ? next.tokens : kTaps - 1) : 0;
  }

  float d_weight[kTaps][kV] = {};
  if (channel < p.channels && start < chunk.tokens) {
    float w[kTaps][kV], x[kTaps][kV], dy[kTaps][kV];
    load_weights<T>(p.weight, channel, p.weight_dtype, w);
    BRIDGE_UNROLL
    for (int i = 0; i < kTaps - 1; ++i) {
      load_input<T>(p, chunk, chunk.position + start - (kTaps - 1) + i, channel, x[i]);
    }
    BRIDGE_UNROLL
    for (int i = 0; i < kRun + kTaps - 1; ++i) {
      if (start + i < limit) {
        load_input<T>(p, chunk, chunk.position + start + i, channel, x[(i + kTaps - 1) % kTaps]);
        float g[kV];
        load(static_cast<const T*>(p.d_out) + (static_cast<int64_t>(chunk.first) + start + i) * p.d_out_stride + channel, g);
        BRIDGE_UNROLL
        for (int j = 0; j < kV; ++j) {
          const float y = w[0][j] * x[i % kTaps][j] + w[1][j] * x[(i + 1) % kTaps][j] + w[2][j] * x[(i + 2) % kTaps][j] +
                          w[3][j] * x[(i + 3) % kTaps][j];
          dy[i % kTaps][j] = g[j] * silu_slope(y);
          if (i < kRun) {
            BRIDGE_UNROLL
            for (int tap = 0; tap < kTaps; ++tap) {
              d_weight[tap][j] += dy[i % kTaps][j] * x[(i + tap) % kTaps][j];
            }
          }
        }
      } else {
        BRIDGE_UNROLL
        for (int j = 0; j < kV; ++j) {
          dy[i % kTaps][j] = 0.0f;
        }
      }
      if (i >= kTaps - 1 && start + i - (kTaps - 1) < end) {
        float out[kV];
        BRIDGE_UNROLL
        for (int j = 0; j < kV; ++j) {
          out[j] = w[0][j] * dy[i % kTaps][j] + w[1][j] * dy[(i + 3) % kTaps][j] + w[2][j] * dy[(i + 2) % kTaps][j] +
                   w[3][j] * dy[(i + 1) % kTaps][j];
        }
        store(d_x + (start + i - (kTaps - 1)) * p.d_x_stride, out);
      }
    }
  }

  // [run][piece][channel][tap]
  BRIDGE_UNROLL
  for (int j = 0; j < kV; ++j) {
    BRIDGE_UNROLL
    for (int tap = 0; tap < kTaps; ++tap) {
      box[(run * kPieces + piece) * kV * kTaps + j * kTaps + tap] = d_weight[tap][j];
    }
  }
  __syncthreads();
  constexpr int kValues = kPieces * kV * kTaps;
  const int64_t first = static_cast<int64_t>(blockIdx.y) * kValues;
  float* part = p.workspace + static_cast<int64_t>(blockIdx.x) * p.channels * kTaps;
  for (int i = static_cast<int>(threadIdx.x); i < kValues; i += kBlock) {
    if (first + i < static_cast<int64_t>(p.channels) * kTaps) {
      float sum = 0.0f;
      for (int r = 0; r < kRuns; ++r) {
        sum += box[r * kValues + i];
      }
      part[first + i] = sum;
    }
  }
}

// The gradient of the inputs before a sequence, from its first 3 tokens. A thread a sequence and channel.
template <class T>
__global__ void __launch_bounds__(kBlock) state_kernel(ConvBackward p) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kBlock + threadIdx.x;
  if (index >= p.sequences * p.channels) {
    return;
  }
  const int64_t sequence = index / p.channels, channel = index % p.channels;
  const auto border = [&](int64_t i) {
    return p.wide ? static_cast<const int64_t*>(p.cu_seqlens)[i] : int64_t{static_cast<const int*>(p.cu_seqlens)[i]};
  };
  const int64_t first = border(sequence), length = border(sequence + 1) - first;
  float w[kTaps], x[2 * (kTaps - 1)], dy[kTaps - 1];
  BRIDGE_UNROLL
  for (int i = 0; i < kTaps; ++i) {
    w[i] = load_scalar(p.weight, channel * kTaps + i, p.weight_dtype);
  }
  BRIDGE_UNROLL
  for (int i = 0; i < kTaps - 1; ++i) {
    x[i] = p.state != nullptr ? to_float(static_cast<const T*>(p.state)[index * (kTaps - 1) + i]) : 0.0f;
  }
  BRIDGE_UNROLL
  for (int i = 0; i < kTaps - 1; ++i) {
    const bool inside = i < length;
    x[kTaps - 1 + i] = inside ? to_float(static_cast<const T*>(p.x)[(first + i) * p.x_stride + channel]) : 0.0f;
    const float y = w[0] * x[i] + w[1] * x[i + 1] + w[2] * x[i + 2] + w[3] * x[i + 3];
    const float g = inside ? to_float(static_cast<const T*>(p.d_out)[(first + i) * p.d_out_stride + channel]) : 0.0f;
    dy[i] = g * silu_slope(y);
    float sum = 0.0f;
    BRIDGE_UNROLL
    for (int tap = 0; tap <= i; ++tap) {
      sum += w[tap] * dy[i - tap];
    }
    static_cast<T*>(p.d_state)[index * (kTaps - 1) + i] = from_float<T>(sum);
  }
}

template <class Parameters>
bool supported(const Parameters& p, int64_t other_stride) {
  const int piece = p.dtype == DType::kBf16 ? kVec<Bf16> : kVec<float>;
  return p.tokens >= 0 && p.sequences >= 0 && p.channels > 0 && p.channels <= (1 << 22) && p.channels % piece == 0 &&
         p.x_stride % piece == 0 && other_stride % piece == 0;
}

template <class Parameters>
dim3 grid_of(const Parameters& p) {
  const int piece = p.dtype == DType::kBf16 ? kVec<Bf16> : kVec<float>;
  const int width = kPieces * piece;
  return dim3(static_cast<unsigned>(max_chunks(p.tokens, p.sequences, kConvChunk)),
              static_cast<unsigned>((p.channels + width - 1) / width));
}

}  // namespace

size_t conv_backward_workspace_bytes(int64_t tokens, int64_t sequences, int channels) {
  return static_cast<size_t>(max_chunks(tokens, sequences, kConvChunk)) * static_cast<size_t>(channels) * kTaps * sizeof(float);
}

cudaError_t conv1d_silu_forward(const ConvForward& p, cudaStream_t stream) {
  if (!supported(p, p.out_stride)) {
    return cudaErrorInvalidValue;
  }
  return launch(p.dtype == DType::kBf16 ? forward_kernel<Bf16> : forward_kernel<float>, grid_of(p), dim3(kBlock), 0, stream, p);
}

cudaError_t conv1d_silu_backward(const ConvBackward& p, cudaStream_t stream) {
  if (!supported(p, p.d_out_stride) || !supported(p, p.d_x_stride)) {
    return cudaErrorInvalidValue;
  }
  const bool half = p.dtype == DType::kBf16;
  cudaError_t error = launch(half ? backward_kernel<Bf16> : backward_kernel<float>, grid_of(p), dim3(kBlock), 0, stream, p);
  if (error == cudaSuccess) {
    error = sum_parts(p.workspace, max_chunks(p.tokens, p.sequences, kConvChunk), p.first_chunk + p.sequences,
                      int64_t{p.channels} * kTaps, p.d_weight, p.weight_dtype, stream);
  }
  if (error == cudaSuccess && p.d_state != nullptr) {
    const dim3 grid(static_cast<unsigned>((p.sequences * p.channels + kBlock - 1) / kBlock));
    error = launch(half ? state_kernel<Bf16> : state_kernel<float>, grid, dim3(kBlock), 0, stream, p);
  }
  return error;
}

}  // namespace bridge
