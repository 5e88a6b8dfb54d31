//! `trainer finetune`: Fine-tune a checkpoint on chat data with images and video.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, bail};
use clap::ArgAction;
use serde_json::{Value, json};

use crate::hub::{self, Lookup, Wanted};
use crate::report;
use crate::train::checkpoint::Checkpoint;
use crate::train::config::{Origin, Override, Resolved, resolve, setting};
use crate::train::{Outcome, RunOptions};

/// Fine-tune a checkpoint on chat data with images and video.
///
/// Example: `trainer finetune --model Qwen3.5-0.8B --data train.jsonl --output out learning_rate=1e-5 epochs=2`
///
/// Every key of a run can be given as key=value, or in a TOML or YAML file with --config; `--print-config` lists all of them
/// with their values and where each came from. OUTPUT ends as a Hugging Face checkpoint, with metrics, plot and TensorBoard
/// events in OUTPUT/run. Ctrl-C (or SIGTERM) finishes the step and saves; SIGUSR1 saves and goes on.
#[derive(Debug, clap::Args)]
pub(crate) struct FinetuneArgs {
    /// Hugging Face directory or Hub id to start from.
    #[arg(long, value_name = "MODEL")]
    model: Option<PathBuf>,
    /// Training data, JSONL or JSON.
    #[arg(long, value_name = "FILE")]
    data: Option<PathBuf>,
    /// Where the run and the trained checkpoint go.
    #[arg(long, value_name = "DIR")]
    output: Option<PathBuf>,
    /// Configuration, TOML or YAML; the command line wins over it.
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Parts that do not train: vision, projector, language, mtp.
    #[arg(long, value_name = "PARTS")]
    freeze: Option<String>,
    /// Optimizer steps; replaces the epochs.
    #[arg(long, value_name = "N")]
    max_steps: Option<u64>,
    /// Passes over the data.
    #[arg(long, value_name = "N")]
    epochs: Option<f64>,
    /// Seed of every random stream.
    #[arg(long, value_name = "N")]
    seed: Option<u64>,
    /// auto, float32 or bfloat16.
    #[arg(long)]
    dtype: Option<String>,
    /// auto, cpu, cuda or cuda:N.
    #[arg(long)]
    device: Option<String>,
    /// auto, cuda or reference, with exceptions as auto,gdn=reference: what computes the ops (see `trainer info`).
    #[arg(long, value_name = "POLICY")]
    kernels: Option<String>,
    /// Go on from the newest checkpoint of OUTPUT, or from this one.
    #[arg(long, value_name = "CHECKPOINT", num_args = 0..=1, require_equals = true, conflicts_with = "overwrite")]
    #[expect(
        clippy::option_option,
        reason = "absent, without a value, with a value"
    )]
    resume: Option<Option<PathBuf>>,
    /// Replace the run or model that OUTPUT holds.
    #[arg(long)]
    overwrite: bool,
    /// Show the merged configuration with each value's origin, and stop.
    #[arg(long)]
    print_config: bool,
    /// End with one JSON object on stdout, also on failure.
    #[arg(long, action = ArgAction::SetTrue)]
    json: bool,
    /// Settings, such as learning_rate=1e-5 or kernels.policy=reference.
    #[arg(value_name = "KEY=VALUE")]
    settings: Vec<String>,
}

pub(crate) fn run(args: &FinetuneArgs) -> anyhow::Result<ExitCode> {
    let mut overrides = flags(args);
    for typed in &args.settings {
        overrides.push(Override::parse(typed)?);
    }
    let resume = checkpoint_to_resume(args, &overrides)?;
    let saved = resume.as_deref().map(Checkpoint::open).transpose()?;
    if let (Some(dir), true) = (
        resume.as_deref().and_then(Path::parent),
        args.output.is_none(),
    ) {
        let output = Value::from(dir.to_string_lossy());
        overrides.push(Override::flag(
            "output",
            output,
            format!("--resume={}", dir.display()),
        ));
    }
    let base = saved
        .as_ref()
        .map(|saved| (&saved.state.config, Origin::Checkpoint(saved.dir.clone())));
    let mut resolved = resolve(base, args.config.as_deref(), &overrides)?;
    if args.print_config {
        report::out().write_all(resolved.to_toml().as_bytes())?;
        return Ok(ExitCode::SUCCESS);
    }
    // What the run records is the snapshot's path, which says the commit and never changes.
    let model = hub::local(&resolved.config.model, Wanted::Model, &Lookup::default())?;
    resolved.config.model = model.into_owned();
    make_absolute(&mut resolved)?;
    let options = RunOptions {
        resume,
        overwrite: args.overwrite,
    };
    let outcome = crate::train::run(&resolved, &options)
        .with_context(|| format!("fine-tune {}", resolved.config.model.display()))?;
    conclude(&outcome, args.json)?;
    Ok(if outcome.interrupted {
        ExitCode::from(130)
    } else {
        ExitCode::SUCCESS
    })
}

