// The gated delta rule's forward against the float64 recurrence on the same bfloat16 inputs: lengths, packs, head ratios,
// decays from 0 to -50 a token, beta 0 and 1, equal and zero keys, states, slices of wider tensors.

#include "gdn_run.hpp"

using namespace check;

namespace {

Outputs run(const Inputs& in) {
  GdnForwardRun forward(in);
  forward.p.delta = nullptr;  // as a forward without a backward
  forward.run();
  // The states that chunks start from are those that the outputs came from: the last one leads to the final state, so a few
  // sums over them suffice to see that all were written and are the same in every run.
  const size_t states = static_cast<size_t>(forward.map.first()[in.pack.sequences()]) * static_cast<size_t>(in.c.value_heads);
  Values sums(states);
  for (size_t i = 0; i < states * kD * kD; ++i) {
    sums[i / (kD * kD)] += to_double(forward.chunk_states.data()[i]);
  }
  return {{"out", forward.out.values()},         {"state", forward.final_state.values()}, {"rho_k", forward.rho_k.values()},
          {"decay", forward.decay.values()},     {"beta", forward.beta.values()},         {"inverse", forward.inverse.values()},
          {"chunk states", sums}};
}

// G, beta, rho and the inverse of every chunk.
void compare_prepared(const Inputs& in, Outputs& found) {
  const GdnCase& c = in.c;
  const auto hk = static_cast<size_t>(c.key_heads), hv = static_cast<size_t>(c.value_heads);
  size_t first = 0;
  double worst = 0.0;
  for (int length : c.lengths) {
    for (size_t chunk = 0; chunk < static_cast<size_t>(length); chunk += 64) {
      const size_t m = std::min<size_t>(64, static_cast<size_t>(length) - chunk);
      for (size_t head = 0; head < hv; ++head) {
        double sum = 0.0;
        Values sums;
        std::vector<Values> keys(m), rows(m);
        for (size_t i = 0; i < m; ++i) {
          const size_t token = first + chunk + i;
          const double* k = c.k.data() + (token * hk + head / (hv / hk)) * kD;
          double squares = 1e-6;
          for (size_t d = 0; d < kD; ++d) {
            squares += k[d] * k[d];
          }
          for (size_t d = 0; d < kD; ++d) {
            keys[i].push_back(k[d] / std::sqrt(squares));
          }
          sum += c.g[token * hv + head];
          require(std::abs(found["decay"][token * hv + head] - sum) <= 2e-6 * std::abs(sum) + 1e-7, "decay is the sum of g in the chunk");
          sums.push_back(sum);
          // Row i of T: e_i - beta_i sum_j (k_i k_j) Gamma_ij row j.
          rows[i].assign(64, 0.0);
          rows[i][i] = 1.0;
          for (size_t j = 0; j < i; ++j) {
            double product = 0.0;
            for (size_t d = 0; d < kD; ++d) {
              product += keys[i][d] * keys[j][d];
            }
            for (size_t column = 0; column <= j; ++column) {
              rows[i][column] -= c.beta[token * hv + head] * product * std::exp(sums[i] - sums[j]) * rows[j][column];
            }
          }
          for (size_t column = 0; column < 64; ++column) {
            const double off = found["inverse"][(token * hv + head) * 64 + column] - rows[i][column] + (column == i ? 1.0 : 0.0);
            worst = std::isnan(off) ? INFINITY : std::max(worst, std::abs(off));
          }
        }
      }
    }
    first += static_cast<size_t>(length);
  }
  for (size_t i = 0; i < first * hv; ++i) {
    require(std::abs(found["beta"][i] - c.beta[i]) <= (in.gates == DType::kBf16 ? 0.004 : 1e-6) * c.beta[i] + 1e-30, "beta is the sigmoid of b");
  }
  // Entries are at most 1: half a unit of the last place of bfloat16 there, and the float32 products.
  if (!(worst <= 0.0021)) {
    complain("the inverse is off by %g", worst);
  }
}

double compare(const Inputs& in, bool all_schedules = true) {
  const GdnResult ref = gdn_reference(in.c);
  Outputs found = all_schedules ? under_every_schedule([&] { return run(in); }) : run(in);
  compare_prepared(in, found);
  const auto heads = static_cast<size_t>(in.c.value_heads);
  const size_t real = (in.c.tokens() - static_cast<size_t>(in.c.tail)) * heads * kD;
  for (size_t i = real; i < found["out"].size(); ++i) {
    require(found["out"][i] == 0.0, "tokens of no sequence give zeros");
  }
  for (double sum : found["chunk states"]) {
    require(std::isfinite(sum), "the state of every chunk is written");
  }
  close_elements("out", found["out"], ref.out, 0.0, 0.02 * largest(ref.out) + 1e-6);
  close_norm("state", found["state"], ref.state, kTolerance, 1e-6);
  return close_norm("out", found["out"], ref.out, kTolerance, 1e-6);
}

void random_case(unsigned seed, const Pack& pack, int key_heads, int ratio, Decay decay, const char* kind, bool state,
                 bool all_schedules = true) {
  name_case("gdn_forward", pack, key_heads, ratio, decay, kind);
  const double off = compare(random_inputs(seed, pack, key_heads, ratio, decay, kind, state), all_schedules);
  std::printf("%s: relative error %.1e\n", context().c_str(), off);
}

// Every golden holds for the reference, and the one with heads of 128 for the kernel.
void goldens(const Goldens& file) {
  for (const auto& [name, c] : gdn_goldens(file)) {
    context() = "golden " + name;
    const GdnResult ref = gdn_reference(c);
    close_norm("reference out", ref.out, file.at(name + ".out.out").values, 1e-7);
    close_norm("reference state", ref.state, file.at(name + ".out.state").values, 1e-7);
    if (c.key_dim != 128) {
      continue;
    }
    Inputs kernel{c, {"golden", c.lengths, 0, false}, {}, {}, {0.0}, {0.0}, DType::kF32, 0};
    kernel.c.q = stored<Bf16>(c.q);
    kernel.c.k = stored<Bf16>(c.k);
    kernel.c.v = stored<Bf16>(c.v);
    for (size_t i = 0; i < c.g.size(); ++i) {
      kernel.a.push_back(std::log(std::expm1(-c.g[i])));
      kernel.b.push_back(std::log(c.beta[i] / (1.0 - c.beta[i])));
    }
    kernel.a = stored<float>(kernel.a);
    kernel.b = stored<float>(kernel.b);
    set_gates(kernel);
    compare(kernel);
    // Rounding q, k and v to bfloat16 costs as much again.
    close_norm("out against the golden", run(kernel).at("out"), file.at(name + ".out.out").values, 2 * kTolerance);
  }
}

}  // namespace

