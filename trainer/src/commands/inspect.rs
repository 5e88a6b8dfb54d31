//! `trainer inspect`: Show what a checkpoint directory holds.

use std::collections::BTreeMap;
use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;

use bridge_core::AutoBridge;
use bridge_core::checkpoint::TensorSource;
use bridge_core::checkpoint::hf::HfCheckpoint;
use bridge_core::config::HfConfig;
use bridge_core::mapping::{Part, Registry, Section};
use bridge_core::plan::PlanOptions;
use bytesize::ByteSize;
use rayon::prelude::*;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use super::model::{self, Weights};
use crate::report::{self, grouped, table};

/// The form of `--json`; it changes when a key changes its meaning.
const SCHEMA_VERSION: u32 = 1;

/// Show what a checkpoint directory holds.
///
/// Architecture, sizes, parameters by part, dtypes and the pattern of layers; every header is checked, and the tensors
/// against the config. A config file alone will do where no weights are needed.
///
/// Example: trainer inspect Qwen3.5-0.8B/ --mapping
#[derive(Debug, clap::Args)]
pub(crate) struct InspectArgs {
    /// A model directory, or a config file of any name.
    path: PathBuf,
    /// Print the mapping: one row a parameter, Megatron's name and layout beside the Hugging Face tensors.
    #[arg(long)]
    mapping: bool,
    /// List every tensor.
    #[arg(long)]
    tensors: bool,
    /// List every tensor with the SHA-256 of its bytes.
    #[arg(long)]
    checksum: bool,
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
}

struct TensorLine {
    name: String,
    dtype: String,
    shape: Vec<usize>,
    sha256: Option<String>,
}

pub(crate) fn run(args: &InspectArgs) -> anyhow::Result<ExitCode> {
    let weights = if args.checksum {
        Weights::NeededFor("--checksum")
    } else {
        Weights::IfPresent
    };
    let bridge = model::open(&args.path, weights)?;
    let registry = bridge.registry()?;
    // Says what is wrong with the tensors before anything is printed: a table of a broken checkpoint would mislead.
    let plan = bridge.plan(&PlanOptions::default())?;
    let lines = if args.tensors || args.checksum {
        Some(tensor_lines(&bridge, &plan.inverted(), args.checksum)?)
    } else {
        None
    };
    if args.json {
        let mut value = summary_json(&bridge, &registry, &plan.inverted());
        if args.mapping {
            value["mapping"] = registry.sections().iter().flat_map(mapping_json).collect();
        }
        if let Some(lines) = &lines {
            value["tensors"] = lines.iter().map(tensor_json).collect();
        }
        report::json_line(&value)?;
        return Ok(ExitCode::SUCCESS);
    }
    let mut out = report::out();
    if !args.mapping && lines.is_none() {
        print_summary(&mut out, &bridge, &registry, &plan.inverted())?;
    }
    if args.mapping {
        print_mapping(&mut out, &registry)?;
    }
    if let Some(lines) = &lines {
        print_tensors(&mut out, lines)?;
    }
    out.flush()?;
    Ok(ExitCode::SUCCESS)
}

fn parameters_by_part(registry: &Registry) -> BTreeMap<Part, usize> {
    let mut counts = BTreeMap::new();
    for (_, hf) in registry.hf_parameters() {
        *counts.entry(hf.part).or_insert(0) += hf.shape.iter().product::<usize>();
    }
    counts
}

/// Tensors and bytes of each dtype.
fn dtypes(hf_plan: &bridge_core::plan::ModelPlan) -> BTreeMap<String, (usize, u64)> {
    let mut counts: BTreeMap<String, (usize, u64)> = BTreeMap::new();
    for tensor in &hf_plan.tensors {
        let entry = counts.entry(tensor.dtype.to_string()).or_default();
        entry.0 += 1;
        entry.1 += tensor.num_bytes();
    }
    counts
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
    hf_plan: &bridge_core::plan::ModelPlan,
) -> anyhow::Result<()> {
    let config = bridge.config();
    let text = &config.text;
    let mut sizes = table(&["model", ""], &[]);
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

    let mut parts = table(&["part", "parameters"], &[1]);
    let counts = parameters_by_part(registry);
    for (part, count) in &counts {
        parts.add_row([part.word().to_owned(), grouped(*count)]);
    }
    parts.add_row(["total".to_owned(), grouped(counts.values().sum())]);
    writeln!(out, "{parts}\n")?;

    let mut kinds = table(&["dtype", "tensors", "size"], &[1, 2]);
    for (dtype, (tensors, bytes)) in dtypes(hf_plan) {
        kinds.add_row([dtype, tensors.to_string(), ByteSize(bytes).to_string()]);
    }
    writeln!(out, "{kinds}")?;
    if bridge.checkpoint().is_none() {
        writeln!(
            out,
            "\nNo weights here: dtypes are those of a new checkpoint."
        )?;
    }
    Ok(())
}

/// The numbers of a section's layers, runs joined: `0-2, 4-6`.
fn layer_numbers(section: &Section) -> String {
    let Some(layers) = &section.layers else {
        return String::new();
    };
    let runs: Vec<String> = layers
        .chunk_by(|a, b| a + 1 == *b)
        .map(|run| match run {
            [only] => only.to_string(),
            [first, .., last] => format!("{first}-{last}"),
            [] => String::new(),
        })
        .collect();
    format!(", layers {}", runs.join(", "))
}

