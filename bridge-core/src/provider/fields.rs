//! Fields that dense and mixture-of-experts models share.

use serde::Serialize;

use crate::Dtype;
use crate::config::{HfConfig, LayerType};

/// Fields of the multi-token-prediction head.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[expect(missing_docs, reason = "fields carry Megatron's names")]
pub struct MtpFields {
    /// `None`: no head.
    pub mtp_num_layers: Option<usize>,
    pub mtp_loss_scaling_factor: f64,
    pub mtp_detach_heads: bool,
    pub mtp_use_repeated_layer: bool,
}

/// Fields of the classes with a vision tower.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[expect(missing_docs, reason = "fields carry Megatron's names")]
pub struct VisionFields {
    pub head_dim: usize,
    pub vision_start_token_id: i64,
    pub vision_end_token_id: i64,
    pub image_token_id: i64,
    pub video_token_id: i64,
    // Constants of the class, not read from vision_config.
    pub spatial_merge_size: usize,
    pub temporal_patch_size: usize,
    pub patch_size: usize,
    pub language_max_sequence_length: usize,
    pub use_hf_vision_model: bool,
    pub vision_dp_when_cp: bool,
    pub freeze_language_model: bool,
    pub freeze_vision_model: bool,
    pub freeze_vision_projection: bool,
}

/// Fields of the class with a classifier of tokens.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[expect(missing_docs, reason = "fields carry Megatron's names")]
pub struct ClassifierFields {
    pub num_labels: usize,
    pub classifier_dropout: f64,
}

/// What dense and mixture-of-experts models have.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[expect(missing_docs, reason = "fields carry Megatron's names")]
pub struct CommonFields {
    // Sizes.
    pub num_layers: usize,
    pub hidden_size: usize,
    pub vocab_size: usize,
    pub seq_length: usize,
    pub make_vocab_size_divisible_by: usize,
    pub should_pad_vocab: bool,
    pub share_embeddings_and_output_weights: bool,
    // Attention.
    pub num_attention_heads: usize,
    pub num_query_groups: usize,
    pub kv_channels: usize,
    pub add_qkv_bias: bool,
    pub add_bias_linear: bool,
    pub qk_layernorm: bool,
    pub attention_output_gate: bool,
    pub attention_dropout: f64,
    pub hidden_dropout: f64,
    pub attention_softmax_in_fp32: bool,
    // Gated delta net.
    pub experimental_attention_variant: &'static str,
    /// One entry a layer: 1 linear, 0 full attention.
    pub linear_attention_freq: Vec<u8>,
    pub linear_conv_kernel_dim: usize,
    pub linear_key_head_dim: usize,
    pub linear_value_head_dim: usize,
    pub linear_num_key_heads: usize,
    pub linear_num_value_heads: usize,
    // Norms and MLP.
    pub normalization: &'static str,
    pub layernorm_epsilon: f64,
    pub layernorm_zero_centered_gamma: bool,
    pub gated_linear_unit: bool,
    pub init_method_std: f64,
    // Rotary embedding.
    pub position_embedding_type: &'static str,
    pub rotary_base: f64,
    pub rotary_percent: f64,
    pub rotary_interleaved: bool,
    /// `None` without a vision tower: text positions need no sections.
    pub mrope_section: Option<[usize; 3]>,
    // Multi-token prediction.
    #[serde(flatten)]
    pub mtp: MtpFields,
    // Dtype.
    pub params_dtype: String,
    pub bf16: bool,
    pub fp16: bool,
    // Tokens.
    pub bos_token_id: Option<i64>,
    pub eos_token_id: Option<i64>,
    // What only some classes have.
    #[serde(flatten)]
    pub vision: Option<VisionFields>,
    #[serde(flatten)]
    pub classifier: Option<ClassifierFields>,
    // How it is stored and run.
    /// Megatron's own spelling.
    pub hetereogenous_dist_checkpoint: bool,
    pub bias_activation_fusion: bool,
    pub scatter_embedding_sequence_parallel: bool,
}

