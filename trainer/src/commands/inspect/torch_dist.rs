//! A directory of Megatron-Core.

use std::collections::HashSet;
use std::io::Write;

use bridge_core::checkpoint::torch_dist::TorchDistCheckpoint;
use bridge_core::provider::run_config::RunConfig;
use bytesize::ByteSize;
use serde_json::{Value, json};

use super::table::{self, Dtypes, TensorLine};
use super::{InspectArgs, SCHEMA_VERSION};
use crate::report::{self, grouped};

/// What a directory holds, counted.
#[derive(Default)]
struct Summary {
    model: Count,
    optimizer: Count,
    dtypes: Dtypes,
    extra_states: usize,
    objects: usize,
    iteration: Option<u64>,
    /// The provider's class and the model's id, where Megatron Bridge wrote the directory.
    target: Option<String>,
    hf_model_id: Option<String>,
}

#[derive(Default)]
struct Count {
    tensors: usize,
    parameters: usize,
    bytes: u64,
}

pub(super) fn run(args: &InspectArgs) -> anyhow::Result<()> {
    let directory = TorchDistCheckpoint::open(&args.path)?;
    let summary = summary(&directory)?;
    let lines = if args.tensors || args.checksum {
        let mut lines = lines(&directory);
        if args.checksum {
            table::hash(&mut lines, &directory)?;
        }
        Some(lines)
    } else {
        None
    };
    if args.json {
        let mut value = summary_json(&directory, &summary);
        if let Some(lines) = &lines {
            value["tensors"] = table::lines_json(lines);
            let objects = directory.objects();
            value["objects"] = objects
                .map(|(name, length)| json!({"name": name, "length": length}))
                .collect();
        }
        report::json_line(&value)?;
        return Ok(());
    }
    let mut out = report::out();
    match &lines {
        Some(lines) => table::print(&mut out, lines)?,
        None => print(&mut out, &directory, &summary)?,
    }
    out.flush()?;
    Ok(())
}

/// Every tensor, with torch's word for its dtype.
fn lines(directory: &TorchDistCheckpoint) -> Vec<TensorLine> {
    let mut lines: Vec<TensorLine> = directory
        .tensors()
        .map(|(name, info)| TensorLine {
            dtype: info.dtype.torch_word(),
            chunks: directory.num_chunks(name),
            ..TensorLine::new(name, info)
        })
        .collect();
    lines.sort_by(|a, b| a.name.cmp(&b.name));
    lines
}

fn summary(directory: &TorchDistCheckpoint) -> anyhow::Result<Summary> {
    let mut summary = Summary {
        iteration: directory.iteration()?,
        ..Summary::default()
    };
    if let Some(file) = directory.run_config() {
        let run = RunConfig::read(&file)?;
        summary.target = run.target().map(str::to_owned);
        summary.hf_model_id = run.hf_model_id().map(str::to_owned);
    }
    let model: HashSet<&str> = directory.model_tensors().map(|(name, _)| name).collect();
    for (name, info) in directory.tensors() {
        summary
            .dtypes
            .add(info.dtype.torch_word(), info.num_bytes());
        let count = if model.contains(name) {
            &mut summary.model
        } else {
            &mut summary.optimizer
        };
        count.tensors += 1;
        count.parameters += info.numel();
        count.bytes += info.num_bytes();
    }
    for (name, _) in directory.objects() {
        if name.contains("_extra_state") {
            summary.extra_states += 1;
        } else {
            summary.objects += 1;
        }
    }
    Ok(summary)
}

fn summary_json(directory: &TorchDistCheckpoint, summary: &Summary) -> Value {
    let count = |count: &Count| json!({"tensors": count.tensors, "parameters": count.parameters, "bytes": count.bytes});
    json!({
        "schema_version": SCHEMA_VERSION,
        "kind": "torch_dist",
        "path": directory.dir().display().to_string(),
        "iteration": summary.iteration,
        "files": directory.files().collect::<Vec<_>>(),
        "model": count(&summary.model),
        "optimizer": count(&summary.optimizer),
        "dtypes": summary.dtypes.json(),
        "extra_states": summary.extra_states,
        "other_objects": summary.objects,
        "run_config": directory.run_config().is_some(),
        "target": summary.target,
        "hf_model_id": summary.hf_model_id,
    })
}

fn print(
    out: &mut impl Write,
    directory: &TorchDistCheckpoint,
    summary: &Summary,
) -> anyhow::Result<()> {
    let mut about = report::table(&["torch_dist", ""], &[]);
    let mut line = |what: &str, value: String| {
        about.add_row([what.to_owned(), value]);
    };
    line("directory", directory.dir().display().to_string());
    if let Some(iteration) = summary.iteration {
        line("iteration", iteration.to_string());
    }
    if let Some(target) = &summary.target {
        line("provider", target.clone());
    }
    if let Some(id) = &summary.hf_model_id {
        line("Hugging Face model", id.clone());
    }
    line("data files", directory.files().len().to_string());
    if summary.extra_states > 0 {
        line("extra states", grouped(summary.extra_states));
    }
    if summary.objects > 0 {
        line("other objects", grouped(summary.objects));
    }
    writeln!(out, "{about}\n")?;
    let mut parts = report::table(&["part", "tensors", "parameters", "size"], &[1, 2, 3]);
    for (part, count) in [("model", &summary.model), ("optimizer", &summary.optimizer)] {
        if count.tensors > 0 || part == "model" {
            parts.add_row([
                part.to_owned(),
                grouped(count.tensors),
                grouped(count.parameters),
                ByteSize(count.bytes).to_string(),
            ]);
        }
    }
    writeln!(out, "{parts}\n")?;
    writeln!(out, "{}", summary.dtypes.table())?;
    Ok(())
}
