//! `trainer diff`: Measure how far two checkpoints are apart.

mod measure;
mod print;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context;

use self::measure::measure;
use super::checkpoint::Checkpoint;
use crate::report::{self, Labels};

/// Measure how far two checkpoints of one model are apart, tensor by tensor.
///
/// For each tensor ||b - a|| / ||a||, the largest difference of a value and the cosine of the angle between both, in
/// float64; and the same for each layer. A and B are Hugging Face directories or torch_dist directories. Exit code 0:
/// nothing differs; 1: something does.
///
/// Example: trainer diff Qwen3.5-9B/ tuned/ --plot diff.svg
#[derive(Debug, clap::Args)]
pub(crate) struct DiffArgs {
    /// The checkpoint to measure from, or the Hub id of one.
    a: PathBuf,
    /// The other one.
    b: PathBuf,
    /// Draw the relative norm of each layer.
    #[arg(long, value_name = "FILE.svg", value_parser = svg)]
    plot: Option<PathBuf>,
    /// Tensors in the table, those furthest apart first; `--json` has all.
    #[arg(long, value_name = "N", default_value_t = 20)]
    limit: usize,
    /// The model, its config file or Hub id, by which the tensors of two torch_dist directories are told apart by layer.
    #[arg(long, value_name = "MODEL")]
    hf_model: Option<PathBuf>,
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
}

fn svg(path: &str) -> Result<PathBuf, String> {
    let path = PathBuf::from(path);
    match path.extension() {
        Some(extension) if extension == "svg" => Ok(path),
        _ => Err("a plot is an SVG file; choose a name that ends in .svg".to_owned()),
    }
}

pub(crate) fn run(args: &DiffArgs) -> anyhow::Result<ExitCode> {
    let open = |path: &PathBuf| {
        Checkpoint::open(path)
            .and_then(Checkpoint::dequantised)
            .with_context(|| format!("open {} to compare it", path.display()))
    };
    let (a, b) = (open(&args.a)?, open(&args.b)?);
    let measured = measure(&a, &b, args.hf_model.as_deref())?;
    if let Some(path) = &args.plot {
        let labels = Labels {
            title: "Relative norm of the difference by layer",
            x: "layer",
            y: "||b - a|| / ||a||",
        };
        report::line_plot(path, &labels, &measured.series())
            .with_context(|| format!("draw {}", path.display()))?;
    }
    if args.json {
        print::json(&a, &b, &measured)?;
    } else {
        print::text(&a, &b, &measured, args.limit)?;
    }
    Ok(if measured.is_equal() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}
