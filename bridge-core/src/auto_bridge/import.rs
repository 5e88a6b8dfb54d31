//! Hugging Face to a `torch_dist` directory.

use std::path::Path;

use serde_json::Value;

use super::job::Job;
use super::{AutoBridge, BridgeError};
use crate::Dtype;
use crate::checkpoint::hf::HfCheckpoint;
use crate::checkpoint::torch_dist::{TorchDistLayout, TorchDistWriter};
use crate::checkpoint::{CheckpointError, FileSink, Staging, TensorSink};
use crate::convert::{ExecuteOptions, Report, Rounded, execute, write_files};
use crate::layout::LayoutSpec;
use crate::plan::{KeyStyle, ModelPlan};
use crate::provider::run_config::{self, RunConfig};

/// What a `torch_dist` directory should hold.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImportOptions {
    /// The dtype of every tensor; `None`: each keeps its own.
    pub dtype: Option<Dtype>,
    /// Stores norms in float32 that would be rounded where Megatron keeps them minus one.
    pub exact_norms: bool,
    /// Leaves the multi-token-prediction head out.
    pub without_mtp: bool,
    /// Pads the vocabulary to a multiple of this; `None`: no padding.
    pub make_vocab_size_divisible_by: Option<usize>,
    /// Writes an empty object for each module that could have a state beside its parameters: Megatron-Core's default
    /// strictness misses them otherwise.
    pub extra_states: bool,
}

impl Default for ImportOptions {
    fn default() -> Self {
        Self {
            dtype: None,
            exact_norms: false,
            without_mtp: false,
            make_vocab_size_divisible_by: None,
            extra_states: true,
        }
    }
}

/// An import that is planned and checked; nothing is written yet.
#[derive(Debug)]
pub struct Import<'a> {
    source: &'a HfCheckpoint,
    plan: ModelPlan,
    layout: TorchDistLayout,
    rounded_norms: Vec<Rounded>,
    run_config: String,
    job: Job,
}

impl AutoBridge {
    /// Plans a `torch_dist` directory out of this checkpoint.
    ///
    /// # Errors
    /// As [`AutoBridge::plan`]; [`BridgeError::NoWeights`] for a bridge made from a config alone.
    pub fn import(&self, options: &ImportOptions) -> Result<Import<'_>, BridgeError> {
        let source = self.checkpoint().ok_or(BridgeError::NoWeights)?;
        let (planned, _) = self.lay_out(&LayoutSpec {
            dtype: options.dtype,
            without_mtp: options.without_mtp,
            make_vocab_size_divisible_by: options.make_vocab_size_divisible_by,
            ..LayoutSpec::default()
        })?;
        let mut plan = self.plan_stored(&planned, KeyStyle::Written)?;
        let rounded_norms = rounded_norms(&plan, source)?;
        if options.exact_norms {
            for tensor in &mut plan.tensors {
                if rounded_norms.iter().any(|norm| norm.name == tensor.name) {
                    tensor.dtype = Dtype::F32;
                }
            }
        }
        let mut layout = TorchDistLayout {
            tensors: plan.targets(),
            ..TorchDistLayout::default()
        };
        if options.extra_states {
            layout.extra_states = self.extra_states(&planned)?;
        }
        let config = &self.config.file;
        let job = Job::new(
            &format!("import {options:?}"),
            source.paths().chain([config.clone()]),
            [source.dir(), config],
        );
        Ok(Import {
            source,
            plan,
            layout,
            rounded_norms,
            run_config: self.imported_run_config(options).to_yaml(),
            job,
        })
    }

    /// Writes a `torch_dist` directory of this checkpoint to `megatron_path`; see [`AutoBridge::import`].
    ///
    /// # Errors
    /// [`BridgeError`]; nothing that looks complete stands at `megatron_path` then.
    pub fn import_ckpt(
        &self,
        megatron_path: &Path,
        options: &ImportOptions,
        staging: &Staging,
    ) -> Result<Report, BridgeError> {
        let import = self.import(options)?;
        let writer = import.create(megatron_path, staging)?;
        let report = import.write(&writer, &ExecuteOptions::default())?;
        writer.finish()?;
        Ok(report)
    }
}

impl AutoBridge {
    fn imported_run_config(&self, options: &ImportOptions) -> RunConfig {
        let mut run = RunConfig::new(&self.to_megatron_provider(), &self.config);
        if options.without_mtp {
            run.set("mtp_num_layers", Value::Null);
        }
        if let Some(dtype) = options.dtype {
            run.set_dtype(&format!("torch.{}", dtype.torch_word()));
        }
        if let Some(divisor) = options.make_vocab_size_divisible_by {
            run.set("should_pad_vocab", true);
            run.set("make_vocab_size_divisible_by", divisor);
        }
        run
    }
}

impl Import<'_> {
    /// How every stored tensor is made. [`ModelPlan::left_out`] are the checkpoint's tensors that are not imported.
    #[must_use]
    pub fn plan(&self) -> &ModelPlan {
        &self.plan
    }

    /// What is read.
    #[must_use]
    pub fn source(&self) -> &HfCheckpoint {
        self.source
    }

    /// Norms whose values would not come back exactly from minus one in their own dtype; with
    /// [`ImportOptions::exact_norms`] they are stored in float32, and do.
    #[must_use]
    pub fn rounded_norms(&self) -> &[Rounded] {
        &self.rounded_norms
    }

    /// Starts the directory, with what Megatron Bridge wants beside the tensors. Its data files can be finished one by one:
    /// [`Staging::job`] is set here.
    ///
    /// # Errors
    /// [`BridgeError::Overlap`], [`CheckpointError`].
    pub fn create(&self, target: &Path, staging: &Staging) -> Result<TorchDistWriter, BridgeError> {
        let staging = self.job.staging(target, staging)?;
        let writer = TorchDistWriter::create(&self.layout, target, staging)?;
        writer.write_file(run_config::FILE, self.run_config.as_bytes())?;
        writer.write_train_state()?;
        Ok(writer)
    }

    /// Fills `sink`, which is the writer or stands before it.
    ///
    /// # Errors
    /// [`BridgeError::Convert`].
    pub fn write(
        &self,
        sink: &dyn FileSink,
        options: &ExecuteOptions,
    ) -> Result<Report, BridgeError> {
        Ok(write_files(&self.plan, self.source, sink, options)?)
    }
}

/// Norms are small: they are converted once for the numbers alone.
fn rounded_norms(plan: &ModelPlan, source: &HfCheckpoint) -> Result<Vec<Rounded>, BridgeError> {
    let norms = plan.clone().only(|tensor| !tensor.transforms.is_empty());
    Ok(execute(&norms, source, &Discard, &ExecuteOptions::default())?.rounded)
}

struct Discard;

impl TensorSink for Discard {
    fn write(&self, _: &str, _: u64, _: &[u8]) -> Result<(), CheckpointError> {
        Ok(())
    }
}
