// The gated delta net between its projections: convolution, delta rule and gated norm, each alone and all as one node.
#include <ATen/ops/empty_like.h>

#include "../conv1d_silu.hpp"
#include "../gated_rms_norm.hpp"
#include "../gdn_backward.hpp"
#include "../gdn_forward.hpp"
#include "library.hpp"

namespace bridge::operators {

namespace {

static_assert(kConvChunk == kGdnChunk, "one map serves both");
constexpr int64_t kChunkInts = sizeof(Chunk) / sizeof(int);

// One int32 tensor holds the chunks of a pack, then where each sequence's chunks start.
at::Tensor chunk_map_of(const at::Tensor& cu_seqlens, int64_t tokens) {
  const at::ScalarType kind = cu_seqlens.scalar_type();
  TORCH_CHECK(cu_seqlens.dim() == 1 && cu_seqlens.size(0) >= 1 && (kind == at::kLong || kind == at::kInt),
              "cu_seqlens has shape ", cu_seqlens.sizes(), " and dtype ", kind,
              ", expected the borders of the sequences, [n + 1], int32 or int64");
  const at::Tensor borders = cu_seqlens.contiguous();
  const int64_t sequences = borders.size(0) - 1, chunks = max_chunks(tokens, sequences, kGdnChunk);
  at::Tensor map = at::empty({chunks * kChunkInts + sequences + 2}, borders.options().dtype(at::kInt));
  ChunkMap p{};
  p.cu_seqlens = borders.const_data_ptr();
  p.wide = kind == at::kLong;
  p.sequences = sequences;
  p.tokens = tokens;
  p.size = kGdnChunk;
  p.chunks = reinterpret_cast<Chunk*>(map.data_ptr<int>());
  p.first_chunk = map.data_ptr<int>() + chunks * kChunkInts;
  Launch("chunk_map", borders)(chunk_map, p);
  return map;
}

// A pack as launchers see it.
struct Pack {
  at::Tensor cu_seqlens, map;
  int64_t tokens, sequences;

  Pack(const at::Tensor& borders, const at::Tensor& chunk_map, int64_t tokens, const at::Tensor& like)
      : cu_seqlens(borders.contiguous()), map(chunk_map), tokens(tokens), sequences(borders.size(0) - 1) {
    check(cu_seqlens, "cu_seqlens", like, cu_seqlens.scalar_type(), {-1});
    check(map, "chunk_map", like, at::kInt, {num_chunks() * kChunkInts + sequences + 2});
  }
  int64_t num_chunks() const { return max_chunks(tokens, sequences, kGdnChunk); }
  const Chunk* chunks() const { return reinterpret_cast<const Chunk*>(map.const_data_ptr<int>()); }
  const int* first_chunk() const { return map.const_data_ptr<int>() + num_chunks() * kChunkInts; }
};

const float* floats(const at::Tensor& x) { return x.defined() ? x.const_data_ptr<float>() : nullptr; }
float* floats(at::Tensor& x) { return x.defined() ? x.data_ptr<float>() : nullptr; }
const void* bytes(const at::Tensor& x) { return x.defined() ? x.const_data_ptr() : nullptr; }

// x [tokens, channels], weight [channels, 4], state [sequences, channels, 3] in x's dtype or undefined; into `out`.
void convolve(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& state, const Pack& pack, at::Tensor& out) {
  ConvForward p{};
  p.x = x.const_data_ptr();
  p.weight = weight.const_data_ptr();
  p.state = bytes(state);
  p.out = out.data_ptr();
  p.chunks = pack.chunks();
  p.tokens = pack.tokens;
  p.sequences = pack.sequences;
  p.x_stride = row_stride(x);
  p.out_stride = row_stride(out);
  p.channels = static_cast<int>(x.size(1));
  p.dtype = dtype_of(x, "x");
  p.weight_dtype = dtype_of(weight, "weight");
  Launch("causal_conv1d_silu", x)(conv1d_silu_forward, p);
}

// The gradient of x into `d_x`; that of the weight is returned, that of the state too where `d_state` is defined.
at::Tensor convolve_back(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& state, const Pack& pack,
                         const at::Tensor& d_out, at::Tensor& d_x, at::Tensor& d_state) {
  at::Tensor d_weight = at::empty_like(weight);
  const int channels = static_cast<int>(x.size(1));
  const at::Tensor scratch = workspace(conv_backward_workspace_bytes(pack.tokens, pack.sequences, channels), x);
  ConvBackward p{};
  p.x = x.const_data_ptr();
  p.weight = weight.const_data_ptr();
  p.state = bytes(state);
  p.d_out = d_out.const_data_ptr();
  p.d_x = d_x.data_ptr();
  p.d_weight = d_weight.data_ptr();
  p.d_state = d_state.defined() ? d_state.data_ptr() : nullptr;
  p.chunks = pack.chunks();
  p.first_chunk = pack.first_chunk();
  p.cu_seqlens = pack.cu_seqlens.const_data_ptr();
  p.wide = pack.cu_seqlens.scalar_type() == at::kLong;
  p.workspace = reinterpret_cast<float*>(scratch.data_ptr());
  p.tokens = pack.tokens;
  p.sequences = pack.sequences;
  p.x_stride = row_stride(x);
  p.d_out_stride = row_stride(d_out);
  p.d_x_stride = row_stride(d_x);
  p.channels = channels;
  p.dtype = dtype_of(x, "x");
  p.weight_dtype = dtype_of(weight, "weight");
  Launch("causal_conv1d_silu", x)(conv1d_silu_backward, p);
  return d_weight;
}

// What the delta rule reads: q, k [tokens, key heads * 128], v [tokens, value heads * 128] and a, b [tokens, value heads], all
// perhaps slices of wider rows; a_log, dt_bias [value heads] float32; state [sequences, value heads, 128, 128] or undefined.
struct DeltaInputs {
  at::Tensor q, k, v, a, b, a_log, dt_bias, state;

