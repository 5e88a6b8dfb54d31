// The counting sort and its copies: stable, the inverse of itself, experts without rows, one expert that takes all; the shared
// expert's term with its gate open, shut and in between.

#include "../dispatch.cu"

#include "check.hpp"

using namespace check;

namespace {

struct Case {
  int64_t tokens;
  int experts, top_k, width;
  Values chosen, x, rows, weights, g, shared, gate;
};

template <class T>
Outputs run(const Case& c) {
  const int64_t assignments = c.tokens * c.top_k;
  const auto n = static_cast<size_t>(assignments);
  Buffer<int> chosen(c.chosen), offsets(static_cast<size_t>(c.experts) + 1), row_of(n), assignment_of(n);
  Buffer<int> workspace(bridge::dispatch_workspace_bytes(assignments, c.experts) / sizeof(int));
  launched(bridge::dispatch_plan({chosen.data(), offsets.data(), row_of.data(), assignment_of.data(), workspace.data(),
                                  assignments, c.experts},
                                 nullptr));
  Buffer<T> x(c.x), rows(c.rows), weights(c.weights), g(c.g);
  Buffer<T> shared(c.shared), gate(c.gate), with_shared(c.x.size()), d_shared(c.x.size()), d_gate(c.gate.size());
  Buffer<T> permuted(c.rows.size()), d_rows(c.rows.size()), combined(c.x.size()), d_x(c.x.size());
  constexpr DType kType = dtype_of<T>;
  const auto permute = [&](Buffer<T>& from, const void* scale, Buffer<T>& to) {
    launched(bridge::permute({from.data(), scale, assignment_of.data(), to.data(), c.tokens, c.width, c.top_k, kType}, nullptr));
  };
  const auto combine = [&](const void* scale, const void* extra, const void* logits, Buffer<T>& to) {
    launched(bridge::combine(
        {rows.data(), scale, row_of.data(), extra, logits, to.data(), c.tokens, c.width, c.top_k, kType}, nullptr));
  };
  const auto combine_shared = [&](Buffer<T>& from, Buffer<T>& to) {
    launched(bridge::combine_shared(
        {g.data(), from.data(), gate.data(), to.data(), d_gate.data(), c.tokens, c.width, kType}, nullptr));
  };
  permute(x, nullptr, permuted);
  permute(g, weights.data(), d_rows);
  combine(weights.data(), nullptr, nullptr, combined);
  combine(nullptr, nullptr, nullptr, d_x);
  combine(weights.data(), shared.data(), gate.data(), with_shared);
  combine_shared(shared, d_shared);
  Buffer<T> in_place(c.shared);
  combine_shared(in_place, in_place);
  require(same_bits(in_place.values(), d_shared.values()), "d_shared may lie on shared");
  return {{"offsets", offsets.values()}, {"row_of", row_of.values()}, {"assignment_of", assignment_of.values()},
          {"permuted", permuted.values()}, {"d_rows", d_rows.values()}, {"combined", combined.values()},
          {"d_x", d_x.values()}, {"with_shared", with_shared.values()},
          {"d_shared", d_shared.values()}, {"d_gate", d_gate.values()}};
}

template <class T>
void random_case(unsigned seed, int64_t tokens, int experts, int top_k, int width, const char* kind) {
  context() = std::string("dispatch ") + name_of<T>() + " tokens " + std::to_string(tokens) + " experts " +
              std::to_string(experts) + " top " + std::to_string(top_k) + " " + kind;
  Random random(seed);
  Case c{tokens, experts, top_k, width, {}, {}, {}, {}, {}, {}, {}};
  const auto n = static_cast<size_t>(tokens * top_k), w = static_cast<size_t>(width), k = static_cast<size_t>(top_k);
  for (size_t i = 0; i < n; ++i) {
    c.chosen.push_back(std::strcmp(kind, "one") == 0   ? experts - 1
                       : std::strcmp(kind, "few") == 0 ? std::min(experts - 1, 2 * random.below(std::max(1, experts / 4)) + 1)
                                                       : random.below(experts));
  }
  c.x = stored<T>(random.normal(static_cast<size_t>(tokens) * w));
  c.g = stored<T>(random.normal(static_cast<size_t>(tokens) * w));
  c.rows = stored<T>(random.normal(n * w));
  c.weights = stored<T>(random.uniform(n, 0.0, 1.0));
  c.shared = stored<T>(random.normal(c.x.size()));
  c.gate = random.normal(static_cast<size_t>(tokens), 3.0);
  for (size_t t = 0; t < c.gate.size(); ++t) {
    c.gate[t] = t % 7 == 3 ? 1e4 : t % 7 == 4 ? -1e4 : t % 7 == 5 ? 12.0 : t % 7 == 6 ? -12.0 : c.gate[t];
  }
  c.gate = stored<T>(c.gate);

  std::vector<size_t> order(n);
  std::iota(order.begin(), order.end(), size_t{0});
  std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) { return c.chosen[a] < c.chosen[b]; });
  Values offsets(static_cast<size_t>(experts) + 1), row_of(n), assignment_of(n), permuted(n * w), d_rows(n * w),
      combined(static_cast<size_t>(tokens) * w), d_x(combined);
  for (size_t row = 0; row < n; ++row) {
    const size_t a = order[row], token = a / k;
    assignment_of[row] = static_cast<double>(a);
    row_of[a] = static_cast<double>(row);
    offsets[static_cast<size_t>(c.chosen[a]) + 1] += 1.0;
    for (size_t i = 0; i < w; ++i) {
      permuted[row * w + i] = c.x[token * w + i];
      d_rows[row * w + i] = c.weights[a] * c.g[token * w + i];
      combined[token * w + i] += c.weights[a] * c.rows[row * w + i];
      d_x[token * w + i] += c.rows[row * w + i];
    }
  }
  Values with_shared = combined, d_shared(c.x.size()), d_gate, terms;
  for (size_t t = 0; t < c.gate.size(); ++t) {
    const double open = sigmoid64(c.gate[t]), slope = open * sigmoid64(-c.gate[t]);
    double along = 0.0, sizes = 0.0;
    for (size_t i = t * w; i < (t + 1) * w; ++i) {
      with_shared[i] += open * c.shared[i];
      d_shared[i] = open * c.g[i];
      along += c.g[i] * c.shared[i];
      sizes += std::abs(c.g[i] * c.shared[i]);
    }
    d_gate.push_back(along * slope);
    terms.push_back(sizes * slope);
  }
  std::partial_sum(offsets.begin(), offsets.end(), offsets.begin());

  Outputs found = under_every_schedule([&] { return run<T>(c); });
  equal("offsets", found["offsets"], offsets);
  equal("row_of", found["row_of"], row_of);
  equal("assignment_of", found["assignment_of"], assignment_of);
  equal("permuted", found["permuted"], permuted);
  close_elements("d_rows", found["d_rows"], d_rows, kOneRounding<T>, 1e-30);
  close_elements("combined", found["combined"], combined, kOneRounding<T>, 1e-6 * top_k);
  close_elements("d_x", found["d_x"], d_x, kOneRounding<T>, 1e-6 * top_k);
  close_elements("with_shared", found["with_shared"], with_shared, kOneRounding<T>, 1e-6 * (top_k + 1));
  close_elements("d_shared", found["d_shared"], d_shared, kOneRounding<T>, 1e-30);
  for (size_t t = 0; t < d_gate.size(); ++t) {
    close_elements("d_gate", {found["d_gate"][t]}, {d_gate[t]}, kOneRounding<T>, 1e-6 * terms[t]);
  }
}

