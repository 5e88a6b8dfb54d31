//! The language model: `text_config`, or the top level of a language model's own file.

use serde_json::{Map, Value};

use super::ConfigProblem;
use super::reader::Reader;
use crate::Dtype;

/// What mixes positions in a layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum LayerType {
    /// Gated delta net.
    LinearAttention,
    /// Attention with an output gate.
    FullAttention,
}

impl LayerType {
    /// The word of `layer_types`.
    #[must_use]
    pub fn hf_word(self) -> &'static str {
        match self {
            Self::LinearAttention => "linear_attention",
            Self::FullAttention => "full_attention",
        }
    }
}

/// Rotary embedding of the text: interleaved multimodal rope over a part of each head.
#[derive(Debug, Clone, PartialEq)]
pub struct RopeParameters {
    /// Base of the frequencies.
    pub rope_theta: f64,
    /// Part of a head that is rotated.
    pub partial_rotary_factor: f64,
    /// Frequencies for time, height and width; their sum is half the rotated dimensions.
    pub mrope_section: [usize; 3],
}

/// Sizes of a mixture-of-experts model; every layer is one.
#[derive(Debug, Clone, PartialEq)]
#[expect(missing_docs, reason = "fields carry the names of config.json")]
pub struct MoeConfig {
    pub num_experts: usize,
    pub num_experts_per_tok: usize,
    pub moe_intermediate_size: usize,
    pub shared_expert_intermediate_size: usize,
    pub router_aux_loss_coef: f64,
    pub output_router_logits: bool,
}

/// The language model. Field names are those of `config.json`; absent keys have transformers' defaults.
#[derive(Debug, Clone, PartialEq)]
#[expect(missing_docs, reason = "fields carry the names of config.json")]
pub struct TextConfig {
    pub vocab_size: usize,
    pub hidden_size: usize,
    pub num_hidden_layers: usize,
    /// Width of the dense MLP; `None` in a mixture of experts.
    pub intermediate_size: Option<usize>,
    pub num_attention_heads: usize,
    pub num_key_value_heads: usize,
    pub head_dim: usize,
    pub linear_num_key_heads: usize,
    pub linear_num_value_heads: usize,
    pub linear_key_head_dim: usize,
    pub linear_value_head_dim: usize,
    pub linear_conv_kernel_dim: usize,
    /// One entry a layer, from `layer_types` or else from `full_attention_interval`.
    pub layer_types: Vec<LayerType>,
    pub full_attention_interval: usize,
    pub hidden_act: String,
    pub rms_norm_eps: f64,
    pub attention_dropout: f64,
    pub rope: RopeParameters,
    pub max_position_embeddings: usize,
    /// `None` in a dense model.
    pub moe: Option<MoeConfig>,
    /// 0 or 1 multi-token-prediction layers.
    pub mtp_num_hidden_layers: usize,
    pub initializer_range: f64,
    pub bos_token_id: Option<i64>,
    pub eos_token_id: Option<i64>,
    pub pad_token_id: Option<i64>,
    /// What the file says the weights are; the tensors themselves decide.
    pub dtype: Option<Dtype>,
}

/// Defaults that differ between the two families.
struct Defaults {
    hidden_size: usize,
    num_hidden_layers: usize,
    num_key_value_heads: usize,
}

const DENSE: Defaults = Defaults {
    hidden_size: 4096,
    num_hidden_layers: 32,
    num_key_value_heads: 4,
};
const MOE: Defaults = Defaults {
    hidden_size: 2048,
    num_hidden_layers: 40,
    num_key_value_heads: 2,
};

impl TextConfig {
    /// Whether layer `layer` is full attention.
    #[must_use]
    pub fn is_full_attention(&self, layer: usize) -> bool {
        self.layer_types.get(layer) == Some(&LayerType::FullAttention)
    }

    /// Rotated dimensions of a head.
    #[must_use]
    pub fn rotary_dim(&self) -> usize {
        2 * self.rope.mrope_section.iter().sum::<usize>()
    }

    /// `path` is the dotted path of `map` in the file.
    pub(super) fn read(
        path: &str,
        map: &Map<String, Value>,
        is_moe: bool,
    ) -> (Self, Vec<ConfigProblem>) {
        let mut r = Reader::new(path, map);
        let defaults = if is_moe { MOE } else { DENSE };

        r.only("hidden_act", "\"silu\"");
        r.only("attention_bias", "false");
        r.only("attn_output_gate", "true");
        r.only("output_gate_type", "\"swish\"");
        r.only("mamba_ssm_dtype", "\"float32\"");
        r.only("mlp_only_layers", "[]");
        r.only("mtp_use_dedicated_embeddings", "false");
        r.also_known(&["tie_word_embeddings", "use_cache", "model_type"]);

        let num_hidden_layers =
            r.size_at_most("num_hidden_layers", defaults.num_hidden_layers, 100_000);
        let full_attention_interval = r.size("full_attention_interval", 4);
        let layer_types = read_layer_types(&mut r, num_hidden_layers, full_attention_interval);
        let head_dim = r.size("head_dim", 256);
        let rope = read_rope(&mut r, head_dim);
        let moe = is_moe.then(|| read_moe(&mut r));
        let dtype = r.dtype();

        let text = Self {
            vocab_size: r.size("vocab_size", 248_320),
            hidden_size: r.size("hidden_size", defaults.hidden_size),
            num_hidden_layers,
            intermediate_size: (!is_moe).then(|| r.size("intermediate_size", 12_288)),
            num_attention_heads: r.size("num_attention_heads", 16),
            num_key_value_heads: r.size("num_key_value_heads", defaults.num_key_value_heads),
            head_dim,
            linear_num_key_heads: r.size("linear_num_key_heads", 16),
            linear_num_value_heads: r.size("linear_num_value_heads", 32),
            linear_key_head_dim: r.size("linear_key_head_dim", 128),
            linear_value_head_dim: r.size("linear_value_head_dim", 128),
            linear_conv_kernel_dim: r.size("linear_conv_kernel_dim", 4),
            layer_types,
            full_attention_interval,
            hidden_act: "silu".to_owned(),
            rms_norm_eps: r.float("rms_norm_eps", 1e-6),
            attention_dropout: r.float("attention_dropout", 0.0),
            rope,
            max_position_embeddings: r.size("max_position_embeddings", 32_768),
            moe,
            mtp_num_hidden_layers: r.count("mtp_num_hidden_layers", 0, 1),
            initializer_range: r.float("initializer_range", 0.02),
            bos_token_id: r.integer("bos_token_id"),
            eos_token_id: r.integer("eos_token_id"),
            pad_token_id: r.integer("pad_token_id"),
            dtype,
        };
        if !text
            .num_attention_heads
            .is_multiple_of(text.num_key_value_heads)
        {
            r.inconsistent(
                "num_attention_heads",
                text.num_attention_heads,
                format!(
                    "it must be a multiple of num_key_value_heads ({})",
                    text.num_key_value_heads
                ),
            );
        }
        if !text
            .linear_num_value_heads
            .is_multiple_of(text.linear_num_key_heads)
        {
            r.inconsistent(
                "linear_num_value_heads",
                text.linear_num_value_heads,
                format!(
                    "it must be a multiple of linear_num_key_heads ({})",
                    text.linear_num_key_heads
                ),
            );
        }
        (text, r.finish())
    }
}