  int key_heads() const { return static_cast<int>(q.size(1) / kGdnDim); }
  int value_heads() const { return static_cast<int>(a_log.size(0)); }

  // Parameters of forward and backward have these fields alike.
  template <class Parameters>
  void fill(Parameters& p, const Pack& pack) const {
    p.q = q.const_data_ptr();
    p.k = k.const_data_ptr();
    p.v = v.const_data_ptr();
    p.a = a.const_data_ptr();
    p.b = b.const_data_ptr();
    p.a_log = a_log.const_data_ptr();
    p.dt_bias = dt_bias.const_data_ptr();
    p.chunks = pack.chunks();
    p.first_chunk = pack.first_chunk();
    p.tokens = pack.tokens;
    p.sequences = pack.sequences;
    p.q_stride = row_stride(q);
    p.k_stride = row_stride(k);
    p.v_stride = row_stride(v);
    p.a_stride = row_stride(a);
    p.b_stride = row_stride(b);
    p.key_heads = key_heads();
    p.value_heads = value_heads();
    p.gate_dtype = dtype_of(a, "a");
    p.parameter_dtype = DType::kF32;
  }
};

// What the forward makes beside its output, for the backward.
struct DeltaKept {
  at::Tensor rho_q, rho_k, decay, beta, inverse, states, delta;
};

// `keep` says whether the states of all chunks and Delta are written, which only the backward reads.
DeltaKept delta_rule_forward(const DeltaInputs& in, const Pack& pack, bool keep, at::Tensor& out, at::Tensor& final_state) {
  const int64_t tokens = pack.tokens, heads = in.value_heads();
  const auto wide = in.q.options().dtype(at::kFloat);
  DeltaKept kept;
  kept.rho_q = at::empty({tokens, in.key_heads()}, wide);
  kept.rho_k = at::empty({tokens, in.key_heads()}, wide);
  kept.decay = at::empty({tokens, heads}, wide);
  kept.beta = at::empty({tokens, heads}, wide);
  kept.inverse = at::empty({tokens, heads, kGdnChunk}, in.q.options());
  if (keep) {
    kept.states = at::empty({pack.num_chunks(), heads, kGdnDim, kGdnDim}, in.q.options());
    kept.delta = at::empty({tokens, heads, kGdnDim}, in.q.options());
  }
  GdnForward p{};
  in.fill(p, pack);
  p.initial_state = floats(in.state);
  p.out = out.data_ptr();
  p.final_state = floats(final_state);
  p.chunk_states = keep ? kept.states.data_ptr() : nullptr;
  p.rho_q = kept.rho_q.data_ptr<float>();
  p.rho_k = kept.rho_k.data_ptr<float>();
  p.decay = kept.decay.data_ptr<float>();
  p.beta = kept.beta.data_ptr<float>();
  p.inverse = kept.inverse.data_ptr();
  p.delta = keep ? kept.delta.data_ptr() : nullptr;
  Launch("gated_delta_rule", in.q)(gdn_forward, p);
  return kept;
}

// Where gradients go: like DeltaInputs.
struct DeltaGradients {
  at::Tensor q, k, v, a, b, a_log, dt_bias, state;
};

void delta_rule_backward(const DeltaInputs& in, const Pack& pack, const DeltaKept& kept, const at::Tensor& d_out,
                         const at::Tensor& d_final_state, DeltaGradients& d) {
  const at::Tensor scratch = workspace(gdn_backward_workspace_bytes(pack.tokens, pack.sequences, in.value_heads()), in.q);
  d.a_log = at::empty_like(in.a_log);
  d.dt_bias = at::empty_like(in.dt_bias);
  GdnBackward p{};
  in.fill(p, pack);
  p.rho_q = kept.rho_q.const_data_ptr<float>();
  p.rho_k = kept.rho_k.const_data_ptr<float>();
  p.decay = kept.decay.const_data_ptr<float>();
  p.beta = kept.beta.const_data_ptr<float>();
  p.inverse = kept.inverse.const_data_ptr();
  p.chunk_states = kept.states.const_data_ptr();
  p.delta = kept.delta.const_data_ptr();
  p.d_out = d_out.const_data_ptr();
  p.d_final_state = floats(d_final_state);
  p.d_q = d.q.data_ptr();
  p.d_k = d.k.data_ptr();
  p.d_v = d.v.data_ptr();
  p.d_a = d.a.data_ptr();
  p.d_b = d.b.data_ptr();
  p.d_a_log = d.a_log.data_ptr();
  p.d_dt_bias = d.dt_bias.data_ptr();
  p.d_initial_state = floats(d.state);
  p.workspace = scratch.data_ptr();
  p.d_q_stride = row_stride(d.q);
  p.d_k_stride = row_stride(d.k);
  p.d_v_stride = row_stride(d.v);
  p.d_a_stride = row_stride(d.a);
  p.d_b_stride = row_stride(d.b);
  Launch("gated_delta_rule", in.q)(gdn_backward, p);
}

at::Tensor state_like(const DeltaInputs& in, const Pack& pack) {
  return at::empty({pack.sequences, in.value_heads(), kGdnDim, kGdnDim}, in.q.options().dtype(at::kFloat));
}

void check_state(const OptionalTensor& state, const char* name, const at::Tensor& like, at::ScalarType kind,
                 at::IntArrayRef shape) {
  if (state) {
    check(*state, name, like, kind, shape);
  }
}

at::Tensor or_none(const OptionalTensor& x) { return x ? x->contiguous() : at::Tensor(); }

// a_log and dt_bias come in any dtype and are read in float32; their gradients go back in what was given.
at::Tensor wide(const at::Tensor& x) { return x.to(at::kFloat).contiguous(); }

void remember_dtypes(AutogradContext* ctx, const at::Tensor& a_log, const at::Tensor& dt_bias) {
  ctx->saved_data["dtypes"] =
      std::vector<int64_t>{static_cast<int64_t>(a_log.scalar_type()), static_cast<int64_t>(dt_bias.scalar_type())};
}

void as_given(AutogradContext* ctx, DeltaGradients& d) {
  const std::vector<int64_t> dtypes = ctx->saved_data["dtypes"].toIntVector();
  d.a_log = d.a_log.to(static_cast<at::ScalarType>(dtypes[0]));
  d.dt_bias = d.dt_bias.to(static_cast<at::ScalarType>(dtypes[1]));
}

class ConvNode : public torch::autograd::Function<ConvNode> {
 public:
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& state,
                            const at::Tensor& cu_seqlens, const at::Tensor& chunk_map) {
    TORCH_CHECK(x.dim() == 2, "x has shape ", x.sizes(), ", expected [tokens, channels]");
    check(weight, "weight", x, weight.scalar_type(), {x.size(1), kTaps});
    const Pack pack(cu_seqlens, chunk_map, x.size(0), x);
    check_state(state, "state", x, x.scalar_type(), {pack.sequences, x.size(1), kTaps - 1});
    const at::Tensor rows = rows_of(x), before = or_none(state), taps = weight.contiguous();
    at::Tensor out = at::empty(x.sizes(), x.options());
    convolve(rows, taps, before, pack, out);
    ctx->save_for_backward({rows, taps, before, pack.cu_seqlens, pack.map});
    return out;
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const variable_list saved = ctx->get_saved_variables();
    const at::Tensor &x = saved[0], &state = saved[2];
    const Pack pack(saved[3], saved[4], x.size(0), x);
    at::Tensor d_x = at::empty(x.sizes(), x.options());
    at::Tensor d_state = state.defined() ? at::empty_like(state) : at::Tensor();
    const at::Tensor d_weight = convolve_back(x, saved[1], state, pack, grads[0].contiguous(), d_x, d_state);
    return {d_x, d_weight, d_state, at::Tensor(), at::Tensor()};
  }
};

class DeltaRuleNode : public torch::autograd::Function<DeltaRuleNode> {
 public:
  static variable_list forward(AutogradContext* ctx, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                               const at::Tensor& a, const at::Tensor& b, const at::Tensor& a_log, const at::Tensor& dt_bias,
                               const OptionalTensor& state, const at::Tensor& cu_seqlens, const at::Tensor& chunk_map,
                               bool output_final_state) {
    const int64_t tokens = q.size(0), heads = a_log.size(0);
    check(q, "q", q, at::kBFloat16, {-1, -1, kGdnDim});
    check(k, "k", q, at::kBFloat16, q.sizes());
    check(v, "v", q, at::kBFloat16, {tokens, heads, kGdnDim});
    check(a, "a", q, a.scalar_type(), {tokens, heads});
    check(b, "b", q, a.scalar_type(), {tokens, heads});
    check(dt_bias, "dt_bias", q, dt_bias.scalar_type(), {heads});
    TORCH_CHECK(q.size(1) > 0 && heads % q.size(1) == 0, heads, " value heads are not a multiple of ", q.size(1), " key heads");
    const Pack pack(cu_seqlens, chunk_map, tokens, q);
    check_state(state, "initial_state", q, at::kFloat, {pack.sequences, heads, kGdnDim, kGdnDim});
    const DeltaInputs in{rows_of(q.flatten(1)), rows_of(k.flatten(1)), rows_of(v.flatten(1)), a.contiguous(),
                         b.contiguous(),        wide(a_log),           wide(dt_bias),         or_none(state)};
    at::Tensor out = at::empty(v.sizes(), v.options());
    at::Tensor final_state = output_final_state ? state_like(in, pack) : at::Tensor();
    const DeltaKept kept = delta_rule_forward(in, pack, false, out, final_state);
    ctx->save_for_backward({in.q, in.k, in.v, in.a, in.b, in.a_log, in.dt_bias, in.state, pack.cu_seqlens, pack.map});
    remember_dtypes(ctx, a_log, dt_bias);
    ctx->set_materialize_grads(false);
    if (!output_final_state) {
      final_state = at::empty({0}, in.a_log.options());
      ctx->mark_non_differentiable({final_state});
    }
    return {out, final_state};
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const variable_list saved = ctx->get_saved_variables();
    const DeltaInputs in{saved[0], saved[1], saved[2], saved[3], saved[4], saved[5], saved[6], saved[7]};
    const Pack pack(saved[8], saved[9], in.q.size(0), in.q);
    const int64_t tokens = pack.tokens, heads = in.value_heads();
    at::Tensor out = at::empty({tokens, heads, kGdnDim}, in.q.options()), no_state;
    const at::Tensor d_out = grads[0].defined() ? grads[0].contiguous() : at::zeros_like(out);
    const at::Tensor d_final = grads[1].defined() ? grads[1].contiguous() : at::Tensor();
    const DeltaKept kept = delta_rule_forward(in, pack, true, out, no_state);
    DeltaGradients d;
    d.q = at::empty(in.q.sizes(), in.q.options());
    d.k = at::empty(in.k.sizes(), in.k.options());
    d.v = at::empty(in.v.sizes(), in.v.options());
    d.a = at::empty(in.a.sizes(), in.a.options());
    d.b = at::empty(in.b.sizes(), in.b.options());
    if (in.state.defined()) {
      d.state = at::empty_like(in.state);
    }
    delta_rule_backward(in, pack, kept, d_out, d_final, d);
    as_given(ctx, d);
    const auto shaped = [&](const at::Tensor& x) { return x.unflatten(1, {x.size(1) / kGdnDim, kGdnDim}); };
    const at::Tensor none;
    return {shaped(d.q), shaped(d.k), shaped(d.v), d.a, d.b, d.a_log, d.dt_bias, d.state, none, none, none};
  }
};

// The parts of in_proj's output, [tokens, q k v z b a].
struct Projected {
  at::Tensor all;
  int64_t keys, values, heads;  // widths of q and v, and how many value heads there are