int main(int, char** arguments) {
  goldens(Goldens(std::string(arguments[1]) + "/delta_rule.safetensors"));
  unsigned seed = 1;
  for (const Pack& pack : packs()) {
    // The other orders of threads cost as much again each: packs with several chunks and borders show what they can.
    random_case(seed, pack, 1, 1 + static_cast<int>(seed % 2), Decay::kReal, "random", seed % 2 == 0, pack.tokens() < 140);
    ++seed;
  }
  const Pack ragged{"70+0+65", {70, 0, 65}, 3, false};
  for (int ratio : {1, 2, 3, 4}) {
    random_case(seed++, ragged, ratio <= 2 ? 2 : 1, ratio, Decay::kSlow, "random", ratio % 2 == 0, ratio == 3);
  }
  for (const Decay decay : {Decay::kNone, Decay::kStrong, Decay::kMixed, Decay::kFirst}) {
    random_case(seed++, {"130", {130}, 0, false}, 1, 1, decay, "random", true, false);
  }
  for (const char* kind : {"beta 0", "beta 1", "beta 30", "equal keys", "zero rows", "correlated", "exact gates"}) {
    random_case(seed++, {"129", {129}, 0, false}, 1, 1, Decay::kSlow, kind, true, false);
  }
  random_case(seed++, {"1000", {1000}, 0, false}, 1, 1, Decay::kReal, "random", false, false);
  context() = "gdn_forward refusals";
  gdn_refusals(bridge::gdn_forward, {});
  return finish("gdn_forward");
}
