//! A rank's file.

use std::io::Write;

use bridge_core::checkpoint::shard::ShardFile;
use bytesize::ByteSize;
use serde_json::{Value, json};

use super::table::{self, Dtypes, TensorLine};
use super::{InspectArgs, SCHEMA_VERSION};
use crate::report;

pub(super) fn run(args: &InspectArgs) -> anyhow::Result<()> {
    let file = ShardFile::open(&args.path)?;
    let mut dtypes = Dtypes::default();
    let mut bytes = 0;
    let mut lines: Vec<TensorLine> = Vec::new();
    for (name, info) in file.tensors() {
        dtypes.add(info.dtype.safetensors_word(), info.num_bytes());
        bytes += info.num_bytes();
        lines.push(TensorLine::new(name, info));
    }
    lines.sort_by(|a, b| a.name.cmp(&b.name));
    if args.checksum {
        table::hash(&mut lines, &file)?;
    }
    let listed = args.tensors || args.checksum;
    let description = file.shard().to_json();
    if args.json {
        let mut value = json!({
            "schema_version": SCHEMA_VERSION,
            "kind": "shard",
            "shard": description,
            "num_tensors": lines.len(),
            "bytes": bytes,
            "dtypes": dtypes.json(),
        });
        if listed {
            value["tensors"] = table::lines_json(&lines);
        }
        report::json_line(&value)?;
        return Ok(());
    }
    let mut out = report::out();
    if listed {
        table::print(&mut out, &lines)?;
    } else {
        let mut summary = report::table(&["shard", ""], &[]);
        for (key, value) in description.as_object().into_iter().flatten() {
            let said = match value {
                Value::Null | Value::Bool(false) => continue,
                Value::String(text) => text.clone(),
                other => other.to_string(),
            };
            if key != "schema_version" {
                summary.add_row([key.clone(), said]);
            }
        }
        summary.add_row(["tensors".to_owned(), lines.len().to_string()]);
        summary.add_row(["size".to_owned(), ByteSize(bytes).to_string()]);
        writeln!(out, "{summary}\n")?;
        writeln!(out, "{}", dtypes.table())?;
    }
    out.flush()?;
    Ok(())
}
