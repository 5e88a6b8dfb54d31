//! `trainer finetune`: Fine-tune a checkpoint on chat data with images and video.

use std::process::ExitCode;

/// Fine-tune a checkpoint on chat data with images and video.
#[derive(Debug, clap::Args)]
pub(crate) struct FinetuneArgs {}

pub(crate) fn run(_args: &FinetuneArgs) -> anyhow::Result<ExitCode> {
    anyhow::bail!("`trainer finetune` is not built yet")
}
