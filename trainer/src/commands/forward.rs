//! `trainer forward`: Run the model on a batch and write every output to a safetensors file.

use std::process::ExitCode;

/// Run the model on a batch and write every output to a safetensors file.
#[derive(Debug, clap::Args)]
pub(crate) struct ForwardArgs {}

pub(crate) fn run(_args: &ForwardArgs) -> anyhow::Result<ExitCode> {
    anyhow::bail!("`trainer forward` is not built yet")
}
