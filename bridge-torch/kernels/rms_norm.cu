// RMSNorm over rows, with the residual addition in front of it. Formulas: rms_norm.hpp.
//
// A row belongs to one warp (up to 1024 elements forward and backward) or to a block of 256 threads. Each thread holds its
// 16-byte pieces of the row in registers, so memory is read once and written once. Sums are float32, results are rounded
// once. The backward's blocks walk over rows with a fixed stride and keep their part of d_weight in registers; the parts are
// added by sum_parts in a fixed order.
//
// bf16 and f32, dim a multiple of 16 bytes up to 8192; sm_80 and newer, no shared memory but for block sums and the parts of
// d_weight (one row). Bound by memory: 2 tensors forward (4 with a residual), 3 backward (4).
// Defined by: transformers, Qwen3_5RMSNorm.
//
// sass forward_kernel: LDG.E.128 STG.E.128
// sass backward_kernel: LDG.E.128 STG.E.128

#include "rms_norm.hpp"

#include "reduce.cuh"
#include "sum_parts.cuh"

namespace bridge {

namespace {

constexpr int kBlock = 256;
// Elements of a row that one thread holds at most.
constexpr int kElements = 32;
constexpr int kWarpDim = 32 * kElements;

template <class T, int kThreads>
__global__ void __launch_bounds__(kBlock) forward_kernel(RmsNormForward p) {
  constexpr int kV = kVec<T>, kPieces = kElements / kV, kRows = kBlock / kThreads;
  const int thread = static_cast<int>(threadIdx.x) % kThreads;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kRows + static_cast<int>(threadIdx.x) / kThreads;
  const bool in_rows = row < p.rows;
  const T* x = static_cast<const T*>(p.x) + row * p.x_stride;
  const T* residual = static_cast<const T*>(p.residual) + row * p.dim;
  T* sum = static_cast<T*>(p.sum) + row * p.dim;
  T* out = static_cast<T*>(p.out) + row * p.dim;

  float s[kPieces][kV];
  float squares = 0.0f, unused = 0.0f;
  BRIDGE_UNROLL
  for (int i = 0; i < kPieces; ++i) {
    const int column = (i * kThreads + thread) * kV;
    if (in_rows && column < p.dim) {
      load(x + column, s[i]);
      if (p.residual != nullptr) {
        float r[kV];
        load(residual + column, r);
        BRIDGE_UNROLL
        for (int j = 0; j < kV; ++j) {
          s[i][j] = rounded<T>(s[i][j] + r[j]);
        }
        store(sum + column, s[i]);
      }
      BRIDGE_UNROLL
      for (int j = 0; j < kV; ++j) {
        squares += s[i][j] * s[i][j];
      }
    }
  }
  sum2<kThreads>(squares, unused);
  const float scale = rsqrtf(__fdividef(squares, static_cast<float>(p.dim)) + p.eps);
  BRIDGE_UNROLL
  for (int i = 0; i < kPieces; ++i) {
    const int column = (i * kThreads + thread) * kV;
    if (in_rows && column < p.dim) {
      float w[kV];
      load_parameter(p.weight, column, p.weight_dtype, w);
      BRIDGE_UNROLL
      for (int j = 0; j < kV; ++j) {
        s[i][j] *= scale * (p.weight_offset + w[j]);
      }
      store(out + column, s[i]);
    }
  }
}

template <class T, int kThreads>
__global__ void __launch_bounds__(kBlock) backward_kernel(RmsNormBackward p) {
  constexpr int kV = kVec<T>, kPieces = kElements / kV, kRows = kBlock / kThreads;
  const int thread = static_cast<int>(threadIdx.x) % kThreads;
  const int group = static_cast<int>(threadIdx.x) / kThreads;

  float d_weight[kPieces][kV] = {};
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kRows;
  for (int64_t first = static_cast<int64_t>(blockIdx.x) * kRows; first < p.rows; first += stride) {
    const int64_t row = first + group;
    const bool in_rows = row < p.rows;
    const T* s = static_cast<const T*>(p.s) + row * p.s_stride;
    const T* d_out = static_cast<const T*>(p.d_out) + row * p.dim;
    Bits128 s_bits[kPieces], g_bits[kPieces];
    float squares = 0.0f, along = 0.0f;
    BRIDGE_UNROLL
    for (int i = 0; i < kPieces; ++i) {
      const int column = (i * kThreads + thread) * kV;
      if (in_rows && column < p.dim) {
        s_bits[i] = load_bits(s + column);
        g_bits[i] = load_bits(d_out + column);
        float values[kV], g[kV], w[kV];
        load_parameter(p.weight, column, p.weight_dtype, w);
        unpack(s_bits[i], values);
        unpack(g_bits[i], g);
        BRIDGE_UNROLL
        for (int j = 0; j < kV; ++j) {
          squares += values[j] * values[j];
          along += g[j] * (p.weight_offset + w[j]) * values[j];
        }
      }
    }
    sum2<kThreads>(squares, along);
    const float inverse = __fdividef(1.0f, static_cast<float>(p.dim));
    const float scale = rsqrtf(squares * inverse + p.eps);
    const float pull = along * inverse * scale * scale;  // mean(h n) / s, so that n mean(h n) = s pull
    BRIDGE_UNROLL
    for (int i = 0; i < kPieces; ++i) {
      const int column = (i * kThreads + thread) * kV;
      if (in_rows && column < p.dim) {
        float values[kV], g[kV], w[kV], d_x[kV];
        load_parameter(p.weight, column, p.weight_dtype, w);
        unpack(s_bits[i], values);
        unpack(g_bits[i], g);
        BRIDGE_UNROLL
        for (int j = 0; j < kV; ++j) {
          const float h = g[j] * (p.weight_offset + w[j]);
          d_x[j] = scale * (h - values[j] * pull);
          d_weight[i][j] += g[j] * values[j] * scale;
        }
        if (p.d_sum != nullptr) {
          float past[kV];
          load(static_cast<const T*>(p.d_sum) + row * p.dim + column, past);
          BRIDGE_UNROLL
          for (int j = 0; j < kV; ++j) {
            d_x[j] += past[j];
          }
        }
        store(static_cast<T*>(p.d_x) + row * p.dim + column, d_x);
      }
    }
  }

  float* part = p.workspace + static_cast<int64_t>(blockIdx.x) * p.dim;
  if constexpr (kRows == 1) {
    BRIDGE_UNROLL
    for (int i = 0; i < kPieces; ++i) {
      const int column = (i * kThreads + thread) * kV;
      if (column < p.dim) {
        BRIDGE_UNROLL
        for (int j = 0; j < kV; ++j) {
          part[column + j] = d_weight[i][j];
        }
      }
    }
  } else {
    BRIDGE_SHARED(float, box, kWarpDim);
    for (int turn = 0; turn < kRows; ++turn) {
      if (group == turn) {
        BRIDGE_UNROLL
        for (int i = 0; i < kPieces; ++i) {
          BRIDGE_UNROLL
          for (int j = 0; j < kV; ++j) {
            const int column = (i * kThreads + thread) * kV + j;
            box[column] = turn == 0 ? d_weight[i][j] : box[column] + d_weight[i][j];
          }
        }
      }
      __syncthreads();
    }
    for (int column = static_cast<int>(threadIdx.x); column < p.dim; column += kBlock) {
      part[column] = box[column];
    }
  }
}

int64_t parts_of(int64_t rows, int dim) {
  const int64_t groups = dim <= kWarpDim ? (rows + kBlock / 32 - 1) / (kBlock / 32) : rows;
  return groups < kRowParts ? groups : kRowParts;
}

bool supported(int64_t rows, int dim, int64_t stride, DType dtype) {
  const int piece = dtype == DType::kBf16 ? kVec<Bf16> : kVec<float>;
  return rows >= 0 && dim > 0 && dim <= kRmsNormMaxDim && dim % piece == 0 && stride % piece == 0;
}

template <class T>
cudaError_t forward(const RmsNormForward& p, cudaStream_t stream) {
  if (p.dim <= kWarpDim) {
    constexpr int64_t kRows = kBlock / 32;
    const auto blocks = static_cast<unsigned>((p.rows + kRows - 1) / kRows);
    return launch(forward_kernel<T, 32>, dim3(blocks), dim3(kBlock), 0, stream, p);
  }
  return launch(forward_kernel<T, kBlock>, dim3(static_cast<unsigned>(p.rows)), dim3(kBlock), 0, stream, p);
}

template <class T>
cudaError_t backward(const RmsNormBackward& p, cudaStream_t stream) {
  const int64_t parts = parts_of(p.rows, p.dim);
  auto* kernel = p.dim <= kWarpDim ? backward_kernel<T, 32> : backward_kernel<T, kBlock>;
  const cudaError_t error = launch(kernel, dim3(static_cast<unsigned>(parts)), dim3(kBlock), 0, stream, p);
  if (error != cudaSuccess) {
    return error;
  }
  return sum_parts(p.workspace, parts, nullptr, p.dim, p.d_weight, p.weight_dtype, stream);
}

}  // namespace

size_t rms_norm_backward_workspace_bytes(int64_t rows, int dim) {
  return static_cast<size_t>(parts_of(rows, dim)) * static_cast<size_t>(dim) * sizeof(float);
}

cudaError_t rms_norm_forward(const RmsNormForward& p, cudaStream_t stream) {
  if (!supported(p.rows, p.dim, p.x_stride, p.dtype) || (p.residual == nullptr) != (p.sum == nullptr)) {
    return cudaErrorInvalidValue;
  }
  return p.dtype == DType::kBf16 ? forward<Bf16>(p, stream) : forward<float>(p, stream);
}

cudaError_t rms_norm_backward(const RmsNormBackward& p, cudaStream_t stream) {
  if (!supported(p.rows, p.dim, p.s_stride, p.dtype)) {
    return cudaErrorInvalidValue;
  }
  return p.dtype == DType::kBf16 ? backward<Bf16>(p, stream) : backward<float>(p, stream);
}

}  // namespace bridge
