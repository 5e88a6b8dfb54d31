//! Rows of the vision tower and its mergers.

use super::language::{INPUT_NORM, MLP_NORM};
use crate::config::VisionConfig;
use crate::mapping::{Init, Part, Row, Rule, Section, row, section, tensor};

/// A linear layer with bias: the rule of the weight is the bias's too.
fn linear(megatron: &str, hf: &str, rule: Rule, out: usize, inputs: usize) -> [Row; 2] {
    [
        row(
            &format!("{megatron}.weight"),
            rule,
            [tensor(&format!("{hf}.weight"), [out, inputs])],
        ),
        row(
            &format!("{megatron}.bias"),
            rule,
            [tensor(&format!("{hf}.bias"), [out])],
        )
        .init(Init::Zeros),
    ]
}

/// A layer norm with bias; `megatron` ends where `weight` and `bias` follow.
fn layer_norm(megatron: &str, hf: &str, size: usize) -> [Row; 2] {
    ["weight", "bias"].map(|word| {
        let init = if word == "weight" {
            Init::Ones
        } else {
            Init::Zeros
        };
        row(
            &format!("{megatron}{word}"),
            Rule::Replicated,
            [tensor(&format!("{hf}.{word}"), [size])],
        )
        .init(init)
    })
}

/// A layer norm that is fused into the linear layer behind it; `separate` is its module where it is not.
fn fused_norm(megatron: &str, hf: &str, separate: &str, size: usize) -> [Row; 2] {
    let [weight, bias] = layer_norm(megatron, hf, size);
    [
        weight.separate_norm(&format!("{separate}weight")),
        bias.separate_norm(&format!("{separate}bias")),
    ]
}

/// Sections of the tower.
pub(super) fn sections(vision: &VisionConfig, megatron: &str, hf: &str) -> Vec<Section> {
    let hidden = vision.hidden_size;
    let merged = vision.merged_size();
    let patch = [
        hidden,
        vision.in_channels,
        vision.temporal_patch_size,
        vision.patch_size,
        vision.patch_size,
    ];
    let block_megatron = format!("{megatron}decoder.layers.{{layer}}.");
    let block_hf = format!("{hf}blocks.{{layer}}.");
    let mut list = vec![
        section(
            "patches and positions",
            Part::Vision,
            (megatron, hf),
            [
                row(
                    "patch_embed.proj.weight",
                    Rule::Replicated,
                    [tensor("patch_embed.proj.weight", patch)],
                )
                .stateless(),
                row(
                    "patch_embed.proj.bias",
                    Rule::Replicated,
                    [tensor("patch_embed.proj.bias", [hidden])],
                )
                .init(Init::Zeros)
                .stateless(),
                row(
                    "pos_embed.weight",
                    Rule::Replicated,
                    [tensor(
                        "pos_embed.weight",
                        [vision.num_position_embeddings, hidden],
                    )],
                )
                .stateless(),
            ],
        ),
        section(
            "vision blocks",
            Part::Vision,
            (&block_megatron, &block_hf),
            block_rows(vision),
        )
        // The tower's layers are alike, so Megatron-Core stacks them.
        .key_prefix(&format!("{megatron}decoder.layers."))
        .on(0..vision.depth),
        section(
            "merger",
            Part::Projector,
            (&format!("{megatron}merger."), &format!("{hf}merger.")),
            merger_rows(hidden, merged, vision.out_hidden_size),
        ),
    ];
    if !vision.deepstack_visual_indexes.is_empty() {
        let name = "deepstack_merger_list.{layer}.";
        list.push(
            section(
                "deepstack mergers",
                Part::Projector,
                (&format!("{megatron}decoder.{name}"), &format!("{hf}{name}")),
                merger_rows(merged, merged, vision.out_hidden_size),
            )
            .on(0..vision.deepstack_visual_indexes.len()),
        );
    }
    list
}

fn block_rows(vision: &VisionConfig) -> Vec<Row> {
    let (hidden, width) = (vision.hidden_size, vision.intermediate_size);
    let qkv = Rule::VisionQkv {
        num_heads: vision.num_heads,
        head_dim: hidden / vision.num_heads,
    };
    [
        fused_norm(
            "self_attention.linear_qkv.layer_norm_",
            "norm1",
            INPUT_NORM,
            hidden,
        ),
        linear(
            "self_attention.linear_qkv",
            "attn.qkv",
            qkv,
            3 * hidden,
            hidden,
        ),
        linear(
            "self_attention.linear_proj",
            "attn.proj",
            Rule::Row,
            hidden,
            hidden,
        ),
        fused_norm("mlp.linear_fc1.layer_norm_", "norm2", MLP_NORM, hidden),
        linear(
            "mlp.linear_fc1",
            "mlp.linear_fc1",
            Rule::Column,
            width,
            hidden,
        ),
        linear("mlp.linear_fc2", "mlp.linear_fc2", Rule::Row, hidden, width),
    ]
    .into_iter()
    .flatten()
    .collect()
}

/// A merger joins `merge size squared` rows; `norm_size` is the width at which its norm runs.
fn merger_rows(norm_size: usize, merged: usize, out: usize) -> Vec<Row> {
    [
        layer_norm("patch_norm.", "norm", norm_size),
        linear("linear_fc1", "linear_fc1", Rule::Column, merged, merged),
        linear("linear_fc2", "linear_fc2", Rule::Row, out, merged),
    ]
    .into_iter()
    .flatten()
    .collect()
}
