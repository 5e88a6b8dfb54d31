#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <vector>

namespace bridge_shim {

// Where the tokens of a batch lie when each sample is cut into chunks of equal size, the last one filled up with nothing.
// Chunks are ordered by step, then by sample, so that the recurrence advances all samples that are left by one contiguous
// piece a step. Samples are ordered by falling length: those that are left are always the first ones.
struct Chunks {
  // cu_seqlens: the borders of packed samples; empty for batch samples of seq tokens.
  // mask: [batch, seq] bool, true at real tokens, or undefined.
  Chunks(int64_t batch, int64_t seq, const std::vector<int64_t>& cu_seqlens, const at::Tensor& mask,
         const at::Tensor& like);

  int64_t samples;           // n
  int64_t size;              // tokens of a chunk, C
  int64_t count = 0;         // chunks of all samples, X
  std::vector<int64_t> active;  // samples that are left at each step

  // x [tokens, h, d] -> [X, h, C, d], contiguous, zeros where there is no real token.
  at::Tensor gather(const at::Tensor& x) const;
  // x [X, h, C, d] -> [tokens, h, d]; zero_padding: for gradients of gather.
  at::Tensor scatter(const at::Tensor& x, bool zero_padding) const;
  // States [n, ...] in the order of the steps, and back.
  at::Tensor by_length(const at::Tensor& states) const;
  at::Tensor by_sample(const at::Tensor& states) const;

 private:
  bool regular_;
  int64_t batch_, seq_;
  at::Tensor slot_token_, token_slot_;  // [X C], [tokens]
  at::Tensor valid_;                    // [X, 1, C, 1], or undefined
  at::Tensor order_, rank_;             // [n]; undefined when the order is that of the batch
};

}  // namespace bridge_shim