fn print_mapping(out: &mut impl Write, registry: &Registry) -> anyhow::Result<()> {
    for section in registry.sections() {
        writeln!(out, "{}{}", section.title, layer_numbers(section))?;
        writeln!(
            out,
            "  {} <-> {}",
            section.megatron_prefix, section.hf_prefix
        )?;
        let header = ["Megatron", "Hugging Face", "shape", "rule", "TP", "import"];
        let mut rows = table(&header, &[]);
        for row in &section.rows {
            let names: Vec<String> = row.hf.iter().map(|hf| hf.pattern.to_string()).collect();
            let shapes: Vec<String> = row.hf.iter().map(|hf| format!("{:?}", hf.shape)).collect();
            rows.add_row([
                row.megatron.to_string(),
                names.join("\n"),
                shapes.join("\n"),
                row.rule.name().to_owned(),
                row.rule.split().word().to_owned(),
                row.transform.map_or("copy", |one| one.word()).to_owned(),
            ]);
        }
        writeln!(out, "{rows}\n")?;
    }
    Ok(())
}

fn mapping_json(section: &Section) -> Vec<Value> {
    section
        .rows
        .iter()
        .map(|row| {
            let hf: Vec<Value> = row
                .hf
                .iter()
                .map(|hf| {
                    let name = hf.pattern.as_str();
                    let name = match name.strip_prefix('/') {
                        Some(absolute) => absolute.to_owned(),
                        None => format!("{}{name}", section.hf_prefix),
                    };
                    json!({"name": name, "shape": hf.shape})
                })
                .collect();
            json!({
                "megatron": format!("{}{}", section.megatron_prefix, row.megatron),
                "hf": hf,
                "rule": row.rule.name(),
                "tp": row.rule.split().word(),
                "import": row.transform.map_or("copy", |one| one.word()),
                "layers": section.layers,
                "part": row.part.unwrap_or(section.part).word(),
            })
        })
        .collect()
}

fn summary_json(
    bridge: &AutoBridge,
    registry: &Registry,
    hf_plan: &bridge_core::plan::ModelPlan,
) -> Value {
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
    let dtypes: serde_json::Map<String, Value> = dtypes(hf_plan)
        .into_iter()
        .map(|(dtype, (tensors, bytes))| (dtype, json!({"tensors": tensors, "bytes": bytes})))
        .collect();
    json!({
        "schema_version": SCHEMA_VERSION,
        "architecture": config.architecture.hf_name(),
        "parameters": parameters,
        "dtypes": dtypes,
        "layer_types": words,
        "provider": bridge.to_megatron_provider(),
        "has_weights": bridge.checkpoint().is_some(),
    })
}

/// Every tensor: of the files, or those that a new checkpoint would have.
fn tensor_lines(
    bridge: &AutoBridge,
    hf_plan: &bridge_core::plan::ModelPlan,
    checksum: bool,
) -> anyhow::Result<Vec<TensorLine>> {
    let mut lines: Vec<TensorLine> = match bridge.checkpoint() {
        Some(checkpoint) => {
            let tensors: Vec<_> = checkpoint.tensors().collect();
            tensors
                .par_iter()
                .map(|(name, info)| {
                    Ok(TensorLine {
                        name: (*name).to_owned(),
                        dtype: info.dtype.to_string(),
                        shape: info.shape.clone(),
                        sha256: match checksum {
                            true => Some(sha256(checkpoint, name, info.num_bytes())?),
                            false => None,
                        },
                    })
                })
                .collect::<anyhow::Result<_>>()?
        }
        None => hf_plan
            .tensors
            .iter()
            .map(|tensor| TensorLine {
                name: tensor.name.clone(),
                dtype: tensor.dtype.to_string(),
                shape: tensor.shape.clone(),
                sha256: None,
            })
            .collect(),
    };
    lines.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(lines)
}

fn sha256(checkpoint: &HfCheckpoint, name: &str, num_bytes: u64) -> anyhow::Result<String> {
    let mut hash = Sha256::new();
    let mut buffer = vec![0u8; 1 << 20];
    let mut offset = 0;
    while offset < num_bytes {
        let len = usize::try_from(num_bytes - offset)
            .unwrap_or(usize::MAX)
            .min(buffer.len());
        checkpoint.read(name, offset, &mut buffer[..len])?;
        hash.update(&buffer[..len]);
        offset += len as u64;
    }
    Ok(hash
        .finalize()
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect())
}

fn tensor_json(line: &TensorLine) -> Value {
    let mut value = json!({"name": line.name, "dtype": line.dtype, "shape": line.shape});
    if let Some(sha256) = &line.sha256 {
        value["sha256"] = sha256.as_str().into();
    }
    value
}

fn print_tensors(out: &mut impl Write, lines: &[TensorLine]) -> anyhow::Result<()> {
    let width = lines.iter().map(|line| line.name.len()).max().unwrap_or(0);
    for line in lines {
        let shape = format!("{:?}", line.shape);
        write!(out, "{:width$}  {:5} {shape:24}", line.name, line.dtype)?;
        match &line.sha256 {
            Some(sha256) => writeln!(out, " {sha256}")?,
            None => writeln!(out)?,
        }
    }
    Ok(())
}
