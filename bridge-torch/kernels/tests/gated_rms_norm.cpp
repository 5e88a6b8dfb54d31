// Gated RMSNorm against float64: the golden, head counts, gates inside of a wider tensor, zero heads, far-out gates.

#include "../gated_rms_norm.cu"

#include "check.hpp"
#include "goldens.hpp"

using namespace check;

namespace {

constexpr size_t kDim = bridge::kGatedNormDim;

struct Case {
  int64_t tokens, stride;
  int heads;
  double offset;
  Values x, gate, w, g;  // gate: [tokens, stride]
};

struct Reference {
  Values out, d_x, d_gate, d_w;  // d_gate: [tokens, stride], NaN where nothing belongs
};

// With `round`, n is rounded to T in between as the operation is defined.
template <class T>
Reference reference(const Case& c, double eps, bool round) {
  const auto rows = static_cast<size_t>(c.tokens * c.heads);
  Reference ref{Values(rows * kDim), Values(rows * kDim), Values(static_cast<size_t>(c.tokens * c.stride), std::nan("")),
                Values(kDim)};
  for (size_t row = 0; row < rows; ++row) {
    const size_t token = row / static_cast<size_t>(c.heads), head = row % static_cast<size_t>(c.heads);
    const double* x = c.x.data() + row * kDim;
    const double* gate = c.gate.data() + token * static_cast<size_t>(c.stride) + head * kDim;
    const double* g = c.g.data() + row * kDim;
    double* d_gate = ref.d_gate.data() + token * static_cast<size_t>(c.stride) + head * kDim;
    double squares = 0.0, along = 0.0;
    for (size_t i = 0; i < kDim; ++i) {
      squares += x[i] * x[i];
    }
    const double scale = 1.0 / std::sqrt(squares / kDim + eps);
    for (size_t i = 0; i < kDim; ++i) {
      const double s = sigmoid64(gate[i]), w = c.offset + c.w[i];
      const double n = round ? to_double(from_double<T>(x[i] * scale)) : x[i] * scale;
      ref.out[row * kDim + i] = n * w * gate[i] * s;
      along += g[i] * gate[i] * s * w * x[i] * scale;
      ref.d_w[i] += g[i] * gate[i] * s * n;
      d_gate[i] = g[i] * w * n * s * (1.0 + gate[i] * (1.0 - s));
    }
    for (size_t i = 0; i < kDim; ++i) {
      const double s = sigmoid64(gate[i]), h = g[i] * gate[i] * s * (c.offset + c.w[i]);
      ref.d_x[row * kDim + i] = scale * (h - x[i] * scale * along / kDim);
    }
  }
  return ref;
}

template <class T>
Outputs run(const Case& c, double eps, DType weight_dtype) {
  const auto size = static_cast<size_t>(c.tokens * c.heads) * kDim;
  Buffer<T> x(c.x), gate(c.gate), g(c.g), out(size), d_x(size), d_gate(c.gate.size());
  AnyBuffer w(c.w, weight_dtype), d_w(kDim, weight_dtype);
  Buffer<float> workspace(bridge::gated_rms_norm_backward_workspace_bytes(c.tokens, c.heads, dtype_of<T>) / sizeof(float));
  const auto offset = static_cast<float>(c.offset), epsilon = static_cast<float>(eps);
  launched(bridge::gated_rms_norm_forward({x.data(), gate.data(), w.data(), out.data(), c.tokens, c.stride, c.heads, epsilon, offset,
                                           dtype_of<T>, weight_dtype},
                                          nullptr));
  launched(bridge::gated_rms_norm_backward(
      {x.data(), gate.data(), w.data(), g.data(), d_x.data(), d_gate.data(), d_w.data(),
       workspace.data(), c.tokens, c.stride, c.stride, c.heads, epsilon, offset, dtype_of<T>, weight_dtype},
      nullptr));
  return {{"out", out.values()}, {"d_x", d_x.values()}, {"d_gate", d_gate.values()},
          {"d_weight", d_w.values()}};
}

template <class T>
void random_case(unsigned seed, int64_t tokens, int heads, int padding, DType weight_dtype, double scale, double gate_scale) {
  context() = std::string("gated_rms_norm ") + name_of<T>() + " tokens " + std::to_string(tokens) + " heads " +
              std::to_string(heads) + " scale " + std::to_string(scale);
  Random random(seed);
  Case c{tokens, heads * static_cast<int64_t>(kDim) + padding, heads, seed % 2 == 0 ? 1.0 : 0.0, {}, {}, {}, {}};
  const auto size = static_cast<size_t>(tokens * heads) * kDim;
  c.x = stored<T>(random.normal(size, scale));
  if (tokens > 1) {
    std::fill(c.x.begin() + static_cast<ptrdiff_t>(kDim), c.x.begin() + static_cast<ptrdiff_t>(2 * kDim), 0.0);
  }
  c.gate = stored<T>(random.normal(static_cast<size_t>(tokens * c.stride), gate_scale));
  c.g = stored<T>(random.normal(size));
  c.w = stored(random.normal(kDim, 0.3, seed % 2 == 0 ? 0.0 : 1.0), weight_dtype);
  const Reference ref = reference<T>(c, 1e-6, true);
  Outputs found = under_every_schedule([&] { return run<T>(c, 1e-6, weight_dtype); });
  // Where n is half-way between two neighbours, float32 and float64 may round it apart: a whole unit, then the last half.
  const double two = sizeof(T) == 2 ? 3.05 * kOneRounding<T> : kOneRounding<T>;
  close_elements("out", found["out"], ref.out, two, 1e-12);
  if (sizeof(T) == 2) {  // n itself is rounded: without it a third of the results would differ
    mostly_nearest<T>("out", found["out"], ref.out, 0.98);
  }
  close_elements("d_x", found["d_x"], ref.d_x, kOneRounding<T>, 4e-6 * largest(ref.d_x));
  close_slice("d_gate", found["d_gate"], ref.d_gate, two, 4e-6 * largest(ref.d_gate));
  close_elements("d_weight", found["d_weight"], ref.d_w, weight_dtype == DType::kF32 ? 1e-4 : kOneRounding<Bf16> + 1e-4,
                 2e-5 * (1.0 + largest(ref.d_w)));
}

// 10 heads of 16: repeated eight times in itself a head has the same root, output and gradients, and every repetition of the
// weight the same gradient.
void golden_case(const Goldens& goldens) {
  context() = "gated_rms_norm golden";
  const auto widened = [&](const std::string& name) {
    const Values values = goldens.at("rms_norm_gated." + name).values;
    Values out;
    for (size_t row = 0; row < values.size() / 16; ++row) {
      append(out, repeated(part(values, 16 * row, 16), 8));
    }
    return out;
  };
  const Case c{5, 2 * static_cast<int64_t>(kDim), 2, 0.0, widened("in.x"), widened("in.gate"), widened("in.weight"),
               widened("up.out")};
  const Reference ref = reference<float>(c, 1e-6, false);
  close_norm("reference out", ref.out, widened("out.out"), 1e-7);
  close_norm("reference d_x", ref.d_x, widened("grad.x"), 1e-7);
  close_norm("reference d_gate", ref.d_gate, widened("grad.gate"), 1e-7);
  close_norm("reference d_weight", ref.d_w, widened("grad.weight"), 1e-7);
  Outputs found = under_every_schedule([&] { return run<float>(c, 1e-6, DType::kF32); });
  close_norm("out", found["out"], widened("out.out"), 2e-6);
  close_norm("d_x", found["d_x"], widened("grad.x"), 5e-6);
  close_norm("d_gate", found["d_gate"], widened("grad.gate"), 2e-6);
  close_norm("d_weight", found["d_weight"], widened("grad.weight"), 5e-6);
}

template <class T>
void every_shape() {
  unsigned seed = 1;
  for (int64_t tokens : {0, 1, 2, 63, 65}) {
    random_case<T>(seed++, tokens, 3, 0, DType::kF32, 1.0, 1.0);
  }
  for (int heads : {1, 16, 32, 48}) {
    random_case<T>(seed++, 7, heads, 64, dtype_of<T>, 1.0, 1.0);
  }
  random_case<T>(seed++, 280, 32, 0, dtype_of<T>, 1.0, 1.0);  // more heads than the parts take in one turn
  random_case<T>(seed++, 9, 2, 128, DType::kF32, 1e4, 30.0);
  random_case<T>(seed++, 9, 2, 0, DType::kBf16, 1e-4, 1.0);
}

void refusals() {
  context() = "gated_rms_norm refusals";
  bridge::GatedRmsNormForward p{};
  p.tokens = 1;
  p.heads = 2;
  p.gate_stride = 260;
  p.dtype = DType::kBf16;
  require(bridge::gated_rms_norm_forward(p, nullptr) == cudaErrorInvalidValue, "an unaligned stride is refused");
  p.gate_stride = 256;
  p.tokens = int64_t{1} << 31;
  require(bridge::gated_rms_norm_forward(p, nullptr) == cudaErrorInvalidValue, "2^32 heads are refused");
}

}  // namespace

int main(int, char** arguments) {
  golden_case(Goldens(std::string(arguments[1]) + "/ops.safetensors"));
  every_shape<float>();
  every_shape<Bf16>();
  refusals();
  return finish("gated_rms_norm");
}
