//! A Hugging Face directory, or its config alone.

use std::collections::BTreeMap;
use std::io::Write;

use bridge_core::AutoBridge;
use bridge_core::checkpoint::hf::{HfCheckpoint, UNQUANTISED};
use bridge_core::config::HfConfig;
use bridge_core::mapping::{Part, Registry};
use bridge_core::plan::{ModelPlan, PlanOptions};
use serde_json::{Value, json};

use super::table::{self, Dtypes, TensorLine};
use super::{InspectArgs, SCHEMA_VERSION, mapping};
use crate::commands::model::{self, Weights};
use crate::hub::Lookup;
use crate::report::{self, grouped};

pub(super) fn run(args: &InspectArgs) -> anyhow::Result<()> {
    let weights = if args.checksum {
        Weights::NeededFor("--checksum")
    } else {
        Weights::IfPresent
    };
    let bridge = model::open(&args.path, weights, &Lookup::default())?;
    let registry = bridge.registry()?;
    // Says what is wrong with the tensors before anything is printed: a table of a broken checkpoint would mislead.
    let plan = bridge.plan(&PlanOptions::default())?;
    let hf_plan = plan.inverted();
    let stored = as_stored(&bridge)?;
    let files = stored.as_ref().or(bridge.checkpoint());
    let lines = if args.tensors || args.checksum {
        Some(tensor_lines(files, &hf_plan, args.checksum)?)
    } else {
        None
    };
    if args.json {
        let mut value = summary_json(&bridge, &registry, &dtypes(files, &hf_plan));
        if args.mapping {
            value["mapping"] = mapping::rows_json(&registry);
        }
        if let Some(lines) = &lines {
            value["tensors"] = table::lines_json(lines);
        }
        report::json_line(&value)?;
        return Ok(());
    }
    let mut out = report::out();
    if !args.mapping && lines.is_none() {
        print_summary(&mut out, &bridge, &registry, &dtypes(files, &hf_plan))?;
    }
    if args.mapping {
        mapping::print(&mut out, &registry)?;
    }
    if let Some(lines) = &lines {
        table::print(&mut out, lines)?;
    }
    out.flush()?;
    Ok(())
}

fn parameters_by_part(registry: &Registry) -> BTreeMap<Part, usize> {
    let mut counts = BTreeMap::new();
    for (_, hf) in registry.hf_parameters() {
        *counts.entry(hf.part).or_insert(0) += hf.shape.iter().product::<usize>();
    }
    counts
}

/// The files as they are, where the bridge shows matrices in FP8 as what they become.
fn as_stored(bridge: &AutoBridge) -> anyhow::Result<Option<HfCheckpoint>> {
    match bridge.checkpoint() {
        Some(checkpoint) if checkpoint.quantised().next().is_some() => {
            Ok(Some(HfCheckpoint::open(checkpoint.dir())?))
        }
        _ => Ok(None),
    }
}

fn dtypes(files: Option<&HfCheckpoint>, hf_plan: &ModelPlan) -> Dtypes {
    let mut dtypes = Dtypes::default();
    match files {
        Some(files) => files
            .tensors()
            .for_each(|(_, info)| dtypes.add(info.dtype.safetensors_word(), info.num_bytes())),
        None => hf_plan
            .tensors
            .iter()
            .for_each(|one| dtypes.add(one.dtype.safetensors_word(), one.num_bytes())),
    }
    dtypes
}

/// The layers as a repeated group where they are one: `(3 linear_attention, 1 full_attention) x 6`.
fn layer_pattern(config: &HfConfig) -> String {
    let types = &config.text.layer_types;
    let period = (1..=types.len())
        .filter(|period| types.len().is_multiple_of(*period))
        .find(|period| types.iter().zip(&types[*period..]).all(|(a, b)| a == b))
        .unwrap_or(types.len());
    let runs: Vec<String> = types[..period]
        .chunk_by(|a, b| a == b)
        .map(|run| format!("{} {}", run.len(), run[0].hf_word()))
        .collect();
    format!("({}) x {}", runs.join(", "), types.len() / period.max(1))
}

