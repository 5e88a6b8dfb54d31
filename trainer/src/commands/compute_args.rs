//! The flags that say where a model computes, and what computes its ops.

use bridge_torch::model::ModelOptions;
use bridge_torch::ops::policy::KernelPolicy;
use tch::Kind;

use crate::device;

/// Device and kernels.
#[derive(Debug, clap::Args)]
pub(crate) struct ComputeArgs {
    /// auto (the first GPU where there is one), cpu, cuda or cuda:N.
    #[arg(long, default_value = "auto", value_parser = device::checked)]
    device: String,
    /// auto, cuda or reference, with exceptions as auto,gdn=reference: what computes the ops (see `trainer info`).
    #[arg(long, default_value_t, value_name = "POLICY")]
    kernels: KernelPolicy,
}

impl ComputeArgs {
    /// A whole model that computes in `dtype`.
    ///
    /// # Errors
    /// When a GPU was asked for and is not there.
    pub(crate) fn options(&self, dtype: Kind) -> anyhow::Result<ModelOptions> {
        Ok(ModelOptions {
            dtype,
            device: device::resolve(&self.device)?,
            kernels: self.kernels,
            ..ModelOptions::default()
        })
    }
}
