/// @file provider.hpp The fields of a model under Megatron's names.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#if defined(__GNUC__)
#define BRIDGE_CPP_API __attribute__((visibility("default")))
#else
#define BRIDGE_CPP_API
#endif

namespace megatron_bridge {

/// All that Megatron's provider of a model says, without the settings of a run (parallel sizes,
/// fusions, fp8, ...).
///
/// Every field has a function of its name. Fields that only some models have are std::optional:
/// empty where Megatron says None, or where the provider's class has no such field.
class BRIDGE_CPP_API Provider {
 public:
  Provider(const Provider&);
  Provider(Provider&&) noexcept;
  Provider& operator=(const Provider&);
  Provider& operator=(Provider&&) noexcept;
  ~Provider();

  /// Megatron Bridge's class: `Qwen35VLModelProvider`, `Qwen35VLMoEModelProvider`,
  /// `GPTModelProvider`, ...
  const std::string& class_name() const noexcept;

  /// All fields as one JSON object, in Megatron's spelling.
  const std::string& json() const noexcept;

  /// The names of all fields, those that are null among them.
  std::vector<std::string> fields() const;

  /// Whether the field is there and not null.
  bool has(const std::string& field) const noexcept;

  /// An integer field.
  /// @throws Error argument when there is no such field, it is null, or of another type; so do the
  ///   next four
  std::int64_t integer(const std::string& field) const;
  /// A number field; integers are numbers too.
  double number(const std::string& field) const;
  /// A boolean field.
  bool boolean(const std::string& field) const;
  /// A text field.
  std::string text(const std::string& field) const;
  /// A field that is a list of integers.
  std::vector<std::int64_t> integers(const std::string& field) const;

  /// As integer(), nothing where the field is null or not there; so are the next four.
  std::optional<std::int64_t> optional_integer(const std::string& field) const;
  std::optional<double> optional_number(const std::string& field) const;
  std::optional<bool> optional_boolean(const std::string& field) const;
  std::optional<std::string> optional_text(const std::string& field) const;
  std::optional<std::vector<std::int64_t>> optional_integers(const std::string& field) const;

  // Sizes.
  /// Decoder layers.
  std::int64_t num_layers() const { return integer("num_layers"); }
  /// Width of the residual stream.
  std::int64_t hidden_size() const { return integer("hidden_size"); }
  /// Width of the MLP; nothing in a mixture of experts.
  std::optional<std::int64_t> ffn_hidden_size() const {
    return optional_integer("ffn_hidden_size");
  }
  /// Rows of the vocabulary without padding.
  std::int64_t vocab_size() const { return integer("vocab_size"); }
  /// Positions that the model was made for.
  std::int64_t seq_length() const { return integer("seq_length"); }
  /// What the vocabulary is divisible by.
  std::int64_t make_vocab_size_divisible_by() const {
    return integer("make_vocab_size_divisible_by");
  }
  /// Whether the vocabulary is padded.
  bool should_pad_vocab() const { return boolean("should_pad_vocab"); }
  /// Whether the output layer is the embedding.
  bool share_embeddings_and_output_weights() const {
    return boolean("share_embeddings_and_output_weights");
  }

  // Attention.
  /// Query heads.
  std::int64_t num_attention_heads() const { return integer("num_attention_heads"); }
  /// Key and value heads.
  std::int64_t num_query_groups() const { return integer("num_query_groups"); }
  /// Width of a head.
  std::int64_t kv_channels() const { return integer("kv_channels"); }
  bool add_qkv_bias() const { return boolean("add_qkv_bias"); }
  bool add_bias_linear() const { return boolean("add_bias_linear"); }
  bool qk_layernorm() const { return boolean("qk_layernorm"); }
  bool attention_output_gate() const { return boolean("attention_output_gate"); }
  double attention_dropout() const { return number("attention_dropout"); }
  double hidden_dropout() const { return number("hidden_dropout"); }
  bool attention_softmax_in_fp32() const { return boolean("attention_softmax_in_fp32"); }

  // Gated delta net.
  std::string experimental_attention_variant() const {
    return text("experimental_attention_variant");
  }
  /// One entry a layer: 1 linear, 0 full attention.
  std::vector<std::int64_t> linear_attention_freq() const {
    return integers("linear_attention_freq");
  }
  std::int64_t linear_conv_kernel_dim() const { return integer("linear_conv_kernel_dim"); }
  std::int64_t linear_key_head_dim() const { return integer("linear_key_head_dim"); }
  std::int64_t linear_value_head_dim() const { return integer("linear_value_head_dim"); }
  std::int64_t linear_num_key_heads() const { return integer("linear_num_key_heads"); }
  std::int64_t linear_num_value_heads() const { return integer("linear_num_value_heads"); }

  // Norms and MLP.
  std::string normalization() const { return text("normalization"); }
  double layernorm_epsilon() const { return number("layernorm_epsilon"); }
  /// Whether norms are kept minus one.
  bool layernorm_zero_centered_gamma() const { return boolean("layernorm_zero_centered_gamma"); }
  bool gated_linear_unit() const { return boolean("gated_linear_unit"); }
  double init_method_std() const { return number("init_method_std"); }

  // Rotary embedding.
  std::string position_embedding_type() const { return text("position_embedding_type"); }
  double rotary_base() const { return number("rotary_base"); }
  double rotary_percent() const { return number("rotary_percent"); }
  bool rotary_interleaved() const { return boolean("rotary_interleaved"); }
  /// Nothing without a vision tower.
  std::optional<std::vector<std::int64_t>> mrope_section() const {
    return optional_integers("mrope_section");
  }

