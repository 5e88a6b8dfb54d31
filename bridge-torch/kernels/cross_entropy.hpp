#pragma once

#include "cuda_types.hpp"

namespace bridge {

// Rows of logits to losses and, in place, to their gradient: loss = log sum exp(row) - row[target],
// d_logits = (softmax(row) - onehot(target)) scale. Ignored rows give 0 and zeros, whatever they hold.
// A target outside of the vocabulary, or a row of nothing but -inf, gives an infinite loss and zeros: never NaN, never an
// access outside, and the run's loss shows it.
struct CrossEntropyRows {
  void* logits;            // [rows, vocabulary], rows row_stride elements apart; with write_gradient overwritten
  const int64_t* targets;  // [rows]
  const float* scale;      // one number on the device
  float* losses;           // [rows]
  int64_t rows, row_stride;
  int vocabulary;          // any; row_stride in whole pieces of 16 bytes
  int64_t ignored;         // the target of rows that do not count
  bool write_gradient;
  DType dtype;
};

// scale = 1 / max(1, number of targets that count).
struct CrossEntropyScale {
  const int64_t* targets;
  float* scale;
  int64_t rows;
  int64_t ignored;
};

// total = scale * sum of losses, in a fixed order.
struct CrossEntropyTotal {
  const float* losses;
  const float* scale;
  float* total;
  int64_t rows;
};

cudaError_t cross_entropy_scale(const CrossEntropyScale& p, cudaStream_t stream);
cudaError_t cross_entropy_rows(const CrossEntropyRows& p, cudaStream_t stream);
cudaError_t cross_entropy_total(const CrossEntropyTotal& p, cudaStream_t stream);

}  // namespace bridge
