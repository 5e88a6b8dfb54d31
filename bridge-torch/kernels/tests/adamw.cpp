// AdamW against float64: tensors of odd sizes, masters, clipping, a norm that is not finite, tensors without a gradient or with
// steps behind them; random roundings that hit neighbours only and have no bias; 8-bit moments that follow the exact ones.

#include "../adamw.cu"

#include "check.hpp"

using namespace check;

namespace {

struct Exact {
  Values w, m, v;
};

void exact_step(Exact& e, const Values& g, double clip, int step, double lr, double beta1, double beta2, double eps, double decay) {
  for (size_t i = 0; i < g.size(); ++i) {
    const double gradient = g[i] * clip;
    e.m[i] += (1.0 - beta1) * (gradient - e.m[i]);
    e.v[i] = beta2 * e.v[i] + (1.0 - beta2) * gradient * gradient;
    const double denominator = std::sqrt(e.v[i]) / std::sqrt(1.0 - std::pow(beta2, step)) + eps;
    e.w[i] = e.w[i] * (1.0 - lr * decay) - lr / (1.0 - std::pow(beta1, step)) * e.m[i] / denominator;
  }
}

struct Options {
  bool masters, eight_bit, stochastic;
  double max_norm, lr, decay;
  uint64_t seed;
};

// Tensors in device memory, as an optimizer holds them.
template <class P, class G>
struct Device {
  std::vector<std::unique_ptr<Buffer<P>>> parameters;
  std::vector<std::unique_ptr<Buffer<G>>> gradients;
  std::vector<std::unique_ptr<Buffer<float>>> masters, averages, squares, average_scales, square_scales, counts;
  std::vector<std::unique_ptr<Buffer<uint8_t>>> average_codes, square_codes;
  std::vector<bridge::AdamWTensor> tensors;
  std::vector<bridge::AdamWChunk> chunks;
  bridge::AdamWProgress progress{};
  Options options;

  Device(const std::vector<Values>& start, const Options& o) : options(o) {
    for (const Values& w : start) {
      const size_t n = w.size(), blocks = (n + 255) / 256;
      parameters.push_back(std::make_unique<Buffer<P>>(w));
      gradients.push_back(std::make_unique<Buffer<G>>(n));
      masters.push_back(std::make_unique<Buffer<float>>(o.masters ? w : Values{}));
      const Values zeros(n, 0.0), no_scales(o.eight_bit ? blocks : 0, 0.0);
      averages.push_back(std::make_unique<Buffer<float>>(o.eight_bit ? Values{} : zeros));
      squares.push_back(std::make_unique<Buffer<float>>(o.eight_bit ? Values{} : zeros));
      average_codes.push_back(std::make_unique<Buffer<uint8_t>>(o.eight_bit ? zeros : Values{}));
      square_codes.push_back(std::make_unique<Buffer<uint8_t>>(o.eight_bit ? zeros : Values{}));
      average_scales.push_back(std::make_unique<Buffer<float>>(no_scales));
      square_scales.push_back(std::make_unique<Buffer<float>>(no_scales));
      counts.push_back(std::make_unique<Buffer<float>>(Values{0.0}));
      bridge::AdamWTensor t{};
      t.parameter = parameters.back()->data();
      t.master = o.masters ? masters.back()->data() : nullptr;
      t.exp_avg = o.eight_bit ? static_cast<void*>(average_codes.back()->data()) : averages.back()->data();
      t.exp_avg_sq = o.eight_bit ? static_cast<void*>(square_codes.back()->data()) : squares.back()->data();
      t.exp_avg_scale = o.eight_bit ? average_scales.back()->data() : nullptr;
      t.exp_avg_sq_scale = o.eight_bit ? square_scales.back()->data() : nullptr;
      t.count = counts.back()->data();
      t.numel = static_cast<int64_t>(n);
      t.weight_decay = static_cast<float>(o.decay);
      t.dtype = dtype_of<P>;
      for (int64_t first = 0; first < t.numel; first += bridge::kAdamWChunk) {
        chunks.push_back({first, static_cast<int>(tensors.size())});
      }
      tensors.push_back(t);
    }
  }

