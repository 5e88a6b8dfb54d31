//! `metrics.jsonl`: one JSON object a line for everything that a run shows.

use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};

use fs_err::File;
use serde_json::{Map, Value};

/// The open metrics file of a run.
#[derive(Debug)]
pub(crate) struct MetricsFile {
    file: File,
}

impl MetricsFile {
    /// Opens `path` for appending. What a killed run logged behind `step` is dropped, so that no step appears twice;
    /// `step` 0 starts the file anew.
    pub(crate) fn open(path: &Path, step: u64) -> std::io::Result<Self> {
        let kept = if step == 0 {
            Vec::new()
        } else {
            lines_up_to(path, step)?
        };
        let beside = beside(path);
        let mut file = File::create(&beside)?;
        for line in &kept {
            writeln!(file, "{line}")?;
        }
        file.sync_all()?;
        fs_err::rename(&beside, path)?;
        Ok(Self { file })
    }

    /// Appends one line. A line is written by one call, so that a kill leaves whole lines.
    pub(crate) fn append(&mut self, line: &Map<String, Value>) -> std::io::Result<()> {
        let mut text = serde_json::to_string(line)?;
        text.push('\n');
        self.file.write_all(text.as_bytes())
    }
}

/// The values of `key` by step, for the plot.
pub(crate) fn series(path: &Path, key: &str) -> std::io::Result<Vec<(u64, f64)>> {
    let mut points = Vec::new();
    for line in BufReader::new(File::open(path)?).lines() {
        let Ok(value) = serde_json::from_str::<Value>(&line?) else {
            continue;
        };
        if let (Some(step), Some(number)) = (value["step"].as_u64(), value[key].as_f64()) {
            points.push((step, number));
        }
    }
    Ok(points)
}

fn lines_up_to(path: &Path, step: u64) -> std::io::Result<Vec<String>> {
    if !path.exists() {
        return Ok(Vec::new());
    }
    let mut kept = Vec::new();
    for line in BufReader::new(File::open(path)?).lines() {
        let line = line?;
        // A cut last line does not parse, and is dropped.
        let of_step = serde_json::from_str::<Value>(&line)
            .ok()
            .and_then(|v| v["step"].as_u64());
        if of_step.is_some_and(|of_step| of_step <= step) {
            kept.push(line);
        }
    }
    Ok(kept)
}

fn beside(path: &Path) -> PathBuf {
    path.with_extension("jsonl.tmp")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(step: u64, loss: f64) -> Map<String, Value> {
        let value = serde_json::json!({ "step": step, "loss": loss });
        value.as_object().unwrap().clone()
    }

    #[test]
    fn lines_behind_the_checkpoint_are_dropped_on_resume() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("metrics.jsonl");
        let mut file = MetricsFile::open(&path, 0).unwrap();
        for step in 1..=3 {
            file.append(&line(step, 1.0 / step as f64)).unwrap();
        }
        drop(file);
        // The kill cut the last line.
        let text = fs_err::read_to_string(&path).unwrap() + "{\"step\": 4, \"lo";
        fs_err::write(&path, text).unwrap();
        let mut file = MetricsFile::open(&path, 2).unwrap();
        file.append(&line(3, 0.25)).unwrap();
        assert_eq!(
            series(&path, "loss").unwrap(),
            [(1, 1.0), (2, 0.5), (3, 0.25)]
        );
    }
}