  int64_t channels() const { return 2 * keys + values; }
  at::Tensor mixed() const { return all.narrow(1, 0, channels()); }
  at::Tensor z() const { return all.narrow(1, channels(), values); }
  at::Tensor b() const { return all.narrow(1, channels() + values, heads); }
  at::Tensor a() const { return all.narrow(1, channels() + values + heads, heads); }
};

class GdnNode : public torch::autograd::Function<GdnNode> {
 public:
  static variable_list forward(AutogradContext* ctx, const at::Tensor& x, const at::Tensor& conv1d, const at::Tensor& a_log,
                               const at::Tensor& dt_bias, const at::Tensor& out_norm, const OptionalTensor& conv_state,
                               const OptionalTensor& state, const at::Tensor& cu_seqlens, const at::Tensor& chunk_map,
                               int64_t key_heads, double eps, bool output_final_state) {
    const int64_t heads = a_log.size(0), keys = key_heads * kGdnDim, values = heads * kGdnDim;
    TORCH_CHECK(key_heads > 0 && heads % key_heads == 0, heads, " value heads are not a multiple of ", key_heads, " key heads");
    check(x, "x", x, at::kBFloat16, {-1, 2 * (keys + values + heads)});
    const Projected in{rows_of(x), keys, values, heads};
    const Pack pack(cu_seqlens, chunk_map, x.size(0), x);
    check(conv1d, "conv1d", x, conv1d.scalar_type(), {in.channels(), kTaps});
    check(dt_bias, "dt_bias", x, dt_bias.scalar_type(), {heads});
    check(out_norm, "out_norm", x, out_norm.scalar_type(), {kGdnDim});
    check_state(conv_state, "conv_state", x, at::kBFloat16, {pack.sequences, in.channels(), kTaps - 1});
    check_state(state, "state", x, at::kFloat, {pack.sequences, heads, kGdnDim, kGdnDim});

    const at::Tensor taps = conv1d.contiguous(), before = or_none(conv_state), norm = out_norm.contiguous();
    at::Tensor mixed = at::empty({pack.tokens, in.channels()}, x.options());
    convolve(in.mixed(), taps, before, pack, mixed);
    const DeltaInputs delta = delta_inputs(in, mixed, wide(a_log), wide(dt_bias), or_none(state));
    at::Tensor core = at::empty({pack.tokens, values}, x.options());
    at::Tensor final_state = output_final_state ? state_like(delta, pack) : at::Tensor();
    delta_rule_forward(delta, pack, false, core, final_state);
    at::Tensor out = at::empty({pack.tokens, values}, x.options());
    GatedRmsNormForward p{};
    p.out = out.data_ptr();
    fill_norm(p, in, core, norm, eps);
    Launch("gdn_core", x)(gated_rms_norm_forward, p);

    ctx->save_for_backward({in.all, mixed, core, taps, delta.a_log, delta.dt_bias, norm, before, delta.state, pack.cu_seqlens,
                            pack.map});
    ctx->saved_data["eps"] = eps;
    ctx->saved_data["keys"] = keys;
    remember_dtypes(ctx, a_log, dt_bias);
    if (!output_final_state) {
      final_state = at::empty({0}, delta.a_log.options());
    }
    ctx->mark_non_differentiable({final_state});
    return {out, final_state};
  }