impl CommonFields {
    pub(super) fn from_config(config: &HfConfig) -> Self {
        let text = &config.text;
        let dtype = text.dtype.unwrap_or(Dtype::F32);
        let has_vision = config.vision.is_some();
        Self {
            num_layers: text.num_hidden_layers,
            hidden_size: text.hidden_size,
            vocab_size: text.vocab_size,
            seq_length: text.max_position_embeddings,
            make_vocab_size_divisible_by: vocab_divisor(text.vocab_size),
            should_pad_vocab: false,
            share_embeddings_and_output_weights: config.tie_word_embeddings,
            num_attention_heads: text.num_attention_heads,
            num_query_groups: text.num_key_value_heads,
            kv_channels: text.head_dim,
            add_qkv_bias: false,
            add_bias_linear: false,
            qk_layernorm: true,
            attention_output_gate: true,
            attention_dropout: text.attention_dropout,
            hidden_dropout: 0.0,
            attention_softmax_in_fp32: has_vision,
            experimental_attention_variant: "gated_delta_net",
            linear_attention_freq: text
                .layer_types
                .iter()
                .map(|kind| u8::from(*kind == LayerType::LinearAttention))
                .collect(),
            linear_conv_kernel_dim: text.linear_conv_kernel_dim,
            linear_key_head_dim: text.linear_key_head_dim,
            linear_value_head_dim: text.linear_value_head_dim,
            linear_num_key_heads: text.linear_num_key_heads,
            linear_num_value_heads: text.linear_num_value_heads,
            normalization: "RMSNorm",
            layernorm_epsilon: text.rms_norm_eps,
            layernorm_zero_centered_gamma: true,
            gated_linear_unit: true,
            init_method_std: text.initializer_range,
            position_embedding_type: if has_vision { "mrope" } else { "rope" },
            rotary_base: text.rope.rope_theta,
            rotary_percent: text.rope.partial_rotary_factor,
            rotary_interleaved: false,
            mrope_section: has_vision.then_some(text.rope.mrope_section),
            mtp: MtpFields {
                // The classifier's class says 0, the others nothing.
                mtp_num_layers: (text.mtp_num_hidden_layers > 0 || config.classifier.is_some())
                    .then_some(text.mtp_num_hidden_layers),
                mtp_loss_scaling_factor: 0.1,
                mtp_detach_heads: false,
                mtp_use_repeated_layer: false,
            },
            params_dtype: format!("torch.{}", dtype.torch_word()),
            bf16: dtype == Dtype::Bf16,
            fp16: dtype == Dtype::F16,
            bos_token_id: text.bos_token_id,
            eos_token_id: text.eos_token_id,
            vision: has_vision.then(|| VisionFields::from_config(config)),
            classifier: config.classifier.as_ref().map(|one| ClassifierFields {
                num_labels: one.num_labels,
                classifier_dropout: one.dropout,
            }),
            hetereogenous_dist_checkpoint: true,
            bias_activation_fusion: has_vision,
            scatter_embedding_sequence_parallel: !has_vision,
        }
    }
}

impl VisionFields {
    fn from_config(config: &HfConfig) -> Self {
        Self {
            head_dim: config.text.head_dim,
            vision_start_token_id: config.vision_start_token_id,
            vision_end_token_id: config.vision_end_token_id,
            image_token_id: config.image_token_id,
            video_token_id: config.video_token_id,
            spatial_merge_size: 2,
            temporal_patch_size: 2,
            patch_size: 16,
            language_max_sequence_length: 2048,
            use_hf_vision_model: false,
            vision_dp_when_cp: false,
            freeze_language_model: false,
            freeze_vision_model: false,
            freeze_vision_projection: false,
        }
    }
}

/// The largest power of two up to 128 that divides the vocabulary.
fn vocab_divisor(vocab_size: usize) -> usize {
    1 << vocab_size.trailing_zeros().min(7)
}

#[cfg(test)]
mod tests {
    use super::vocab_divisor;

    #[test]
    fn the_vocabulary_is_divisible_by_a_power_of_two_up_to_128() {
        assert_eq!(vocab_divisor(248_320), 128);
        assert_eq!(vocab_divisor(1000), 8);
        assert_eq!(vocab_divisor(1001), 1);
    }
}
