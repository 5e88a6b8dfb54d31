// Which chunk of a pack belongs to which sequence. Formulas: chunks.hpp.
//
// One block: a prefix sum over the sequences' chunk counts, 1024 at a time, then every entry finds its sequence by binary
// search. Runs once a step and serves all layers, so that nobody reads cu_seqlens on the host. Fewer than 2^31 tokens.

#include "chunks.hpp"

#include "numbers.cuh"

namespace bridge {

namespace {

constexpr int kMapBlock = 1024, kMapWarps = kMapBlock / 32;

// Border i, inside of the pack whatever cu_seqlens says.
__device__ __forceinline__ int border(const ChunkMap& p, int64_t i) {
  if (i > p.sequences) {
    return static_cast<int>(p.tokens);
  }
  const int64_t at = p.wide ? static_cast<const int64_t*>(p.cu_seqlens)[i] : static_cast<const int*>(p.cu_seqlens)[i];
  return static_cast<int>(at < 0 ? 0 : at > p.tokens ? p.tokens : at);
}

__global__ void __launch_bounds__(kMapBlock) map_kernel(ChunkMap p, int64_t capacity) {
  BRIDGE_SHARED(int, warp_sums, kMapWarps);
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  const int64_t spans = p.sequences + 1;  // the last one is what no sequence holds
  int before = 0;
  for (int64_t first = 0; first < spans; first += kMapBlock) {
    const int64_t span = first + thread;
    int count = 0;
    if (span < spans) {
      const int length = border(p, span + 1) - border(p, span);
      count = length > 0 ? (length + p.size - 1) / p.size : 0;
    }
    int sum = count;
    for (int delta = 1; delta < 32; delta *= 2) {
      const int below = __shfl_up_sync(kWholeWarp, sum, delta);
      sum += lane >= delta ? below : 0;
    }
    __syncthreads();  // the turn before has read the sums
    if (lane == 31) {
      warp_sums[warp] = sum;
    }
    __syncthreads();
    int total = 0;
    for (int i = 0; i < kMapWarps; ++i) {
      const int part = warp_sums[i];
      sum += i < warp ? part : 0;
      total += part;
    }
    if (span < spans) {
      p.first_chunk[span] = before + sum - count;
    }
    before += total;
  }
  if (thread == 0) {
    p.first_chunk[spans] = before;
  }
  __syncthreads();
  for (int64_t i = thread; i < capacity; i += kMapBlock) {
    Chunk chunk{-1, 0, 0, 0};
    if (i < before) {
      // The last span that starts at or before chunk i; empty ones start where their successor does.
      int64_t low = 0, high = spans - 1;
      while (low < high) {
        const int64_t middle = (low + high + 1) / 2;
        if (p.first_chunk[middle] <= i) {
          low = middle;
        } else {
          high = middle - 1;
        }
      }
      chunk.sequence = static_cast<int>(low);
      chunk.position = static_cast<int>(i - p.first_chunk[low]) * p.size;
      chunk.first = border(p, low) + chunk.position;
      const int left = border(p, low + 1) - chunk.first;
      chunk.tokens = left < p.size ? left : p.size;
    }
    p.chunks[i] = chunk;
  }
}

}  // namespace

cudaError_t chunk_map(const ChunkMap& p, cudaStream_t stream) {
  if (p.sequences < 0 || p.tokens < 0 || p.size <= 0 || p.tokens + p.sequences * int64_t{p.size} > int64_t{0x7FFFFFFF}) {
    return cudaErrorInvalidValue;
  }
  return launch(map_kernel, dim3(1), dim3(kMapBlock), 0, stream, p, max_chunks(p.tokens, p.sequences, p.size));
}

}  // namespace bridge
