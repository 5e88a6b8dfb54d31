// Counting sort of tokens by expert, and the copies that follow from it. Formulas: dispatch.hpp.
//
// The plan: a block takes 1024 assignments, a warp 128 of them in order, so that everything before an assignment is in
// earlier blocks, earlier warps, earlier turns or lower lanes. count_kernel: histograms of blocks. scan_kernel, one block, a
// thread an expert: what is in front of each block, and the offsets. place_kernel: ranks within a block from the warps'
// histograms and a match among the 32 lanes. No atomics: one lane speaks for all lanes of its expert.
// The copies: a warp a row, 16 bytes a lane.
//
// bf16 and f32 rows, up to 512 experts; sm_80 and newer; 16 KB of shared memory. The plan is bound by launches, the copies
// by memory.
//
// sass place_kernel: MATCH.ANY
// sass permute_kernel: LDG.E.128 STG.E.128
// sass combine_kernel: LDG.E.128 STG.E.128
// sass combine_shared_kernel: LDG.E.128 STG.E.128

#include "dispatch.hpp"

#include "reduce.cuh"

namespace bridge {

namespace {

constexpr int kBlock = 256, kWarps = kBlock / 32, kTurns = 4, kWarpItems = 32 * kTurns, kItems = kWarps * kWarpItems;
constexpr int kMaxPlanExperts = 512;

__device__ __forceinline__ int64_t first_of_warp() {
  return static_cast<int64_t>(blockIdx.x) * kItems + static_cast<int>(threadIdx.x) / 32 * kWarpItems;
}

// The expert of this lane's assignment of this turn, or -1 behind the last one.
__device__ __forceinline__ int expert_of(const DispatchPlan& p, int64_t first, int turn) {
  const int64_t at = first + turn * 32 + static_cast<int>(threadIdx.x) % 32;
  return at < p.assignments ? p.chosen[at] : -1;
}

// counts[warp][expert] of the block's assignments. All threads call it; a barrier stands at its end.
__device__ __forceinline__ void count_warps(const DispatchPlan& p, int* counts) {
  for (int i = static_cast<int>(threadIdx.x); i < kWarps * p.experts; i += kBlock) {
    counts[i] = 0;
  }
  __syncthreads();
  int* mine = counts + static_cast<int>(threadIdx.x) / 32 * p.experts;
  for (int turn = 0; turn < kTurns; ++turn) {
    const int expert = expert_of(p, first_of_warp(), turn);
    const unsigned same = __match_any_sync(kWholeWarp, expert);
    if (expert >= 0 && __ffs(static_cast<int>(same)) - 1 == static_cast<int>(threadIdx.x) % 32) {
      mine[expert] += __popc(same);
    }
    __syncwarp();  // another lane may speak for the expert in the next turn
  }
  __syncthreads();
}

// workspace[block, expert] = how many assignments of the block go to the expert.
__global__ void __launch_bounds__(kBlock) count_kernel(DispatchPlan p) {
  BRIDGE_SHARED(int, counts, kWarps * kMaxPlanExperts);
  count_warps(p, counts);
  for (int expert = static_cast<int>(threadIdx.x); expert < p.experts; expert += kBlock) {
    int sum = 0;
    for (int warp = 0; warp < kWarps; ++warp) {
      sum += counts[warp * p.experts + expert];
    }
    p.workspace[static_cast<int64_t>(blockIdx.x) * p.experts + expert] = sum;
  }
}

// workspace[block, expert] becomes the row of the block's first assignment to the expert.
__global__ void __launch_bounds__(kMaxPlanExperts) scan_kernel(DispatchPlan p, int blocks) {
  BRIDGE_SHARED(int, warp_sums, kMaxPlanExperts / 32);
  const int expert = static_cast<int>(threadIdx.x), lane = expert % 32, warp = expert / 32;
  int count = 0;
  if (expert < p.experts) {
    for (int block = 0; block < blocks; ++block) {
      count += p.workspace[static_cast<int64_t>(block) * p.experts + expert];
    }
  }
  int sum = count;
  BRIDGE_UNROLL
  for (int delta = 1; delta < 32; delta *= 2) {
    const int below = __shfl_up_sync(kWholeWarp, sum, delta);
    sum += lane >= delta ? below : 0;
  }
  if (lane == 31) {
    warp_sums[warp] = sum;
  }
  __syncthreads();
  for (int i = 0; i < warp; ++i) {
    sum += warp_sums[i];
  }
  if (expert >= p.experts) {
    return;
  }
  int at = sum - count;
  p.offsets[expert] = at;
  if (expert == p.experts - 1) {
    p.offsets[p.experts] = sum;
  }
  for (int block = 0; block < blocks; ++block) {
    int& here = p.workspace[static_cast<int64_t>(block) * p.experts + expert];
    const int own = here;
    here = at;
    at += own;
  }
}

__global__ void __launch_bounds__(kBlock) place_kernel(DispatchPlan p) {
  BRIDGE_SHARED(int, counts, kWarps * kMaxPlanExperts);
  const int lane = static_cast<int>(threadIdx.x) % 32;
  count_warps(p, counts);
  // Counts become the row of each warp's first assignment to the expert.
  for (int expert = static_cast<int>(threadIdx.x); expert < p.experts; expert += kBlock) {
    int at = p.workspace[static_cast<int64_t>(blockIdx.x) * p.experts + expert];
    for (int warp = 0; warp < kWarps; ++warp) {
      const int own = counts[warp * p.experts + expert];
      counts[warp * p.experts + expert] = at;
      at += own;
    }
  }
  __syncthreads();
  int* next = counts + static_cast<int>(threadIdx.x) / 32 * p.experts;
  for (int turn = 0; turn < kTurns; ++turn) {
    const int expert = expert_of(p, first_of_warp(), turn);
    const unsigned same = __match_any_sync(kWholeWarp, expert);
    const int rank = __popc(same & ((1u << lane) - 1u));
    const int base = expert >= 0 ? next[expert] : 0;
    __syncwarp();  // all have read before one adds
    if (expert >= 0) {
      const auto assignment = static_cast<int>(first_of_warp() + turn * 32 + lane);
      p.row_of[assignment] = base + rank;
      p.assignment_of[base + rank] = assignment;
      if (rank == 0) {
        next[expert] = base + __popc(same);
      }
    }
    __syncwarp();
  }
}

template <class T>
__global__ void __launch_bounds__(kBlock) permute_kernel(Permute p) {
  constexpr int kV = kVec<T>;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kWarps + static_cast<int>(threadIdx.x) / 32;
  if (row >= p.tokens * p.top_k) {
    return;
  }
  const int assignment = p.assignment_of[row];
  const float weight = p.weights != nullptr ? to_float(static_cast<const T*>(p.weights)[assignment]) : 1.0f;
  const T* from = static_cast<const T*>(p.x) + static_cast<int64_t>(assignment / p.top_k) * p.width;
  T* to = static_cast<T*>(p.rows) + row * p.width;
  for (int column = static_cast<int>(threadIdx.x) % 32 * kV; column < p.width; column += 32 * kV) {
    float x[kV];
    load(from + column, x);
    BRIDGE_UNROLL
    for (int j = 0; j < kV; ++j) {
      x[j] *= weight;
    }
    store(to + column, x);
  }
}

template <class T>
__global__ void __launch_bounds__(kBlock) combine_kernel(Combine p) {
  constexpr int kV = kVec<T>;
  const int64_t token = static_cast<int64_t>(blockIdx.x) * kWarps + static_cast<int>(threadIdx.x) / 32;
  if (token >= p.tokens) {
    return;
  }
  const int* rows = p.row_of + token * p.top_k;
  const float open = p.shared != nullptr ? sigmoid(to_float(static_cast<const T*>(p.gate)[token])) : 0.0f;
  for (int column = static_cast<int>(threadIdx.x) % 32 * kV; column < p.width; column += 32 * kV) {
    float sum[kV] = {};
    BRIDGE_NO_UNROLL
    for (int choice = 0; choice < p.top_k; ++choice) {
      const float weight =
          p.weights != nullptr ? to_float(static_cast<const T*>(p.weights)[token * p.top_k + choice]) : 1.0f;
      float x[kV];
      load(static_cast<const T*>(p.rows) + static_cast<int64_t>(rows[choice]) * p.width + column, x);
      BRIDGE_UNROLL
      for (int j = 0; j < kV; ++j) {
        sum[j] += weight * x[j];
      }
    }
    if (p.shared != nullptr) {
      float x[kV];
      load(static_cast<const T*>(p.shared) + token * p.width + column, x);
      BRIDGE_UNROLL
      for (int j = 0; j < kV; ++j) {
        sum[j] += open * x[j];
      }
    }
    store(static_cast<T*>(p.out) + token * p.width + column, sum);
  }
}

// Four blocks an SM: ptxas would spill to reach one more.
template <class T>
__global__ void __launch_bounds__(kBlock, 4) combine_shared_kernel(CombineShared p) {
  constexpr int kV = kVec<T>;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int64_t token = static_cast<int64_t>(blockIdx.x) * kWarps + static_cast<int>(threadIdx.x) / 32;
  if (token >= p.tokens) {
    return;
  }
  const float gate = to_float(static_cast<const T*>(p.gate)[token]), open = sigmoid(gate);
  const T* d_out = static_cast<const T*>(p.d_out) + token * p.width;
  const T* shared = static_cast<const T*>(p.shared) + token * p.width;
  T* d_shared = static_cast<T*>(p.d_shared) + token * p.width;
  float sum = 0.0f;
  for (int column = lane * kV; column < p.width; column += 32 * kV) {
    float g[kV], x[kV];
    load(d_out + column, g);
    load(shared + column, x);
    BRIDGE_UNROLL
    for (int j = 0; j < kV; ++j) {
      sum += g[j] * x[j];
      g[j] *= open;
    }
    store(d_shared + column, g);
  }
  sum = lanes_sum<32>(sum);
  if (lane == 0) {
    // 1 - sigmoid(gate) is sigmoid(-gate), which keeps its digits where the gate is open.
    static_cast<T*>(p.d_gate)[token] = from_float<T>(sum * open * sigmoid(-gate));
  }
}

int64_t blocks_of(int64_t assignments) { return (assignments + kItems - 1) / kItems; }

bool supported(int64_t tokens, int width, int top_k, DType dtype) {
  const int piece = dtype == DType::kBf16 ? kVec<Bf16> : kVec<float>;
  return tokens >= 0 && width > 0 && width % piece == 0 && top_k > 0 && tokens <= int64_t{0x7FFFFFFF} / top_k;
}

dim3 warps_of(int64_t rows) { return dim3(static_cast<unsigned>((rows + kWarps - 1) / kWarps)); }

}  // namespace

size_t dispatch_workspace_bytes(int64_t assignments, int experts) {
  return static_cast<size_t>(blocks_of(assignments)) * static_cast<size_t>(experts) * sizeof(int);
}

cudaError_t dispatch_plan(const DispatchPlan& p, cudaStream_t stream) {
  if (p.assignments < 0 || p.assignments > int64_t{0x7FFFFFFF} || p.experts <= 0 || p.experts > kMaxPlanExperts) {
    return cudaErrorInvalidValue;
  }
  const int64_t blocks = blocks_of(p.assignments);
  const dim3 grid(static_cast<unsigned>(blocks));
  cudaError_t error = launch(count_kernel, grid, dim3(kBlock), 0, stream, p);
  if (error == cudaSuccess) {
    error = launch(scan_kernel, dim3(1), dim3(kMaxPlanExperts), 0, stream, p, static_cast<int>(blocks));
  }
  if (error == cudaSuccess) {
    error = launch(place_kernel, grid, dim3(kBlock), 0, stream, p);
  }
  return error;
}

cudaError_t permute(const Permute& p, cudaStream_t stream) {
  if (!supported(p.tokens, p.width, p.top_k, p.dtype)) {
    return cudaErrorInvalidValue;
  }
  auto* kernel = p.dtype == DType::kBf16 ? permute_kernel<Bf16> : permute_kernel<float>;
  return launch(kernel, warps_of(p.tokens * p.top_k), dim3(kBlock), 0, stream, p);
}

cudaError_t combine(const Combine& p, cudaStream_t stream) {
  if (!supported(p.tokens, p.width, p.top_k, p.dtype) || (p.shared == nullptr) != (p.gate == nullptr)) {
    return cudaErrorInvalidValue;
  }
  auto* kernel = p.dtype == DType::kBf16 ? combine_kernel<Bf16> : combine_kernel<float>;
  return launch(kernel, warps_of(p.tokens), dim3(kBlock), 0, stream, p);
}

cudaError_t combine_shared(const CombineShared& p, cudaStream_t stream) {
  if (!supported(p.tokens, p.width, 1, p.dtype)) {
    return cudaErrorInvalidValue;
  }
  auto* kernel = p.dtype == DType::kBf16 ? combine_shared_kernel<Bf16> : combine_shared_kernel<float>;
  return launch(kernel, warps_of(p.tokens), dim3(kBlock), 0, stream, p);
}

}  // namespace bridge
