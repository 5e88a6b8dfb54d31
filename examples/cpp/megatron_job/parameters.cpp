#include "parameters.hpp"

#include <stdexcept>
#include <string>
#include <vector>

namespace mb = megatron_bridge;

namespace {

/// Adds the parameters of a module under its prefix.
class Builder {
 public:
  Builder(mb::StateDict& parameters, at::ScalarType dtype)
      : parameters_(parameters), dtype_(dtype) {}

  void add(const std::string& name, std::vector<std::int64_t> shape) {
    parameters_.emplace(name, at::empty(shape, at::TensorOptions().dtype(dtype_)));
  }

  /// A matrix and its bias.
  void linear(const std::string& name, std::int64_t out, std::int64_t in) {
    add(name + ".weight", {out, in});
    add(name + ".bias", {out});
  }

 private:
  mb::StateDict& parameters_;
  at::ScalarType dtype_;
};

/// A size that an expert model must have.
std::int64_t needed(const std::optional<std::int64_t>& value, const char* field) {
  if (!value) {
    throw std::runtime_error(
        std::string("this job trains a mixture of experts; the model has no ") + field);
  }
  return *value;
}

void vision_tower(Builder& build, const VisionConfig& vision, const mb::Provider& provider,
                  const Job& job) {
  const std::int64_t h = vision.hidden_size;
  const std::int64_t patch = needed(provider.patch_size(), "patch_size");
  const std::int64_t temporal = needed(provider.temporal_patch_size(), "temporal_patch_size");
  const std::int64_t merge = needed(provider.spatial_merge_size(), "spatial_merge_size");
  build.add("vision_model.patch_embed.proj.weight",
            {h, vision.in_channels, temporal, patch, patch});
  build.add("vision_model.patch_embed.proj.bias", {h});
  build.add("vision_model.pos_embed.weight", {vision.num_position_embeddings, h});
  for (std::int64_t layer = 0; layer < vision.depth; ++layer) {
    const std::string prefix = "vision_model.decoder.layers." + std::to_string(layer);
    build.add(prefix + ".self_attention.linear_qkv.layer_norm_weight", {h});
    build.add(prefix + ".self_attention.linear_qkv.layer_norm_bias", {h});
    build.linear(prefix + ".self_attention.linear_qkv", 3 * h / job.tp_size, h);
    build.linear(prefix + ".self_attention.linear_proj", h, h / job.tp_size);
    build.add(prefix + ".mlp.linear_fc1.layer_norm_weight", {h});
    build.add(prefix + ".mlp.linear_fc1.layer_norm_bias", {h});
    build.linear(prefix + ".mlp.linear_fc1", vision.intermediate_size / job.tp_size, h);
    build.linear(prefix + ".mlp.linear_fc2", h, vision.intermediate_size / job.tp_size);
  }
  const std::int64_t merged = h * merge * merge;
  build.add("vision_model.merger.patch_norm.weight", {h});
  build.add("vision_model.merger.patch_norm.bias", {h});
  build.linear("vision_model.merger.linear_fc1", merged / job.tp_size, merged);
  build.linear("vision_model.merger.linear_fc2", vision.out_hidden_size, merged / job.tp_size);
}

void attention(Builder& build, const std::string& prefix, const mb::Provider& provider,
               const Job& job) {
  const std::int64_t h = provider.hidden_size();
  const std::int64_t d = provider.kv_channels();
  const std::int64_t query_rows =
      provider.num_attention_heads() * (provider.attention_output_gate() ? 2 : 1);
  const std::int64_t rows = (query_rows + 2 * provider.num_query_groups()) * d;
  build.add(prefix + ".linear_qkv.layer_norm_weight", {h});
  build.add(prefix + ".linear_qkv.weight", {rows / job.tp_size, h});
  build.add(prefix + ".q_layernorm.weight", {d});
  build.add(prefix + ".k_layernorm.weight", {d});
  build.add(prefix + ".linear_proj.weight", {h, provider.num_attention_heads() * d / job.tp_size});
}

void gated_delta_net(Builder& build, const std::string& prefix, const mb::Provider& provider,
                     const Job& job) {
  const std::int64_t h = provider.hidden_size();
  const std::int64_t value_heads = provider.linear_num_value_heads();
  const std::int64_t qk = provider.linear_num_key_heads() * provider.linear_key_head_dim();
  const std::int64_t v = value_heads * provider.linear_value_head_dim();
  build.add(prefix + ".in_proj.layer_norm_weight", {h});
  build.add(prefix + ".in_proj.weight", {2 * (qk + v + value_heads) / job.tp_size, h});
  build.add(prefix + ".conv1d.weight",
            {(2 * qk + v) / job.tp_size, 1, provider.linear_conv_kernel_dim()});
  build.add(prefix + ".dt_bias", {value_heads / job.tp_size});
  build.add(prefix + ".A_log", {value_heads / job.tp_size});
  build.add(prefix + ".out_norm.weight", {provider.linear_value_head_dim()});
  build.add(prefix + ".out_proj.weight", {h, v / job.tp_size});
}

void mixture_of_experts(Builder& build, const std::string& layer, const mb::Provider& provider,
                        const Job& job) {
  const std::int64_t h = provider.hidden_size();
  const std::int64_t experts = needed(provider.num_moe_experts(), "num_moe_experts");
  const std::int64_t width = needed(provider.moe_ffn_hidden_size(), "moe_ffn_hidden_size");
  const std::int64_t shared =
      needed(provider.moe_shared_expert_intermediate_size(), "moe_shared_expert_intermediate_size");
  build.add(layer + ".pre_mlp_layernorm.weight", {h});
  build.add(layer + ".mlp.router.weight", {experts, h});
  for (std::int64_t expert = 0; expert < experts / job.ep_size; ++expert) {
    const std::string number = std::to_string(expert);
    build.add(layer + ".mlp.experts.linear_fc1.weight" + number, {2 * width / job.etp_size, h});
    build.add(layer + ".mlp.experts.linear_fc2.weight" + number, {h, width / job.etp_size});
  }
  build.add(layer + ".mlp.shared_experts.gate_weight", {1, h});
  build.add(layer + ".mlp.shared_experts.linear_fc1.weight", {2 * shared / job.tp_size, h});
  build.add(layer + ".mlp.shared_experts.linear_fc2.weight", {h, shared / job.tp_size});
}

void mtp_head(Builder& build, const std::string& prefix, const mb::Provider& provider,
              const Job& job) {
  const std::int64_t h = provider.hidden_size();
  build.add(prefix + ".enorm.weight", {h});
  build.add(prefix + ".hnorm.weight", {h});
  build.add(prefix + ".eh_proj.weight", {h / job.tp_size, 2 * h});
  attention(build, prefix + ".mtp_model_layer.self_attention", provider, job);
  mixture_of_experts(build, prefix + ".mtp_model_layer", provider, job);
  build.add(prefix + ".final_layernorm.weight", {h});
}

}  // namespace

