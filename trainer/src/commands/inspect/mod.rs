//! `trainer inspect`: Show what a checkpoint holds.

mod hf;
mod mapping;
mod shard;
mod table;
mod torch_dist;

use std::ffi::OsStr;
use std::path::PathBuf;
use std::process::ExitCode;

use bridge_core::checkpoint::torch_dist::TorchDistCheckpoint;

use super::checksums;

/// The form of `--json`; it changes when a key changes its meaning.
const SCHEMA_VERSION: u32 = 1;

/// Show what a checkpoint holds.
///
/// Of a Hugging Face directory: architecture, sizes, parameters by part, dtypes and the pattern of layers; every header
/// is checked, and the tensors against the config. A config file alone will do where no weights are needed. Of a
/// torch_dist directory, the run's or an iteration's: tensors, dtypes, files, and what is known of the run. Of a rank's
/// file: whose part it is.
///
/// Example: trainer inspect Qwen3.5-0.8B/ --mapping
#[derive(Debug, clap::Args)]
pub(crate) struct InspectArgs {
    /// A model directory, a config file of any name or a Hub id (config.json alone is downloaded, with --checksum all); a
    /// torch_dist directory; a rank's .safetensors file.
    path: PathBuf,
    /// Print the mapping: one row a parameter, Megatron's name and layout beside the Hugging Face tensors.
    #[arg(long)]
    mapping: bool,
    /// List every tensor.
    #[arg(long)]
    tensors: bool,
    /// List every tensor with the SHA-256 of its bytes.
    #[arg(long)]
    checksum: bool,
    /// Write the checksums of every file and tensor to checksums.json, against which `trainer verify DIR` holds the
    /// checkpoint later.
    #[arg(long, requires = "checksum")]
    record: bool,
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(args: &InspectArgs) -> anyhow::Result<ExitCode> {
    let is_shard = args.path.is_file() && args.path.extension() == Some(OsStr::new("safetensors"));
    let is_torch_dist = TorchDistCheckpoint::is_at(&args.path);
    if args.mapping && (is_shard || is_torch_dist) {
        anyhow::bail!(
            "{} holds no config; --mapping needs a model directory or its config file",
            args.path.display()
        );
    }
    // Elsewhere the id would be opened in the cache, which other programs share: nothing of ours belongs there.
    anyhow::ensure!(
        !args.record || args.path.exists(),
        "{} is no path here; --record writes beside the weights, so give a directory or file",
        args.path.display()
    );
    if is_shard {
        shard::run(args)?;
    } else if is_torch_dist {
        torch_dist::run(args)?;
    } else {
        hf::run(args)?;
    }
    if args.record {
        let record = checksums::record(&args.path)?;
        tracing::info!("wrote {}", record.display());
    }
    Ok(ExitCode::SUCCESS)
}
