//! `trainer convert import`: Hugging Face to a `torch_dist` directory.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use anyhow::Context;
use bridge_core::convert::ExecuteOptions;
use bridge_core::{Import, ImportOptions};
use bytesize::ByteSize;

use super::quantised;
use super::writing::{WriteArgs, report_rounding, say_done, say_what_is_left};
use crate::commands::interrupt::Interrupt;
use crate::commands::model::{self, HubArgs, Weights};

/// Make a Megatron-Core checkpoint directory of a Hugging Face model.
///
/// The directory (torch_dist) is written once and loads at any parallel layout, in Megatron-Core, Megatron-LM and Megatron
/// Bridge. Every tensor keeps its own dtype unless --torch-dtype says otherwise.
///
/// Example: trainer convert import --hf-model Qwen3.5-9B/ --megatron-path megatron/Qwen3.5-9B
#[derive(Debug, clap::Args)]
pub(crate) struct ImportArgs {
    /// The model directory to read, or a Hub id.
    #[arg(long, value_name = "MODEL")]
    hf_model: PathBuf,
    #[command(flatten)]
    hub: HubArgs,
    /// The directory to make.
    #[arg(long, value_name = "DIR")]
    megatron_path: PathBuf,
    /// Store norms in float32 that Megatron, which keeps them minus one, would round: the way back is exact then. A bfloat16
    /// model in Megatron-Core loads them (and rounds them).
    #[arg(long)]
    exact_norms: bool,
    /// Pad the vocabulary to a multiple of N; without it there is no padding.
    #[arg(long, value_name = "N")]
    make_vocab_size_divisible_by: Option<usize>,
    /// Leave out the empty states of Transformer Engine's modules, for loads with dist_ckpt_strictness log_all.
    #[arg(long)]
    no_extra_states: bool,
    #[command(flatten)]
    write: WriteArgs,
}

pub(crate) fn run(args: &ImportArgs) -> anyhow::Result<ExitCode> {
    let started = Instant::now();
    let bridge = model::open(
        &args.hf_model,
        Weights::NeededFor("an import"),
        &args.write.lookup(&args.hub),
    )?;
    let options = ImportOptions {
        dtype: args.write.torch_dtype,
        exact_norms: args.exact_norms,
        without_mtp: args.write.no_mtp,
        make_vocab_size_divisible_by: args.make_vocab_size_divisible_by,
        extra_states: !args.no_extra_states,
    };
    let import = bridge.import(&options)?;
    say_plan(&import, args);
    quantised::report_import(import.source(), import.plan());
    write(&import, args, started).inspect_err(|_| say_what_is_left(&args.megatron_path))
}

/// Says what is going to be written, and what will not come back.
fn say_plan(import: &Import<'_>, args: &ImportArgs) {
    let plan = import.plan();
    tracing::info!(
        "{} tensors, {}, to {}",
        plan.tensors.len(),
        ByteSize(plan.num_bytes()),
        args.megatron_path.display()
    );
    if let Some(first) = plan.left_out.first() {
        tracing::warn!(
            "{} tensors are left out, first `{first}`",
            plan.left_out.len()
        );
    }
    let rounded = import.rounded_norms();
    if let Some(first) = rounded.first() {
        let values: usize = rounded.iter().map(|norm| norm.elements).sum();
        let what = format!(
            "{} norms ({values} values) would be rounded where Megatron keeps them minus one, first `{}` by up to {:.1e}",
            rounded.len(),
            first.name,
            first.max_error
        );
        if args.exact_norms {
            tracing::info!("{what}; they are stored in float32");
        } else {
            tracing::warn!("{what}; --exact-norms stores them in float32");
        }
    }
}

fn write(import: &Import<'_>, args: &ImportArgs, started: Instant) -> anyhow::Result<ExitCode> {
    let interrupt = Interrupt::listen()?;
    let writer = import.create(&args.megatron_path, &args.write.staging())?;
    let done = args
        .write
        .fill(&interrupt, &writer, |sink| {
            import.write(sink, &ExecuteOptions::default())
        })
        .with_context(|| format!("write {}", args.megatron_path.display()))?;
    let output = writer.finish()?;
    if args.write.torch_dtype.is_some() {
        report_rounding(&done.rounded);
    }
    say_done(&output, &done, started);
    args.write.record(&output)?;
    Ok(ExitCode::SUCCESS)
}
