//! `trainer convert export`: a `torch_dist` directory to Hugging Face.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use anyhow::Context;
use bridge_core::checkpoint::torch_dist::TorchDistCheckpoint;
use bridge_core::convert::ExecuteOptions;
use bridge_core::models::ExpertLayout;
use bridge_core::{Export, ExportOptions, Missing};
use bytesize::ByteSize;

use super::quantised;
use super::writing::{WriteArgs, report_rounding, say_done, say_what_is_left};
use crate::commands::interrupt::Interrupt;
use crate::commands::model::{self, HubArgs, Weights};

/// Make a Hugging Face model of a Megatron-Core checkpoint directory.
///
/// The directory (torch_dist) may come from Megatron-Core, Megatron-LM or Megatron Bridge, at any parallel layout, with an
/// optimizer's state in it or not. Sharding, dtypes, expert layout, tokenizer and configs are those of the reference; a
/// reference without weights gives new files in its config's dtype.
///
/// Example: trainer convert export --hf-model Qwen3.5-9B/ --megatron-path run/ --hf-path Qwen3.5-9B-tuned/
#[derive(Debug, clap::Args)]
pub(crate) struct ExportArgs {
    /// The reference: the directory or Hub id of the model that the training began with.
    #[arg(long, value_name = "MODEL")]
    hf_model: PathBuf,
    #[command(flatten)]
    hub: HubArgs,
    /// The directory of a run (its newest iteration is read) or of an iteration.
    #[arg(long, value_name = "DIR")]
    megatron_path: PathBuf,
    /// The directory to make.
    #[arg(long, value_name = "DIR")]
    hf_path: PathBuf,
    /// What to do about tensors of the reference that the directory lacks (an MTP head that was left out); an error without
    /// it.
    #[arg(long, value_enum, value_name = "WHAT")]
    missing: Option<WhatIsMissing>,
    /// How experts are stored, those of the MTP head too; without it as the reference stores them.
    #[arg(long, value_enum, value_name = "LAYOUT")]
    expert_layout: Option<Experts>,
    /// Leave out tensors that the reference does not know, and take a directory whose run_config.yaml contradicts the
    /// reference.
    #[arg(long)]
    not_strict: bool,
    #[command(flatten)]
    write: WriteArgs,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum WhatIsMissing {
    /// Take them from the reference.
    Copy,
    /// Leave them out.
    Skip,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Experts {
    /// One tensor for all experts of a layer, as Qwen3.6 stores them.
    Packed,
    /// One tensor an expert.
    PerExpert,
}

pub(crate) fn run(args: &ExportArgs) -> anyhow::Result<ExitCode> {
    let started = Instant::now();
    let bridge = model::open(
        &args.hf_model,
        Weights::OfReference,
        &args.write.lookup(&args.hub),
    )?;
    let source = TorchDistCheckpoint::open(&args.megatron_path)?;
    let options = ExportOptions {
        dtype: args.write.torch_dtype,
        expert_layout: args.expert_layout.map(|layout| match layout {
            Experts::Packed => ExpertLayout::Packed,
            Experts::PerExpert => ExpertLayout::PerExpert,
        }),
        without_mtp: args.write.no_mtp,
        missing: match args.missing {
            None => Missing::Refuse,
            Some(WhatIsMissing::Copy) => Missing::Copy,
            Some(WhatIsMissing::Skip) => Missing::Skip,
        },
        not_strict: args.not_strict,
    };
    let export = bridge.export(&source, &options)?;
    say_plan(&export, args);
    if let Some(reference) = bridge.checkpoint() {
        quantised::report_export(reference, args.write.torch_dtype);
    }
    write(&export, args, started).inspect_err(|_| say_what_is_left(&args.hf_path))
}

/// Says what is going to be written, and what is not as in the directory.
fn say_plan(export: &Export<'_>, args: &ExportArgs) {
    let plan = export.plan();
    tracing::info!(
        "{} tensors, {}, to {}",
        plan.tensors.len(),
        ByteSize(plan.num_bytes()),
        args.hf_path.display()
    );
    let lists = [
        (
            export.copied(),
            "that the directory lacks are the reference's",
        ),
        (plan.left_out.as_slice(), "of the reference are left out"),
        (
            export.unknown(),
            "that the reference does not know are left out",
        ),
    ];
    for (names, what) in lists {
        if let Some(first) = names.first() {
            tracing::warn!("{} tensors {what}, first `{first}`", names.len());
        }
    }
    if !export.is_whole() {
        tracing::warn!(
            "what is written lacks tensors that its config.json describes, and loads nowhere without them"
        );
    }
    if export.changes_config() {
        tracing::info!("config.json is changed to what is written");
    }
}

fn write(export: &Export<'_>, args: &ExportArgs, started: Instant) -> anyhow::Result<ExitCode> {
    let interrupt = Interrupt::listen()?;
    let writer = export.create(&args.hf_path, &args.write.staging())?;
    let done = args
        .write
        .fill(&interrupt, &writer, |sink| {
            export.write(sink, &ExecuteOptions::default())
        })
        .with_context(|| format!("write {}", args.hf_path.display()))?;
    let output = writer.finish()?;
    report_rounding(&done.rounded);
    say_done(&output, &done, started);
    args.write.record(&output)?;
    Ok(ExitCode::SUCCESS)
}