  // The states of chunks and Delta are made again: kept, they would be 24 KB a token with 32 heads, in every layer.
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const variable_list saved = ctx->get_saved_variables();
    const at::Tensor &mixed = saved[1], &core = saved[2], &taps = saved[3], &norm = saved[6];
    const int64_t keys = ctx->saved_data["keys"].toInt(), heads = saved[4].size(0);
    const Projected in{saved[0], keys, heads * kGdnDim, heads};
    const Pack pack(saved[9], saved[10], mixed.size(0), mixed);
    const DeltaInputs delta = delta_inputs(in, mixed, saved[4], saved[5], saved[8]);
    const Projected d_in{at::empty(in.all.sizes(), in.all.options()), keys, in.values, heads};
    const auto like = mixed.options();

    at::Tensor d_core = at::empty({pack.tokens, in.values}, like), d_norm = at::empty_like(norm), d_z = d_in.z();
    const at::Tensor d_out = grads[0].contiguous();
    GatedRmsNormBackward p{};
    fill_norm(p, in, core, norm, ctx->saved_data["eps"].toDouble());
    const at::Tensor scratch = workspace(gated_rms_norm_backward_workspace_bytes(p.tokens, p.heads, p.dtype), mixed);
    p.d_out = d_out.const_data_ptr();
    p.d_x = d_core.data_ptr();
    p.d_gate = d_z.data_ptr();
    p.d_gate_stride = row_stride(d_in.all);
    p.d_weight = d_norm.data_ptr();
    p.workspace = reinterpret_cast<float*>(scratch.data_ptr());
    Launch("gdn_core", mixed)(gated_rms_norm_backward, p);

