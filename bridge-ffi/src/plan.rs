//! What one virtual stage of a rank holds.

use std::collections::HashMap;

use bridge_core::layout::RankCoord;
use bridge_core::plan::{ModelPlan, TensorPlan};

use crate::checkpoint::Checkpoint;
use crate::error::FfiError;
use crate::provider::nearest;

/// A rank's tensors and how they are made. It keeps its checkpoint open.
#[derive(Debug, Clone)]
pub struct Plan {
    pub(crate) checkpoint: Checkpoint,
    model: ModelPlan,
    by_name: HashMap<String, usize>,
    /// The rank.
    pub rank: RankCoord,
    /// Its virtual stage.
    pub vp_stage: usize,
}

impl Plan {
    pub(crate) fn new(
        checkpoint: Checkpoint,
        model: ModelPlan,
        rank: RankCoord,
        vp_stage: usize,
    ) -> Self {
        let names = model.tensors.iter().enumerate();
        Self {
            by_name: names.map(|(at, one)| (one.name.clone(), at)).collect(),
            checkpoint,
            model,
            rank,
            vp_stage,
        }
    }

    /// The tensors, in the model's order.
    #[must_use]
    pub fn tensors(&self) -> &[TensorPlan] {
        &self.model.tensors
    }

    /// The number of a tensor.
    ///
    /// # Errors
    /// [`FfiError::NoTensor`] with the nearest name.
    pub fn find(&self, name: &str) -> Result<usize, FfiError> {
        self.by_name.get(name).copied().ok_or_else(|| {
            let names = self.model.tensors.iter().map(|one| one.name.as_str());
            FfiError::NoTensor {
                name: name.to_owned(),
                rank: self.rank.global_rank,
                vp_stage: self.vp_stage,
                nearest: nearest(name, names).map(str::to_owned),
            }
        })
    }
}
