// Routing against float64: the goldens' choices and weights, ties, equal rows, -inf, 8 to 512 experts.

#include "../router.cu"

#include "check.hpp"
#include "goldens.hpp"

using namespace check;

namespace {

struct Case {
  int64_t tokens;
  int experts, top_k;
  Values logits, d_weights;
};

struct Reference {
  Values chosen, weights, d_logits;
};

Reference reference(const Case& c) {
  const auto experts = static_cast<size_t>(c.experts), k = static_cast<size_t>(c.top_k);
  Reference ref;
  ref.d_logits.assign(c.logits.size(), 0.0);
  for (size_t t = 0; t < static_cast<size_t>(c.tokens); ++t) {
    const double* row = c.logits.data() + t * experts;
    std::vector<size_t> order(experts);
    std::iota(order.begin(), order.end(), size_t{0});
    std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) { return row[a] > row[b]; });
    double sum = 0.0, mean = 0.0;
    for (size_t i = 0; i < k; ++i) {
      sum += std::exp(row[order[i]] - row[order[0]]);
    }
    for (size_t i = 0; i < k; ++i) {
      const double w = std::exp(row[order[i]] - row[order[0]]) / sum;
      ref.chosen.push_back(static_cast<double>(order[i]));
      ref.weights.push_back(w);
      mean += w * c.d_weights[t * k + i];
    }
    for (size_t i = 0; i < k; ++i) {
      ref.d_logits[t * experts + order[i]] = ref.weights[t * k + i] * (c.d_weights[t * k + i] - mean);
    }
  }
  return ref;
}

template <class T>
Outputs run(const Case& c) {
  const auto picks = static_cast<size_t>(c.tokens * c.top_k);
  Buffer<T> logits(c.logits), d_weights(c.d_weights), weights(picks), d_logits(c.logits.size());
  Buffer<int> chosen(picks);
  launched(bridge::router_forward({logits.data(), weights.data(), chosen.data(), c.tokens, c.experts, c.top_k, dtype_of<T>}, nullptr));
  launched(bridge::router_backward(
      {logits.data(), chosen.data(), d_weights.data(), d_logits.data(), c.tokens, c.experts, c.top_k, dtype_of<T>}, nullptr));
  return {{"weights", weights.values()}, {"chosen", chosen.values()}, {"d_logits", d_logits.values()}};
}

template <class T>
void compare(const Case& c) {
  const Reference ref = reference(c);
  Outputs found = under_every_schedule([&] { return run<T>(c); });
  equal("chosen", found["chosen"], ref.chosen);
  close_elements("weights", found["weights"], ref.weights, kOneRounding<T>, 1e-30);
  close_elements("d_logits", found["d_logits"], ref.d_logits, kOneRounding<T>, 1e-6);
  for (size_t i = 0; i < ref.d_logits.size(); ++i) {
    require(ref.d_logits[i] != 0.0 || std::abs(found["d_logits"][i]) < 1e-6, "who was not chosen has no gradient");
  }
}

template <class T>
void random_case(unsigned seed, int64_t tokens, int experts, int top_k, const char* kind) {
  context() = std::string("router ") + name_of<T>() + " experts " + std::to_string(experts) + " top " + std::to_string(top_k) +
              " " + kind;
  Random random(seed);
  Case c{tokens, experts, top_k, {}, {}};
  const auto size = static_cast<size_t>(tokens * experts);
  c.logits = stored<T>(random.normal(size, 2.0));
  if (std::strcmp(kind, "equal") == 0) {
    std::fill(c.logits.begin(), c.logits.end(), -0.75);
  } else if (std::strcmp(kind, "ties") == 0) {
    for (auto& x : c.logits) {
      x = random.below(3) - 1;
    }
  } else if (std::strcmp(kind, "-inf") == 0) {
    for (size_t i = 0; i < size; ++i) {  // at least top_k of a row stay
      c.logits[i] = i % static_cast<size_t>(experts) >= static_cast<size_t>(top_k) && random.below(2) == 0 ? -INFINITY : c.logits[i];
    }
  } else if (std::strcmp(kind, "one") == 0) {
    for (size_t t = 0; t < static_cast<size_t>(tokens); ++t) {
      c.logits[t * static_cast<size_t>(experts) + static_cast<size_t>(experts) - 1] = 80.0;
    }
  }
  c.d_weights = stored<T>(random.normal(static_cast<size_t>(tokens * top_k)));
  compare<T>(c);
}

// The golden's logits are a product x w^T; what the router's own gradient is follows from grad.weight only with the
// auxiliary loss in it, so gradients are compared with the reference alone.
void golden_cases(const Goldens& goldens) {
  for (const std::string name : {"router", "router_ten_of_512"}) {
    context() = name + " golden";
    const Golden &logits = goldens.at(name + ".out.logits"), &weights = goldens.at(name + ".out.weights");
    const Case c{logits.shape[0], static_cast<int>(logits.shape[1]), static_cast<int>(weights.shape[1]), logits.values,
                 goldens.at(name + ".up.weights").values};
    const Reference ref = reference(c);
    equal("reference chosen", ref.chosen, goldens.at(name + ".out.experts").values);
    close_norm("reference weights", ref.weights, weights.values, 1e-9);
    Outputs found = under_every_schedule([&] { return run<float>(c); });
    equal("chosen", found["chosen"], goldens.at(name + ".out.experts").values);
    close_norm("weights", found["weights"], weights.values, 2e-6);
  }
}

// Rows that no softmax is defined for: valid and distinct experts, and weights that show it.
void broken_rows() {
  context() = "router broken rows";
  Case c{2, 8, 3, Values(16, -INFINITY), Values(6, 1.0)};
  c.logits[8 + 5] = -std::nan("");  // below everything by its sign bit
  c.logits[8 + 2] = 1.0;
  const Outputs found = run<float>(c);
  equal("chosen", found.at("chosen"), {0, 1, 2, 5, 2, 0});
  for (double w : found.at("weights")) {
    require(std::isnan(w), "the weights are NaN");
  }
}

void refusals() {
  context() = "router refusals";
  bridge::RouterForward p{nullptr, nullptr, nullptr, 1, 513, 2, DType::kBf16};
  require(bridge::router_forward(p, nullptr) == cudaErrorInvalidValue, "513 experts are refused");
  p.experts = 4;
  p.top_k = 5;
  require(bridge::router_forward(p, nullptr) == cudaErrorInvalidValue, "more choices than experts are refused");
}

template <class T>
void every_shape() {
  unsigned seed = 1;
  for (const auto& [tokens, experts, top_k] : {std::tuple{0, 8, 2}, {1, 8, 2}, {63, 8, 8}, {65, 256, 8}, {33, 512, 10}, {5, 300, 32}, {3, 1, 1}}) {
    random_case<T>(seed++, tokens, experts, top_k, "random");
  }
  for (const char* kind : {"equal", "ties", "-inf", "one"}) {
    random_case<T>(seed++, 9, 256, 8, kind);
    random_case<T>(seed++, 9, 40, 3, kind);
  }
}

}  // namespace

int main(int, char** arguments) {
  golden_cases(Goldens(std::string(arguments[1]) + "/ops.safetensors"));
  every_shape<float>();
  every_shape<Bf16>();
  broken_rows();
  refusals();
  return finish("router");
}
