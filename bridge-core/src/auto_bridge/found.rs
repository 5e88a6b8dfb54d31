//! A `torch_dist` directory as the model finds it.

use super::export::stored_keys::StoredKeys;
use super::{AutoBridge, BridgeError, left_out};
use crate::Dtype;
use crate::checkpoint::TensorSource;
use crate::checkpoint::torch_dist::TorchDistCheckpoint;
use crate::plan::{ModelPlan, PlanOptions};

/// How the tensors of a directory come from Hugging Face's.
#[derive(Debug)]
pub struct FoundPlan {
    /// Every stored tensor of the model, under the keys and with the padding that are there.
    pub plan: ModelPlan,
    /// Keys of the directory that no tensor of the model has. States of optimizers and modules are not counted.
    pub unknown: Vec<String>,
}

impl AutoBridge {
    /// Plans the tensors of `directory`, whatever its key style and padding, in the dtypes of the Hugging Face tensors.
    /// What the directory lacks is planned under the keys that Megatron-Core writes.
    ///
    /// # Errors
    /// As [`AutoBridge::plan_stored`]; and [`super::ExportError::Vocabulary`] where the directory has fewer rows of the
    /// vocabulary than the model.
    pub fn plan_found(
        &self,
        directory: &TorchDistCheckpoint,
        without_mtp: bool,
    ) -> Result<FoundPlan, BridgeError> {
        let options = PlanOptions {
            without_mtp,
            ..PlanOptions::default()
        };
        let (full, chosen) = self.tables(&options)?;
        let stored = StoredKeys::new(self, directory, &full)?;
        let mut plan = stored.plan(&chosen, &|name| self.hf_info(&full, name).dtype)?;
        plan.left_out = left_out(&full, &chosen);
        Ok(FoundPlan {
            plan,
            unknown: stored.unknown(),
        })
    }
}

impl FoundPlan {
    /// The way back, in the dtypes of the directory, for the Hugging Face tensors that it holds in full.
    #[must_use]
    pub fn as_hf(&self, directory: &TorchDistCheckpoint) -> ModelPlan {
        let holds = |key: &str| directory.info(key).is_some();
        let mut back = self
            .plan
            .inverted()
            .only(|tensor| tensor.sources.iter().all(|source| holds(&source.name)));
        for tensor in &mut back.tensors {
            let sources = tensor.sources.iter();
            let dtypes = sources.filter_map(|one| Some(directory.info(&one.name)?.dtype));
            tensor.dtype = dtypes.reduce(Dtype::widest).unwrap_or(tensor.dtype);
        }
        back
    }
}
