// The gated delta rule's gradients against those of the float64 recurrence on the same bfloat16 inputs, with and without
// gradients of the final state; the reference itself against the goldens.

#include "gdn_run.hpp"

#include "../gdn_backward.cu"

using namespace check;

namespace {

struct Upstream {
  Values out, state;  // state may be empty
};

Outputs run(const Inputs& in, const Upstream& up) {
  GdnForwardRun forward(in);
  forward.p.final_state = nullptr;
  forward.run();
  const bridge::GdnForward& f = forward.p;

  const auto hv = static_cast<size_t>(in.c.value_heads);
  Buffer<Bf16> d_out(up.out), d_q(in.c.q.size()), d_k(in.c.k.size()), d_v(in.c.v.size());
  AnyBuffer d_a(in.a.size(), in.gates), d_b(in.b.size(), in.gates);
  Buffer<float> d_a_log(hv), d_dt_bias(hv), d_final_state(up.state), d_initial_state(forward.states);
  Buffer<unsigned char> workspace(bridge::gdn_backward_workspace_bytes(f.tokens, f.sequences, f.value_heads));
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
  p.d_final_state = up.state.empty() ? nullptr : d_final_state.data();
  p.d_q = d_q.data();
  p.d_k = d_k.data();
  p.d_v = d_v.data();
  p.d_a = d_a.data();
  p.d_b = d_b.data();
  p.d_a_log = d_a_log.data();
  p.d_dt_bias = d_dt_bias.data();
  p.d_initial_state = d_initial_state.data();
  p.workspace = workspace.data();
  p.chunks = f.chunks;
  p.first_chunk = f.first_chunk;
  p.tokens = f.tokens;
  p.sequences = f.sequences;
  p.q_stride = f.q_stride;
  p.k_stride = f.k_stride;
  p.v_stride = f.v_stride;
  p.a_stride = p.b_stride = p.d_a_stride = p.d_b_stride = f.value_heads;
  p.d_q_stride = p.d_k_stride = f.q_stride - in.gap;
  p.d_v_stride = f.v_stride - in.gap;
  p.key_heads = f.key_heads;
  p.value_heads = f.value_heads;
  p.gate_dtype = f.gate_dtype;
  p.parameter_dtype = f.parameter_dtype;
  launched(bridge::gdn_backward(p, nullptr));
  return {{"d_q", d_q.values()},         {"d_k", d_k.values()},
          {"d_v", d_v.values()},         {"d_a", d_a.values()},
          {"d_b", d_b.values()},         {"d_a_log", d_a_log.values()},
          {"d_dt_bias", d_dt_bias.values()}, {"d_state", d_initial_state.values()}};
}

double norm(const Values& values) {
  double sum = 0.0;
  for (double x : values) {
    sum += x * x;
  }
  return std::sqrt(sum);
}

void compare(const Inputs& in, const Upstream& up, double d_v_tolerance, bool all_schedules) {
  const GdnCase& c = in.c;
  const auto hv = static_cast<size_t>(c.value_heads);
  const GdnGradients ref = gdn_gradients(c, up.out, up.state);
  Values d_a(c.g.size()), d_b(c.g.size()), terms(c.g.size()), d_a_log(hv), d_dt_bias(hv), sizes(hv, 1e-6);
  for (size_t i = 0; i < c.g.size(); ++i) {
    const double x = in.a[i] + in.dt_bias[i % hv];
    d_a[i] = -ref.g[i] * std::exp(in.a_log[i % hv]) * sigmoid64(x);
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
  close("d_v", ref.v, d_v_tolerance, 1e-3);
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
  name_case("gdn_backward", pack, key_heads, ratio, decay, kind);
  const Inputs in = random_inputs(seed, pack, key_heads, ratio, decay, kind, state);
  Random random(seed + 1000);
  Upstream up{stored<Bf16>(random.normal(in.c.v.size())), {}};
  if (state) {
    up.state = stored<float>(random.normal(pack.lengths.size() * static_cast<size_t>(in.c.value_heads) * kD * kD, 0.3));
  }
  if (std::strcmp(kind, "state only") == 0) {
    std::fill(up.out.begin(), up.out.end(), 0.0);
  }
  // With all keys the same and nothing forgotten, Y is a small difference of large terms: twice what was seen, as everywhere.
  const bool cancels = decay == Decay::kNone && std::strcmp(kind, "equal keys") == 0;
  compare(in, up, cancels ? 2e-2 : 8e-3, all_schedules);
}

// The reference's gradients are those of every golden.
void goldens(const Goldens& file) {
  for (const auto& [name, c] : gdn_goldens(file)) {
    context() = "golden " + name;
    const auto get = [&, prefix = name](const char* what) { return file.at(prefix + what); };
    const GdnGradients grads = gdn_gradients(c, get(".up.out").values, get(".up.state").values);
    close_norm("reference d_q", grads.q, get(".grad.q").values, 1e-6);
    close_norm("reference d_k", grads.k, get(".grad.k").values, 1e-6);
    close_norm("reference d_v", grads.v, get(".grad.v").values, 1e-6);
    close_norm("reference d_g", grads.g, get(".grad.g").values, 1e-6);
    close_norm("reference d_beta", grads.beta, get(".grad.beta").values, 1e-6);
    close_norm("reference d_state", grads.state, get(".grad.state").values, 1e-6);
  }
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
  for (unsigned cancelling : {100u, 101u, 109u, 120u}) {  // 9e-3 where dDelta is rounded on its way to the next tokens
    random_case(cancelling, {"129", {129}, 0, false}, 1, 1, Decay::kSlow, "equal keys", true, false);
  }
  random_case(109, {"129", {129}, 0, false}, 1, 1, Decay::kNone, "equal keys", true, false);
  random_case(seed++, {"1000", {1000}, 0, false}, 1, 1, Decay::kReal, "random", false, false);
  context() = "gdn_backward refusals";
  using P = bridge::GdnBackward;
  gdn_refusals(bridge::gdn_backward, {&P::d_q_stride, &P::d_k_stride, &P::d_v_stride});
  return finish("gdn_backward");
}