fn print_summary(
    out: &mut impl Write,
    bridge: &AutoBridge,
    registry: &Registry,
    dtypes: &Dtypes,
) -> anyhow::Result<()> {
    let config = bridge.config();
    let text = &config.text;
    let mut sizes = report::table(&["model", ""], &[]);
    let mut line = |what: &str, value: String| {
        sizes.add_row([what.to_owned(), value]);
    };
    line("architecture", config.architecture.hf_name().to_owned());
    line(
        "provider",
        bridge.to_megatron_provider().class_name().to_owned(),
    );
    line("layers", layer_pattern(config));
    line("hidden size", text.hidden_size.to_string());
    line(
        "attention",
        format!(
            "{} query heads, {} key-value heads, head size {}",
            text.num_attention_heads, text.num_key_value_heads, text.head_dim
        ),
    );
    line(
        "gated delta net",
        format!(
            "{} key heads of {}, {} value heads of {}, kernel {}",
            text.linear_num_key_heads,
            text.linear_key_head_dim,
            text.linear_num_value_heads,
            text.linear_value_head_dim,
            text.linear_conv_kernel_dim
        ),
    );
    if let Some(intermediate) = text.intermediate_size {
        line("MLP", format!("{intermediate} wide"));
    }
    if let Some(moe) = &text.moe {
        line(
            "mixture of experts",
            format!(
                "{} experts, {} a token, {} wide; shared expert {} wide",
                moe.num_experts,
                moe.num_experts_per_tok,
                moe.moe_intermediate_size,
                moe.shared_expert_intermediate_size
            ),
        );
    }
    line(
        "vocabulary",
        format!(
            "{}{}",
            text.vocab_size,
            if config.tie_word_embeddings {
                ", output layer tied to the embedding"
            } else {
                ""
            }
        ),
    );
    if let Some(classifier) = &config.classifier {
        line("classifier", format!("{} labels", classifier.num_labels));
    }
    line("MTP layers", text.mtp_num_hidden_layers.to_string());
    if let Some(vision) = &config.vision {
        line(
            "vision tower",
            format!(
                "{} layers, hidden size {}, {} heads, patch {}, merge {}",
                vision.depth,
                vision.hidden_size,
                vision.num_heads,
                vision.patch_size,
                vision.spatial_merge_size
            ),
        );
    }
    writeln!(out, "{sizes}\n")?;

    let mut parts = report::table(&["part", "parameters"], &[1]);
    let counts = parameters_by_part(registry);
    for (part, count) in &counts {
        parts.add_row([part.word().to_owned(), grouped(*count)]);
    }
    parts.add_row(["total".to_owned(), grouped(counts.values().sum())]);
    writeln!(out, "{parts}\n")?;

    writeln!(out, "{}", dtypes.table())?;
    let quantised = bridge
        .checkpoint()
        .map_or(0, |files| files.quantised().count());
    if quantised > 0 {
        writeln!(
            out,
            "\n{quantised} matrices in FP8: they are planned in {}, and an import cannot be undone for them.",
            UNQUANTISED.torch_word()
        )?;
    }
    if bridge.checkpoint().is_none() {
        writeln!(
            out,
            "\nNo weights here: dtypes are those of a new checkpoint."
        )?;
    }
    Ok(())
}

fn summary_json(bridge: &AutoBridge, registry: &Registry, dtypes: &Dtypes) -> Value {
    let config = bridge.config();
    let counts = parameters_by_part(registry);
    let words: Vec<&str> = config
        .text
        .layer_types
        .iter()
        .map(|t| t.hf_word())
        .collect();
    let parameters: serde_json::Map<String, Value> = counts
        .iter()
        .map(|(part, count)| (part.word().to_owned(), json!(count)))
        .chain([("total".to_owned(), json!(counts.values().sum::<usize>()))])
        .collect();
    json!({
        "schema_version": SCHEMA_VERSION,
        "kind": "hugging_face",
        "architecture": config.architecture.hf_name(),
        "parameters": parameters,
        "dtypes": dtypes.json(),
        "layer_types": words,
        "provider": bridge.to_megatron_provider(),
        "has_weights": bridge.checkpoint().is_some(),
        "quantised": bridge.checkpoint().map_or(0, |files| files.quantised().count()),
    })
}

/// Every tensor: of the files, or those that a new checkpoint would have.
fn tensor_lines(
    files: Option<&HfCheckpoint>,
    hf_plan: &ModelPlan,
    checksum: bool,
) -> anyhow::Result<Vec<TensorLine>> {
    let mut lines: Vec<TensorLine> = match files {
        Some(checkpoint) => checkpoint
            .tensors()
            .map(|(name, info)| TensorLine::new(name, info))
            .collect(),
        None => hf_plan
            .targets()
            .iter()
            .map(|(name, info)| TensorLine::new(name, info))
            .collect(),
    };
    lines.sort_by(|a, b| a.name.cmp(&b.name));
    if let Some(checkpoint) = files
        && checksum
    {
        table::hash(&mut lines, checkpoint)?;
    }
    Ok(lines)
}