    at::Tensor again = at::empty({pack.tokens, in.values}, like), none;
    const DeltaKept kept = delta_rule_forward(delta, pack, true, again, none);
    const at::Tensor d_mixed = at::empty(mixed.sizes(), like);
    DeltaGradients d;
    d.q = d_mixed.narrow(1, 0, keys);
    d.k = d_mixed.narrow(1, keys, keys);
    d.v = d_mixed.narrow(1, 2 * keys, in.values);
    d.a = d_in.a();
    d.b = d_in.b();
    delta_rule_backward(delta, pack, kept, d_core, at::Tensor(), d);
    at::Tensor d_x = d_in.mixed(), no_state;
    const at::Tensor d_taps = convolve_back(in.mixed(), taps, saved[7], pack, d_mixed, d_x, no_state);

    as_given(ctx, d);
    return {d_in.all, d_taps, d.a_log, d.dt_bias, d_norm, none, none, none, none, none, none, none};
  }

 private:
  static DeltaInputs delta_inputs(const Projected& in, const at::Tensor& mixed, const at::Tensor& a_log,
                                  const at::Tensor& dt_bias, const at::Tensor& state) {
    return {mixed.narrow(1, 0, in.keys), mixed.narrow(1, in.keys, in.keys), mixed.narrow(1, 2 * in.keys, in.values),
            in.a(), in.b(), a_log, dt_bias, state};
  }

