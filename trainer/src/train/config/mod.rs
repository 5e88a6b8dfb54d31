//! The configuration of a run: its keys, their defaults, and where each value came from.
//!
//! Keys are named as in transformers' `TrainingArguments` where it has one. Values come in layers (defaults, file, command
//! line); every key is checked, and a wrong one is answered with the nearest right one.
//! Invariant: a [`RunConfig`] that [`resolve`] returned is valid: ranges hold and no two keys contradict.

mod check;
mod layers;
mod print;

use std::path::PathBuf;

use serde::{Deserialize, Deserializer, Serialize};

pub use layers::{ConfigError, Origin, Override, Problem, Resolved, resolve, setting};

/// Where a parameter's gradient goes: the parts that `freeze` names.
pub const FREEZE_PARTS: [&str; 4] = ["vision", "projector", "language", "mtp"];

/// Parameters without weight decay unless `no_decay` says otherwise: norms, biases, and the delta rule's decay terms.
pub const NO_DECAY: [&str; 6] = [
    "*norm*.weight",
    "*layernorm*",
    "*layer_norm_*",
    "*.bias",
    "*.A_log",
    "*.dt_bias",
];

/// Everything that decides a run. One field a key.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct RunConfig {
    /// Hugging Face directory or Hub id to start from.
    pub model: PathBuf,
    /// Training data: JSONL or JSON.
    pub data: PathBuf,
    /// Where the run's files and the trained Hugging Face checkpoint go.
    pub output: PathBuf,
    /// Evaluation data; without it see `eval_split`.
    pub eval_data: Option<PathBuf>,
    /// Fraction of `data` held out for evaluation.
    pub eval_split: f64,
    /// Folder that media paths are relative to; default: the data file's.
    pub media_root: Option<PathBuf>,

    /// Longest sample in tokens; with `packing`, the length of a pack.
    pub max_length: Option<usize>,
    /// What to do with a longer sample.
    pub truncation: Truncation,
    /// What to do with a row that cannot be used.
    pub on_bad_row: OnBadRow,
    /// Join samples into packs of up to `max_length` tokens instead of padding them.
    pub packing: bool,
    /// Side of the padding in a batch.
    pub padding_side: PaddingSide,
    /// Shuffle the samples of each epoch.
    pub shuffle: bool,
    /// Threads that read, render and tokenise ahead of the step. They never change a result.
    pub dataloader_num_workers: usize,
    /// Steps that are kept ready.
    pub dataloader_prefetch_factor: usize,

    /// Passes over the data; fractions are allowed.
    pub num_train_epochs: f64,
    /// Optimizer steps; replaces `num_train_epochs`.
    pub max_steps: Option<u64>,
    /// Samples (packs, with `packing`) a forward pass.
    pub per_device_train_batch_size: usize,
    /// Forward passes an optimizer step.
    pub gradient_accumulation_steps: usize,
    /// Seed of every random stream.
    pub seed: u64,

    /// Highest learning rate.
    pub learning_rate: f64,
    /// Course of the learning rate after warm-up.
    pub lr_scheduler_type: SchedulerType,
    /// Steps of linear warm-up.
    pub warmup_steps: u64,
    /// Warm-up as a fraction of all steps; `warmup_steps` must then be 0.
    pub warmup_ratio: f64,
    /// Last learning rate as a fraction of the highest.
    pub min_lr_ratio: f64,
    /// Weight decay of the parameters that `no_decay` does not match.
    pub weight_decay: f64,
    /// Megatron names without weight decay; `*` stands for anything.
    #[serde(deserialize_with = "list")]
    pub no_decay: Vec<String>,
    /// adamw, or adamw_8bit: moments of 8 bits, with the kernels only.
    pub optim: Optim,
    /// Decay of the gradient's running mean.
    pub adam_beta1: f64,
    /// Decay of the squared gradient's running mean.
    pub adam_beta2: f64,
    /// Added to the root of the second moment.
    pub adam_epsilon: f64,
    /// Largest global norm of the gradient; 0 turns clipping off.
    pub max_grad_norm: f64,
    /// Keep float32 master weights when the model is bfloat16.
    pub master_weights: bool,
    /// Round bfloat16 weights without masters at random, so that small steps are not lost; with the kernels only.
    pub stochastic_rounding: bool,

    /// Parts that do not train: vision, projector, language, mtp.
    #[serde(deserialize_with = "list")]
    pub freeze: Vec<String>,
    /// Weight of the multi-token-prediction loss; 0 leaves the head as it is.
    pub mtp_loss_scaling_factor: f64,
    /// Weight of the router's auxiliary loss; default: the model's own.
    pub router_aux_loss_coef: Option<f64>,
    /// What to do when a loss or gradient is not finite.
    pub on_non_finite: OnNonFinite,

    /// Arithmetic: auto (the checkpoint's), float32, bfloat16.
    pub dtype: RunDtype,
    /// auto, cpu, cuda or cuda:N.
    pub device: String,
    /// Which implementation of the ops runs.
    pub kernels: KernelConfig,
    /// Threads of libtorch; default: its own choice.
    pub num_threads: Option<i32>,
    /// Keep freed memory in the process (glibc mallopt); faster steps, no smaller peak.
    pub keep_freed_memory: bool,

    /// Steps between log lines.
    pub logging_steps: u64,
    /// Steps between evaluations; default: at each epoch's end.
    pub eval_steps: Option<u64>,
    /// Samples a forward pass of the evaluation.
    pub per_device_eval_batch_size: usize,
    /// Steps between checkpoints, with one at the end; null: only when interrupted.
    pub save_steps: Option<u64>,
    /// Checkpoints kept; older ones are deleted.
    pub save_total_limit: Option<usize>,
    /// Besides metrics.jsonl: tensorboard, plot.
    #[serde(deserialize_with = "list")]
    pub report_to: Vec<String>,
}

