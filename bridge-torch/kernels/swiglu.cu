// SwiGLU of a fused gate and up projection. Formulas: swiglu.hpp.
//
// A thread takes 16 bytes of gate and the 16 bytes of up that belong to them; the grid walks over all pieces. Arithmetic is
// float32 with one rounding at the end (libtorch rounds silu(gate) first, so it is the less exact of the two).
//
// bf16 and f32, any width of whole 16 bytes; sm_80 and newer; no shared memory. Bound by memory: 3 tensors forward, 5
// backward. Defined by: transformers, Qwen3_5MLP.
//
// sass forward_kernel: LDG.E.128 STG.E.128
// sass backward_kernel: LDG.E.128 STG.E.128

#include "swiglu.hpp"

#include "numbers.cuh"

namespace bridge {

namespace {

constexpr int kBlock = 256;
// Enough blocks to fill every SM several times; the rest is the loop's.
constexpr unsigned kMaxBlocks = 132 * 16;

template <class T>
__global__ void __launch_bounds__(kBlock) forward_kernel(SwigluForward p, unsigned pieces) {
  constexpr int kV = kVec<T>;
  const unsigned row_pieces = static_cast<unsigned>(p.dim / kV);
  for (uint64_t piece = static_cast<uint64_t>(blockIdx.x) * kBlock + threadIdx.x; piece < pieces;
       piece += static_cast<uint64_t>(gridDim.x) * kBlock) {
    const unsigned row = static_cast<unsigned>(piece) / row_pieces;
    const int column = static_cast<int>(static_cast<unsigned>(piece) - row * row_pieces) * kV;
    const T* x = static_cast<const T*>(p.x) + static_cast<int64_t>(row) * p.x_stride + column;
    float gate[kV], up[kV];
    load(x, gate);
    load(x + p.dim, up);
    BRIDGE_UNROLL
    for (int j = 0; j < kV; ++j) {
      gate[j] = silu(gate[j]) * up[j];
    }
    store(static_cast<T*>(p.out) + static_cast<int64_t>(row) * p.dim + column, gate);
  }
}

template <class T>
__global__ void __launch_bounds__(kBlock) backward_kernel(SwigluBackward p, unsigned pieces) {
  constexpr int kV = kVec<T>;
  const unsigned row_pieces = static_cast<unsigned>(p.dim / kV);
  for (uint64_t piece = static_cast<uint64_t>(blockIdx.x) * kBlock + threadIdx.x; piece < pieces;
       piece += static_cast<uint64_t>(gridDim.x) * kBlock) {
    const unsigned row = static_cast<unsigned>(piece) / row_pieces;
    const int column = static_cast<int>(static_cast<unsigned>(piece) - row * row_pieces) * kV;
    const T* x = static_cast<const T*>(p.x) + static_cast<int64_t>(row) * p.x_stride + column;
    float gate[kV], up[kV], g[kV];
    load(x, gate);
    load(x + p.dim, up);
    load(static_cast<const T*>(p.d_out) + static_cast<int64_t>(row) * p.dim + column, g);
    BRIDGE_UNROLL
    for (int j = 0; j < kV; ++j) {
      swiglu_gradient(gate[j], up[j], g[j]);
    }
    T* d_x = static_cast<T*>(p.d_x) + static_cast<int64_t>(row) * 2 * p.dim + column;
    store(d_x, gate);
    store(d_x + p.dim, up);
  }
}

// How many pieces there are, or -1 for what is not supported.
int64_t pieces_of(int64_t rows, int dim, int64_t stride, DType dtype) {
  const int piece = dtype == DType::kBf16 ? kVec<Bf16> : kVec<float>;
  if (rows < 0 || dim <= 0 || dim % piece != 0 || stride % piece != 0) {
    return -1;
  }
  const int64_t row_pieces = dim / piece;
  return rows > int64_t{0xFFFFFFFF} / row_pieces ? -1 : rows * row_pieces;
}

dim3 grid_of(int64_t pieces) {
  const int64_t blocks = (pieces + kBlock - 1) / kBlock;
  return dim3(blocks < kMaxBlocks ? static_cast<unsigned>(blocks) : kMaxBlocks);
}

}  // namespace

cudaError_t swiglu_forward(const SwigluForward& p, cudaStream_t stream) {
  const int64_t pieces = pieces_of(p.rows, p.dim, p.x_stride, p.dtype);
  if (pieces < 0) {
    return cudaErrorInvalidValue;
  }
  auto* kernel = p.dtype == DType::kBf16 ? forward_kernel<Bf16> : forward_kernel<float>;
  return launch(kernel, grid_of(pieces), dim3(kBlock), 0, stream, p, static_cast<unsigned>(pieces));
}

cudaError_t swiglu_backward(const SwigluBackward& p, cudaStream_t stream) {
  const int64_t pieces = pieces_of(p.rows, p.dim, p.x_stride, p.dtype);
  if (pieces < 0) {
    return cudaErrorInvalidValue;
  }
  auto* kernel = p.dtype == DType::kBf16 ? backward_kernel<Bf16> : backward_kernel<float>;
  return launch(kernel, grid_of(pieces), dim3(kBlock), 0, stream, p, static_cast<unsigned>(pieces));
}

}  // namespace bridge