  // Multi-token prediction.
  /// Nothing without a head.
  std::optional<std::int64_t> mtp_num_layers() const { return optional_integer("mtp_num_layers"); }
  double mtp_loss_scaling_factor() const { return number("mtp_loss_scaling_factor"); }
  bool mtp_detach_heads() const { return boolean("mtp_detach_heads"); }
  bool mtp_use_repeated_layer() const { return boolean("mtp_use_repeated_layer"); }

  // Dtype.
  /// `torch.bfloat16` for example.
  std::string params_dtype() const { return text("params_dtype"); }
  bool bf16() const { return boolean("bf16"); }
  bool fp16() const { return boolean("fp16"); }

  // Tokens.
  std::optional<std::int64_t> bos_token_id() const { return optional_integer("bos_token_id"); }
  std::optional<std::int64_t> eos_token_id() const { return optional_integer("eos_token_id"); }

  // How it is stored and run.
  /// Megatron's own spelling.
  bool hetereogenous_dist_checkpoint() const { return boolean("hetereogenous_dist_checkpoint"); }
  bool bias_activation_fusion() const { return boolean("bias_activation_fusion"); }
  bool scatter_embedding_sequence_parallel() const {
    return boolean("scatter_embedding_sequence_parallel");
  }

  // Mixture of experts: nothing in a dense model.
  /// Experts a layer.
  std::optional<std::int64_t> num_moe_experts() const {
    return optional_integer("num_moe_experts");
  }
  /// Experts a token.
  std::optional<std::int64_t> moe_router_topk() const {
    return optional_integer("moe_router_topk");
  }
  /// Width of an expert.
  std::optional<std::int64_t> moe_ffn_hidden_size() const {
    return optional_integer("moe_ffn_hidden_size");
  }
  std::optional<std::int64_t> moe_shared_expert_intermediate_size() const {
    return optional_integer("moe_shared_expert_intermediate_size");
  }
  std::optional<bool> moe_shared_expert_gate() const {
    return optional_boolean("moe_shared_expert_gate");
  }
  std::optional<double> moe_aux_loss_coeff() const { return optional_number("moe_aux_loss_coeff"); }
  std::optional<std::string> moe_router_load_balancing_type() const {
    return optional_text("moe_router_load_balancing_type");
  }
  std::optional<bool> moe_router_pre_softmax() const {
    return optional_boolean("moe_router_pre_softmax");
  }
  std::optional<std::string> moe_router_score_function() const {
    return optional_text("moe_router_score_function");
  }
  std::optional<std::string> moe_router_dtype() const { return optional_text("moe_router_dtype"); }
  std::optional<bool> moe_router_enable_expert_bias() const {
    return optional_boolean("moe_router_enable_expert_bias");
  }
  std::optional<std::int64_t> moe_layer_freq() const { return optional_integer("moe_layer_freq"); }
  std::optional<bool> moe_grouped_gemm() const { return optional_boolean("moe_grouped_gemm"); }
  std::optional<bool> moe_permute_fusion() const { return optional_boolean("moe_permute_fusion"); }
  std::optional<std::string> moe_token_dispatcher_type() const {
    return optional_text("moe_token_dispatcher_type");
  }
  std::optional<std::int64_t> audio_token_id() const { return optional_integer("audio_token_id"); }

  // Vision tower: nothing in a language model.
  std::optional<std::int64_t> head_dim() const { return optional_integer("head_dim"); }
  std::optional<std::int64_t> vision_start_token_id() const {
    return optional_integer("vision_start_token_id");
  }
  std::optional<std::int64_t> vision_end_token_id() const {
    return optional_integer("vision_end_token_id");
  }
  std::optional<std::int64_t> image_token_id() const { return optional_integer("image_token_id"); }
  std::optional<std::int64_t> video_token_id() const { return optional_integer("video_token_id"); }
  std::optional<std::int64_t> spatial_merge_size() const {
    return optional_integer("spatial_merge_size");
  }
  std::optional<std::int64_t> temporal_patch_size() const {
    return optional_integer("temporal_patch_size");
  }
  std::optional<std::int64_t> patch_size() const { return optional_integer("patch_size"); }
  std::optional<std::int64_t> language_max_sequence_length() const {
    return optional_integer("language_max_sequence_length");
  }
  std::optional<bool> use_hf_vision_model() const {
    return optional_boolean("use_hf_vision_model");
  }
  std::optional<bool> vision_dp_when_cp() const { return optional_boolean("vision_dp_when_cp"); }
  std::optional<bool> freeze_language_model() const {
    return optional_boolean("freeze_language_model");
  }
  std::optional<bool> freeze_vision_model() const {
    return optional_boolean("freeze_vision_model");
  }
  std::optional<bool> freeze_vision_projection() const {
    return optional_boolean("freeze_vision_projection");
  }

  // Classifier of tokens: nothing in other models.
  std::optional<std::int64_t> num_labels() const { return optional_integer("num_labels"); }
  std::optional<double> classifier_dropout() const { return optional_number("classifier_dropout"); }

 private:
  friend struct Internals;
  struct Impl;
  explicit Provider(std::shared_ptr<const Impl> impl) noexcept;
  std::shared_ptr<const Impl> impl_;
};

}  // namespace megatron_bridge
