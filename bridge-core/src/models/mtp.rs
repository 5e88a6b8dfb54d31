//! Rows of the multi-token-prediction head: one attention layer between two norms, a projection and a norm.

use super::facts::Facts;
use super::language::{attention_rows, mlp_section, norm};
use crate::config::TextConfig;
use crate::mapping::{Part, Rule, Section, row, section, tensor};

/// Sections of the head; `megatron` is the language model's prefix, `mtp.` stands at the top of a Hugging Face file.
pub(super) fn sections(text: &TextConfig, megatron: &str, facts: &Facts) -> Vec<Section> {
    if !facts.mtp {
        return Vec::new();
    }
    let hidden = text.hidden_size;
    let head_megatron = format!("{megatron}mtp.layers.0.");
    let layer_megatron = format!("{megatron}mtp.layers.{{layer}}.mtp_model_layer.");
    let prefixes = (layer_megatron.as_str(), "mtp.layers.{layer}.");
    // Megatron-Core keeps the older word in files, so that older checkpoints load.
    let layer_key = format!("{megatron}mtp.layers.{{layer}}.transformer_layer.");
    vec![
        section(
            "MTP head",
            Part::Mtp,
            (&head_megatron, "mtp."),
            [
                norm("enorm.weight", "pre_fc_norm_embedding.weight", hidden),
                norm("hnorm.weight", "pre_fc_norm_hidden.weight", hidden),
                row(
                    "eh_proj.weight",
                    Rule::Column,
                    [tensor("fc.weight", [hidden, 2 * hidden])],
                ),
                norm("final_layernorm.weight", "norm.weight", hidden),
            ],
        ),
        section("MTP attention", Part::Mtp, prefixes, attention_rows(text))
            .key_prefix(&layer_key)
            .on([0]),
        mlp_section(
            Part::Mtp,
            prefixes,
            text,
            facts.mtp_experts,
            facts.expert_names,
        )
        .key_prefix(&layer_key)
        .on([0]),
    ]
}
