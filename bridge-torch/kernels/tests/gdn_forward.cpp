// The gated delta rule's forward against the float64 recurrence on the same bfloat16 inputs: lengths, packs, head ratios,
// decays from 0 to -50 a token, beta 0 and 1, equal and zero keys, states, slices of wider tensors.

#include "../gdn_forward.cu"

#include "check.hpp"
#include "gdn_cases.hpp"
#include "goldens.hpp"

using namespace check;

namespace {

Outputs run(const Inputs& in) {
  const GdnCase& c = in.c;
  const int64_t tokens = in.pack.tokens(), sequences = in.pack.sequences();
  const auto t = static_cast<size_t>(tokens), hk = static_cast<size_t>(c.key_heads), hv = static_cast<size_t>(c.value_heads);
  const auto gap = static_cast<size_t>(in.gap);
  Mapped map(in.pack, bridge::kGdnChunk);
  Buffer<Bf16> q(spaced(c.q, t, gap)), k(spaced(c.k, t, gap)), v(spaced(c.v, t, gap));
  Buffer<Bf16> a16(in.a), b16(in.b);
  Buffer<float> a32(in.a), b32(in.b), a_log(in.a_log), dt_bias(in.dt_bias), before(c.state);
  Buffer<Bf16> out(t * hv * kD), inverse(t * hv * 64), states(map.size() * hv * kD * kD);
  Buffer<float> after(static_cast<size_t>(sequences) * hv * kD * kD), rho_q(t * hk), rho_k(t * hk), decay(t * hv), beta(t * hv);
  bridge::GdnForward p{};
  const bool half = in.gates == DType::kBf16;
  p.q = q.data();
  p.k = k.data();
  p.v = v.data();
  p.a = half ? static_cast<const void*>(a16.data()) : a32.data();
  p.b = half ? static_cast<const void*>(b16.data()) : b32.data();
  p.a_log = a_log.data();
  p.dt_bias = dt_bias.data();
  p.initial_state = c.state.empty() ? nullptr : before.data();
  p.out = out.data();
  p.final_state = after.data();
  p.chunk_states = states.data();
  p.rho_q = rho_q.data();
  p.rho_k = rho_k.data();
  p.decay = decay.data();
  p.beta = beta.data();
  p.inverse = inverse.data();
  p.chunks = map.chunks();
  p.first_chunk = map.first();
  p.tokens = tokens;
  p.sequences = sequences;
  p.q_stride = p.k_stride = static_cast<int64_t>(hk * kD + gap);
  p.v_stride = static_cast<int64_t>(hv * kD + gap);
  p.a_stride = p.b_stride = c.value_heads;
  p.key_heads = c.key_heads;
  p.value_heads = c.value_heads;
  p.gate_dtype = in.gates;
  p.parameter_dtype = DType::kF32;
  launched(bridge::gdn_forward(p, nullptr));

  // The states that chunks start from are those that the outputs came from: the last one leads to the final state, so a few
  // sums over them suffice to see that all were written and are the same in every run.
  Values sums;
  for (size_t chunk = 0; chunk < static_cast<size_t>(map.first()[sequences]); ++chunk) {
    for (size_t head = 0; head < hv; ++head) {
      double sum = 0.0;
      for (size_t i = 0; i < kD * kD; ++i) {
        sum += to_double(states.data()[(chunk * hv + head) * kD * kD + i]);
      }
      sums.push_back(sum);
    }
  }
  return {{"out", out.values()},     {"state", after.values()},   {"rho_k", rho_k.values()},
          {"decay", decay.values()}, {"beta", beta.values()},     {"inverse", inverse.values()},
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
          // Row i of the inverse: e_i - beta_i sum_j (k_i k_j) row j.
          rows[i].assign(64, 0.0);
          rows[i][i] = 1.0;
          for (size_t j = 0; j < i; ++j) {
            double product = 0.0;
            for (size_t d = 0; d < kD; ++d) {
              product += keys[i][d] * keys[j][d];
            }
            for (size_t column = 0; column <= j; ++column) {
              rows[i][column] -= c.beta[token * hv + head] * product * rows[j][column];
            }
          }
          for (size_t column = 0; column < 64; ++column) {
            worst = std::max(worst, std::abs(found["inverse"][(token * hv + head) * 64 + column] - rows[i][column]));
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
  double largest = 0.0;
  for (double x : ref.out) {
    largest = std::max(largest, std::abs(x));
  }
  close_elements("out", found["out"], ref.out, 0.0, 0.02 * largest + 1e-6);
  close_norm("state", found["state"], ref.state, kTolerance, 1e-6);
  return close_norm("out", found["out"], ref.out, kTolerance, 1e-6);
}

void random_case(unsigned seed, const Pack& pack, int key_heads, int ratio, Decay decay, const char* kind, bool state,
                 bool all_schedules = true) {
  context() = std::string("gdn_forward pack ") + pack.name + " heads " + std::to_string(key_heads) + " x " + std::to_string(ratio) +
              " decay " + std::to_string(static_cast<int>(decay)) + " " + kind;
  const double off = compare(random_inputs(seed, pack, key_heads, ratio, decay, kind, state), all_schedules);
  std::printf("%s: relative error %.1e\n", context().c_str(), off);
}

// Every golden holds for the reference, and the one with heads of 128 for the kernel.
void goldens(const Goldens& file) {
  int cases = 0;
  for (const std::string& key : file.names()) {
    const size_t at = key.find(".in.q");
    if (at == std::string::npos) {
      continue;
    }
    const std::string name = key.substr(0, at);
    context() = "golden " + name;
    const auto in = [&](const char* what) { return file.at(name + ".in." + what); };
    GdnCase c;
    const std::vector<int64_t> k = in("k").shape, v = in("v").shape;
    c.key_heads = static_cast<int>(k[2]);
    c.key_dim = static_cast<int>(k[3]);
    c.value_heads = static_cast<int>(v[2]);
    c.value_dim = static_cast<int>(v[3]);
    if (file.has(name + ".in.cu_seqlens")) {
      const Values borders = in("cu_seqlens").values;
      for (size_t i = 1; i < borders.size(); ++i) {
        c.lengths.push_back(static_cast<int>(borders[i] - borders[i - 1]));
      }
    } else {
      c.lengths.assign(static_cast<size_t>(k[0]), static_cast<int>(k[1]));
    }
    c.q = in("q").values;
    c.k = in("k").values;
    c.v = in("v").values;
    c.g = in("g").values;
    c.beta = in("beta").values;
    c.state = in("state").values;
    const GdnResult ref = gdn_reference(c);
    close_norm("reference out", ref.out, file.at(name + ".out.out").values, 1e-7);
    close_norm("reference state", ref.state, file.at(name + ".out.state").values, 1e-7);
    ++cases;
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
  require(cases > 20, "the goldens were found");
}

void refusals() {
  context() = "gdn_forward refusals";
  bridge::GdnForward p{};
  p.key_heads = 2;
  p.value_heads = 3;
  require(bridge::gdn_forward(p, nullptr) == cudaErrorInvalidValue, "a ratio that is no whole number is refused");
  p.value_heads = 4;
  p.q_stride = 4;
  require(bridge::gdn_forward(p, nullptr) == cudaErrorInvalidValue, "an unaligned stride is refused");
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
  refusals();
  return finish("gdn_forward");
}
