// RMSNorm against float64: goldens, widths on both sides of the warp limit, residuals, zero rows and rows of 1e4.

#include "../rms_norm.cu"

#include "check.hpp"
#include "goldens.hpp"

using namespace check;

namespace {

struct Case {
  int64_t rows, stride;
  int dim;
  bool residual;
  double offset;
  Values x, r, w, g, past;  // x: [rows, stride]
};

struct Reference {
  Values s, out, d_x, d_w;
};

template <class T>
Reference reference(const Case& c, double eps) {
  const auto rows = static_cast<size_t>(c.rows), dim = static_cast<size_t>(c.dim);
  Reference ref{Values(rows * dim), Values(rows * dim), Values(rows * dim), Values(dim)};
  for (size_t t = 0; t < rows; ++t) {
    double squares = 0.0, along = 0.0;
    for (size_t i = 0; i < dim; ++i) {
      double s = c.x[t * static_cast<size_t>(c.stride) + i];
      if (c.residual) {
        s = to_double(from_double<T>(s + c.r[t * dim + i]));
      }
      ref.s[t * dim + i] = s;
      squares += s * s;
    }
    const double scale = 1.0 / std::sqrt(squares / c.dim + eps);
    for (size_t i = 0; i < dim; ++i) {
      const double n = ref.s[t * dim + i] * scale, h = c.g[t * dim + i] * (c.offset + c.w[i]);
      ref.out[t * dim + i] = n * (c.offset + c.w[i]);
      along += h * n;
    }
    for (size_t i = 0; i < dim; ++i) {
      const double n = ref.s[t * dim + i] * scale, h = c.g[t * dim + i] * (c.offset + c.w[i]);
      ref.d_x[t * dim + i] = scale * (h - n * along / c.dim) + (c.past.empty() ? 0.0 : c.past[t * dim + i]);
      ref.d_w[i] += c.g[t * dim + i] * n;
    }
  }
  return ref;
}

template <class T>
Outputs run(const Case& c, double eps, DType weight_dtype) {
  const auto size = static_cast<size_t>(c.rows * c.dim);
  Buffer<T> x(c.x), r(c.r), g(c.g), past(c.past), out(size), sum(c.residual ? size : 0), d_x(size);
  AnyBuffer w(c.w, weight_dtype), d_w(c.w.size(), weight_dtype);
  Buffer<float> workspace(bridge::rms_norm_backward_workspace_bytes(c.rows, c.dim) / sizeof(float));
  const auto offset = static_cast<float>(c.offset), epsilon = static_cast<float>(eps);
  launched(bridge::rms_norm_forward({x.data(), c.residual ? r.data() : nullptr, w.data(), c.residual ? sum.data() : nullptr,
                                     out.data(), c.rows, c.stride, c.dim, epsilon, offset, dtype_of<T>, weight_dtype},
                                    nullptr));
  const int64_t stride = c.residual ? c.dim : c.stride;
  launched(bridge::rms_norm_backward(
      {c.residual ? sum.data() : x.data(), w.data(), g.data(), c.past.empty() ? nullptr : past.data(), d_x.data(),
       d_w.data(), workspace.data(), c.rows, stride, c.dim, epsilon, offset,
       dtype_of<T>, weight_dtype},
      nullptr));
  return {{"out", out.values()}, {"sum", sum.values()}, {"d_x", d_x.values()},
          {"d_weight", d_w.values()}};
}

template <class T>
void random_case(unsigned seed, int64_t rows, int dim, bool residual, DType weight_dtype, double scale, int padding = 0) {
  context() = std::string("rms_norm ") + name_of<T>() + " rows " + std::to_string(rows) + " dim " + std::to_string(dim) +
              (residual ? " residual" : "") + " scale " + std::to_string(scale);
  Random random(seed);
  Case c{rows, dim + padding, dim, residual, seed % 2 == 0 ? 1.0 : 0.0, {}, {}, {}, {}, {}};
  const auto size = static_cast<size_t>(rows * dim);
  c.x = stored<T>(random.normal(static_cast<size_t>(rows * c.stride), scale));
  if (rows > 2) {  // a row of zeros: the root of eps alone
    std::fill(c.x.begin() + c.stride, c.x.begin() + 2 * c.stride, 0.0);
  }
  c.g = stored<T>(random.normal(size));
  c.w = stored(random.normal(static_cast<size_t>(dim), 0.3), weight_dtype);
  if (residual) {
    c.r = stored<T>(random.normal(size, scale));
    c.past = stored<T>(random.normal(size));
  }
  const Reference ref = reference<T>(c, 1e-6);
  Outputs found = under_every_schedule([&] { return run<T>(c, 1e-6, weight_dtype); });
  // A gradient is a difference: what float32 loses is relative to its larger term.
  close_elements("out", found["out"], ref.out, kOneRounding<T>, 1e-12);
  if (residual) {
    equal("sum", found["sum"], ref.s);
  }
  close_elements("d_x", found["d_x"], ref.d_x, kOneRounding<T>, 4e-6 * largest(ref.d_x));
  close_elements("d_weight", found["d_weight"], ref.d_w, weight_dtype == DType::kF32 ? 1e-5 : kOneRounding<Bf16>,
                 1e-5 * std::sqrt(static_cast<double>(rows)));
}

void golden_case(const Goldens& goldens) {
  context() = "rms_norm golden";
  const Golden& x = goldens.at("rms_norm_zero_centred.in.x");
  Case c{15, 32, 32, false, 1.0, x.values, {}, goldens.at("rms_norm_zero_centred.in.weight").values,
         goldens.at("rms_norm_zero_centred.up.out").values, {}};
  const double eps = 1e-6;
  const Reference ref = reference<float>(c, eps);
  close_norm("reference out", ref.out, goldens.at("rms_norm_zero_centred.out.out").values, 1e-7);
  close_norm("reference d_x", ref.d_x, goldens.at("rms_norm_zero_centred.grad.x").values, 1e-7);
  close_norm("reference d_weight", ref.d_w, goldens.at("rms_norm_zero_centred.grad.weight").values, 1e-7);
  Outputs found = under_every_schedule([&] { return run<float>(c, eps, DType::kF32); });
  close_norm("out", found["out"], goldens.at("rms_norm_zero_centred.out.out").values, 2e-6);
  close_norm("d_x", found["d_x"], goldens.at("rms_norm_zero_centred.grad.x").values, 5e-6);
  close_norm("d_weight", found["d_weight"], goldens.at("rms_norm_zero_centred.grad.weight").values, 5e-6);
}

template <class T>
void every_shape() {
  unsigned seed = 1;
  for (int64_t rows : {0, 1, 7, 8, 9, 63, 200}) {
    random_case<T>(seed++, rows, 64, rows % 2 == 0, DType::kF32, 1.0);
  }
  for (int dim : {8, 1016, 1024, 1032, 2048, 4096, 5120, 8192}) {
    random_case<T>(seed, 5, dim, seed % 3 == 0, dtype_of<T>, 1.0);
    ++seed;
  }
  random_case<T>(seed++, 300, 1032, true, dtype_of<T>, 1.0);  // more rows than parts
  random_case<T>(seed++, 2200, 8, true, dtype_of<T>, 1.0);
  random_case<T>(seed++, 9, 256, false, DType::kF32, 1e4);
  random_case<T>(seed++, 9, 256, false, DType::kBf16, 1e-4);
  random_case<T>(seed++, 9, 256, false, DType::kBf16, 1.0, 512);  // rows inside of a wider tensor
}

void refusals() {
  context() = "rms_norm refusals";
  bridge::RmsNormForward p{};
  p.rows = 1;
  p.dtype = DType::kBf16;
  for (int dim : {0, 12, 8200}) {
    p.dim = dim;
    p.x_stride = dim;
    require(bridge::rms_norm_forward(p, nullptr) == cudaErrorInvalidValue, "an unsupported width is refused");
  }
  p.dim = 64;
  p.x_stride = 65;
  require(bridge::rms_norm_forward(p, nullptr) == cudaErrorInvalidValue, "an unaligned stride is refused");
}

}  // namespace

int main(int, char** arguments) {
  golden_case(Goldens(std::string(arguments[1]) + "/ops.safetensors"));
  every_shape<float>();
  every_shape<Bf16>();
  refusals();
  return finish("rms_norm");
}
