//! `trainer convert`: one file a way of converting.

mod export;
mod import;
mod quantised;
mod roundtrip;
mod shard;
mod unshard;
mod writing;

use std::process::ExitCode;

/// Convert between Hugging Face directories and Megatron's layouts, without a GPU.
#[derive(Debug, clap::Args)]
pub(crate) struct ConvertArgs {
    #[command(subcommand)]
    command: ConvertCommand,
}

#[derive(Debug, clap::Subcommand)]
enum ConvertCommand {
    Import(import::ImportArgs),
    Export(export::ExportArgs),
    Roundtrip(roundtrip::RoundtripArgs),
    Shard(shard::ShardArgs),
    Unshard(unshard::UnshardArgs),
}

pub(crate) fn run(args: &ConvertArgs) -> anyhow::Result<ExitCode> {
    match &args.command {
        ConvertCommand::Import(args) => import::run(args),
        ConvertCommand::Export(args) => export::run(args),
        ConvertCommand::Roundtrip(args) => roundtrip::run(args),
        ConvertCommand::Shard(args) => shard::run(args),
        ConvertCommand::Unshard(args) => unshard::run(args),
    }
}
