//! One file a command. Each holds its arguments and a `run` that does the job.

mod checkpoint;
mod checksums;
mod completions;
#[cfg(feature = "torch")]
mod compute_args;
mod convert;
mod data;
#[cfg(feature = "torch")]
mod demo;
mod diff;
#[cfg(feature = "torch")]
mod finetune;
#[cfg(feature = "torch")]
mod forward;
#[cfg(feature = "torch")]
mod generate;
#[cfg(feature = "torch")]
mod info;
mod init;
mod inspect;
mod interrupt;
mod layout_args;
mod model;
mod plan;
mod verify;

use std::ffi::OsString;
use std::io;
use std::process::ExitCode;

use bridge_core::layout::LayoutError;
use clap::Parser;
use clap::error::ErrorKind;

use self::interrupt::Interrupted;
use crate::hub::RevisionError;
use crate::report::{self, ColorChoice, Verbosity};

/// Fine-tune, generate with, inspect and convert Qwen3.5/3.6-VL checkpoints.
#[derive(Debug, Parser)]
#[command(name = "trainer", version, arg_required_else_help = true)]
struct Cli {
    /// Say nothing on stderr but warnings and errors.
    #[arg(long, short, global = true, conflicts_with = "verbose")]
    quiet: bool,
    /// Say more on stderr; twice for a line a tensor.
    #[arg(long, short, global = true, action = clap::ArgAction::Count)]
    verbose: u8,
    /// When to colour the output.
    #[arg(long, global = true, value_enum, default_value_t, value_name = "WHEN")]
    color: ColorChoice,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, clap::Subcommand)]
enum Command {
    Completions(completions::CompletionsArgs),
    Convert(convert::ConvertArgs),
    Data(data::DataArgs),
    #[cfg(feature = "torch")]
    Demo(demo::DemoArgs),
    Diff(diff::DiffArgs),
    #[cfg(feature = "torch")]
    Finetune(finetune::FinetuneArgs),
    #[cfg(feature = "torch")]
    Forward(forward::ForwardArgs),
    #[cfg(feature = "torch")]
    Generate(generate::GenerateArgs),
    #[cfg(feature = "torch")]
    Info(info::InfoArgs),
    Init(init::InitArgs),
    Inspect(inspect::InspectArgs),
    Plan(plan::PlanArgs),
    Verify(verify::VerifyArgs),
}

/// Parses `args` (the program's name first), runs the command and returns the exit code:
/// 0 done, 1 the job failed or a difference was found, 2 wrong use, 130 interrupted.
///
/// With `--json` an error is one JSON object `{"error": ...}` on stdout.
pub fn run(args: impl IntoIterator<Item = OsString>) -> ExitCode {
    let args: Vec<OsString> = args.into_iter().collect();
    let json = args.iter().any(|arg| arg == "--json");
    let cli = match Cli::try_parse_from(args) {
        Ok(cli) => cli,
        Err(error) => return usage(&error, json),
    };
    let verbosity = match (cli.quiet, cli.verbose) {
        (true, _) => Verbosity::Quiet,
        (false, 0) => Verbosity::Normal,
        (false, 1) => Verbosity::Debug,
        (false, _) => Verbosity::Trace,
    };
    report::init(verbosity, cli.color);
    // Here, because libtorch's threads take the mode over from the one that starts them.
    #[cfg(feature = "torch")]
    bridge_torch::shim::flush_denormals();
    let result = match &cli.command {
        Command::Completions(args) => completions::run(args),
        Command::Convert(args) => convert::run(args),
        Command::Data(args) => data::run(args),
        #[cfg(feature = "torch")]
        Command::Demo(args) => demo::run(args),
        Command::Diff(args) => diff::run(args),
        #[cfg(feature = "torch")]
        Command::Finetune(args) => finetune::run(args),
        #[cfg(feature = "torch")]
        Command::Forward(args) => forward::run(args),
        #[cfg(feature = "torch")]
        Command::Generate(args) => generate::run(args),
        #[cfg(feature = "torch")]
        Command::Info(args) => info::run(args),
        Command::Init(args) => init::run(args),
        Command::Inspect(args) => inspect::run(args),
        Command::Plan(args) => plan::run(args),
        Command::Verify(args) => verify::run(args),
    };
    result.unwrap_or_else(|error| {
        if is_closed_pipe(&error) {
            return ExitCode::SUCCESS;
        }
        if error.chain().any(|cause| cause.is::<Interrupted>()) {
            report::print_error(&Interrupted.into(), json);
            return ExitCode::from(130);
        }
        report::print_error(&error, json);
        if is_wrong_use(&error) {
            ExitCode::from(2)
        } else {
            ExitCode::FAILURE
        }
    })
}

/// Whether the user's settings are at fault, before any work began.
fn is_wrong_use(error: &anyhow::Error) -> bool {
    #[cfg(feature = "torch")]
    if error.is::<crate::train::config::ConfigError>() {
        return true;
    }
    error.is::<LayoutError>() || error.is::<RevisionError>()
}

/// Help and version go to stdout with code 0, wrong use to stderr with code 2.
fn usage(error: &clap::Error, json: bool) -> ExitCode {
    let asked_for = matches!(
        error.kind(),
        ErrorKind::DisplayHelp | ErrorKind::DisplayVersion
    );
    if json && !asked_for {
        let text = error.to_string();
        report::print_error(
            &anyhow::anyhow!("{}", text.trim().trim_start_matches("error: ")),
            true,
        );
    } else {
        // A closed pipe is not an error.
        let _ = error.print();
    }
    ExitCode::from(u8::try_from(error.exit_code()).unwrap_or(2))
}

/// Whether `error` comes from a reader of our stdout that went away, as `head` does.
fn is_closed_pipe(error: &anyhow::Error) -> bool {
    error.chain().any(|cause| {
        cause
            .downcast_ref::<io::Error>()
            .is_some_and(|io| io.kind() == io::ErrorKind::BrokenPipe)
    })
}
