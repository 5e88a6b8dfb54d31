//! `trainer inspect`: Show what a checkpoint directory holds.

use std::process::ExitCode;

/// Show what a checkpoint directory holds.
#[derive(Debug, clap::Args)]
pub(crate) struct InspectArgs {}

pub(crate) fn run(_args: &InspectArgs) -> anyhow::Result<ExitCode> {
    anyhow::bail!("`trainer inspect` is not built yet")
}
