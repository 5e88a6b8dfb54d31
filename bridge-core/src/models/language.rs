//! Rows of the language model.

use super::facts::{ExpertLayout, ExpertNames};
use crate::config::{HfConfig, MoeConfig, TextConfig};
use crate::mapping::{Init, Part, Place, Row, Rule, Section, Transform, row, section, tensor};

/// A zero-centred norm, kept as it is on both sides.
pub(super) fn norm(megatron: &str, hf: &str, size: usize) -> Row {
    row(megatron, Rule::Replicated, [tensor(hf, [size])]).init(Init::Zeros)
}

/// The norm in front of a layer's attention or delta net, as a module of its own.
pub(super) const INPUT_NORM: &str = "input_layernorm.";
/// The norm in front of a layer's MLP, as a module of its own.
pub(super) const MLP_NORM: &str = "pre_mlp_layernorm.";

/// A norm that is fused into the linear layer behind it; `separate` is its module where it is not.
fn fused_norm(megatron: &str, hf: &str, separate: &str, size: usize) -> Row {
    norm(megatron, hf, size).separate_norm(&format!("{separate}weight"))
}

/// Sections of the language model; `megatron` and `hf` are the prefixes.
pub(super) fn sections(
    config: &HfConfig,
    (megatron, hf): (&str, &str),
    experts: ExpertLayout,
    expert_names: ExpertNames,
) -> Vec<Section> {
    let text = &config.text;
    let (vocab, hidden) = (text.vocab_size, text.hidden_size);
    let layers = |full: bool| {
        (0..text.num_hidden_layers).filter(move |layer| text.is_full_attention(*layer) == full)
    };
    let layer_megatron = format!("{megatron}decoder.layers.{{layer}}.");
    let layer_hf = format!("{hf}layers.{{layer}}.");
    let prefixes = (layer_megatron.as_str(), layer_hf.as_str());
    let mut embedding = row(
        "embedding.word_embeddings.weight",
        Rule::Vocabulary,
        [tensor("embed_tokens.weight", [vocab, hidden])],
    )
    .at(Place::Embedding)
    .stateless();
    let output_layer = "output_layer.weight";
    if config.tie_word_embeddings {
        embedding = embedding.tied_output(output_layer);
    }
    let final_layernorm = norm("decoder.final_layernorm.weight", "norm.weight", hidden);
    let mut once = vec![embedding, final_layernorm.at(Place::FinalLayernorm)];
    if let Some(classifier) = &config.classifier {
        once.extend(classifier_rows(classifier.num_labels, hidden));
    } else if !config.tie_word_embeddings {
        let head = tensor("/lm_head.weight", [vocab, hidden]);
        let head = row(output_layer, Rule::Vocabulary, [head]);
        once.push(head.at(Place::OutputLayer).stateless());
    }
    vec![
        section("embedding and output", Part::Language, (megatron, hf), once),
        section("gated delta net", Part::Language, prefixes, gdn_rows(text)).on(layers(false)),
        section(
            "gated attention",
            Part::Language,
            prefixes,
            attention_rows(text),
        )
        .on(layers(true)),
        mlp_section(Part::Language, prefixes, text, experts, expert_names)
            .on(0..text.num_hidden_layers),
    ]
}

/// A classifier of tokens in the place of the output layer: a plain linear layer, whole on every rank.
fn classifier_rows(num_labels: usize, hidden: usize) -> [Row; 2] {
    let weight = tensor("/score.weight", [num_labels, hidden]);
    let bias = tensor("/score.bias", [num_labels]);
    [
        row("output_layer.weight", Rule::Replicated, [weight]),
        row("output_layer.bias", Rule::Replicated, [bias]).init(Init::Zeros),
    ]
    .map(|row| row.at(Place::OutputLayer).stateless())
}

