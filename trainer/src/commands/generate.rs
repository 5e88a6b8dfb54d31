//! `trainer generate`: Answer a prompt.

use std::process::ExitCode;

/// Answer a prompt.
#[derive(Debug, clap::Args)]
pub(crate) struct GenerateArgs {}

pub(crate) fn run(_args: &GenerateArgs) -> anyhow::Result<ExitCode> {
    anyhow::bail!("`trainer generate` is not built yet")
}
