//! The command line: finetune.
//!
//! Runs are a few steps of the tiny golden checkpoints; each takes seconds.

mod refused;
mod resumed;
mod trained;

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

use assert_cmd::cargo::cargo_bin;
use safetensors::SafeTensors;
use serde_json::{Value, json};
use tests::golden;

/// A run's command line, so far.
struct Run {
    model: PathBuf,
    data: PathBuf,
    output: PathBuf,
    settings: Vec<String>,
}

impl Run {
    fn new(
        model: impl Into<PathBuf>,
        data: impl Into<PathBuf>,
        output: impl Into<PathBuf>,
    ) -> Self {
        let settings = ["num_threads=1", "save_steps=null", "learning_rate=1e-3"];
        Self {
            model: model.into(),
            data: data.into(),
            output: output.into(),
            settings: settings.map(str::to_owned).to_vec(),
        }
    }

    fn with(mut self, settings: &[&str]) -> Self {
        self.settings
            .extend(settings.iter().map(|&setting| setting.to_owned()));
        self
    }

    fn command(&self) -> Command {
        let mut command = Command::new(cargo_bin("trainer"));
        command.arg("finetune");
        command
            .arg("--model")
            .arg(&self.model)
            .arg("--data")
            .arg(&self.data);
        command
            .arg("--output")
            .arg(&self.output)
            .args(&self.settings);
        command
    }

    fn finish(&self) -> Output {
        let output = self.command().output().unwrap();
        assert!(output.status.success(), "{}", stderr(&output));
        output
    }

    fn fail(&self) -> String {
        let output = self.command().output().unwrap();
        assert_eq!(output.status.code(), Some(1), "{}", stderr(&output));
        assert!(output.stdout.is_empty());
        stderr(&output)
    }

    /// Starts the run and waits until its stderr says `text`.
    #[expect(clippy::zombie_processes, reason = "the caller waits for the child")]
    fn start_until(&self, text: &str) -> (Child, BufReader<std::process::ChildStderr>) {
        let mut child = self
            .command()
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stderr.take().unwrap());
        let mut all = String::new();
        loop {
            let mut line = String::new();
            if lines.read_line(&mut line).unwrap() == 0 {
                child.wait().unwrap();
                panic!("the run ended: {all}");
            }
            if line.contains(text) {
                return (child, lines);
            }
            all.push_str(&line);
        }
    }
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn shapes() -> PathBuf {
    golden("data/shapes/train.jsonl")
}

fn checkpoint(name: &str) -> PathBuf {
    golden("checkpoints").join(name)
}

/// Text rows whose answers have very different lengths.
fn text_rows(dir: &Path) -> PathBuf {
    let rows: Vec<String> = (1..=8)
        .map(|length| {
            let answer = vec!["word"; length * length].join(" ");
            let messages = json!([
                { "role": "user", "content": format!("say it {length} times") },
                { "role": "assistant", "content": answer },
            ]);
            json!({ "messages": messages }).to_string()
        })
        .collect();
    let path = dir.join("text.jsonl");
    fs_err::write(&path, rows.join("\n")).unwrap();
    path
}

/// The lines of metrics.jsonl without what a clock decides.
fn metrics(output: &Path) -> Vec<Value> {
    let text = fs_err::read_to_string(output.join("run/metrics.jsonl")).unwrap();
    let mut lines: Vec<Value> = text
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    for line in &mut lines {
        let line = line.as_object_mut().unwrap();
        line.remove("seconds");
        line.remove("tokens_per_second");
    }
    lines
}

fn series(output: &Path, key: &str) -> Vec<f64> {
    metrics(output)
        .iter()
        .filter_map(|line| line[key].as_f64())
        .collect()
}

fn run_json(output: &Path) -> Value {
    serde_json::from_slice(&fs_err::read(output.join("run/run.json")).unwrap()).unwrap()
}

/// Every tensor of a checkpoint directory: file, dtype, shape and bytes.
fn tensors(dir: &Path) -> BTreeMap<String, (String, String, Vec<usize>, Vec<u8>)> {
    let mut found = BTreeMap::new();
    for entry in fs_err::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path
            .extension()
            .is_none_or(|extension| extension != "safetensors")
        {
            continue;
        }
        let file = path.file_name().unwrap().to_string_lossy().into_owned();
        let bytes = fs_err::read(&path).unwrap();
        for (name, view) in SafeTensors::deserialize(&bytes).unwrap().tensors() {
            let dtype = format!("{:?}", view.dtype());
            let tensor = (
                file.clone(),
                dtype,
                view.shape().to_vec(),
                view.data().to_vec(),
            );
            found.insert(name, tensor);
        }
    }
    found
}

/// A copy of a golden checkpoint of one file whose float32 tensors are multiplied by `factors`.
fn scaled(dir: &Path, model: &str, factors: &[(&str, f32)]) -> PathBuf {
    let copy = dir.join("model");
    fs_err::create_dir(&copy).unwrap();
    for entry in fs_err::read_dir(checkpoint(model)).unwrap() {
        let path = entry.unwrap().path();
        fs_err::copy(&path, copy.join(path.file_name().unwrap())).unwrap();
    }
    let path = copy.join("model.safetensors");
    let mut bytes = fs_err::read(&path).unwrap();
    let (header, metadata) = SafeTensors::read_metadata(&bytes).unwrap();
    let data = 8 + header;
    for (name, factor) in factors {
        let (start, end) = metadata.info(name).unwrap().data_offsets;
        for value in bytes[data + start..data + end].chunks_exact_mut(4) {
            let scaled = f32::from_le_bytes((&*value).try_into().unwrap()) * factor;
            value.copy_from_slice(&scaled.to_le_bytes());
        }
    }
    fs_err::write(path, bytes).unwrap();
    copy
}

fn signal(child: &Child, name: &str) {
    let status = Command::new("kill")
        .arg(name)
        .arg(child.id().to_string())
        .status()
        .unwrap();
    assert!(status.success());
}
