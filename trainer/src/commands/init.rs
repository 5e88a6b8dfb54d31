//! `trainer init`: Write a random checkpoint of any size.

use std::process::ExitCode;

/// Write a random checkpoint of any size.
#[derive(Debug, clap::Args)]
pub(crate) struct InitArgs {}

pub(crate) fn run(_args: &InitArgs) -> anyhow::Result<ExitCode> {
    anyhow::bail!("`trainer init` is not built yet")
}
