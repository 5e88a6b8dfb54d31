// The gated activation.
#include "../swiglu.hpp"

#include "library.hpp"

namespace bridge::operators {

namespace {

class SwigluNode : public torch::autograd::Function<SwigluNode> {
 public:
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& x) {
    const at::Tensor rows = rows_of(x);
    std::vector<int64_t> shape = x.sizes().vec();
    shape.back() /= 2;
    at::Tensor out = at::empty(shape, x.options());
    SwigluForward p{};
    p.x = rows.const_data_ptr();
    p.out = out.data_ptr();
    p.rows = rows.size(0);
    p.x_stride = row_stride(rows);
    p.dim = static_cast<int>(shape.back());
    p.dtype = dtype_of(x, "x");
    Launch("swiglu", x)(swiglu_forward, p);
    ctx->save_for_backward({x});
    return out;
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const at::Tensor x = ctx->get_saved_variables()[0], rows = rows_of(x), d_out = grads[0].contiguous();
    at::Tensor d_x = at::empty(x.sizes(), x.options());
    SwigluBackward p{};
    p.x = rows.const_data_ptr();
    p.d_out = d_out.const_data_ptr();
    p.d_x = d_x.data_ptr();
    p.rows = rows.size(0);
    p.x_stride = row_stride(rows);
    p.dim = static_cast<int>(x.size(-1) / 2);
    p.dtype = dtype_of(x, "x");
    Launch("swiglu", x)(swiglu_backward, p);
    return {d_x};
  }
};

at::Tensor swiglu(const at::Tensor& x) { return SwigluNode::apply(x); }

}  // namespace

TORCH_LIBRARY_FRAGMENT(megatron_bridge, library) {
  // x [.., 2 I], gate first: silu(gate) up, [.., I].
  define(library, "swiglu(Tensor x) -> Tensor", &swiglu);
}

}  // namespace bridge::operators
