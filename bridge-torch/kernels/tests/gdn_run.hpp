// The gated delta rule's kernels on a case in device memory, its goldens, and what both directions refuse.
#pragma once

#include "../gdn_forward.cu"

#include "gdn_cases.hpp"
#include "goldens.hpp"

namespace check {

// Inputs, outputs and launch parameters of the forward; `p` may be changed before `run`.
struct GdnForwardRun {
  size_t tokens, key_rows, value_rows, states;  // rows: tokens times heads; states: elements of a state of every sequence
  Mapped map;
  Buffer<Bf16> q, k, v;
  AnyBuffer a, b;
  Buffer<float> a_log, dt_bias, initial_state;
  Buffer<Bf16> out, inverse, chunk_states, delta;
  Buffer<float> final_state, rho_q, rho_k, decay, beta;
  bridge::GdnForward p{};

  explicit GdnForwardRun(const Inputs& in)
      : tokens(in.c.tokens()), key_rows(tokens * static_cast<size_t>(in.c.key_heads)),
        value_rows(tokens * static_cast<size_t>(in.c.value_heads)),
        states(in.c.lengths.size() * static_cast<size_t>(in.c.value_heads) * kD * kD), map(in.pack, bridge::kGdnChunk),
        q(in.rows(in.c.q)), k(in.rows(in.c.k)), v(in.rows(in.c.v)), a(in.a, in.gates), b(in.b, in.gates), a_log(in.a_log),
        dt_bias(in.dt_bias), initial_state(in.c.state), out(value_rows * kD), inverse(value_rows * 64),
        chunk_states(map.size() * static_cast<size_t>(in.c.value_heads) * kD * kD), delta(value_rows * kD), final_state(states),
        rho_q(key_rows), rho_k(key_rows), decay(value_rows), beta(value_rows) {
    p.q = q.data();
    p.k = k.data();
    p.v = v.data();
    p.a = a.data();
    p.b = b.data();
    p.a_log = a_log.data();
    p.dt_bias = dt_bias.data();
    p.initial_state = in.c.state.empty() ? nullptr : initial_state.data();
    p.out = out.data();
    p.final_state = final_state.data();
    p.chunk_states = chunk_states.data();
    p.rho_q = rho_q.data();
    p.rho_k = rho_k.data();
    p.decay = decay.data();
    p.beta = beta.data();
    p.inverse = inverse.data();
    p.delta = delta.data();
    p.chunks = map.chunks();
    p.first_chunk = map.first();
    p.tokens = static_cast<int64_t>(tokens);
    p.sequences = in.pack.sequences();
    p.q_stride = p.k_stride = static_cast<int64_t>(in.c.key_heads) * static_cast<int64_t>(kD) + in.gap;
    p.v_stride = static_cast<int64_t>(in.c.value_heads) * static_cast<int64_t>(kD) + in.gap;
    p.a_stride = p.b_stride = in.c.value_heads;
    p.key_heads = in.c.key_heads;
    p.value_heads = in.c.value_heads;
    p.gate_dtype = in.gates;
    p.parameter_dtype = DType::kF32;
  }

  void run() { launched(bridge::gdn_forward(p, nullptr)); }
};

// The case of every golden of the delta rule in the file, under its name.
inline std::map<std::string, GdnCase> gdn_goldens(const Goldens& file) {
  std::map<std::string, GdnCase> cases;
  for (const std::string& key : file.names()) {
    const size_t at = key.find(".in.q");
    if (at == std::string::npos) {
      continue;
    }
    const std::string name = key.substr(0, at);
    const auto in = [&](const char* what) { return file.at(name + ".in." + what); };
    const std::vector<int64_t> k = in("k").shape, v = in("v").shape;
    GdnCase c;
    c.lengths = lengths_of(file, name, k[0], k[1]);
    c.key_heads = static_cast<int>(k[2]);
    c.key_dim = static_cast<int>(k[3]);
    c.value_heads = static_cast<int>(v[2]);
    c.value_dim = static_cast<int>(v[3]);
    c.q = in("q").values;
    c.k = in("k").values;
    c.v = in("v").values;
    c.g = in("g").values;
    c.beta = in("beta").values;
    c.state = in("state").values;
    cases[name] = c;
  }
  require(cases.size() > 20, "the goldens were found");
  return cases;
}

// `strides`: those that only this direction has.
template <class Parameters>
void gdn_refusals(cudaError_t (*launcher)(const Parameters&, cudaStream_t), const std::vector<int64_t Parameters::*>& strides) {
  const auto refused = [&](const char* claim, const std::function<void(Parameters&)>& break_it) {
    Parameters p{};
    p.key_heads = 2;
    p.value_heads = 4;
    break_it(p);
    require(launcher(p, nullptr) == cudaErrorInvalidValue, claim);
  };
  refused("a ratio that is no whole number is refused", [](Parameters& p) { p.value_heads = 3; });
  refused("65536 heads are refused", [](Parameters& p) { p.value_heads = 65536; });
  refused("no heads are refused", [](Parameters& p) { p.value_heads = 0; });
  refused("fewer than no tokens are refused", [](Parameters& p) { p.tokens = -1; });
  refused("fewer than no sequences are refused", [](Parameters& p) { p.sequences = -1; });
  std::vector<int64_t Parameters::*> all = {&Parameters::q_stride, &Parameters::k_stride, &Parameters::v_stride};
  all.insert(all.end(), strides.begin(), strides.end());
  for (const auto stride : all) {
    refused("an unaligned stride is refused", [&](Parameters& p) { p.*stride = 4; });
  }
}

}  // namespace check
