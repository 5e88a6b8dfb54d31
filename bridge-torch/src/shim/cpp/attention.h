#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <memory>

namespace bridge_shim {

// softmax(q k^T / sqrt(d) + bias) v by plain products, for short sequences: it keeps the probabilities for backward.
// q [b, query heads, s, d]; k, v [b, kv heads, t, d], each serving a run of query heads.
// causal: query i sees the keys up to seen + i. bias: undefined, or added to the scores, [b or 1, 1, s or 1, t].
std::unique_ptr<at::Tensor> short_attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                            const at::Tensor& bias, bool causal, int64_t seen);

}  // namespace bridge_shim
