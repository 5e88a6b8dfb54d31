//! Tensors of any checkpoint as lines.

use std::collections::BTreeMap;
use std::io::Write;

use bridge_core::checkpoint::{CheckpointError, TensorInfo, TensorSource};
use bytesize::ByteSize;
use comfy_table::Table;
use rayon::prelude::*;
use serde_json::{Map, Value, json};

use crate::commands::checksums::sha256;
use crate::report::table;

/// One tensor.
pub(super) struct TensorLine {
    pub(super) name: String,
    /// In the words of the checkpoint's format.
    pub(super) dtype: &'static str,
    pub(super) shape: Vec<usize>,
    /// Parts that it is stored in, where a format has such.
    pub(super) chunks: Option<usize>,
    pub(super) sha256: Option<String>,
}

impl TensorLine {
    /// A tensor under safetensors' word for its dtype.
    pub(super) fn new(name: &str, info: &TensorInfo) -> Self {
        Self {
            name: name.to_owned(),
            dtype: info.dtype.safetensors_word(),
            shape: info.shape.clone(),
            chunks: None,
            sha256: None,
        }
    }

    fn json(&self) -> Value {
        let mut value = json!({"name": self.name, "dtype": self.dtype, "shape": self.shape});
        if let Some(chunks) = self.chunks {
            value["chunks"] = chunks.into();
        }
        if let Some(sha256) = &self.sha256 {
            value["sha256"] = sha256.as_str().into();
        }
        value
    }
}

/// The lines of a JSON report.
pub(super) fn lines_json(lines: &[TensorLine]) -> Value {
    lines.iter().map(TensorLine::json).collect()
}

/// Adds the SHA-256 of its bytes to each line, the tensors in parallel, each through one buffer.
pub(super) fn hash(
    lines: &mut [TensorLine],
    source: &dyn TensorSource,
) -> Result<(), CheckpointError> {
    lines.par_iter_mut().try_for_each(|line| {
        line.sha256 = Some(sha256(source, &line.name)?);
        Ok(())
    })
}

/// A line a tensor.
pub(super) fn print(out: &mut impl Write, lines: &[TensorLine]) -> anyhow::Result<()> {
    let width = lines.iter().map(|line| line.name.len()).max().unwrap_or(0);
    let dtype_width = lines.iter().map(|line| line.dtype.len()).max().unwrap_or(0);
    for line in lines {
        let shape = format!("{:?}", line.shape);
        write!(
            out,
            "{:width$}  {:dtype_width$} {shape:24}",
            line.name, line.dtype
        )?;
        match &line.sha256 {
            Some(sha256) => writeln!(out, " {sha256}")?,
            None => writeln!(out)?,
        }
    }
    Ok(())
}

/// Tensors and bytes of each dtype.
#[derive(Default)]
pub(super) struct Dtypes(BTreeMap<&'static str, (usize, u64)>);

impl Dtypes {
    pub(super) fn add(&mut self, dtype: &'static str, num_bytes: u64) {
        let entry = self.0.entry(dtype).or_default();
        entry.0 += 1;
        entry.1 += num_bytes;
    }

    pub(super) fn table(&self) -> Table {
        let mut kinds = table(&["dtype", "tensors", "size"], &[1, 2]);
        for (dtype, (tensors, bytes)) in &self.0 {
            let size = ByteSize(*bytes).to_string();
            kinds.add_row([(*dtype).to_owned(), tensors.to_string(), size]);
        }
        kinds
    }

    pub(super) fn json(&self) -> Value {
        let entries = self.0.iter().map(|(dtype, (tensors, bytes))| {
            let entry = json!({"tensors": tensors, "bytes": bytes});
            ((*dtype).to_owned(), entry)
        });
        Value::Object(entries.collect::<Map<String, Value>>())
    }
}
