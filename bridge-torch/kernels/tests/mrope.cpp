// Interleaved mRoPE against float64: the golden (text, an image, positions up to 200000), strided heads, the inverse.

#include "../mrope.cu"

#include "check.hpp"
#include "goldens.hpp"

using namespace check;

namespace {

struct Case {
  int64_t tokens;
  int q_heads, k_heads, dim, gap;  // gap: elements between heads that belong to something else
  Values q, k, cos, sin;           // q: [tokens, q_heads, dim + gap]; cos, sin: [tokens, 32]
};

Values turned(const Values& x, const Case& c, int heads, double sign) {
  Values out = x;
  const auto pitch = static_cast<size_t>(c.dim + c.gap);
  for (size_t row = 0; row < static_cast<size_t>(c.tokens * heads); ++row) {
    const size_t token = row / static_cast<size_t>(heads);
    for (size_t j = 0; j < 32; ++j) {
      const double a = x[row * pitch + j], b = x[row * pitch + 32 + j];
      const double cosine = c.cos[token * 32 + j], sine = sign * c.sin[token * 32 + j];
      out[row * pitch + j] = a * cosine - b * sine;
      out[row * pitch + 32 + j] = b * cosine + a * sine;
    }
  }
  return out;
}

template <class T>
Outputs run(const Case& c, bool inverse) {
  Buffer<T> q(c.q), k(c.k), cos(c.cos), sin(c.sin);
  const int64_t head = c.dim + c.gap;
  launched(bridge::mrope_apply({q.data(), k.data(), cos.data(), sin.data(), c.tokens, c.q_heads * head, head,
                                c.k_heads * head, head, c.q_heads, c.k_heads, inverse, dtype_of<T>},
                               nullptr));
  return {{"q", q.values()}, {"k", k.values()}};
}

template <class T>
void random_case(unsigned seed, int64_t tokens, int q_heads, int k_heads, int gap) {
  context() = std::string("mrope ") + name_of<T>() + " tokens " + std::to_string(tokens) + " heads " + std::to_string(q_heads) +
              "/" + std::to_string(k_heads);
  Random random(seed);
  Case c{tokens, q_heads, k_heads, 256, gap, {}, {}, {}, {}};
  const auto head = static_cast<size_t>(256 + gap);
  c.q = stored<T>(random.normal(static_cast<size_t>(tokens * q_heads) * head));
  c.k = stored<T>(random.normal(static_cast<size_t>(tokens * k_heads) * head));
  for (double angle : random.uniform(static_cast<size_t>(tokens) * 32, -3.2, 3.2)) {
    c.cos.push_back(std::cos(angle));
    c.sin.push_back(std::sin(angle));
  }
  c.cos = stored<T>(c.cos);
  c.sin = stored<T>(c.sin);
  for (const bool inverse : {false, true}) {
    Outputs found = under_every_schedule([&] { return run<T>(c, inverse); });
    close_elements("q", found["q"], turned(c.q, c, q_heads, inverse ? -1.0 : 1.0), kOneRounding<T>, 1e-6);
    close_elements("k", found["k"], turned(c.k, c, k_heads, inverse ? -1.0 : 1.0), kOneRounding<T>, 1e-6);
  }
}

// [1, heads, tokens, d] as [tokens, heads, d].
Values by_token(const Golden& golden) {
  const auto heads = static_cast<size_t>(golden.shape[1]), tokens = static_cast<size_t>(golden.shape[2]),
             d = static_cast<size_t>(golden.shape[3]);
  Values out;
  for (size_t t = 0; t < tokens; ++t) {
    for (size_t h = 0; h < heads; ++h) {
      for (size_t i = 0; i < d; ++i) {
        out.push_back(golden.values[(h * tokens + t) * d + i]);
      }
    }
  }
  return out;
}

template <class T>
void golden_case(const Goldens& goldens) {
  context() = std::string("mrope golden ") + name_of<T>();
  const Values positions = goldens.at("mrope_d256.in.position_ids").values;
  const auto tokens = static_cast<int64_t>(positions.size() / 3);
  Values frequencies;
  for (int j = 0; j < 32; ++j) {
    frequencies.push_back(std::pow(1e7, -2.0 * j / 64));
  }
  Outputs table = under_every_schedule([&] {
    Buffer<int64_t> at(positions);
    Buffer<float> rate(frequencies);
    Buffer<T> cos(static_cast<size_t>(tokens) * 32), sin(static_cast<size_t>(tokens) * 32);
    launched(bridge::mrope_table({at.data(), rate.data(), cos.data(), sin.data(), tokens, 33, 30, dtype_of<T>}, nullptr));
    return Outputs{{"cos", cos.values()}, {"sin", sin.values()}};
  });
  // The goldens' angles are float64. A float32 angle of size a is off by a 2^-24 in the frequency and as much in the product.
  Values cos, sin;
  double largest = 0.0;
  for (size_t t = 0; t < static_cast<size_t>(tokens); ++t) {
    for (size_t j = 0; j < 32; ++j) {
      cos.push_back(goldens.at("mrope_d256.out.cos").values[t * 64 + j]);
      sin.push_back(goldens.at("mrope_d256.out.sin").values[t * 64 + j]);
    }
    for (size_t row = 0; row < 3; ++row) {
      largest = std::max(largest, positions[row * static_cast<size_t>(tokens) + t]);
    }
  }
  for (size_t i = 0; i < cos.size(); ++i) {
    double at = 0.0;
    for (size_t row = 0; row < 3; ++row) {
      at = std::max(at, positions[row * static_cast<size_t>(tokens) + i / 32]);
    }
    const double angle = at * frequencies[i % 32] * 1.2e-7 + 2e-7;
    const double rounding = sizeof(T) == 2 ? 0.502 / 256 : 0.0;
    if (std::abs(table["cos"][i] - cos[i]) > angle + rounding || std::abs(table["sin"][i] - sin[i]) > angle + rounding) {
      complain("cos or sin [%zu, %zu] is off: %g, %g instead of %g, %g", i / 32, i % 32, table["cos"][i], table["sin"][i],
               cos[i], sin[i]);
      return;
    }
  }
  require(largest == 200000, "the golden has a far position");

  const Golden &q = goldens.at("mrope_d256.in.q"), &k = goldens.at("mrope_d256.in.k");
  Case c{tokens, static_cast<int>(q.shape[1]), static_cast<int>(k.shape[1]), 256, 0, by_token(q), by_token(k), cos, sin};
  close_norm("reference q", turned(c.q, c, c.q_heads, 1.0), by_token(goldens.at("mrope_d256.out.q")), 1e-12);
  close_norm("reference k", turned(c.k, c, c.k_heads, 1.0), by_token(goldens.at("mrope_d256.out.k")), 1e-12);
  const double tolerance = sizeof(T) == 2 ? 6e-3 : 2e-6;
  Outputs found = run<T>(c, false);
  close_norm("q", found["q"], by_token(goldens.at("mrope_d256.out.q")), tolerance);
  close_norm("k", found["k"], by_token(goldens.at("mrope_d256.out.k")), tolerance);
  c.q = by_token(goldens.at("mrope_d256.up.q"));
  c.k = by_token(goldens.at("mrope_d256.up.k"));
  found = run<T>(c, true);
  close_norm("d_q", found["q"], by_token(goldens.at("mrope_d256.grad.q")), tolerance);
  close_norm("d_k", found["k"], by_token(goldens.at("mrope_d256.grad.k")), tolerance);
}

template <class T>
void every_shape() {
  unsigned seed = 1;
  for (int64_t tokens : {0, 1, 2, 63, 65}) {
    random_case<T>(seed++, tokens, 4, 1, 0);
  }
  random_case<T>(seed++, 9, 16, 2, 256);  // q heads with their gates between them
  random_case<T>(seed++, 9, 24, 4, 8);
  random_case<T>(seed++, 5, 3, 0, 0);
}

void refusals() {
  context() = "mrope refusals";
  bridge::MropeApply p{nullptr, nullptr, nullptr, nullptr, 1, 256, 256, 256, 100, 1, 1, false, DType::kBf16};
  require(bridge::mrope_apply(p, nullptr) == cudaErrorInvalidValue, "an unaligned head is refused");
  p.k_head_stride = 256;
  p.tokens = int64_t{1} << 31;
  require(bridge::mrope_apply(p, nullptr) == cudaErrorInvalidValue, "2^32 heads are refused");
}

}  // namespace

int main(int, char** arguments) {
  const Goldens goldens(std::string(arguments[1]) + "/ops.safetensors");
  golden_case<float>(goldens);
  golden_case<Bf16>(goldens);
  every_shape<float>();
  every_shape<Bf16>();
  refusals();
  return finish("mrope");
}
