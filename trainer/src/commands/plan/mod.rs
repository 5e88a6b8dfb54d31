//! `trainer plan`: Show what each rank of a layout holds.

mod json;
mod load;
mod memory;
mod tables;

use std::path::PathBuf;
use std::process::ExitCode;

use bridge_core::layout::RankCoord;

use self::load::Loads;
use self::memory::TrainingArgs;
use super::layout_args::LayoutArgs;
use super::model::{self, Weights};
use crate::hub::Lookup;

/// Show what each rank of a layout holds, before anything is written.
///
/// Parameters, bytes and layers of every rank, the files that it reads, and an estimate of its memory in training, with
/// the formula. A config file alone will do, for a model of any size.
///
/// Example: trainer plan Qwen3.5-27B/ --tp 4 --pp 2 --micro-batch-size 1 --seq-length 8192
#[derive(Debug, clap::Args)]
pub(crate) struct PlanArgs {
    /// A model directory, a config file of any name, or a Hub id, of which config.json alone is downloaded.
    model: PathBuf,
    /// Print one JSON object, with every tensor of every rank.
    #[arg(long)]
    json: bool,
    /// Only this global rank, in Megatron's order tp-cp-ep-dp-pp.
    #[arg(long, value_name = "G")]
    rank: Option<usize>,
    #[command(flatten)]
    layout: LayoutArgs,
    #[command(flatten)]
    training: TrainingArgs,
}

pub(crate) fn run(args: &PlanArgs) -> anyhow::Result<ExitCode> {
    let bridge = model::open(&args.model, Weights::IfPresent, &Lookup::default())?;
    let (options, layout) = bridge.lay_out(&args.layout.spec())?;
    let only = args.rank.map(|rank| layout.coord(rank)).transpose()?;
    let planner = bridge.planner(&options)?;
    let total = planner.model_size()?;
    let mut loads = Loads::new(&bridge, planner, &layout);
    if args.json {
        let ranks: Box<dyn Iterator<Item = RankCoord>> = match only {
            Some(rank) => Box::new(std::iter::once(rank)),
            None => Box::new(layout.ranks()),
        };
        json::write(total, ranks, &mut loads)?;
    } else {
        let table = tables::Tables {
            config: bridge.config(),
            layout: &layout,
            training: &args.training,
        };
        table.write(total, only, &mut loads)?;
    }
    Ok(ExitCode::SUCCESS)
}
