#include "attention.h"

#include <ATen/ops/_softmax.h>
#include <ATen/ops/_softmax_backward_data.h>
#include <ATen/ops/baddbmm.h>
#include <ATen/ops/bmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/full.h>
#include <ATen/ops/mul.h>
#include <torch/csrc/autograd/custom_function.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <vector>

namespace bridge_shim {

namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// Queries of one block: causal blocks leave out the keys that none of them sees.
constexpr int64_t kBlock = 128;

// Sizes, and the packing of query heads behind their key-value head: [b, kv heads x r, s, d] as [b x kv heads, r s, d].
struct Heads {
  int64_t batch, heads, kv, queries, keys, dim, seen;
  bool causal;

  int64_t group() const { return heads / kv; }
  // The keys that queries start..start + rows see.
  int64_t visible(int64_t start, int64_t rows) const {
    return causal ? std::min(keys, seen + start + rows) : keys;
  }
  at::Tensor pack(const at::Tensor& x, int64_t start, int64_t rows) const {
    return x.narrow(2, start, rows).reshape({batch * kv, group() * rows, dim});
  }
  at::Tensor unpack(const at::Tensor& x, int64_t rows) const { return x.view({batch, heads, rows, dim}); }
  at::Tensor flat(const at::Tensor& x) const { return x.reshape({batch * kv, keys, dim}); }
};

Heads heads_of(const at::Tensor& q, const at::Tensor& k, bool causal, int64_t seen) {
  return {q.size(0), q.size(1), k.size(1), q.size(2), k.size(2), q.size(3), seen, causal};
}

class AttentionNode : public torch::autograd::Function<AttentionNode> {
 public:
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                            const std::optional<at::Tensor>& bias, bool causal, int64_t seen) {
    const Heads heads = heads_of(q, k, causal, seen);
    const double scale = 1 / std::sqrt(static_cast<double>(heads.dim));
    const at::Tensor keys = heads.flat(k), values = heads.flat(v);
    // Rows of blocks lie in [b, s, heads, d], as the caller wants them.
    const at::Tensor out =
        at::empty({heads.batch, heads.queries, heads.heads, heads.dim}, q.options()).transpose(1, 2);
    variable_list saved{keys, values};
    for (int64_t start = 0; start < heads.queries; start += kBlock) {
      const int64_t rows = std::min(kBlock, heads.queries - start);
      const int64_t visible = heads.visible(start, rows);
      const at::Tensor block = heads.pack(at::mul(q.narrow(2, start, rows), scale), 0, rows);
      at::Tensor scores = at::bmm(block, keys.narrow(1, 0, visible).transpose(1, 2));
      at::Tensor square = scores.view({heads.batch, heads.heads, rows, visible});
      if (bias.has_value()) {
        const at::Tensor queries = bias->size(2) == 1 ? *bias : bias->narrow(2, start, rows);
        square.add_(queries.narrow(3, 0, visible));
      }
      // The last `rows` of the visible keys are the block's own tokens.
      if (causal && rows > 1) {
        const double hidden = -std::numeric_limits<double>::infinity();
        square.narrow(3, visible - rows, rows).add_(at::full({rows, rows}, hidden, q.options()).triu_(1));
      }
      const at::Tensor p = at::_softmax(scores, -1, false);
      out.narrow(2, start, rows).copy_(heads.unpack(at::bmm(p, values.narrow(1, 0, visible)), rows));
      saved.push_back(block);
      saved.push_back(p);
    }
    ctx->save_for_backward(std::move(saved));
    ctx->saved_data["sizes"] = std::vector<int64_t>{heads.batch, heads.heads, heads.kv,   heads.queries,
                                                    heads.keys,  heads.dim,   heads.seen, causal ? 1 : 0};
    return out;
  }

  static variable_list backward(AutogradContext* ctx, variable_list upstream) {
    const auto saved = ctx->get_saved_variables();
    const auto sizes = ctx->saved_data["sizes"].toIntVector();
    const Heads heads{sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], sizes[5], sizes[6], sizes[7] != 0};
    const double scale = 1 / std::sqrt(static_cast<double>(heads.dim));
    const at::Tensor &keys = saved[0], &values = saved[1], &grad = upstream[0];
    const at::Tensor grad_q =
        at::empty({heads.batch, heads.queries, heads.heads, heads.dim}, grad.options()).transpose(1, 2);
    at::Tensor grad_k = at::empty_like(keys), grad_v = at::empty_like(values);
    // From the last block on: it sees every key that any block sees, so it writes and the others add.
    const int64_t blocks = (heads.queries + kBlock - 1) / kBlock;
    for (int64_t index = blocks - 1; index >= 0; --index) {
      const int64_t start = index * kBlock;
      const int64_t rows = std::min(kBlock, heads.queries - start);
      const int64_t visible = heads.visible(start, rows);
      const at::Tensor &block = saved[2 + 2 * index], &p = saved[3 + 2 * index];
      const at::Tensor grad_out = heads.pack(grad, start, rows);
      const at::Tensor grad_p = at::bmm(grad_out, values.narrow(1, 0, visible).transpose(1, 2));
      const at::Tensor grad_scores = at::_softmax_backward_data(grad_p, p, -1, p.scalar_type());
      grad_q.narrow(2, start, rows).copy_(heads.unpack(at::bmm(grad_scores, keys.narrow(1, 0, visible)).mul_(scale), rows));
      if (index == blocks - 1 && visible == heads.keys) {
        at::bmm_out(grad_k, grad_scores.transpose(1, 2), block);
        at::bmm_out(grad_v, p.transpose(1, 2), grad_out);
        continue;
      }
      if (index == blocks - 1) {
        grad_k.zero_();
        grad_v.zero_();
      }
      grad_k.narrow(1, 0, visible).baddbmm_(grad_scores.transpose(1, 2), block);
      grad_v.narrow(1, 0, visible).baddbmm_(p.transpose(1, 2), grad_out);
    }
    const auto shape = {heads.batch, heads.kv, heads.keys, heads.dim};
    return {grad_q, grad_k.view(shape), grad_v.view(shape), {}, {}, {}};
  }
};

}  // namespace

std::unique_ptr<at::Tensor> short_attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                            const at::Tensor& bias, bool causal, int64_t seen) {
  const auto added = bias.defined() ? std::make_optional(bias) : std::nullopt;
  return std::make_unique<at::Tensor>(AttentionNode::apply(q, k, v, added, causal, seen));
}

}  // namespace bridge_shim