  template <class Parameters>
  static void fill_norm(Parameters& p, const Projected& in, const at::Tensor& core, const at::Tensor& norm, double eps) {
    p.x = core.const_data_ptr();
    p.gate = in.z().const_data_ptr();
    p.weight = norm.const_data_ptr();
    p.tokens = core.size(0);
    p.gate_stride = row_stride(in.all);
    p.heads = static_cast<int>(in.heads);
    p.eps = static_cast<float>(eps);
    p.weight_offset = 1.0f;
    p.dtype = dtype_of(core, "x");
    p.weight_dtype = dtype_of(norm, "out_norm");
  }
};

at::Tensor causal_conv1d_silu(const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& state,
                              const at::Tensor& cu_seqlens, const at::Tensor& chunk_map) {
  return ConvNode::apply(x, weight, state, cu_seqlens, chunk_map);
}

std::tuple<at::Tensor, at::Tensor> gated_delta_rule(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                                    const at::Tensor& a, const at::Tensor& b, const at::Tensor& a_log,
                                                    const at::Tensor& dt_bias, const OptionalTensor& initial_state,
                                                    const at::Tensor& cu_seqlens, const at::Tensor& chunk_map,
                                                    bool output_final_state) {
  const variable_list results =
      DeltaRuleNode::apply(q, k, v, a, b, a_log, dt_bias, initial_state, cu_seqlens, chunk_map, output_final_state);
  return {results[0], results[1]};
}

