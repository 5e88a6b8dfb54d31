#include "chunks.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/tensor.h>

#include <algorithm>
#include <numeric>

namespace bridge_shim {

namespace {

constexpr int64_t kLargest = 64;
constexpr int64_t kSmallest = 8;

at::Tensor on_device(const std::vector<int64_t>& values, const at::Tensor& like) {
  return at::tensor(values, like.options().dtype(at::kLong).device(at::kCPU)).to(like.device());
}

}  // namespace

Chunks::Chunks(int64_t batch, int64_t seq, const std::vector<int64_t>& cu_seqlens,
               const at::Tensor& mask, const at::Tensor& like)
    : batch_(batch), seq_(seq) {
  std::vector<int64_t> borders = cu_seqlens;
  if (borders.empty()) {
    for (int64_t i = 0; i <= batch; ++i) {
      borders.push_back(i * seq);
    }
  }
  samples = static_cast<int64_t>(borders.size()) - 1;
  int64_t longest = 0;
  for (int64_t i = 0; i < samples; ++i) {
    longest = std::max(longest, borders[i + 1] - borders[i]);
  }
  size = kSmallest;
  while (size < std::min(longest, kLargest)) {
    size *= 2;
  }
  regular_ = cu_seqlens.empty() && seq % size == 0 && !mask.defined();
  if (regular_) {
    count = batch * (seq / size);
    active.assign(seq / size, batch);
    return;
  }

  std::vector<int64_t> order(samples);
  std::iota(order.begin(), order.end(), 0);
  const auto length = [&](int64_t i) { return borders[i + 1] - borders[i]; };
  std::stable_sort(order.begin(), order.end(),
                   [&](int64_t a, int64_t b) { return length(a) > length(b); });
  std::vector<int64_t> slot_token, token_slot(borders.back());
  std::vector<float> valid;
  for (int64_t start = 0; start < longest; start += size) {
    active.push_back(0);
    for (int64_t rank = 0; rank < samples && length(order[rank]) > start; ++rank) {
      ++active.back();
      for (int64_t i = start; i < start + size; ++i) {
        const bool exists = i < length(order[rank]);
        const int64_t token = exists ? borders[order[rank]] + i : 0;
        if (exists) {
          token_slot[token] = static_cast<int64_t>(slot_token.size());
        }
        slot_token.push_back(token);
        valid.push_back(exists ? 1.0F : 0.0F);
      }
    }
    count += active.back();
  }
  std::vector<int64_t> rank(samples);
  for (int64_t i = 0; i < samples; ++i) {
    rank[order[i]] = i;
  }
  slot_token_ = on_device(slot_token, like);
  token_slot_ = on_device(token_slot, like);
  order_ = on_device(order, like);
  rank_ = on_device(rank, like);
  valid_ = at::tensor(valid, like.options().dtype(at::kFloat).device(at::kCPU)).to(like.options());
  if (mask.defined()) {
    valid_ = valid_ * mask.reshape({-1}).index_select(0, slot_token_).to(like.scalar_type());
  }
  valid_ = valid_.view({count, 1, size, 1});
}

at::Tensor Chunks::gather(const at::Tensor& x) const {
  const int64_t h = x.size(1), d = x.size(2);
  if (regular_) {
    return x.reshape({batch_, seq_ / size, size, h, d})
        .permute({1, 0, 3, 2, 4})
        .contiguous()
        .view({count, h, size, d});
  }
  return (x.index_select(0, slot_token_).view({count, size, h, d}).transpose(1, 2) * valid_).contiguous();
}

at::Tensor Chunks::scatter(const at::Tensor& x, bool zero_padding) const {
  const int64_t h = x.size(1), d = x.size(3);
  if (regular_) {
    return x.view({seq_ / size, batch_, h, size, d})
        .permute({1, 0, 3, 2, 4})
        .reshape({batch_ * seq_, h, d})
        .contiguous();  // a reshape of one chunk is a view
  }
  const at::Tensor kept = zero_padding ? x * valid_ : x;
  return kept.transpose(1, 2).reshape({count * size, h, d}).index_select(0, token_slot_);
}

at::Tensor Chunks::by_length(const at::Tensor& states) const {
  return order_.defined() ? states.index_select(0, order_) : states;
}

at::Tensor Chunks::by_sample(const at::Tensor& states) const {
  return rank_.defined() ? states.index_select(0, rank_) : states;
}

}  // namespace bridge_shim
