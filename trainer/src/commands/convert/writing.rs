//! What import and export share: how a directory is written, and what is said about it.

use std::path::Path;
use std::time::Instant;

use anyhow::Context;
use bridge_core::checkpoint::{FileSink, ReadBack, Resume, Staging, partial_path};
use bridge_core::convert::{Report, Rounded};
use bridge_core::{BridgeError, Dtype};
use bytesize::ByteSize;

use crate::commands::checksums;
use crate::commands::interrupt::Interrupt;
use crate::commands::model::HubArgs;
use crate::hub::Lookup;
use crate::report::Transfer;

/// How the output is written.
#[derive(Debug, Clone, clap::Args)]
#[command(next_help_heading = "Output")]
pub(crate) struct WriteArgs {
    /// bfloat16, float16 or float32 for every tensor; without it each keeps its own (Megatron Bridge's default is bfloat16).
    #[arg(long, visible_alias = "export-weight-dtype", value_name = "DTYPE", value_parser = crate::commands::init::parse_dtype)]
    pub(crate) torch_dtype: Option<Dtype>,
    /// Leave the multi-token-prediction head out.
    #[arg(long)]
    pub(crate) no_mtp: bool,
    /// Replace what is at the output, in one step when everything is written.
    #[arg(long)]
    overwrite: bool,
    /// Go on behind the files that an interrupted run of the same command finished, after checking them.
    #[arg(long)]
    resume: bool,
    /// Do not read back what was written.
    #[arg(long)]
    no_verify: bool,
    /// Write the SHA-256 of every file and tensor to checksums.json, against which `trainer verify` holds the output later.
    #[arg(long)]
    checksum: bool,
    /// Show no progress.
    #[arg(long)]
    no_progress: bool,
}

impl WriteArgs {
    /// How the model is looked up.
    pub(crate) fn lookup<'a>(&self, hub: &'a HubArgs) -> Lookup<'a> {
        hub.lookup(self.no_progress)
    }

    pub(crate) fn staging(&self) -> Staging {
        Staging {
            overwrite: self.overwrite.into(),
            resume: if self.resume { Resume::Yes } else { Resume::No },
            read_back: if self.no_verify {
                ReadBack::No
            } else {
                ReadBack::Yes
            },
            job: None,
        }
    }

    /// Writes the checksums of what was written, where that was asked for.
    pub(crate) fn record(&self, output: &Path) -> anyhow::Result<()> {
        record(self.checksum, output)
    }

    /// Fills the files of `writer` with `write`, under the eyes of the user and until Ctrl-C.
    pub(crate) fn fill<W: FileSink>(
        &self,
        interrupt: &Interrupt,
        writer: &W,
        write: impl FnOnce(&dyn FileSink) -> Result<Report, BridgeError>,
    ) -> Result<Report, BridgeError> {
        let files = 0..writer.num_files();
        let (left, done): (Vec<usize>, Vec<usize>) =
            files.partition(|file| !writer.unwritten(*file).is_empty());
        if self.resume {
            tracing::info!(
                "{} of {} files are there already",
                done.len(),
                writer.num_files()
            );
        }
        let total = left.iter().map(|file| writer.file_bytes(*file)).sum();
        let transfer = Transfer::start(total, !self.no_progress, "written");
        write(&interrupt.sink(writer).showing(&transfer))
    }
}

/// Writes the checksums of a finished output, or takes away those of what it replaced.
pub(crate) fn record(asked: bool, output: &Path) -> anyhow::Result<()> {
    if !asked {
        return checksums::forget(output);
    }
    let record = checksums::record(output).context("record checksums")?;
    tracing::info!("wrote {}", record.display());
    Ok(())
}

/// Says where a conversion that failed left finished files.
pub(crate) fn say_what_is_left(target: &Path) {
    let partial = partial_path(target);
    if partial.is_dir() {
        tracing::warn!(
            "finished files are kept in {}; the same command with --resume goes on behind them",
            partial.display()
        );
    }
}

/// Says what was written, and how fast.
pub(crate) fn say_done(output: &Path, done: &Report, started: Instant) {
    let seconds = started.elapsed().as_secs_f64();
    #[expect(
        clippy::cast_precision_loss,
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "a rate for people"
    )]
    let rate = ByteSize((done.bytes as f64 / seconds.max(1e-9)) as u64);
    tracing::info!(
        "wrote {}: {} tensors, {} in {seconds:.1} s ({rate}/s)",
        output.display(),
        done.tensors,
        ByteSize(done.bytes),
    );
}

/// Warns about values that do not come back exactly.
pub(crate) fn report_rounding(rounded: &[Rounded]) {
    if let Some(first) = rounded.first() {
        let elements: usize = rounded.iter().map(|one| one.elements).sum();
        tracing::warn!(
            "{} tensors were rounded ({elements} values do not come back exactly), first `{}` by up to {:.1e}",
            rounded.len(),
            first.name,
            first.max_error
        );
    }
}