std::tuple<at::Tensor, at::Tensor> gdn_core(const at::Tensor& x, const at::Tensor& conv1d, const at::Tensor& a_log,
                                            const at::Tensor& dt_bias, const at::Tensor& out_norm,
                                            const OptionalTensor& conv_state, const OptionalTensor& state,
                                            const at::Tensor& cu_seqlens, const at::Tensor& chunk_map, int64_t key_heads,
                                            double eps, bool output_final_state) {
  const variable_list results = GdnNode::apply(x, conv1d, a_log, dt_bias, out_norm, conv_state, state, cu_seqlens, chunk_map,
                                               key_heads, eps, output_final_state);
  return {results[0], results[1]};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(megatron_bridge, library) {
  // cu_seqlens [n + 1], int32 or int64, on the device: the chunks of the pack, once a step for all layers.
  define(library, "chunk_map(Tensor cu_seqlens, int tokens) -> Tensor", &chunk_map_of);
  // x [tokens, channels], weight [channels, 4], state [n, channels, 3]: silu of the causal convolution.
  define(library, "causal_conv1d_silu(Tensor x, Tensor weight, Tensor? state, Tensor cu_seqlens, Tensor chunk_map) -> Tensor",
         &causal_conv1d_silu);
  // q, k [tokens, key heads, 128], v [tokens, value heads, 128] bfloat16; a, b [tokens, value heads]; a_log, dt_bias
  // [value heads]; initial_state [n, value heads, 128, 128] float32: the output like v, and the final state (else empty).
  define(library,
         "gated_delta_rule(Tensor q, Tensor k, Tensor v, Tensor a, Tensor b, Tensor a_log, Tensor dt_bias, "
         "Tensor? initial_state, Tensor cu_seqlens, Tensor chunk_map, bool output_final_state) -> (Tensor, Tensor)",
         &gated_delta_rule);
  // x [tokens, q k v z b a] bfloat16, as in_proj gives it: from there to out_proj's input, [tokens, value heads * 128], and
  // the final state. States take no part in the gradient.
  define(library,
         "gdn_core(Tensor x, Tensor conv1d, Tensor a_log, Tensor dt_bias, Tensor out_norm, Tensor? conv_state, Tensor? state, "
         "Tensor cu_seqlens, Tensor chunk_map, int key_heads, float eps, bool output_final_state) -> (Tensor, Tensor)",
         &gdn_core);
}

}  // namespace bridge::operators