  // An empty gradient is none.
  void step(const std::vector<Values>& g) {
    std::vector<bridge::AdamWGradient> given;
    for (size_t i = 0; i < g.size(); ++i) {
      given.push_back({g[i].empty() ? nullptr : gradients[i]->data(), dtype_of<G>});
      for (size_t j = 0; j < g[i].size(); ++j) {
        gradients[i]->data()[j] = from_double<G>(g[i][j]);
      }
    }
    Buffer<double> workspace(chunks.size());
    std::vector<bridge::AdamWCorrection> corrections(tensors.size());
    bridge::AdamW p{};
    p.tensors = tensors.data();
    p.gradients = given.data();
    p.chunks = chunks.data();
    p.corrections = corrections.data();
    p.num_tensors = static_cast<int64_t>(tensors.size());
    p.progress = &progress;
    p.workspace = workspace.data();
    p.num_chunks = static_cast<int64_t>(chunks.size());
    p.lr = static_cast<float>(options.lr);
    p.beta1 = 0.9;
    p.beta2 = 0.95;
    p.eps = 1e-8f;
    p.max_norm = static_cast<float>(options.max_norm);
    p.eight_bit = options.eight_bit;
    p.stochastic = options.stochastic;
    p.seed = options.seed;
    launched(bridge::adamw_step(p, nullptr));
  }