impl Default for RunConfig {
    fn default() -> Self {
        let owned = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect();
        Self {
            model: PathBuf::new(),
            data: PathBuf::new(),
            output: PathBuf::new(),
            eval_data: None,
            eval_split: 0.0,
            media_root: None,
            max_length: None,
            truncation: Truncation::Refuse,
            on_bad_row: OnBadRow::Stop,
            packing: false,
            padding_side: PaddingSide::Right,
            shuffle: true,
            dataloader_num_workers: 2,
            dataloader_prefetch_factor: 2,
            num_train_epochs: 1.0,
            max_steps: None,
            per_device_train_batch_size: 8,
            gradient_accumulation_steps: 1,
            seed: 42,
            learning_rate: 1e-5,
            lr_scheduler_type: SchedulerType::Cosine,
            warmup_steps: 0,
            warmup_ratio: 0.0,
            min_lr_ratio: 0.0,
            weight_decay: 0.0,
            no_decay: owned(&NO_DECAY),
            optim: Optim::AdamW,
            adam_beta1: 0.9,
            adam_beta2: 0.95,
            adam_epsilon: 1e-8,
            max_grad_norm: 1.0,
            master_weights: true,
            stochastic_rounding: false,
            freeze: Vec::new(),
            mtp_loss_scaling_factor: 0.1,
            router_aux_loss_coef: None,
            on_non_finite: OnNonFinite::Stop,
            dtype: RunDtype::Auto,
            device: "auto".to_owned(),
            kernels: KernelConfig::default(),
            num_threads: None,
            keep_freed_memory: true,
            logging_steps: 1,
            eval_steps: None,
            per_device_eval_batch_size: 8,
            save_steps: Some(500),
            save_total_limit: None,
            report_to: owned(&["tensorboard", "plot"]),
        }
    }
}

impl RunConfig {
    /// Whether a longer run has the same learning rates as far as both go.
    #[must_use]
    pub fn schedule_ignores_length(&self) -> bool {
        self.lr_scheduler_type == SchedulerType::Constant && self.warmup_ratio == 0.0
    }
}

/// Which implementation of the ops runs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct KernelConfig {
    /// auto, cuda or reference, with exceptions as auto,gdn=reference.
    pub policy: String,
}

impl Default for KernelConfig {
    fn default() -> Self {
        Self {
            policy: "auto".to_owned(),
        }
    }
}

/// What to do with a sample longer than `max_length`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Truncation {
    /// The row is a bad row.
    Refuse,
    /// Cut at the end, never through an image.
    Truncate,
}

/// What to do with a row that cannot be used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OnBadRow {
    /// Stop the run with the row's error.
    Stop,
    /// Train without it, and say so.
    Skip,
}

/// Side of the padding in a batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum PaddingSide {
    /// Before the sample.
    Left,
    /// After the sample.
    Right,
}

/// Course of the learning rate after warm-up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum SchedulerType {
    /// Stays at the highest.
    Constant,
    /// Falls in a line.
    Linear,
    /// Falls along half a cosine.
    Cosine,
}

/// The optimizer; the names of transformers are taken, too.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Optim {
    /// Moments in the dtype of what is stepped.
    #[serde(rename = "adamw", alias = "adamw_torch", alias = "adamw_torch_fused")]
    AdamW,
    /// Moments as codes of 8 bits with a scale for each 256 of them.
    #[serde(rename = "adamw_8bit", alias = "adamw_bnb_8bit")]
    AdamW8Bit,
}

/// What to do when a loss or gradient is not finite.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OnNonFinite {
    /// Stop the run; the weights stay as they were before the step.
    Stop,
    /// Leave the step out, and say so.
    Skip,
}

/// Arithmetic of the model.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum RunDtype {
    /// bfloat16 when the checkpoint is, else float32.
    Auto,
    /// 32-bit floats.
    Float32,
    /// bfloat16, with float32 where the model needs it.
    Bfloat16,
}

/// A list, or one string with commas, which may stand in brackets: Hydra's lists have words without quotes.
fn list<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<String>, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Form {
        List(Vec<String>),
        Words(String),
    }
    Ok(match Form::deserialize(deserializer)? {
        Form::List(list) => list,
        Form::Words(words) => words
            .strip_prefix('[')
            .and_then(|words| words.strip_suffix(']'))
            .unwrap_or(&words)
            .split(',')
            .map(str::trim)
            .filter(|w| !w.is_empty())
            .map(str::to_owned)
            .collect(),
    })
}