/// Full attention with an output gate.
pub(super) fn attention_rows(text: &TextConfig) -> Vec<Row> {
    let (hidden, head) = (text.hidden_size, text.head_dim);
    let (heads, groups) = (text.num_attention_heads, text.num_key_value_heads);
    let qkv = Rule::Qkv {
        num_query_groups: groups,
        queries_per_group: heads / groups,
        head_dim: head,
    };
    vec![
        fused_norm(
            "self_attention.linear_qkv.layer_norm_weight",
            "input_layernorm.weight",
            INPUT_NORM,
            hidden,
        ),
        row(
            "self_attention.linear_qkv.weight",
            qkv,
            [
                tensor("self_attn.q_proj.weight", [2 * heads * head, hidden]),
                tensor("self_attn.k_proj.weight", [groups * head, hidden]),
                tensor("self_attn.v_proj.weight", [groups * head, hidden]),
            ],
        ),
        norm(
            "self_attention.q_layernorm.weight",
            "self_attn.q_norm.weight",
            head,
        ),
        norm(
            "self_attention.k_layernorm.weight",
            "self_attn.k_norm.weight",
            head,
        ),
        row(
            "self_attention.linear_proj.weight",
            Rule::Row,
            [tensor("self_attn.o_proj.weight", [hidden, heads * head])],
        ),
    ]
}

/// Gated delta net. `A_log` and the gated norm are float32 in hub files of 16 bits.
fn gdn_rows(text: &TextConfig) -> Vec<Row> {
    let hidden = text.hidden_size;
    let heads = text.linear_num_value_heads;
    let key_rows = text.linear_num_key_heads * text.linear_key_head_dim;
    let value_rows = heads * text.linear_value_head_dim;
    let channels = 2 * key_rows + value_rows;
    vec![
        fused_norm(
            "self_attention.in_proj.layer_norm_weight",
            "input_layernorm.weight",
            INPUT_NORM,
            hidden,
        ),
        row(
            "self_attention.in_proj.weight",
            Rule::GdnInProj {
                key_rows,
                value_rows,
                heads,
            },
            [
                tensor("linear_attn.in_proj_qkv.weight", [channels, hidden]),
                tensor("linear_attn.in_proj_z.weight", [value_rows, hidden]),
                tensor("linear_attn.in_proj_b.weight", [heads, hidden]),
                tensor("linear_attn.in_proj_a.weight", [heads, hidden]),
            ],
        ),
        row(
            "self_attention.conv1d.weight",
            Rule::GdnConv {
                key_rows,
                value_rows,
            },
            [tensor(
                "linear_attn.conv1d.weight",
                [channels, 1, text.linear_conv_kernel_dim],
            )],
        )
        .stateless(),
        row(
            "self_attention.A_log",
            Rule::Column,
            [tensor("linear_attn.A_log", [heads])],
        )
        .init(Init::ALog)
        .float32()
        .stateless(),
        row(
            "self_attention.dt_bias",
            Rule::Column,
            [tensor("linear_attn.dt_bias", [heads])],
        )
        .init(Init::Ones)
        .stateless(),
        row(
            "self_attention.out_norm.weight",
            Rule::Replicated,
            [tensor(
                "linear_attn.norm.weight",
                [text.linear_value_head_dim],
            )],
        )
        .transform(Transform::MinusOne)
        .init(Init::Ones)
        .float32(),
        row(
            "self_attention.out_proj.weight",
            Rule::Row,
            [tensor("linear_attn.out_proj.weight", [hidden, value_rows])],
        ),
    ]
}

/// The MLP of a layer: dense, or a mixture of experts.
pub(super) fn mlp_section(
    part: Part,
    prefixes: (&str, &str),
    text: &TextConfig,
    experts: ExpertLayout,
    expert_names: ExpertNames,
) -> Section {
    match &text.moe {
        None => section(
            "dense MLP",
            part,
            prefixes,
            dense_rows(text.hidden_size, text.intermediate_size.unwrap_or(0)),
        ),
        Some(moe) => {
            let mut rows = moe_rows(text.hidden_size, moe);
            rows.extend(expert_rows(text.hidden_size, moe, experts, expert_names));
            section("mixture of experts", part, prefixes, rows).experts(moe.num_experts)
        }
    }
}