  Values average(size_t i) {
    if (!options.eight_bit) {
      return averages[i]->values();
    }
    Values out;
    for (size_t j = 0; j < average_codes[i]->size(); ++j) {
      out.push_back(bridge::decode<true>(average_codes[i]->data()[j], average_scales[i]->data()[j / 256]));
    }
    return out;
  }
  Values square(size_t i) {
    if (!options.eight_bit) {
      return squares[i]->values();
    }
    Values out;
    for (size_t j = 0; j < square_codes[i]->size(); ++j) {
      out.push_back(bridge::decode<false>(square_codes[i]->data()[j], square_scales[i]->data()[j / 256]));
    }
    return out;
  }
};

double norm_of(const std::vector<Values>& tensors) {
  double sum = 0.0;
  for (const Values& t : tensors) {
    for (double x : t) {
      sum += x * x;
    }
  }
  return std::sqrt(sum);
}

// Several steps with float32 moments: parameters, masters and moments as float64 has them.
template <class P, class G>
void exact_case(const char* name, bool masters, double max_norm) {
  context() = std::string("adamw ") + name;
  Random random(11);
  const std::vector<size_t> sizes = {1, 7, 8, 255, 256, 300, 66000, 2048};
  const Options options{masters, false, false, max_norm, 1e-2, 0.1, 1};
  std::vector<Values> start;
  std::vector<Exact> exact;
  for (size_t n : sizes) {
    start.push_back(stored<P>(random.normal(n)));
    exact.push_back({start.back(), Values(n), Values(n)});
  }
  std::vector<std::vector<Values>> gradients;
  for (int step = 0; step < 3; ++step) {
    gradients.emplace_back();
    for (size_t n : sizes) {
      gradients.back().push_back(stored<G>(random.normal(n, step == 1 ? 1e-4 : 0.02)));
      gradients.back().back()[0] = 0.0;  // no gradient: the root of nothing
    }
  }
  Outputs found = under_every_schedule([&] {
    Device<P, G> device(start, options);
    Outputs out;
    for (const auto& g : gradients) {
      device.step(g);
    }
    for (size_t i = 0; i < sizes.size(); ++i) {
      out["parameter " + std::to_string(i)] = device.parameters[i]->values();
      out["master " + std::to_string(i)] = device.masters[i]->values();
      out["average " + std::to_string(i)] = device.average(i);
      out["square " + std::to_string(i)] = device.square(i);
    }
    out["norm"] = {device.progress.norm, device.progress.clip, device.counts[4]->values()[0]};
    return out;
  });
  double norm = 0.0, clip = 1.0;
  for (size_t step = 0; step < gradients.size(); ++step) {
    norm = norm_of(gradients[step]);
    clip = max_norm > 0 ? std::min(1.0, max_norm / (norm + 1e-6)) : 1.0;
    for (size_t i = 0; i < sizes.size(); ++i) {
      exact_step(exact[i], gradients[step][i], clip, static_cast<int>(step) + 1, options.lr, 0.9, 0.95, 1e-8, options.decay);
      if (!masters && sizeof(P) == 2) {
        exact[i].w = stored<P>(exact[i].w);
      }
    }
  }
  close_elements("norm, clip, steps", found["norm"], {norm, clip, 3.0}, 1e-6, 0.0);
  for (size_t i = 0; i < sizes.size(); ++i) {
    const std::string n = std::to_string(i);
    close_elements("average", found["average " + n], exact[i].m, 3e-6, 1e-9);
    close_elements("square", found["square " + n], exact[i].v, 3e-6, 1e-12);
    if (masters) {
      close_elements("master", found["master " + n], exact[i].w, 1e-6, 1e-6);
      equal("parameter", found["parameter " + n], stored<P>(found["master " + n]));
    } else {
      // Without masters a rounding may fall to the other side at each step.
      close_elements("parameter", found["parameter " + n], exact[i].w, sizeof(P) == 2 ? 0.02 : 1e-6, 1e-6);
    }
  }
}

// A norm that is not finite changes nothing, and the next step counts as if it had not been.
void not_finite() {
  context() = "adamw not finite";
  Random random(3);
  const std::vector<Values> start = {stored<Bf16>(random.normal(300))};
  for (const double poison : Values{INFINITY, std::nan("")}) {
    Device<Bf16, Bf16> device(start, {true, false, false, 1.0, 1e-2, 0.1, 1});
    std::vector<Values> g = {stored<Bf16>(random.normal(300))};
    g[0][299] = poison;
    device.step(g);
    require(device.progress.finite == 0 && device.counts[0]->values()[0] == 0.0, "the step is not made");
    equal("parameter", device.parameters[0]->values(), start[0]);
    equal("average", device.average(0), Values(300));
    g[0][299] = 0.0;
    device.step(g);
    require(device.progress.finite == 1 && device.counts[0]->values()[0] == 1.0, "the next step is the first");
  }
}

// A tensor without a gradient stays, and takes no part in the norm; one that goes on from a saved state is corrected by its own
// count, whatever its neighbours have made.
void counts_of_their_own() {
  context() = "adamw counts";
  Random random(5);
  const std::vector<Values> start = {stored<float>(random.normal(300)), stored<float>(random.normal(300)), stored<float>(random.normal(9))};
  Device<float, float> device(start, {false, false, false, 1.0, 1e-2, 0.1, 1});
  device.counts[2]->data()[0] = 7.0f;
  const Values first = stored<float>(random.normal(300)), last = stored<float>(random.normal(9));
  device.step({first, {}, last});
  const double norm = norm_of({first, last}), clip = std::min(1.0, 1.0 / (norm + 1e-6));
  close_elements("norm", {device.progress.norm}, {norm}, 1e-6, 0.0);
  equal("parameter without a gradient", device.parameters[1]->values(), start[1]);
  equal("average without a gradient", device.average(1), Values(300));
  for (const auto& [i, step] : {std::pair{0, 1}, std::pair{2, 8}}) {
    Exact exact{start[i], Values(start[i].size()), Values(start[i].size())};
    exact_step(exact, i == 0 ? first : last, clip, step, 1e-2, 0.9, 0.95, 1e-8, 0.1);
    close_elements("parameter", device.parameters[i]->values(), exact.w, 1e-6, 1e-6);
  }
  const Values counts = {device.counts[0]->values()[0], device.counts[1]->values()[0], device.counts[2]->values()[0]};
  equal("counts", counts, {1.0, 0.0, 8.0});
}

// Every rounding hits a neighbour of the exact value, and their mean over many is that value.
void stochastic_parameters() {
  context() = "adamw stochastic parameters";
  Random random(9);
  const size_t n = 40000;
  const std::vector<Values> start = {Values(n, 1.0)};
  Device<Bf16, float> device(start, {false, false, true, 0.0, 1e-3, 0.0, 77});
  device.step({Values(n, 0.5)});
  Exact exact{Values(1, 1.0), Values(1), Values(1)};
  exact_step(exact, Values(1, 0.5), 1.0, 1, 1e-3, 0.9, 0.95, 1e-8, 0.0);
  double mean = 0.0;
  for (double w : device.parameters[0]->values()) {
    require(w == 1.0 || w == 1.0 - 1.0 / 256, "a rounding hits a neighbour");
    mean += w / static_cast<double>(n);
  }
  // The standard error of the mean is 1.7e-3 of the gap here; the whole step is a quarter of the gap.
  require(std::abs(mean - exact.w[0]) < 4.0 * std::sqrt(0.25 * 0.75 / static_cast<double>(n)) / 256, "roundings have no bias");
  const Values first = device.parameters[0]->values();
  Device<Bf16, float> again(start, {false, false, true, 0.0, 1e-3, 0.0, 77}), other(start, {false, false, true, 0.0, 1e-3, 0.0, 78});
  again.step({Values(n, 0.5)});
  other.step({Values(n, 0.5)});
  require(same_bits(again.parameters[0]->values(), first), "a seed gives the same bits");
  require(!same_bits(other.parameters[0]->values(), first), "another seed gives others");
}

// 8-bit moments: one step is off by at most a code, and many steps follow float64 without drift.
void eight_bits() {
  context() = "adamw 8-bit moments";
  Random random(21);
  const std::vector<size_t> sizes = {1, 9, 256, 700, 66000};
  std::vector<Values> start;
  std::vector<Exact> exact;
  for (size_t n : sizes) {
    start.push_back(stored<float>(random.normal(n)));
    exact.push_back({start.back(), Values(n), Values(n)});
  }
  std::vector<std::vector<Values>> gradients;
  for (int step = 0; step < 12; ++step) {
    gradients.emplace_back();
    for (size_t n : sizes) {
      Values g = random.normal(n, 0.02, 0.03);
      for (size_t i = 0; i < n; ++i) {
        g[i] *= i % 2 == 0 ? 1.0 : 1e-2;  // magnitudes apart within a block
      }
      gradients.back().push_back(stored<Bf16>(g));
    }
  }
  const Options options{true, true, false, 0.0, 1e-3, 0.0, 5};
  Outputs first = under_every_schedule([&] {
    Device<Bf16, Bf16> device(start, options);
    device.step(gradients[0]);
    return Outputs{{"average", device.average(4)}, {"square", device.square(4)}, {"average 3", device.average(3)}};
  });
  Device<Bf16, Bf16> device(start, options);
  for (size_t step = 0; step < gradients.size(); ++step) {
    device.step(gradients[step]);
    for (size_t i = 0; i < sizes.size(); ++i) {
      exact_step(exact[i], gradients[step][i], 1.0, static_cast<int>(step) + 1, options.lr, 0.9, 0.95, 1e-8, 0.0);
    }
    if (step == 0) {
      const Values average = device.average(4), square = device.square(4);
      for (size_t i = 0; i < average.size(); ++i) {
        const size_t block = i / 256 * 256;
        double largest = 0.0, largest_square = 0.0;
        for (size_t j = block; j < std::min(block + 256, average.size()); ++j) {
          largest = std::max(largest, std::abs(exact[4].m[j]));
          largest_square = std::max(largest_square, exact[4].v[j]);
        }
        require(std::abs(average[i] - exact[4].m[i]) <= 0.126 * std::abs(exact[4].m[i]) + largest * 3.1e-5, "exp_avg is off by one code at most");
        require(std::abs(square[i] - exact[4].v[i]) <= 0.126 * exact[4].v[i] + largest_square * 5e-10, "exp_avg_sq is off by one code at most");
      }
      close_elements("average", first["average"], average, 0.0, 0.0);
    }
  }
  // After twelve steps the roundings of single elements differ, their means do not.
  double average = 0.0, expected_average = 0.0, square = 0.0, expected_square = 0.0, moved = 0.0, expected_moved = 0.0;
  const Values averages = device.average(4), squares = device.square(4), masters = device.masters[4]->values();
  for (size_t i = 1; i < averages.size(); i += 2) {  // the small half: where rounding to nearest would stall or vanish
    average += averages[i];
    expected_average += exact[4].m[i];
    square += squares[i];
    expected_square += exact[4].v[i];
    moved += masters[i] - start[4][i];
    expected_moved += exact[4].w[i] - start[4][i];
  }
  require(std::abs(average / expected_average - 1.0) < 5e-3, "exp_avg has no bias");
  require(std::abs(square / expected_square - 1.0) < 5e-3, "exp_avg_sq has no bias");
  require(std::abs(moved / expected_moved - 1.0) < 2e-2, "the parameters move as far");
}

// A constant gradient: the averages come as near to it as the exact ones. Rounding to nearest would leave exp_avg_sq where its
// changes fall below half a code, at six tenths of the way.
void eight_bits_move_on() {
  context() = "adamw 8-bit moments under a constant gradient";
  const size_t n = 4096;
  Values g(n, 0.01);
  for (size_t i = 0; i < n; i += 256) {
    g[i] = 0.13;  // the largest of a block is its scale and always exact
  }
  Device<float, float> device({Values(n, 1.0)}, {false, true, false, 0.0, 1e-4, 0.0, 3});
  Exact exact{Values(n, 1.0), Values(n), Values(n)};
  for (int step = 1; step <= 60; ++step) {
    device.step({g});
    exact_step(exact, g, 1.0, step, 1e-4, 0.9, 0.95, 1e-8, 0.0);
  }
  const Values average = device.average(0), square = device.square(0);
  double mean = 0.0, mean_square = 0.0;
  for (size_t i = 0; i < n; ++i) {
    mean += i % 256 == 0 ? 0.0 : average[i] / exact.m[i] / (static_cast<double>(n) * 255 / 256);
    mean_square += i % 256 == 0 ? 0.0 : square[i] / exact.v[i] / (static_cast<double>(n) * 255 / 256);
  }
  require(std::abs(mean - 1.0) < 0.01, "exp_avg arrives");
  require(std::abs(mean_square - 1.0) < 0.01, "exp_avg_sq arrives");
}

// The known answers of Random123.
void generator() {
  context() = "philox";
  const auto zeros = bridge::philox(0, 0, 0, 0, 0);
  require(zeros.word[0] == 0x6627E8D5u && zeros.word[1] == 0xE169C58Du && zeros.word[2] == 0xBC57AC4Cu && zeros.word[3] == 0x9B00DBD8u,
          "philox4x32-10 of zeros");
  const auto ones = bridge::philox(~0u, ~0u, ~0u, ~0u, ~uint64_t{0});
  require(ones.word[0] == 0x408F276Du && ones.word[1] == 0x41C83B0Eu && ones.word[2] == 0xA20BC7C6u && ones.word[3] == 0x6D5451FDu,
          "philox4x32-10 of ones");
}

}  // namespace

int main() {
  generator();
  exact_case<Bf16, Bf16>("bf16 with masters, clipped", true, 1.0);
  exact_case<float, float>("f32", false, 0.0);
  exact_case<Bf16, float>("bf16 without masters", false, 100.0);
  not_finite();
  counts_of_their_own();
  stochastic_parameters();
  eight_bits();
  eight_bits_move_on();
  return finish("adamw");
}
