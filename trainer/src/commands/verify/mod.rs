//! `trainer verify`: Compare two checkpoints tensor by tensor.

mod compare;
mod print;
mod recorded;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::Context;
use bridge_core::Dtype;
use bridge_core::convert::{Comparison, Side};

use self::compare::compare;
use super::checkpoint::Checkpoint;

/// Compare two checkpoints tensor by tensor, by value and dtype, or one with the checksums that were recorded of it.
///
/// Each of A and B is a Hugging Face directory, a torch_dist directory or a rank's file; tensors of different kinds are
/// compared through the mapping, bit for bit. Without B, every file and tensor of A is held against its checksums.json,
/// which `--checksum` of the conversions and `trainer inspect --checksum --record` write. Exit code 0: nothing differs;
/// 1: something does.
///
/// Example: trainer verify Qwen3.5-9B/ megatron/ --torch-dtype bfloat16
#[derive(Debug, clap::Args)]
pub(crate) struct VerifyArgs {
    /// One checkpoint, or the Hub id of one.
    a: PathBuf,
    /// The other one.
    b: Option<PathBuf>,
    /// Compare every tensor in this dtype; without it dtypes must agree, tensor by tensor.
    #[arg(long, requires = "b", value_name = "DTYPE", value_parser = super::init::parse_dtype)]
    torch_dtype: Option<Dtype>,
    /// Leave the multi-token-prediction head out, where a torch_dist directory was saved without it.
    #[arg(long, requires = "b")]
    no_mtp: bool,
    /// The model, its config file or Hub id, where neither A nor B is a Hugging Face directory but the mapping is needed: a
    /// torch_dist directory against a shard, or two torch_dist directories whose keys differ in style.
    #[arg(long, requires = "b", value_name = "MODEL")]
    hf_model: Option<PathBuf>,
    /// Print one JSON object, with every difference.
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(args: &VerifyArgs) -> anyhow::Result<ExitCode> {
    let equal = match &args.b {
        Some(b) => two(args, b)?,
        None => recorded::run(&args.a, args.json)?,
    };
    Ok(if equal {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

/// Compares both and prints what differs; whether nothing does.
fn two(args: &VerifyArgs, b: &Path) -> anyhow::Result<bool> {
    let open = |path: &Path| {
        Checkpoint::open(path).with_context(|| format!("open {} to compare it", path.display()))
    };
    let (a, b) = (open(&args.a)?, open(b)?);
    let outcome = compare(&a, &b, args)?;
    if args.json {
        print::json(&a, &b, &outcome)?;
    } else {
        print::text(&a, &b, &outcome)?;
    }
    Ok(outcome.is_equal())
}

/// Prints what a comparison found; `a` is the side that is called A.
pub(crate) fn print_differences(comparison: &Comparison, a: Side) -> anyhow::Result<()> {
    print::comparison_alone(comparison, a)
}
