// The gated delta rule's gradients against those of the float64 recurrence on the same bfloat16 inputs, with and without
// gradients of the final state; the reference itself against the goldens.

#include "../gdn_forward.cu"

#include "../gdn_backward.cu"

#include "check.hpp"
#include "gdn_cases.hpp"
#include "goldens.hpp"

using namespace check;

namespace {

struct Upstream {
  Values out, state;  // state may be empty
};

Outputs run(const Inputs& in, const Upstream& up) {
  const GdnCase& c = in.c;
  const int64_t tokens = in.pack.tokens(), sequences = in.pack.sequences();
  const auto t = static_cast<size_t>(tokens), hk = static_cast<size_t>(c.key_heads), hv = static_cast<size_t>(c.value_heads);
  const auto gap = static_cast<size_t>(in.gap), states = static_cast<size_t>(sequences) * hv * kD * kD;
  const bool half = in.gates == DType::kBf16;
  Mapped map(in.pack, bridge::kGdnChunk);
  Buffer<Bf16> q(spaced(c.q, t, gap)), k(spaced(c.k, t, gap)), v(spaced(c.v, t, gap));
  Buffer<Bf16> a16(in.a), b16(in.b), d_a16(in.a.size()), d_b16(in.b.size());
  Buffer<float> a32(in.a), b32(in.b), d_a32(in.a.size()), d_b32(in.b.size());
  Buffer<float> a_log(in.a_log), dt_bias(in.dt_bias), before(c.state), d_a_log(hv), d_dt_bias(hv);
  Buffer<Bf16> out(t * hv * kD), inverse(t * hv * 64), chunk_states(map.size() * hv * kD * kD), delta(t * hv * kD);
  Buffer<float> rho_q(t * hk), rho_k(t * hk), decay(t * hv), beta(t * hv);
  Buffer<Bf16> d_out(up.out), d_q(t * hk * kD), d_k(t * hk * kD), d_v(t * hv * kD);
  Buffer<float> d_after(up.state), d_before(states);
  Buffer<unsigned char> workspace(bridge::gdn_backward_workspace_bytes(tokens, sequences, c.value_heads));

  bridge::GdnForward f{};
  f.q = q.data();
  f.k = k.data();
  f.v = v.data();
  f.a = half ? static_cast<const void*>(a16.data()) : a32.data();
  f.b = half ? static_cast<const void*>(b16.data()) : b32.data();
  f.a_log = a_log.data();
  f.dt_bias = dt_bias.data();
  f.initial_state = c.state.empty() ? nullptr : before.data();
  f.out = out.data();
  f.chunk_states = chunk_states.data();
  f.rho_q = rho_q.data();
  f.rho_k = rho_k.data();
  f.decay = decay.data();
  f.beta = beta.data();
  f.inverse = inverse.data();
  f.delta = delta.data();
  f.chunks = map.chunks();
  f.first_chunk = map.first();
  f.tokens = tokens;
  f.sequences = sequences;
  f.q_stride = f.k_stride = static_cast<int64_t>(hk * kD + gap);
  f.v_stride = static_cast<int64_t>(hv * kD + gap);
  f.a_stride = f.b_stride = c.value_heads;
  f.key_heads = c.key_heads;
  f.value_heads = c.value_heads;
  f.gate_dtype = in.gates;
  f.parameter_dtype = DType::kF32;
  launched(bridge::gdn_forward(f, nullptr));

  bridge::GdnBackward p{};
  p.q = f.q;
  p.k = f.k;
  p.v = f.v;
  p.a = f.a;
  p.b = f.b;
  p.a_log = f.a_log;
  p.dt_bias = f.dt_bias;
  p.rho_q = f.rho_q;
  p.rho_k = f.rho_k;
  p.decay = f.decay;
  p.beta = f.beta;
  p.inverse = f.inverse;
  p.chunk_states = f.chunk_states;
  p.delta = f.delta;
  p.d_out = d_out.data();
  p.d_final_state = up.state.empty() ? nullptr : d_after.data();
  p.d_q = d_q.data();
  p.d_k = d_k.data();
  p.d_v = d_v.data();
  p.d_a = half ? static_cast<void*>(d_a16.data()) : d_a32.data();
  p.d_b = half ? static_cast<void*>(d_b16.data()) : d_b32.data();
  p.d_a_log = d_a_log.data();
  p.d_dt_bias = d_dt_bias.data();
  p.d_initial_state = d_before.data();
  p.workspace = workspace.data();
  p.chunks = f.chunks;
  p.first_chunk = f.first_chunk;
  p.tokens = tokens;
  p.sequences = sequences;
  p.q_stride = f.q_stride;
  p.k_stride = f.k_stride;
  p.v_stride = f.v_stride;
  p.a_stride = p.b_stride = p.d_a_stride = p.d_b_stride = c.value_heads;
  p.d_q_stride = p.d_k_stride = static_cast<int64_t>(hk * kD);
  p.d_v_stride = static_cast<int64_t>(hv * kD);
  p.key_heads = c.key_heads;
  p.value_heads = c.value_heads;
  p.gate_dtype = in.gates;
  p.parameter_dtype = DType::kF32;
  launched(bridge::gdn_backward(p, nullptr));
  return {{"d_q", d_q.values()},         {"d_k", d_k.values()},
          {"d_v", d_v.values()},         {"d_a", half ? d_a16.values() : d_a32.values()},
          {"d_b", half ? d_b16.values() : d_b32.values()}, {"d_a_log", d_a_log.values()},
          {"d_dt_bias", d_dt_bias.values()}, {"d_state", d_before.values()}};
}

double norm(const Values& values) {
  double sum = 0.0;
  for (double x : values) {
    sum += x * x;
  }
  return std::sqrt(sum);
}

void compare(const Inputs& in, const Upstream& up, bool equal_keys, bool all_schedules) {
  const GdnCase& c = in.c;
  const auto hv = static_cast<size_t>(c.value_heads);
  const GdnGradients ref = gdn_gradients(c, up.out, up.state);
  Values d_a(c.g.size()), d_b(c.g.size()), terms(c.g.size()), d_a_log(hv), d_dt_bias(hv), sizes(hv, 1e-6);
  for (size_t i = 0; i < c.g.size(); ++i) {
    const double x = in.a[i] + in.dt_bias[i % hv];
    d_a[i] = -ref.g[i] * std::exp(in.a_log[i % hv]) / (1.0 + std::exp(-x));
    d_b[i] = ref.beta[i] * c.beta[i] * (1.0 - c.beta[i]);
    terms[i] = ref.beta_terms[i] * c.beta[i] * (1.0 - c.beta[i]);
    d_dt_bias[i % hv] += d_a[i];
    d_a_log[i % hv] += ref.g[i] * c.g[i];
    sizes[i % hv] += std::abs(ref.g[i]) * (std::abs(c.g[i]) + std::exp(in.a_log[i % hv]));
  }
  Outputs found = all_schedules ? under_every_schedule([&] { return run(in, up); }) : run(in, up);
  std::string errors;
  const auto close = [&](const char* name, const Values& expected, double tolerance, double floor) {
    char text[64];
    std::snprintf(text, sizeof text, " %s %.1e", name, close_norm(name, found[name], expected, tolerance, floor));
    errors += text;
  };
  close("d_q", ref.q, 8e-3, 1e-3);
  close("d_k", ref.k, 8e-3, 1e-3);
  // Y = T^T dDelta is a small difference of large terms where keys are the same: twice what was seen, as everywhere.
  close("d_v", ref.v, equal_keys ? 2e-2 : 8e-3, 1e-3);
  // A gradient of beta is a dot product whose sum may be anything: the bound is on its terms.
  close("d_b", d_b, 8e-3, norm(terms));
  close("d_a", d_a, 1.2e-2, 1e-3);
  close("d_state", ref.state, 8e-3, 1e-3);
  for (size_t head = 0; head < hv; ++head) {
    require(std::abs(found["d_a_log"][head] - d_a_log[head]) <= 8e-3 * sizes[head], "d_a_log is off by 8e-3 of its terms at most");
    require(std::abs(found["d_dt_bias"][head] - d_dt_bias[head]) <= 8e-3 * sizes[head], "d_dt_bias is off by 8e-3 of its terms at most");
  }
  const size_t real = c.tokens() - static_cast<size_t>(c.tail);
  for (const char* name : {"d_q", "d_k", "d_v", "d_a", "d_b"}) {
    const size_t width = c.tokens() == 0 ? 0 : found[name].size() / c.tokens();
    for (size_t i = real * width; i < found[name].size(); ++i) {
      require(found[name][i] == 0.0, "tokens of no sequence have no gradient");
    }
  }
  std::printf("%s:%s\n", context().c_str(), errors.c_str());
}

void random_case(unsigned seed, const Pack& pack, int key_heads, int ratio, Decay decay, const char* kind, bool state,
                 bool all_schedules) {
  context() = std::string("gdn_backward pack ") + pack.name + " heads " + std::to_string(key_heads) + " x " + std::to_string(ratio) +
              " decay " + std::to_string(static_cast<int>(decay)) + " " + kind;
  const Inputs in = random_inputs(seed, pack, key_heads, ratio, decay, kind, state);
  Random random(seed + 1000);
  Upstream up{stored<Bf16>(random.normal(in.c.v.size())), {}};
  if (state) {
    up.state = stored<float>(random.normal(pack.lengths.size() * static_cast<size_t>(in.c.value_heads) * kD * kD, 0.3));
  }
  if (std::strcmp(kind, "state only") == 0) {
    std::fill(up.out.begin(), up.out.end(), 0.0);
  }
  compare(in, up, std::strcmp(kind, "equal keys") == 0, all_schedules);
}

// The reference's gradients are those of every golden.
void goldens(const Goldens& file) {
  for (const std::string& key : file.names()) {
    const size_t at = key.find(".in.q");
    if (at == std::string::npos) {
      continue;
    }
    const std::string name = key.substr(0, at);
    context() = "golden " + name;
    const auto get = [&](const char* what) { return file.at(name + what); };
    GdnCase c;
    const std::vector<int64_t> k = get(".in.k").shape, v = get(".in.v").shape;
    c.key_heads = static_cast<int>(k[2]);
    c.key_dim = static_cast<int>(k[3]);
    c.value_heads = static_cast<int>(v[2]);
    c.value_dim = static_cast<int>(v[3]);
    if (file.has(name + ".in.cu_seqlens")) {
      const Values borders = get(".in.cu_seqlens").values;
      for (size_t i = 1; i < borders.size(); ++i) {
        c.lengths.push_back(static_cast<int>(borders[i] - borders[i - 1]));
      }
    } else {
      c.lengths.assign(static_cast<size_t>(k[0]), static_cast<int>(k[1]));
    }
    c.q = get(".in.q").values;
    c.k = get(".in.k").values;
    c.v = get(".in.v").values;
    c.g = get(".in.g").values;
    c.beta = get(".in.beta").values;
    c.state = get(".in.state").values;
    const GdnGradients grads = gdn_gradients(c, get(".up.out").values, get(".up.state").values);
    close_norm("reference d_q", grads.q, get(".grad.q").values, 1e-6);
    close_norm("reference d_k", grads.k, get(".grad.k").values, 1e-6);
    close_norm("reference d_v", grads.v, get(".grad.v").values, 1e-6);
    close_norm("reference d_g", grads.g, get(".grad.g").values, 1e-6);
    close_norm("reference d_beta", grads.beta, get(".grad.beta").values, 1e-6);
    close_norm("reference d_state", grads.state, get(".grad.state").values, 1e-6);
  }
}

void refusals() {
  context() = "gdn_backward refusals";
  bridge::GdnBackward p{};
  p.key_heads = 2;
  p.value_heads = 3;
  require(bridge::gdn_backward(p, nullptr) == cudaErrorInvalidValue, "a ratio that is no whole number is refused");
  p.value_heads = 4;
  p.d_v_stride = 4;
  require(bridge::gdn_backward(p, nullptr) == cudaErrorInvalidValue, "an unaligned stride is refused");
}

}  // namespace

