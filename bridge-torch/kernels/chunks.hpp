#pragma once

#include "cuda_types.hpp"

namespace bridge {

// A run of tokens of one sequence that a block works on.
struct alignas(16) Chunk {
  int sequence;  // the number of sequences itself: tokens that belong to none; -1: nothing
  int first;     // the token in the pack
  int tokens;    // 1 to the chunk's size
  int position;  // of `first` in its sequence
};

// The chunks of a pack, made on the device, where the borders are. The host knows only how many there can be. Chunks start
// at sequence starts and never cross a border; an empty sequence has none. Tokens behind the last border are chunks too.
struct ChunkMap {
  const void* cu_seqlens;  // [sequences + 1], rising from 0 to at most `tokens`
  bool wide;               // whether cu_seqlens is int64 (else int32)
  int64_t sequences;
  int64_t tokens;
  int size;                // tokens a chunk
  Chunk* chunks;           // [max_chunks(...)]
  int* first_chunk;        // [sequences + 2]: where each sequence's chunks start; then those of no sequence; then the end
};

// How many chunks a pack of `tokens` can have.
inline int64_t max_chunks(int64_t tokens, int64_t sequences, int size) {
  return (tokens + size - 1) / size + sequences + 1;
}

cudaError_t chunk_map(const ChunkMap& p, cudaStream_t stream);

}  // namespace bridge