mb::StateDict build_parameters(const mb::Provider& provider, const VisionConfig& vision,
                               const Job& job, at::ScalarType params_dtype) {
  mb::StateDict parameters;
  Builder build(parameters, params_dtype);
  const std::int64_t vocabulary = provider.vocab_size() / job.tp_size;
  const std::int64_t h = provider.hidden_size();
  const std::int64_t mtp_layers = provider.mtp_num_layers().value_or(0);
  const bool first = job.pp_rank == 0;
  const bool last = job.pp_rank == job.pp_size - 1;

  if (first) {
    vision_tower(build, vision, provider, job);
  }
  // The MTP head embeds the next token with a copy of its own.
  if (first || (last && mtp_layers > 0)) {
    build.add("language_model.embedding.word_embeddings.weight", {vocabulary, h});
  }
  const std::vector<std::int64_t> is_linear = provider.linear_attention_freq();
  const std::int64_t layers = provider.num_layers() / job.pp_size;
  for (std::int64_t layer = 0; layer < layers; ++layer) {
    const std::string prefix = "language_model.decoder.layers." + std::to_string(layer);
    if (is_linear.at(static_cast<std::size_t>(job.pp_rank * layers + layer)) != 0) {
      gated_delta_net(build, prefix + ".self_attention", provider, job);
    } else {
      attention(build, prefix + ".self_attention", provider, job);
    }
    mixture_of_experts(build, prefix, provider, job);
  }
  if (last) {
    build.add("language_model.decoder.final_layernorm.weight", {h});
    for (std::int64_t layer = 0; layer < mtp_layers; ++layer) {
      mtp_head(build, "language_model.mtp.layers." + std::to_string(layer), provider, job);
    }
    if (!provider.share_embeddings_and_output_weights() || !first) {
      build.add("language_model.output_layer.weight", {vocabulary, h});
    }
  }
  return parameters;
}