int main(int, char** arguments) {
  goldens(Goldens(std::string(arguments[1]) + "/delta_rule.safetensors"));
  unsigned seed = 1;
  for (const Pack& pack : packs()) {
    random_case(seed, pack, 1, 1, Decay::kReal, "random", seed % 2 == 0, pack.tokens() < 15 || pack.lengths.size() == 4);
    ++seed;
  }
  const Pack ragged{"70+0+65", {70, 0, 65}, 3, false};
  for (int ratio : {1, 2, 3, 4}) {
    random_case(seed++, ragged, ratio <= 2 ? 2 : 1, ratio, Decay::kSlow, "random", ratio % 2 == 0, ratio == 2);
  }
  for (const Decay decay : {Decay::kNone, Decay::kStrong, Decay::kMixed, Decay::kFirst}) {
    random_case(seed++, {"130", {130}, 0, false}, 1, 1, decay, "random", true, false);
  }
  for (const char* kind : {"beta 0", "beta 1", "beta 30", "equal keys", "zero rows", "correlated", "exact gates", "state only"}) {
    random_case(seed++, {"129", {129}, 0, false}, 1, 1, Decay::kSlow, kind, true, false);
  }
  random_case(seed++, {"1000", {1000}, 0, false}, 1, 1, Decay::kReal, "random", false, false);
  refusals();
  return finish("gdn_backward");
}
