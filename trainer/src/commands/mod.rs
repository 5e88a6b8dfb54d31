//! One file a command. Each holds its arguments and a `run` that does the job.

mod data;
#[cfg(feature = "torch")]
mod finetune;
#[cfg(feature = "torch")]
mod forward;
#[cfg(feature = "torch")]
mod generate;
mod init;
mod inspect;

use std::ffi::OsString;
use std::io::Write;
use std::process::ExitCode;

use clap::Parser;

/// Fine-tune, generate with, inspect and convert Qwen3.5/3.6-VL checkpoints.
#[derive(Debug, Parser)]
#[command(name = "trainer", version, arg_required_else_help = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, clap::Subcommand)]
enum Command {
    Data(data::DataArgs),
    #[cfg(feature = "torch")]
    Finetune(finetune::FinetuneArgs),
    #[cfg(feature = "torch")]
    Forward(forward::ForwardArgs),
    #[cfg(feature = "torch")]
    Generate(generate::GenerateArgs),
    Init(init::InitArgs),
    Inspect(inspect::InspectArgs),
}

/// Parses `args` (the program's name first), runs the command and returns the exit code:
/// 0 done, 1 the job failed, 2 wrong use.
pub fn run(args: impl IntoIterator<Item = OsString>) -> ExitCode {
    let cli = match Cli::try_parse_from(args) {
        Ok(cli) => cli,
        Err(error) => {
            // A closed pipe is not an error.
            let _ = error.print();
            return ExitCode::from(u8::try_from(error.exit_code()).unwrap_or(2));
        }
    };
    let result = match &cli.command {
        Command::Data(args) => data::run(args),
        #[cfg(feature = "torch")]
        Command::Finetune(args) => finetune::run(args),
        #[cfg(feature = "torch")]
        Command::Forward(args) => forward::run(args),
        #[cfg(feature = "torch")]
        Command::Generate(args) => generate::run(args),
        Command::Init(args) => init::run(args),
        Command::Inspect(args) => inspect::run(args),
    };
    result.unwrap_or_else(|error| {
        let mut stderr = anstream::stderr();
        let _ = writeln!(stderr, "error: {error}");
        for cause in error.chain().skip(1) {
            let _ = writeln!(stderr, "caused by: {cause}");
        }
        ExitCode::FAILURE
    })
}