void refusals() {
  context() = "dispatch refusals";
  bridge::DispatchPlan plan{nullptr, nullptr, nullptr, nullptr, nullptr, 1, 513};
  require(bridge::dispatch_plan(plan, nullptr) == cudaErrorInvalidValue, "513 experts are refused");
  bridge::Combine p{nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, 1, 12, 2, DType::kBf16};
  require(bridge::combine(p, nullptr) == cudaErrorInvalidValue, "a width of half pieces is refused");
  Buffer<Bf16> some(16);
  p = {nullptr, nullptr, nullptr, some.data(), nullptr, nullptr, 0, 16, 2, DType::kBf16};
  require(bridge::combine(p, nullptr) == cudaErrorInvalidValue, "a shared expert without a gate is refused");
  p = {nullptr, nullptr, nullptr, nullptr, some.data(), nullptr, 0, 16, 2, DType::kBf16};
  require(bridge::combine(p, nullptr) == cudaErrorInvalidValue, "a gate without a shared expert is refused");
  bridge::CombineShared s{nullptr, nullptr, nullptr, nullptr, nullptr, 1, 12, DType::kBf16};
  require(bridge::combine_shared(s, nullptr) == cudaErrorInvalidValue, "a width of half pieces is refused in the shared term");
  s = {nullptr, nullptr, nullptr, nullptr, nullptr, -1, 16, DType::kBf16};
  require(bridge::combine_shared(s, nullptr) == cudaErrorInvalidValue, "fewer than no tokens are refused");
}

}  // namespace

int main() {
  unsigned seed = 1;
  for (const auto& [tokens, experts, top_k] :
       {std::tuple{0, 8, 2}, {1, 8, 2}, {63, 8, 3}, {64, 40, 4}, {65, 256, 8}, {200, 512, 10}, {1000, 16, 2}, {129, 1, 1}}) {
    random_case<Bf16>(seed++, tokens, experts, top_k, 16, "random");
    random_case<float>(seed++, tokens, experts, top_k, 8, "few");
  }
  random_case<Bf16>(seed++, 300, 512, 8, 8, "one");
  random_case<Bf16>(seed++, 33, 256, 8, 520, "random");
  refusals();
  return finish("dispatch");
}
