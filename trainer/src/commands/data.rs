//! `trainer data`: Show each row of a data set as the model will see it.

use std::process::ExitCode;

/// Show each row of a data set as the model will see it.
#[derive(Debug, clap::Args)]
pub(crate) struct DataArgs {}

pub(crate) fn run(_args: &DataArgs) -> anyhow::Result<ExitCode> {
    anyhow::bail!("`trainer data` is not built yet")
}
