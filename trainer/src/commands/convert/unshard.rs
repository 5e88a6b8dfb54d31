//! `trainer convert unshard`: Make a Hugging Face directory of rank files.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::Context;
use bridge_core::checkpoint::hf::{HfCheckpoint, HfWriter};
use bridge_core::checkpoint::{Overwrite, TensorSink};
use bridge_core::convert::{ExecuteOptions, copy_tensors, execute};
use bridge_core::shards::ShardSet;
use bytesize::ByteSize;

use super::quantised;
use super::writing::record;
use crate::commands::interrupt::Interrupt;
use crate::commands::model::{self, HubArgs, Weights};

/// Make a Hugging Face directory of a full set of rank files.
///
/// Sharding, dtypes, expert layout, tokenizer and configs are those of the reference. Ranks that hold the same parameter
/// are compared. A rank that is missing, stands twice or comes from another layout is an error.
///
/// Example: trainer convert unshard shards/ --hf-model Qwen3.5-9B/ --hf-path out/
#[derive(Debug, clap::Args)]
pub(crate) struct UnshardArgs {
    /// The rank files, or directories of them.
    #[arg(required = true)]
    shards: Vec<PathBuf>,
    /// The directory or Hub id of the model that the shards were made from, or of one like it.
    #[arg(long, value_name = "MODEL")]
    hf_model: PathBuf,
    #[command(flatten)]
    hub: HubArgs,
    /// The directory to make.
    #[arg(long, value_name = "DIR")]
    hf_path: PathBuf,
    /// What to do about tensors of the reference that the shards lack (an MTP head that was left out); an error without it.
    #[arg(long, value_enum, value_name = "WHAT")]
    missing: Option<Missing>,
    /// Replace what is at the output.
    #[arg(long)]
    overwrite: bool,
    /// Write the SHA-256 of every file and tensor to checksums.json, against which `trainer verify` holds the output later.
    #[arg(long)]
    checksum: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Missing {
    /// Take them from the reference.
    Copy,
}

pub(crate) fn run(args: &UnshardArgs) -> anyhow::Result<ExitCode> {
    let bridge = model::open(
        &args.hf_model,
        Weights::NeededFor("a reference"),
        &args.hub.lookup(false),
    )?;
    let reference = bridge
        .checkpoint()
        .context("a model opened for its weights has none")?;
    let files = shard_files(&args.shards)?;
    let set = ShardSet::open(&files, &bridge)?;
    let plan = set.plan()?;
    let left_out = &plan.left_out;
    if let (Some(first), None) = (left_out.first(), args.missing) {
        anyhow::bail!(
            "the shards lack {} tensors of {}, first `{first}`; pass --missing copy to take them from there",
            left_out.len(),
            args.hf_model.display()
        );
    }
    tracing::info!(
        "{} files of {} ranks: {} tensors, {}, to {}",
        files.len(),
        set.layout().world_size(),
        plan.tensors.len(),
        ByteSize(plan.num_bytes()),
        args.hf_path.display()
    );
    quantised::report_export(reference, None);
    let compared = set.compare_replicas()?;
    let overwrite = Overwrite::from(args.overwrite);
    let interrupt = Interrupt::listen()?;
    let writer = HfWriter::like(reference, &args.hf_path, overwrite)?;
    let options = ExecuteOptions::default();
    let doing = || format!("write {}", args.hf_path.display());
    let sink = interrupt.sink(&writer);
    let done = execute(&plan, &set, &sink, &options).with_context(doing)?;
    copy_missing(left_out, reference, &sink, &options).with_context(doing)?;
    let output = writer.finish()?;
    tracing::info!(
        "wrote {} in {:.1} s; {compared} copies of parameters agree",
        output.display(),
        done.elapsed.as_secs_f64()
    );
    record(args.checksum, &output)?;
    Ok(ExitCode::SUCCESS)
}

fn copy_missing(
    left_out: &[String],
    reference: &HfCheckpoint,
    sink: &dyn TensorSink,
    options: &ExecuteOptions,
) -> anyhow::Result<()> {
    if left_out.is_empty() {
        return Ok(());
    }
    let bytes = copy_tensors(left_out, &reference.as_written(), sink, options)?;
    tracing::info!(
        "{} tensors ({}) that the shards lack are the reference's",
        left_out.len(),
        ByteSize(bytes)
    );
    Ok(())
}

/// The files as they are named; of a directory, all that end in `.safetensors` and are not hidden.
fn shard_files(paths: &[PathBuf]) -> anyhow::Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for path in paths {
        if !path.is_dir() {
            files.push(path.clone());
            continue;
        }
        let mut found = Vec::new();
        for entry in fs_err::read_dir(path)? {
            let file = entry?.path();
            if is_shard_name(&file) {
                found.push(file);
            }
        }
        if found.is_empty() {
            anyhow::bail!("{} holds no .safetensors files", path.display());
        }
        found.sort();
        files.append(&mut found);
    }
    Ok(files)
}

fn is_shard_name(file: &Path) -> bool {
    let hidden = file
        .file_name()
        .is_some_and(|name| name.as_encoded_bytes().starts_with(b"."));
    !hidden && file.extension() == Some(OsStr::new("safetensors"))
}
