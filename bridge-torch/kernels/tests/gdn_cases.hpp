// Inputs of the gated delta rule that both directions are tested with.
#pragma once

#include <cstring>

#include "check.hpp"
#include "gdn_reference.hpp"
#include "packs.hpp"

namespace check {

inline constexpr size_t kD = 128;
// Relative L2 error: twice what an emulation in bfloat16 operands showed for random decays (docs/kernels.md).
inline constexpr double kTolerance = 8e-3;

struct Inputs {
  GdnCase c;
  Pack pack;
  Values a, b, a_log, dt_bias;
  DType gates;
  int gap;  // elements between the tokens of q, k, v that belong to something else

  // q, k or v as it lies in memory.
  Values rows(const Values& values) const {
    return spaced(values, values.size() / std::max<size_t>(c.tokens(), 1), static_cast<size_t>(gap), std::nan(""));
  }
};

// g and beta of the inputs as the operator defines them.
inline void set_gates(Inputs& in) {
  const auto heads = static_cast<size_t>(in.c.value_heads);
  in.c.g.clear();
  in.c.beta.clear();
  for (size_t i = 0; i < in.a.size(); ++i) {
    const double x = in.a[i] + in.dt_bias[i % heads];
    in.c.g.push_back(-std::exp(in.a_log[i % heads]) * (x > 20.0 ? x : std::log1p(std::exp(x))));
    const double beta = sigmoid64(in.b[i]);
    in.c.beta.push_back(in.gates == DType::kBf16 ? to_double(from_double<Bf16>(beta)) : beta);
  }
}

enum class Decay { kNone, kSlow, kReal, kStrong, kMixed, kFirst };

inline Inputs random_inputs(unsigned seed, const Pack& pack, int key_heads, int ratio, Decay decay, const char* kind, bool state) {
  Random random(seed);
  Inputs in{{}, pack, {}, {}, {}, {}, std::strcmp(kind, "exact gates") == 0 || decay == Decay::kNone ? DType::kF32 : DType::kBf16,
            static_cast<int>(seed % 3) * 8};
  GdnCase& c = in.c;
  c.lengths = pack.lengths;
  c.tail = pack.tail;
  c.key_heads = key_heads;
  c.value_heads = key_heads * ratio;
  const size_t t = c.tokens(), hk = static_cast<size_t>(key_heads), hv = static_cast<size_t>(c.value_heads);
  const double mean = std::strcmp(kind, "correlated") == 0 ? 0.5 : 0.0;
  c.q = stored<Bf16>(random.normal(t * hk * kD));
  c.k = stored<Bf16>(random.normal(t * hk * kD, 1.0, mean));
  c.v = stored<Bf16>(random.normal(t * hv * kD));
  if (std::strcmp(kind, "equal keys") == 0) {
    for (size_t i = hk * kD; i < c.k.size(); ++i) {
      c.k[i] = c.k[i - hk * kD];
    }
  } else if (std::strcmp(kind, "zero rows") == 0) {
    for (size_t i = 0; i < c.k.size(); ++i) {
      c.k[i] = i / (hk * kD) % 3 == 0 ? 0.0 : c.k[i];
      c.q[i] = i / (hk * kD) % 5 == 0 ? 0.0 : c.q[i];
    }
  }
  in.b = random.normal(t * hv, 1.5);
  for (size_t i = 0; i < in.b.size(); ++i) {
    in.b[i] = std::strcmp(kind, "beta 0") == 0 ? -200.0 : std::strcmp(kind, "beta 1") == 0 ? 200.0 : std::strcmp(kind, "beta 30") == 0 ? (i % 2 == 0 ? 30.0 : -30.0) : in.b[i];
  }
  in.dt_bias = stored<float>(random.normal(hv, 0.1, decay == Decay::kReal ? 1.0 : 0.0));
  in.a_log.assign(hv, 0.0);
  in.a = random.normal(t * hv);
  if (decay == Decay::kReal) {
    const Values speeds = random.uniform(hv, 0.01, 16.0);
    for (size_t i = 0; i < hv; ++i) {
      in.a_log[i] = to_double(from_double<float>(std::log(speeds[i])));
    }
  } else {
    for (size_t i = 0; i < in.a.size(); ++i) {
      const bool strong = decay == Decay::kStrong || (decay == Decay::kMixed && random.below(3) == 0) ||
                          (decay == Decay::kFirst && i / hv % 64 == 0);
      in.a[i] = decay == Decay::kNone || ((decay == Decay::kMixed || decay == Decay::kFirst) && !strong) ? -1000.0
                : strong                                                                                  ? 200.0
                                                                                                          : -3.2 + 0.3 * in.a[i];
    }
    in.dt_bias.assign(hv, 0.0);
    in.a_log.assign(hv, to_double(from_double<float>(std::log(0.25))));  // -50 a token where a is 200, beyond what exp holds in float32
  }
  in.a = stored(in.a, in.gates);
  in.b = stored(in.b, in.gates);
  if (state) {
    c.state = stored<float>(random.normal(pack.lengths.size() * hv * kD * kD, 0.3));
  }
  set_gates(in);
  return in;
}

// Sets the context of messages to what random_inputs of these arguments are.
inline void name_case(const char* family, const Pack& pack, int key_heads, int ratio, Decay decay, const char* kind) {
  context() = std::string(family) + " pack " + pack.name + " heads " + std::to_string(key_heads) + " x " + std::to_string(ratio) +
              " decay " + std::to_string(static_cast<int>(decay)) + " " + kind;
}

}  // namespace check
