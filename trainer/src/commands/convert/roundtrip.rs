//! `trainer convert roundtrip`: there and back again, compared.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Instant;

use anyhow::Context;
use bridge_core::checkpoint::Staging;
use bridge_core::checkpoint::torch_dist::TorchDistCheckpoint;
use bridge_core::convert::{Comparison, ExecuteOptions, Side, VerifyOptions, verify};
use bridge_core::{AutoBridge, Dtype, ExportOptions, ImportOptions};

use crate::commands::interrupt::Interrupt;
use crate::commands::model::{self, HubArgs, Weights};
use crate::commands::verify::print_differences;
use crate::report::Transfer;

/// Import a model and export it again without keeping either, and compare every byte.
///
/// The Megatron directory is real, and is removed again; the way back is
/// compared as it is made: A is the model, B what comes back. Exit code 0: nothing differs, 1: a difference was found.
///
/// Example: trainer convert roundtrip --hf-model Qwen3.5-9B/
#[derive(Debug, clap::Args)]
pub(crate) struct RoundtripArgs {
    /// The model directory to read, or a Hub id.
    #[arg(long, value_name = "MODEL")]
    hf_model: PathBuf,
    #[command(flatten)]
    hub: HubArgs,
    /// Where the Megatron directory is made, for a moment; by default where the system keeps temporary files.
    #[arg(long, value_name = "DIR")]
    work_dir: Option<PathBuf>,
    /// bfloat16, float16 or float32 for every stored tensor; without it each keeps its own.
    #[arg(long, value_name = "DTYPE", value_parser = crate::commands::init::parse_dtype)]
    torch_dtype: Option<Dtype>,
    /// Store norms in float32 that Megatron, which keeps them minus one, would round.
    #[arg(long)]
    exact_norms: bool,
    /// Pad the vocabulary to a multiple of N on the way.
    #[arg(long, value_name = "N")]
    make_vocab_size_divisible_by: Option<usize>,
    /// Show no progress.
    #[arg(long)]
    no_progress: bool,
}

pub(crate) fn run(args: &RoundtripArgs) -> anyhow::Result<ExitCode> {
    let started = Instant::now();
    let bridge = model::open(
        &args.hf_model,
        Weights::NeededFor("a round trip"),
        &args.hub.lookup(args.no_progress),
    )?;
    let place = match &args.work_dir {
        Some(dir) => tempfile::Builder::new()
            .prefix(".roundtrip")
            .tempdir_in(dir),
        None => tempfile::tempdir(),
    }
    .context("make a directory for the Megatron side; --work-dir chooses another place")?;
    let megatron = place.path().join("megatron");
    import(&bridge, args, &megatron)?;
    let source = TorchDistCheckpoint::open(&megatron)?;
    let comparison = compare(&bridge, &source)?;
    print_differences(&comparison, Side::Other)?;
    tracing::info!("there and back in {:.1} s", started.elapsed().as_secs_f64());
    Ok(if comparison.is_equal() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

fn import(bridge: &AutoBridge, args: &RoundtripArgs, target: &Path) -> anyhow::Result<()> {
    let import = bridge.import(&ImportOptions {
        dtype: args.torch_dtype,
        exact_norms: args.exact_norms,
        make_vocab_size_divisible_by: args.make_vocab_size_divisible_by,
        ..ImportOptions::default()
    })?;
    let interrupt = Interrupt::listen()?;
    let writer = import.create(target, &Staging::default())?;
    let transfer = Transfer::start(import.plan().num_bytes(), !args.no_progress, "written");
    import.write(
        &interrupt.sink(&writer).showing(&transfer),
        &ExecuteOptions::default(),
    )?;
    writer.finish()?;
    Ok(())
}

/// The export, held against what the import read.
fn compare(bridge: &AutoBridge, source: &TorchDistCheckpoint) -> anyhow::Result<Comparison> {
    let reference = bridge
        .checkpoint()
        .context("a model opened for its weights has none")?;
    let export = bridge.export(source, &ExportOptions::default())?;
    let comparison = verify(
        export.plan(),
        &export,
        &reference.as_written(),
        &VerifyOptions::default(),
    )?;
    Ok(comparison.lacking(&export.plan().left_out, Side::Source))
}
