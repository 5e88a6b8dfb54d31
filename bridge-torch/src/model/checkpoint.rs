//! Loading the parameters from a Hugging Face directory and saving them as one again, through one plan.

use std::path::{Path, PathBuf};

use bridge_core::checkpoint::Overwrite;
use bridge_core::checkpoint::hf::{HfCheckpoint, HfWriter};
use bridge_core::checkpoint::{MemoryTensors, TensorInfo};
use bridge_core::convert::{ExecuteOptions, NonFinite, Transforms, copy_tensors, execute};
use bridge_core::plan::{ModelPlan, PlanOptions};
use bridge_core::{AutoBridge, Dtype};
use tch::{Kind, Tensor};

use super::error::ModelError;
use super::options::ModelOptions;
use super::qwen3_vl::Qwen3VlModel;
use crate::params::{ParamStore, kind_of};

/// Parameters that stay in float32 in a bfloat16 run: the decay of the delta net and its output norm.
const FLOAT32_SUFFIXES: [&str; 2] = [".A_log", ".out_norm.weight"];

/// In float32 when the checkpoint holds it so.
const DT_BIAS: &str = ".dt_bias";

/// How a model is saved.
pub struct SaveOptions<'a> {
    /// Answers whether a parameter (Megatron name, experts stacked) is what it was in the source; such tensors are
    /// copied byte for byte.
    pub unchanged: &'a dyn Fn(&str) -> bool,
    /// What happens when the directory is there already.
    pub overwrite: Overwrite,
}

impl std::fmt::Debug for SaveOptions<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SaveOptions")
            .field("overwrite", &self.overwrite)
            .finish_non_exhaustive()
    }
}

/// Plans the checkpoint in the run's dtype and reads it.
pub(super) fn load(bridge: &AutoBridge, options: &ModelOptions) -> Result<ParamStore, ModelError> {
    let plan = plan(bridge, options)?;
    let checkpoint = weights(bridge)?;
    let experts = bridge.config().text.moe.as_ref();
    let mut params = ParamStore::allocate(&plan, experts.map_or(1, |moe| moe.num_experts))?;
    execute(
        &plan,
        checkpoint,
        &params.memory(),
        &ExecuteOptions::default(),
    )
    .map_err(|error| ModelError::Checkpoint(Box::new(error)))?;
    params.move_to(options.device)?;
    Ok(params)
}

fn weights(bridge: &AutoBridge) -> Result<&HfCheckpoint, ModelError> {
    bridge.checkpoint().ok_or(ModelError::NoWeights)
}

pub(super) fn plan(bridge: &AutoBridge, options: &ModelOptions) -> Result<ModelPlan, ModelError> {
    let architecture = bridge.config().architecture;
    if architecture.is_text_only() || architecture.is_classifier() {
        return Err(ModelError::Unsupported {
            what: "running or training this architecture",
            found: format!(
                "config.json names `{}`; it can be inspected, planned and converted",
                architecture.hf_name()
            ),
        });
    }
    let dtype = dtype_of(options.dtype)?;
    let gdn = if dtype == Dtype::Bf16 {
        Dtype::F32
    } else {
        dtype
    };
    let mut plan = bridge
        .plan(&PlanOptions {
            dtype: Some(dtype),
            overrides: FLOAT32_SUFFIXES
                .map(|suffix| (suffix.to_owned(), gdn))
                .to_vec(),
            without_mtp: !options.mtp,
            ..PlanOptions::default()
        })
        .map_err(|error| ModelError::Plan(Box::new(error)))?;
    for tensor in &mut plan.tensors {
        let float32 = tensor
            .sources
            .iter()
            .all(|source| source.dtype == Dtype::F32);
        if tensor.name.ends_with(DT_BIAS) && float32 {
            tensor.dtype = gdn;
        }
    }
    Ok(plan)
}

fn dtype_of(kind: Kind) -> Result<Dtype, ModelError> {
    match kind {
        Kind::Float => Ok(Dtype::F32),
        Kind::Double => Ok(Dtype::F64),
        Kind::BFloat16 => Ok(Dtype::Bf16),
        found => Err(ModelError::Kind { found }),
    }
}

impl Qwen3VlModel {
    /// Writes the model as a Hugging Face directory in the form of `source`: the same names, files, dtypes and expert
    /// layout; config, tokenizer and the other small files are copied. Tensors that the model does not hold (a
    /// prediction head that was left out) and unchanged ones are copied byte for byte.
    ///
    /// # Errors
    /// [`ModelError`]; the destination is untouched then.
    pub fn save_hf(
        &self,
        source: &AutoBridge,
        dir: &Path,
        options: &SaveOptions<'_>,
    ) -> Result<PathBuf, ModelError> {
        let checkpoint = weights(source)?;
        let failed = |error| ModelError::Checkpoint(error);
        let plan = plan(source, &self.options)?;
        let mut copied = plan.left_out.clone();
        let export = plan.inverted().only(|tensor| {
            tensor.sources.iter().any(|param| {
                let holder = self.params.holder_of(&param.name);
                !holder.is_some_and(options.unchanged)
            })
        });
        copied.extend(
            plan.inverted()
                .tensors
                .into_iter()
                .map(|tensor| tensor.name)
                .filter(|name| export.tensor(name).is_none()),
        );
        let writer = HfWriter::like(checkpoint, dir, options.overwrite)
            .map_err(|error| failed(Box::new(error)))?;
        let run = ExecuteOptions::default();
        copy_tensors(&copied, &checkpoint.as_written(), &writer, &run)
            .map_err(|error| failed(Box::new(error)))?;
        execute(&export, &self.params.memory(), &writer, &run)
            .map_err(|error| failed(Box::new(error)))?;
        writer.finish().map_err(|error| failed(Box::new(error)))
    }

    /// The gradients of the parameters that a backward pass reached, under Hugging Face names and in the run's dtype.
    ///
    /// Only the layout is inverted: a gradient knows no minus one. An expert that no token chose has zeros.
    ///
    /// # Errors
    /// [`ModelError`] when the checkpoint cannot be planned.
    pub fn hf_gradients(&self, source: &AutoBridge) -> Result<Vec<(String, Tensor)>, ModelError> {
        let dtype = dtype_of(self.options.dtype)?;
        let reached = |name: &str| {
            let holder = self.params.holder_of(name);
            holder.is_some_and(|name| {
                self.params
                    .get(name)
                    .is_ok_and(|param| param.grad().defined())
            })
        };
        let plan = plan(source, &self.options)?
            .inverted()
            .with_dtype(dtype)
            .only(|tensor| tensor.sources.iter().all(|param| reached(&param.name)));
        let mut target = MemoryTensors::default();
        for tensor in &plan.tensors {
            let info = TensorInfo {
                dtype,
                shape: tensor.shape.clone(),
            };
            target.insert(&tensor.name, info);
        }
        let run = ExecuteOptions {
            transforms: Transforms::LayoutOnly,
            non_finite: NonFinite::Allow,
            ..ExecuteOptions::default()
        };
        execute(&plan, &self.params.gradients(), &target, &run)
            .map_err(|error| ModelError::Checkpoint(Box::new(error)))?;
        plan.tensors
            .iter()
            .map(|tensor| {
                let bytes = target.bytes(&tensor.name).unwrap_or_default();
                let size: Vec<i64> = tensor
                    .shape
                    .iter()
                    .map(|&length| i64::try_from(length).unwrap_or(i64::MAX))
                    .collect();
                let values = Tensor::f_from_data_size(&bytes, &size, kind_of(dtype)?)?;
                Ok((tensor.name.clone(), values))
            })
            .collect()
    }
}
