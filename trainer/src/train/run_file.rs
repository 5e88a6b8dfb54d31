//! `run/run.json`: what a run was made of, for whoever asks later.

use std::path::{Path, PathBuf};

use serde::Serialize;

use super::output::write_whole;
use super::trainable::PartCount;

/// The content of `run.json`.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct RunFile {
    /// Version of this file's form.
    pub schema_version: u32,
    /// `running`, `done`, `interrupted` or `failed`.
    pub status: &'static str,
    /// Version of the trainer.
    pub trainer_version: &'static str,
    /// Seconds since 1970 at the start.
    pub started: u64,
    /// The model's directory.
    pub model: PathBuf,
    /// `architectures[0]`.
    pub architecture: String,
    /// Parameters by part.
    pub parameters: Vec<Parameters>,
    /// `cpu` or `cuda:N`.
    pub device: String,
    /// Arithmetic of the model.
    pub dtype: &'static str,
    /// What the configuration asked for.
    pub kernel_policy: String,
    /// Each op with what computes it.
    pub kernels: std::collections::BTreeMap<String, String>,
    /// Threads of libtorch.
    pub num_threads: i32,
    /// Whether freed memory stays in the process.
    pub keep_freed_memory: bool,
    /// Rows for training and evaluation.
    pub training_rows: usize,
    /// Rows held out or in the evaluation file.
    pub evaluation_rows: usize,
    /// Steps of the whole run.
    pub total_steps: u64,
    /// The step that the run went on from, and the checkpoint.
    pub resumed_from: Option<(u64, PathBuf)>,
    /// Mean of the last losses, at the end.
    pub final_loss: Option<f64>,
}

/// Parameters of one part.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Parameters {
    /// Part.
    pub part: &'static str,
    /// All.
    pub total: usize,
    /// Those that train.
    pub trainable: usize,
}

impl From<&PartCount> for Parameters {
    fn from(count: &PartCount) -> Self {
        Self {
            part: count.part,
            total: count.parameters,
            trainable: count.trainable,
        }
    }
}

impl RunFile {
    /// Writes the file, beside and renamed.
    ///
    /// # Errors
    /// When the disk refuses.
    pub(crate) fn write(&self, run_dir: &Path) -> std::io::Result<()> {
        write_whole(
            &run_dir.join("run.json"),
            &serde_json::to_string_pretty(self)?,
        )
    }
}
