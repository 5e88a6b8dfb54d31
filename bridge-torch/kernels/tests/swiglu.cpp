// SwiGLU against float64: the golden, widths that are no multiple of a block, rows inside of a wider tensor, far-out gates.

#include "../swiglu.cu"

#include "check.hpp"
#include "goldens.hpp"

using namespace check;

namespace {

struct Case {
  int64_t rows, stride;
  int dim;
  Values x, g;  // x: [rows, stride]
};

struct Reference {
  Values out, d_x;
};

Reference reference(const Case& c) {
  const auto rows = static_cast<size_t>(c.rows), dim = static_cast<size_t>(c.dim), stride = static_cast<size_t>(c.stride);
  Reference ref{Values(rows * dim), Values(2 * rows * dim)};
  for (size_t t = 0; t < rows; ++t) {
    for (size_t i = 0; i < dim; ++i) {
      const double gate = c.x[t * stride + i], up = c.x[t * stride + dim + i], g = c.g[t * dim + i], s = sigmoid64(gate);
      ref.out[t * dim + i] = gate * s * up;
      ref.d_x[t * 2 * dim + i] = g * up * s * (1.0 + gate * (1.0 - s));
      ref.d_x[t * 2 * dim + dim + i] = g * gate * s;
    }
  }
  return ref;
}

template <class T>
Outputs run(const Case& c) {
  const auto size = static_cast<size_t>(c.rows * c.dim);
  Buffer<T> x(c.x), g(c.g), out(size), d_x(2 * size);
  launched(bridge::swiglu_forward({x.data(), out.data(), c.rows, c.stride, c.dim, dtype_of<T>}, nullptr));
  launched(bridge::swiglu_backward({x.data(), g.data(), d_x.data(), c.rows, c.stride, c.dim, dtype_of<T>}, nullptr));
  return {{"out", out.values()}, {"d_x", d_x.values()}};
}

template <class T>
void random_case(unsigned seed, int64_t rows, int dim, int padding, double scale, bool every_schedule = true) {
  context() = std::string("swiglu ") + name_of<T>() + " rows " + std::to_string(rows) + " dim " + std::to_string(dim);
  Random random(seed);
  Case c{rows, 2 * dim + padding, dim, {}, {}};
  c.x = stored<T>(random.normal(static_cast<size_t>(rows * c.stride), scale));
  c.g = stored<T>(random.normal(static_cast<size_t>(rows * dim)));
  const Reference ref = reference(c);
  Outputs found = every_schedule ? under_every_schedule([&] { return run<T>(c); }) : run<T>(c);
  // 1 - sigmoid loses what float32 does not hold: relative to the gate, not to the small slope.
  close_elements("out", found["out"], ref.out, kOneRounding<T>, 1e-30);
  close_elements("d_x", found["d_x"], ref.d_x, kOneRounding<T>, 2e-6 * scale * scale);
}

void golden_case(const Goldens& goldens) {
  context() = "swiglu golden";
  // 4 x 10 values: six columns of zeros make a row of whole 16 bytes.
  const auto widened = [](const Values& values) { return spaced(values, 10, 6, 0.0); };
  const Values gate = widened(goldens.at("swiglu.in.gate").values), up = widened(goldens.at("swiglu.in.up").values);
  const auto fused = [](const Values& first, const Values& second) {
    Values out;
    for (size_t t = 0; t < 4; ++t) {
      append(out, part(first, 16 * t, 16));
      append(out, part(second, 16 * t, 16));
    }
    return out;
  };
  const Case c{4, 32, 16, fused(gate, up), widened(goldens.at("swiglu.up.out").values)};
  const Values out = widened(goldens.at("swiglu.out.out").values);
  const Values d_x = fused(widened(goldens.at("swiglu.grad.gate").values), widened(goldens.at("swiglu.grad.up").values));
  const Reference ref = reference(c);
  close_norm("reference out", ref.out, out, 1e-12);
  close_norm("reference d_x", ref.d_x, d_x, 1e-12);
  Outputs found = under_every_schedule([&] { return run<float>(c); });
  close_norm("out", found["out"], out, 2e-6);
  close_norm("d_x", found["d_x"], d_x, 2e-6);
}

template <class T>
void every_shape() {
  unsigned seed = 1;
  for (int64_t rows : {0, 1, 2, 63, 200}) {
    random_case<T>(seed++, rows, 24, 0, 1.0);
  }
  random_case<T>(seed++, 3, 3584, 0, 1.0);
  random_case<T>(seed++, 2, 12288, 16, 1.0);
  random_case<T>(seed++, 17, 512, 512, 30.0);
}

// More pieces than all blocks take in one turn.
void several_turns() { random_case<float>(90, 2200, 1024, 0, 1.0, false); }

void refusals() {
  context() = "swiglu refusals";
  bridge::SwigluForward p{nullptr, nullptr, 1, 24, 12, DType::kBf16};
  require(bridge::swiglu_forward(p, nullptr) == cudaErrorInvalidValue, "a width of half pieces is refused");
  p = {nullptr, nullptr, int64_t{1} << 40, 16, 8, DType::kBf16};
  require(bridge::swiglu_forward(p, nullptr) == cudaErrorInvalidValue, "more pieces than 2^32 are refused");
}

}  // namespace

int main(int, char** arguments) {
  golden_case(Goldens(std::string(arguments[1]) + "/ops.safetensors"));
  every_shape<float>();
  every_shape<Bf16>();
  several_turns();
  refusals();
  return finish("swiglu");
}
