//! A `torch_dist` directory under Hugging Face names, so that a rank's plan reads it like a model directory.
//!
//! Its values are Megatron's (norms minus one), like those of the rank. So both plans are carried out without their
//! arithmetic, which would cancel out, and could round on the way.

use std::collections::HashMap;
use std::path::Path;

use bridge_core::checkpoint::torch_dist::TorchDistCheckpoint;
use bridge_core::convert::{ConvertError, ExecuteOptions, NonFinite, Planned, Transforms};
use bridge_core::plan::{ModelPlan, TensorPlan};
use bridge_core::provider::run_config::RunConfig;
use bridge_core::{AutoBridge, Dtype};

use crate::error::FfiError;

/// An opened directory, and how Hugging Face tensors come from it.
#[derive(Debug)]
pub(crate) struct Stored {
    directory: TorchDistCheckpoint,
    /// Every Hugging Face tensor that the directory holds in full.
    as_hf: ModelPlan,
    by_name: HashMap<String, usize>,
}

impl Stored {
    pub(crate) fn open(
        path: &Path,
        bridge: &AutoBridge,
        not_strict: bool,
    ) -> Result<Self, FfiError> {
        let directory = TorchDistCheckpoint::open(path)?;
        if let Some(file) = directory.run_config().filter(|_| !not_strict) {
            let differences = RunConfig::read(&file)?.differences(&bridge.to_megatron_provider());
            if !differences.is_empty() {
                return Err(FfiError::OtherModel { file, differences });
            }
        }
        let found = bridge.plan_found(&directory, false)?;
        if !not_strict && !found.unknown.is_empty() {
            return Err(FfiError::UnknownKeys {
                dir: directory.dir().to_owned(),
                keys: found.unknown,
            });
        }
        let as_hf = found.as_hf(&directory);
        // Shapes and dtypes are compared now, not when a tensor is loaded.
        Planned::new(&as_hf, &directory, &layout_only(&ExecuteOptions::default()))?;
        let names = as_hf.tensors.iter().enumerate();
        Ok(Self {
            by_name: names.map(|(at, one)| (one.name.clone(), at)).collect(),
            as_hf,
            directory,
        })
    }

    /// Gives a rank's plan the dtypes of the directory where no other was asked for.
    pub(crate) fn adopt(&self, plan: &mut ModelPlan, asked: Option<Dtype>) -> Result<(), FfiError> {
        let mut lacking = Vec::new();
        for tensor in &mut plan.tensors {
            let mut dtypes = Vec::with_capacity(tensor.sources.len());
            for source in &mut tensor.sources {
                match self.tensor(&source.name) {
                    Some(found) => {
                        source.dtype = found.dtype;
                        dtypes.push(found.dtype);
                    }
                    None => {
                        lacking.push(tensor.name.clone());
                        break;
                    }
                }
            }
            let own = dtypes.into_iter().reduce(Dtype::widest);
            tensor.dtype = asked.or(own).unwrap_or(tensor.dtype);
        }
        if lacking.is_empty() {
            return Ok(());
        }
        Err(FfiError::StoredLacks {
            dir: self.directory.dir().to_owned(),
            names: lacking,
        })
    }

    /// What the sources of these tensors are read from, and how.
    pub(crate) fn source<'a, 'b>(
        &'a self,
        tensors: impl Iterator<Item = &'b TensorPlan>,
        options: &ExecuteOptions,
    ) -> Result<(Planned<'a>, ExecuteOptions), ConvertError> {
        let options = layout_only(options);
        let mut needed: Vec<usize> = tensors
            .flat_map(|tensor| &tensor.sources)
            .filter_map(|source| self.by_name.get(&source.name).copied())
            .collect();
        needed.sort_unstable();
        needed.dedup();
        let needed = needed.into_iter().map(|at| &self.as_hf.tensors[at]);
        // What is read is looked at once, where it arrives.
        let reading = ExecuteOptions {
            non_finite: NonFinite::Allow,
            ..options.clone()
        };
        Ok((Planned::some(needed, &self.directory, &reading)?, options))
    }

    fn tensor(&self, name: &str) -> Option<&TensorPlan> {
        Some(&self.as_hf.tensors[*self.by_name.get(name)?])
    }
}

fn layout_only(options: &ExecuteOptions) -> ExecuteOptions {
    ExecuteOptions {
        transforms: Transforms::LayoutOnly,
        ..options.clone()
    }
}
