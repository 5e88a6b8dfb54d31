// Rotary embedding: the angles of a step, and turning queries and keys by them.
#include "../mrope.hpp"

#include "library.hpp"

namespace bridge::operators {

namespace {

std::tuple<at::Tensor, at::Tensor> mrope_table_of(const at::Tensor& positions, const at::Tensor& frequencies,
                                                  at::IntArrayRef section, at::ScalarType kind) {
  TORCH_CHECK(positions.dim() == 3 && section.size() == 3, "positions have shape ", positions.sizes(),
              ", expected [3, batch, seq]; the section ", section, " has three numbers");
  check(positions, "positions", frequencies, at::kLong, {3, -1, -1});
  check(frequencies, "frequencies", positions, at::kFloat, {kFrequencies});
  const at::Tensor ids = positions.contiguous(), steps = frequencies.contiguous();
  const auto options = positions.options().dtype(kind);
  at::Tensor cos = at::empty({positions.size(1), positions.size(2), kFrequencies}, options);
  at::Tensor sin = at::empty(cos.sizes(), options);
  MropeTable p{};
  p.positions = ids.const_data_ptr<int64_t>();
  p.frequencies = steps.const_data_ptr<float>();
  p.cos = cos.data_ptr();
  p.sin = sin.data_ptr();
  p.tokens = positions.size(1) * positions.size(2);
  p.height_limit = static_cast<int>(3 * section[1]);
  p.width_limit = static_cast<int>(3 * section[2]);
  p.dtype = dtype_of(cos, "the table");
  Launch("mrope_table", positions)(mrope_table, p);
  return {cos, sin};
}

// Turns both in place.
void turn(const at::Tensor& q, const at::Tensor& k, const at::Tensor& cos, const at::Tensor& sin, bool inverse) {
  const auto strides = [](const at::Tensor& x, const char* name) {
    TORCH_CHECK(x.is_contiguous() && x.dim() >= 3 && x.size(-1) >= kRotary, name, " has shape ", x.sizes(),
                "; it is turned in place and must be contiguous, [.., heads, at least 64]");
    return std::pair<int64_t, int64_t>(x.size(-2) * x.size(-1), x.size(-1));
  };
  MropeApply p{};
  std::tie(p.q_token_stride, p.q_head_stride) = strides(q, "q");
  std::tie(p.k_token_stride, p.k_head_stride) = strides(k, "k");
  p.tokens = cos.numel() / kFrequencies;
  check(k, "k", q, q.scalar_type(), k.sizes());
  check(cos, "cos", q, q.scalar_type(), sin.sizes());
  check(sin, "sin", q, q.scalar_type(), cos.sizes());
  TORCH_CHECK(cos.size(-1) == kFrequencies && q.numel() == p.tokens * p.q_token_stride && k.numel() == p.tokens * p.k_token_stride,
              "cos has shape ", cos.sizes(), ", expected one row of 32 for each token of q ", q.sizes(), " and k ", k.sizes());
  p.q = q.data_ptr();
  p.k = k.data_ptr();
  p.cos = cos.const_data_ptr();
  p.sin = sin.const_data_ptr();
  p.q_heads = static_cast<int>(q.size(-2));
  p.k_heads = static_cast<int>(k.size(-2));
  p.inverse = inverse;
  p.dtype = dtype_of(q, "q");
  Launch("mrope_", q)(mrope_apply, p);
}

class MropeNode : public torch::autograd::Function<MropeNode> {
 public:
  static variable_list forward(AutogradContext* ctx, const at::Tensor& q, const at::Tensor& k, const at::Tensor& cos,
                               const at::Tensor& sin) {
    turn(q, k, cos, sin, false);
    ctx->mark_dirty({q, k});
    ctx->save_for_backward({cos, sin});
    return {q, k};
  }
  // A turn is undone by the opposite turn. The gradients may be others' too, so that copies turn.
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const variable_list saved = ctx->get_saved_variables();
    at::Tensor d_q = grads[0].clone(at::MemoryFormat::Contiguous), d_k = grads[1].clone(at::MemoryFormat::Contiguous);
    turn(d_q, d_k, saved[0], saved[1], true);
    return {d_q, d_k, at::Tensor(), at::Tensor()};
  }
};

std::tuple<at::Tensor, at::Tensor> mrope_(at::Tensor q, at::Tensor k, const at::Tensor& cos, const at::Tensor& sin) {
  const variable_list turned = MropeNode::apply(q, k, cos.contiguous(), sin.contiguous());
  return {turned[0], turned[1]};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(megatron_bridge, library) {
  // positions [3, batch, seq] int64, frequencies [32] float32: cos and sin [batch, seq, 32] in `dtype`, once a step.
  define(library,
         "mrope_table(Tensor positions, Tensor frequencies, int[] section, ScalarType dtype) -> (Tensor cos, Tensor sin)",
         &mrope_table_of);
  // q, k [.., heads, d], contiguous, turned in place: the first 64 of d.
  define(library, "mrope_(Tensor(a!) q, Tensor(b!) k, Tensor cos, Tensor sin) -> (Tensor(a!), Tensor(b!))", &mrope_);
}

}  // namespace bridge::operators
