//! The tables that people read.

use std::io::Write;
use std::ops::Range;

use bridge_core::config::HfConfig;
use bridge_core::layout::{ParallelLayout, RankCoord};
use bytesize::ByteSize;

use super::load::{Load, Loads};
use super::memory::{FORMULA, Memory, TrainingArgs};
use crate::report::{self, grouped, table};

pub(super) struct Tables<'a> {
    pub(super) config: &'a HfConfig,
    pub(super) layout: &'a ParallelLayout,
    pub(super) training: &'a TrainingArgs,
}

/// Neighbouring ranks with the same numbers.
struct Line {
    ranks: Range<usize>,
    pp_rank: usize,
    load: Load,
}

impl Tables<'_> {
    pub(super) fn write(
        &self,
        (parameters, bytes): (u64, u64),
        only: Option<RankCoord>,
        loads: &mut Loads<'_>,
    ) -> anyhow::Result<()> {
        let layout = self.layout;
        let lines = lines(layout, only, loads)?;
        let mut out = report::out();
        writeln!(
            out,
            "{}: {} parameters, {}",
            self.config.architecture.hf_name(),
            number(parameters),
            ByteSize(bytes)
        )?;
        writeln!(
            out,
            "{} ranks: TP {} x CP {} x DP {} x PP {}; experts ETP {} x EP {} x EDP {} x PP {}; {} rows of vocabulary\n",
            layout.world_size(),
            layout.tp_size(),
            layout.cp_size(),
            layout.dp_size(),
            layout.pp_size(),
            layout.etp_size(),
            layout.ep_size(),
            layout.edp_size(),
            layout.pp_size(),
            number(layout.padded_vocab_size() as u64),
        )?;
        writeln!(out, "{}", layout.table())?;
        self.write_held(&mut out, &lines, loads.num_files())?;
        self.write_memory(&mut out, &lines)?;
        writeln!(out, "{FORMULA}")?;
        out.flush()?;
        Ok(())
    }

    fn write_held(
        &self,
        out: &mut impl Write,
        lines: &[Line],
        num_files: usize,
    ) -> anyhow::Result<()> {
        let reads = lines.iter().any(|line| line.load.reads.is_some());
        let mut header = vec!["rank", "layers", "parameters", "size"];
        if reads {
            header.extend(["files read", "bytes read"]);
        }
        let mut held = table(&header, &[2, 3, 4, 5]);
        for line in lines {
            let load = &line.load;
            let mut cells = vec![
                numbers(&line.ranks),
                self.layers(line.pp_rank),
                number(load.parameters()),
                ByteSize(load.bytes).to_string(),
            ];
            if let Some((files, bytes)) = load.reads {
                cells.extend([files.to_string(), ByteSize(bytes).to_string()]);
            }
            held.add_row(cells);
        }
        if lines.iter().map(|line| line.ranks.len()).sum::<usize>() > 1 {
            let sum = |of: fn(&Load) -> u64| -> u64 {
                let each = lines.iter();
                each.map(|line| line.ranks.len() as u64 * of(&line.load))
                    .sum()
            };
            let mut cells = vec![
                "all".to_owned(),
                String::new(),
                number(sum(Load::parameters)),
                ByteSize(sum(|load| load.bytes)).to_string(),
            ];
            if reads {
                let bytes = sum(|load| load.reads.map_or(0, |(_, bytes)| bytes));
                cells.extend([num_files.to_string(), ByteSize(bytes).to_string()]);
            }
            held.add_row(cells);
        }
        writeln!(out, "{held}\n")?;
        Ok(())
    }

    fn write_memory(&self, out: &mut impl Write, lines: &[Line]) -> anyhow::Result<()> {
        let header = [
            "rank",
            "weights",
            "gradients",
            "optimizer",
            "activations",
            "in training",
        ];
        let mut memory = table(&header, &[1, 2, 3, 4, 5]);
        for line in lines {
            let (dense, experts) = (line.load.dense, line.load.experts);
            let needed = Memory::estimate(
                self.config,
                self.layout,
                self.training,
                line.pp_rank,
                (dense, experts),
            );
            let sizes = [
                needed.weights,
                needed.gradients,
                needed.optimizer,
                needed.activations,
                needed.total(),
            ];
            let sizes = sizes.map(|bytes| ByteSize(bytes).to_string());
            memory.add_row(std::iter::once(numbers(&line.ranks)).chain(sizes));
        }
        writeln!(out, "{memory}\n")?;
        Ok(())
    }

    /// The decoder layers of a pipeline rank, one run a virtual stage.
    fn layers(&self, pp_rank: usize) -> String {
        let chunks = self.layout.chunks_of(pp_rank);
        let runs = chunks.filter(|chunk| !chunk.layers.is_empty());
        let runs: Vec<String> = runs.map(|chunk| numbers(&chunk.layers)).collect();
        runs.join(", ")
    }
}

/// The ranks of `only`, or all, with their numbers; those that follow each other and are equal in one line.
fn lines(
    layout: &ParallelLayout,
    only: Option<RankCoord>,
    loads: &mut Loads<'_>,
) -> anyhow::Result<Vec<Line>> {
    let line = |rank: RankCoord, count: usize, load| Line {
        ranks: rank.global_rank..rank.global_rank + count,
        pp_rank: rank.pp_rank,
        load,
    };
    if let Some(rank) = only {
        return Ok(vec![line(rank, 1, loads.of(rank)?)]);
    }
    let stage_ranks = layout.world_size() / layout.pp_size();
    let distinct: Vec<RankCoord> = layout.distinct_ranks().collect();
    let mut lines: Vec<Line> = Vec::new();
    for stage in distinct.chunks(distinct.len() / layout.pp_size()) {
        let counted = stage.iter().map(|rank| loads.of(*rank));
        let counted = counted.collect::<Result<Vec<Load>, _>>()?;
        // The pattern repeats with the data-parallel ranks, of which there may be any number.
        if counted.iter().all(|load| *load == counted[0]) {
            lines.push(line(stage[0], stage_ranks, counted[0]));
            continue;
        }
        let first = stage[0].global_rank;
        for global_rank in first..first + stage_ranks {
            let load = counted[(global_rank - first) % counted.len()];
            match lines.last_mut() {
                Some(last) if last.pp_rank == stage[0].pp_rank && last.load == load => {
                    last.ranks.end += 1;
                }
                _ => lines.push(line(layout.coord(global_rank)?, 1, load)),
            }
        }
    }
    Ok(lines)
}

/// `4` or `0-7`.
fn numbers(range: &Range<usize>) -> String {
    match range.len() {
        1 => range.start.to_string(),
        _ => format!("{}-{}", range.start, range.end - 1),
    }
}

fn number(value: u64) -> String {
    grouped(usize::try_from(value).unwrap_or(usize::MAX))
}