fn read_layer_types(r: &mut Reader<'_>, layers: usize, interval: usize) -> Vec<LayerType> {
    let by_interval = || {
        (1..=layers)
            .map(|number| {
                if number.is_multiple_of(interval) {
                    LayerType::FullAttention
                } else {
                    LayerType::LinearAttention
                }
            })
            .collect()
    };
    let Some(value) = r.get("layer_types") else {
        return by_interval();
    };
    let words = value.as_array().map(Vec::as_slice).unwrap_or_default();
    if words.len() != layers {
        let reason = format!("it needs one entry a layer, num_hidden_layers is {layers}");
        r.inconsistent("layer_types", format!("{} entries", words.len()), reason);
        return by_interval();
    }
    let mut types = Vec::with_capacity(layers);
    for word in words {
        match word.as_str() {
            Some("linear_attention") => types.push(LayerType::LinearAttention),
            Some("full_attention") => types.push(LayerType::FullAttention),
            _ => {
                r.problems.push(ConfigProblem::Unsupported {
                    key: r.key("layer_types"),
                    found: word.to_string(),
                    supported: "\"linear_attention\" or \"full_attention\"",
                });
                return by_interval();
            }
        }
    }
    types
}

fn read_rope(r: &mut Reader<'_>, head_dim: usize) -> RopeParameters {
    let empty = Map::new();
    let outer_factor = r.float("partial_rotary_factor", 0.25);
    let outer_theta = r.float("rope_theta", 10_000.0);
    let legacy = r.object("rope_scaling");
    let map = r.object("rope_parameters").or(legacy).unwrap_or(&empty);

    let mut inner = Reader::new(r.key("rope_parameters"), map);
    inner.only("rope_type", "\"default\"");
    inner.only("mrope_interleaved", "true");
    let partial_rotary_factor = inner.float("partial_rotary_factor", outer_factor);
    let rope_theta = inner.float("rope_theta", outer_theta);
    let section = inner.sizes("mrope_section").unwrap_or(vec![11, 11, 10]);
    let mrope_section = <[usize; 3]>::try_from(section.as_slice()).unwrap_or_else(|_| {
        let reason = "it needs three numbers: time, height, width".to_owned();
        inner.inconsistent("mrope_section", format!("{section:?}"), reason);
        [11, 11, 10]
    });
    #[expect(clippy::cast_precision_loss, reason = "sizes are below 2^53")]
    let wanted = head_dim as f64 * partial_rotary_factor / 2.0;
    let sum = mrope_section
        .iter()
        .try_fold(0usize, |sum, part| sum.checked_add(*part));
    #[expect(clippy::cast_precision_loss, reason = "sizes are below 2^53")]
    if sum.map(|sum| sum as f64) != Some(wanted) {
        let reason = format!(
            "it must sum to head_dim x partial_rotary_factor / 2 = {wanted}, one frequency a pair of rotated dimensions"
        );
        inner.inconsistent("mrope_section", format!("{mrope_section:?}"), reason);
    }
    if rope_theta <= 0.0 {
        inner.inconsistent("rope_theta", rope_theta, "it must be positive".to_owned());
    }
    let problems = inner.finish();
    r.problems.extend(problems);
    RopeParameters {
        rope_theta,
        partial_rotary_factor,
        mrope_section,
    }
}

fn read_moe(r: &mut Reader<'_>) -> MoeConfig {
    let moe = MoeConfig {
        num_experts: r.size_at_most("num_experts", 256, 1_000_000),
        num_experts_per_tok: r.size("num_experts_per_tok", 8),
        moe_intermediate_size: r.size("moe_intermediate_size", 512),
        shared_expert_intermediate_size: r.size("shared_expert_intermediate_size", 512),
        router_aux_loss_coef: r.float("router_aux_loss_coef", 0.001),
        output_router_logits: r.boolean("output_router_logits", false),
    };
    if moe.num_experts_per_tok > moe.num_experts {
        r.inconsistent(
            "num_experts_per_tok",
            moe.num_experts_per_tok,
            format!("there are only {} experts (num_experts)", moe.num_experts),
        );
    }
    moe
}