fn flags(args: &FinetuneArgs) -> Vec<Override> {
    let path = |path: &PathBuf| Value::from(path.to_string_lossy());
    let text = |text: &String| Value::from(text.as_str());
    let given = [
        ("model", "--model", args.model.as_ref().map(path)),
        ("data", "--data", args.data.as_ref().map(path)),
        ("output", "--output", args.output.as_ref().map(path)),
        ("freeze", "--freeze", args.freeze.as_ref().map(text)),
        ("max_steps", "--max-steps", args.max_steps.map(Value::from)),
        ("num_train_epochs", "--epochs", args.epochs.map(Value::from)),
        ("seed", "--seed", args.seed.map(Value::from)),
        ("dtype", "--dtype", args.dtype.as_ref().map(text)),
        ("device", "--device", args.device.as_ref().map(text)),
        (
            "kernels.policy",
            "--kernels",
            args.kernels.as_ref().map(text),
        ),
    ];
    given
        .into_iter()
        .filter_map(|(key, flag, value)| {
            let value = value?;
            Some(Override::flag(key, value, flag.to_owned()))
        })
        .collect()
}

/// The checkpoint that `--resume` means: the one it names, or the newest of the output directory.
fn checkpoint_to_resume(
    args: &FinetuneArgs,
    overrides: &[Override],
) -> anyhow::Result<Option<PathBuf>> {
    let Some(asked) = &args.resume else {
        return Ok(None);
    };
    if let Some(dir) = asked {
        return Ok(Some(std::path::absolute(dir)?));
    }
    let output = setting("output", args.config.as_deref(), overrides)?;
    let Some(output) = output.as_ref().and_then(Value::as_str) else {
        bail!("--resume needs --output, the directory of the run, or --resume=CHECKPOINT");
    };
    let output = std::path::absolute(output)?;
    match crate::train::checkpoints(&output)?.pop() {
        Some((_, dir)) => Ok(Some(dir)),
        None => bail!(
            "{} holds no checkpoint to resume from; start without --resume",
            output.display()
        ),
    }
}

/// Paths that mean the same from any directory, since a run is resumed from anywhere.
fn make_absolute(resolved: &mut Resolved) -> std::io::Result<()> {
    let config = &mut resolved.config;
    for path in [&mut config.model, &mut config.data, &mut config.output]
        .into_iter()
        .chain(config.eval_data.as_mut())
        .chain(config.media_root.as_mut())
    {
        *path = std::path::absolute(&*path)?;
    }
    Ok(())
}

fn conclude(outcome: &Outcome, as_json: bool) -> anyhow::Result<()> {
    if as_json {
        report::json_line(&json!({
            "schema_version": 1,
            "status": if outcome.interrupted { "interrupted" } else { "done" },
            "steps": outcome.steps,
            "final_loss": outcome.final_loss,
            "eval_loss": outcome.evaluation.map(|evaluation| evaluation.loss),
            "output": outcome.output,
            "plot": outcome.plot,
            "checkpoint": outcome.checkpoint,
        }))?;
        return Ok(());
    }
    let mut out = report::out();
    if let Some(loss) = outcome.final_loss {
        writeln!(
            out,
            "final loss {loss:.4} (mean of the last 8 recorded steps)"
        )?;
    }
    if let Some(evaluation) = &outcome.evaluation {
        writeln!(out, "eval loss  {:.4}", evaluation.loss)?;
    }
    if let Some(plot) = &outcome.plot {
        writeln!(out, "plot       {}", plot.display())?;
    }
    if let Some(checkpoint) = &outcome.checkpoint {
        writeln!(out, "checkpoint {}", checkpoint.display())?;
    }
    if !outcome.interrupted {
        writeln!(out, "model      {}", outcome.output.display())?;
    }
    Ok(())
}