fn dense_rows(hidden: usize, intermediate: usize) -> Vec<Row> {
    vec![
        fused_norm(
            "mlp.linear_fc1.layer_norm_weight",
            "post_attention_layernorm.weight",
            MLP_NORM,
            hidden,
        ),
        row(
            "mlp.linear_fc1.weight",
            Rule::Gated,
            [
                tensor("mlp.gate_proj.weight", [intermediate, hidden]),
                tensor("mlp.up_proj.weight", [intermediate, hidden]),
            ],
        ),
        row(
            "mlp.linear_fc2.weight",
            Rule::Row,
            [tensor("mlp.down_proj.weight", [hidden, intermediate])],
        ),
    ]
}

/// Router and shared expert; the routed experts are in [`expert_rows`].
fn moe_rows(hidden: usize, moe: &MoeConfig) -> Vec<Row> {
    let shared = moe.shared_expert_intermediate_size;
    vec![
        norm(
            "pre_mlp_layernorm.weight",
            "post_attention_layernorm.weight",
            hidden,
        ),
        row(
            "mlp.router.weight",
            Rule::Replicated,
            [tensor("mlp.gate.weight", [moe.num_experts, hidden])],
        )
        .stateless(),
        row(
            "mlp.shared_experts.linear_fc1.weight",
            Rule::Gated,
            [
                tensor("mlp.shared_expert.gate_proj.weight", [shared, hidden]),
                tensor("mlp.shared_expert.up_proj.weight", [shared, hidden]),
            ],
        ),
        row(
            "mlp.shared_experts.linear_fc2.weight",
            Rule::Row,
            [tensor(
                "mlp.shared_expert.down_proj.weight",
                [hidden, shared],
            )],
        ),
        row(
            "mlp.shared_experts.gate_weight",
            Rule::Replicated,
            [tensor("mlp.shared_expert_gate.weight", [1, hidden])],
        )
        .stateless(),
    ]
}

fn expert_rows(
    hidden: usize,
    moe: &MoeConfig,
    layout: ExpertLayout,
    names: ExpertNames,
) -> Vec<Row> {
    let (experts, width) = (moe.num_experts, moe.moe_intermediate_size);
    let (fc1, fc2) = match names {
        ExpertNames::Grouped => (
            "mlp.experts.linear_fc1.weight{expert}",
            "mlp.experts.linear_fc2.weight{expert}",
        ),
        ExpertNames::Sequential => (
            "mlp.experts.local_experts.{expert}.linear_fc1.weight",
            "mlp.experts.local_experts.{expert}.linear_fc2.weight",
        ),
    };
    let rows = match layout {
        ExpertLayout::Packed => vec![
            row(
                fc1,
                Rule::PackedGated,
                [tensor(
                    "mlp.experts.gate_up_proj",
                    [experts, 2 * width, hidden],
                )],
            ),
            row(
                fc2,
                Rule::PackedRow,
                [tensor("mlp.experts.down_proj", [experts, hidden, width])],
            ),
        ],
        ExpertLayout::PerExpert => vec![
            row(
                fc1,
                Rule::Gated,
                [
                    tensor("mlp.experts.{expert}.gate_proj.weight", [width, hidden]),
                    tensor("mlp.experts.{expert}.up_proj.weight", [width, hidden]),
                ],
            ),
            row(
                fc2,
                Rule::Row,
                [tensor(
                    "mlp.experts.{expert}.down_proj.weight",
                    [hidden, width],
                )],
            ),
        ],
    };
    // Stored in one tensor of all experts. The word stands twice.
    let keys = [
        "mlp.experts.experts.linear_fc1.weight",
        "mlp.experts.experts.linear_fc2.weight",
    ];
    rows.into_iter()
        .zip(keys)
        .map(|(row, key)| row.key(key))
        .collect()
}
