//! The table that conversion runs.

use std::io::Write;

use bridge_core::mapping::{Registry, Section};
use serde_json::{Value, json};

use crate::report::table;

fn prefix(prefix: &str) -> &str {
    if prefix.is_empty() { "(none)" } else { prefix }
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

/// A table a section.
pub(super) fn print(out: &mut impl Write, registry: &Registry) -> anyhow::Result<()> {
    for section in registry.sections() {
        writeln!(out, "{}{}", section.title, layer_numbers(section))?;
        writeln!(
            out,
            "  {} <-> {}",
            prefix(&section.megatron_prefix),
            prefix(&section.hf_prefix)
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

/// Every row.
pub(super) fn rows_json(registry: &Registry) -> Value {
    registry.sections().iter().flat_map(section_json).collect()
}

fn section_json(section: &Section) -> Vec<Value> {
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
