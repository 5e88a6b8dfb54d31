//! `trainer convert shard`: Write one rank's parameters.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context;
use bridge_core::checkpoint::Overwrite;
use bridge_core::checkpoint::shard::{ShardInfo, ShardWriter};
use bridge_core::convert::{ExecuteOptions, execute};
use bridge_core::plan::Stage;
use bytesize::ByteSize;

use super::quantised;
use super::writing::{record, report_rounding};
use crate::commands::interrupt::Interrupt;
use crate::commands::layout_args::{LayoutArgs, RankArgs};
use crate::commands::model::{self, HubArgs, Weights};

/// Write one rank's parameters under their local Megatron names.
///
/// The file's metadata says which model, layout and rank it belongs to; `trainer convert unshard` makes a Hugging Face
/// directory of a full set. Only the bytes that the rank needs are read.
///
/// Example: trainer convert shard --hf-model Qwen3.5-9B/ --tp 2 --pp 2 --rank 3 --output rank3.safetensors
#[derive(Debug, clap::Args)]
pub(crate) struct ShardArgs {
    /// The model directory to read, or a Hub id.
    #[arg(long, value_name = "MODEL")]
    hf_model: PathBuf,
    #[command(flatten)]
    hub: HubArgs,
    /// The file to make.
    #[arg(long, value_name = "FILE")]
    output: PathBuf,
    /// Replace what is at the output.
    #[arg(long)]
    overwrite: bool,
    /// Write the SHA-256 of every file and tensor to checksums.json, against which `trainer verify` holds the output later.
    #[arg(long)]
    checksum: bool,
    #[command(flatten)]
    layout: LayoutArgs,
    #[command(flatten)]
    rank: RankArgs,
}

pub(crate) fn run(args: &ShardArgs) -> anyhow::Result<ExitCode> {
    let bridge = model::open(
        &args.hf_model,
        Weights::NeededFor("a shard"),
        &args.hub.lookup(false),
    )?;
    let source = bridge
        .checkpoint()
        .context("a model opened for its weights has none")?;
    let spec = args.layout.spec();
    let (options, layout) = bridge.lay_out(&spec)?;
    let (rank, chunk) = args.rank.of(&layout)?;
    let plan = bridge
        .planner(&options)?
        .plan(&Stage::new(&layout, rank, chunk))?;
    let shard = ShardInfo {
        architecture: bridge.config().architecture.hf_name().to_owned(),
        padded_vocab_size: layout.padded_vocab_size(),
        spec,
        rank,
        vp_stage: chunk.vp_stage,
    };
    let (tensors, bytes) = (plan.tensors.len(), ByteSize(plan.num_bytes()));
    tracing::info!(
        "rank {} of {}: {tensors} tensors, {bytes}, to {}",
        rank.global_rank,
        layout.world_size(),
        args.output.display()
    );
    let overwrite = Overwrite::from(args.overwrite);
    let interrupt = Interrupt::listen()?;
    let writer = ShardWriter::create(&shard, &plan.targets(), &args.output, overwrite)?;
    let done = execute(
        &plan,
        source,
        &interrupt.sink(&writer),
        &ExecuteOptions::default(),
    )
    .with_context(|| format!("write {}", args.output.display()))?;
    let output = writer.finish()?;
    report_rounding(&done.rounded);
    quantised::report_import(source, &plan);
    tracing::info!(
        "wrote {} in {:.1} s",
        output.display(),
        done.elapsed.as_secs_f64()
    );
    record(args.checksum, &output)?;
    Ok(ExitCode::SUCCESS)
}
