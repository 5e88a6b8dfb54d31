//! Plans of many stages of one model, from one reading of its tables.

use crate::auto_bridge::left_out;
use crate::mapping::Registry;
use crate::plan::{self, Held, ModelPlan, PlanOptions, Stage};
use crate::{AutoBridge, BridgeError};

/// Plans stages one by one; nothing of a stage stays in memory.
#[derive(Debug)]
pub struct StagePlanner<'a> {
    bridge: &'a AutoBridge,
    full: Registry,
    registry: Registry,
    options: PlanOptions,
}

impl<'a> StagePlanner<'a> {
    pub(crate) fn new(
        bridge: &'a AutoBridge,
        full: Registry,
        registry: Registry,
        options: PlanOptions,
    ) -> Self {
        Self {
            bridge,
            full,
            registry,
            options,
        }
    }

    /// The table of what the options choose.
    #[must_use]
    pub fn registry(&self) -> &Registry {
        &self.registry
    }

    /// Elements and bytes of the whole model, each parameter once and without padding.
    ///
    /// # Errors
    /// [`plan::PlanError::TooLarge`] when they cannot be counted.
    pub fn model_size(&self) -> Result<(u64, u64), BridgeError> {
        let dtype_of = |name: &str| self.bridge.hf_info(&self.full, name).dtype;
        Ok(plan::model_size(&self.registry, &dtype_of, &self.options)?)
    }

    /// Plans what a stage holds, under its local names.
    ///
    /// # Errors
    /// [`plan::PlanError::Layout`] when the layout was made for another model or other options.
    pub fn plan(&self, stage: &Stage<'_>) -> Result<ModelPlan, BridgeError> {
        let dtype_of = |name: &str| self.bridge.hf_info(&self.full, name).dtype;
        let mut plan = plan::build_stage(&self.registry, &dtype_of, &self.options, stage)?;
        plan.left_out = left_out(&self.full, &self.registry);
        Ok(plan)
    }

    /// Names, dtypes and shapes of what a stage holds, without the copies that fill it: the targets of
    /// [`StagePlanner::plan`], in the same order.
    ///
    /// # Errors
    /// As [`StagePlanner::plan`].
    pub fn held(&self, stage: &Stage<'_>) -> Result<Vec<Held>, BridgeError> {
        let dtype_of = |name: &str| self.bridge.hf_info(&self.full, name).dtype;
        Ok(plan::held(&self.registry, &dtype_of, &self.options, stage)?)
    }
}
