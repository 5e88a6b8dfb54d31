//! `trainer completions`: Print shell completions.

use std::io::Write;
use std::process::ExitCode;

use clap::CommandFactory;

use crate::report;

/// Print shell completions.
///
/// Example: `trainer completions bash > ~/.local/share/bash-completion/completions/trainer`
#[derive(Debug, clap::Args)]
pub(crate) struct CompletionsArgs {
    /// The shell to write them for.
    shell: clap_complete::Shell,
}

pub(crate) fn run(args: &CompletionsArgs) -> anyhow::Result<ExitCode> {
    // Into memory first: clap_complete panics when its writer fails, and a closed pipe is no error.
    let mut script = Vec::new();
    clap_complete::generate(
        args.shell,
        &mut super::Cli::command(),
        "trainer",
        &mut script,
    );
    report::out().write_all(&script)?;
    Ok(ExitCode::SUCCESS)
}
