// Cross entropy against float64: ignored rows, all rows ignored, targets at both ends, odd vocabularies, logits to 80, -inf.

#include "../cross_entropy.cu"

#include "check.hpp"

using namespace check;

namespace {

constexpr int64_t kIgnored = -100;

struct Case {
  int64_t rows, stride;
  int vocabulary;
  Values logits, targets;  // logits: [rows, stride]
};

struct Reference {
  Values losses, d_logits;  // NaN in the gaps
  double scale, total;
};

Reference reference(const Case& c) {
  Reference ref{{}, Values(c.logits.size(), std::nan("")), 0.0, 0.0};
  double count = 0.0;
  for (double target : c.targets) {
    count += target != kIgnored;
  }
  ref.scale = 1.0 / std::max(1.0, count);
  for (size_t row = 0; row < static_cast<size_t>(c.rows); ++row) {
    const double* x = c.logits.data() + row * static_cast<size_t>(c.stride);
    double* d = ref.d_logits.data() + row * static_cast<size_t>(c.stride);
    const double highest = *std::max_element(x, x + c.vocabulary);
    const bool counts = c.targets[row] != kIgnored;
    const bool sound = c.targets[row] >= 0 && c.targets[row] < c.vocabulary && highest > -INFINITY;
    double sum = 0.0;
    for (int i = 0; i < c.vocabulary; ++i) {
      d[i] = 0.0;
      sum += counts && sound ? std::exp(x[i] - highest) : 0.0;
    }
    if (counts && sound) {
      for (int i = 0; i < c.vocabulary; ++i) {
        d[i] = (std::exp(x[i] - highest) / sum - (i == c.targets[row] ? 1.0 : 0.0)) * ref.scale;
      }
    }
    ref.losses.push_back(!counts ? 0.0 : sound ? std::log(sum) + highest - x[static_cast<size_t>(c.targets[row])] : INFINITY);
    ref.total += ref.losses.back();
  }
  ref.total *= ref.scale;
  return ref;
}

template <class T>
Outputs run(const Case& c, bool write_gradient) {
  Buffer<T> logits(c.logits);
  Buffer<int64_t> targets(c.targets);
  Buffer<float> scale(1), losses(static_cast<size_t>(c.rows)), total(1);
  launched(bridge::cross_entropy_scale({targets.data(), scale.data(), c.rows, kIgnored}, nullptr));
  launched(bridge::cross_entropy_rows({logits.data(), targets.data(), scale.data(), losses.data(), c.rows, c.stride, c.vocabulary,
                                       kIgnored, write_gradient, dtype_of<T>},
                                      nullptr));
  launched(bridge::cross_entropy_total({losses.data(), scale.data(), total.data(), c.rows}, nullptr));
  return {{"logits", logits.values()}, {"losses", losses.values()}, {"scale", scale.values()}, {"total", total.values()}};
}

template <class T>
void random_case(unsigned seed, int64_t rows, int vocabulary, double scale, const char* kind) {
  constexpr int kV = bridge::kVec<T>;
  context() = std::string("cross_entropy ") + name_of<T>() + " rows " + std::to_string(rows) + " vocabulary " +
              std::to_string(vocabulary) + " " + kind;
  Random random(seed);
  Case c{rows, (vocabulary + kV - 1) / kV * kV, vocabulary, {}, {}};
  c.logits = stored<T>(random.normal(static_cast<size_t>(rows * c.stride), scale));
  for (int64_t row = 0; row < rows; ++row) {
    double* x = c.logits.data() + row * c.stride;
    for (int64_t i = vocabulary; i < c.stride; ++i) {
      x[i] = std::nan("");  // what lies between rows must not matter
    }
    const int target = row % 4 == 0 ? 0 : row % 4 == 1 ? vocabulary - 1 : random.below(vocabulary);
    c.targets.push_back(row % 5 == 3 || std::strcmp(kind, "ignored") == 0 ? kIgnored : target);
    if (std::strcmp(kind, "-inf") == 0) {
      for (int i = 0; i < vocabulary; ++i) {
        x[i] = i != target && (i % 3 == 0 || row == 2) ? -INFINITY : x[i];
      }
    } else if (std::strcmp(kind, "sure") == 0) {
      x[target] = 80.0;
    } else if (std::strcmp(kind, "wrong") == 0) {
      c.targets.back() = row % 2 == 0 ? vocabulary : -5;
      if (row == 1) {
        c.targets.back() = 0;
        std::fill(x, x + vocabulary, -INFINITY);
      }
    }
    if (c.targets.back() == kIgnored && row % 2 == 1) {
      x[0] = std::nan("");  // an ignored row may hold anything
    }
  }
  const Reference ref = reference(c);
  Outputs found = under_every_schedule([&] { return run<T>(c, true); });
  close_slice("logits", found["logits"], ref.d_logits, sizeof(T) == 2 ? kOneRounding<T> : 2e-5, 2e-7 * ref.scale);
  for (size_t i = 0; i < ref.losses.size(); ++i) {
    require(ref.losses[i] == found["losses"][i] || std::abs(ref.losses[i] - found["losses"][i]) <= 2e-6 * std::abs(ref.losses[i]) + 2e-6,
            "a row's loss is log sum exp minus the target's logit");
  }
  require(ref.total == found["total"][0] || std::abs(ref.total - found["total"][0]) <= 4e-6 * std::abs(ref.total) + 2e-6,
          "the total is the scaled sum");
  close_elements("scale", found["scale"], {ref.scale}, 1e-7, 0.0);

  const Outputs kept = run<T>(c, false);
  require(same_bits(kept.at("losses"), found["losses"]), "losses do not depend on the gradient");
  Buffer<T> untouched(c.logits);
  require(same_bits(kept.at("logits"), untouched.values()), "without a gradient the logits stay");
}

template <class T>
void every_shape() {
  unsigned seed = 1;
  for (int vocabulary : {1, 2, 7, 8, 9, 1000, 4099, 8200}) {
    random_case<T>(seed++, 6, vocabulary, 2.0, "random");
  }
  for (const char* kind : {"ignored", "-inf", "sure", "wrong"}) {
    random_case<T>(seed++, 6, 517, 1.0, kind);
  }
  random_case<T>(seed++, 0, 32, 1.0, "random");
  random_case<T>(seed++, 1, 32, 1.0, "random");
  random_case<T>(seed++, 5, 300, 30.0, "random");
}

void refusals() {
  context() = "cross_entropy refusals";
  bridge::CrossEntropyRows p{nullptr, nullptr, nullptr, nullptr, 1, 9, 9, kIgnored, true, DType::kBf16};
  require(bridge::cross_entropy_rows(p, nullptr) == cudaErrorInvalidValue, "an unaligned stride is refused");
  p.row_stride = 8;
  require(bridge::cross_entropy_rows(p, nullptr) == cudaErrorInvalidValue, "a stride below the vocabulary is refused");
}

}  // namespace

int main() {
  every_shape<float>();
  every_shape<Bf16>();
  refusals();
  return finish("cross_entropy");
}
