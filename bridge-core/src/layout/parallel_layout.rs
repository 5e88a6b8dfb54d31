//! A layout that fits its model.

use std::fmt::Write as _;
use std::ops::Range;

use super::chunk::Chunk;
use super::error::{LayoutError, LayoutProblem};
use super::grid::{Grid, RankCoord};
use super::model_facts::{ModelFacts, indivisible};
use super::pipeline_layout::{LayerWord, PipelineLayout};
use super::sizes::ParallelSizes;
use super::split::{PipelineOptions, StageCounts};
use super::vocabulary;

/// Which rank holds what of one model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ParallelLayout {
    grid: Grid,
    vp_size: usize,
    chunks: Vec<Chunk>,
    num_experts: usize,
    padded_vocab_size: usize,
}

impl ParallelLayout {
    /// Checks sizes and options against a model.
    ///
    /// # Errors
    /// [`LayoutError`] with everything that does not fit, by parameter and numbers.
    pub fn new(
        sizes: &ParallelSizes,
        options: &PipelineOptions,
        facts: &ModelFacts,
    ) -> Result<Self, LayoutError> {
        let zeros = sizes.zeros();
        if !zeros.is_empty() {
            return Err(LayoutError { problems: zeros });
        }
        let mut problems = facts.indivisible(sizes);
        let mut keep = |problem: LayoutProblem| problems.push(problem);
        let vocabulary = vocabulary_rows(sizes, facts).map_err(&mut keep).ok();
        let stages = options.split(sizes, facts).map_err(&mut keep).ok();
        let grid = Grid::new(sizes).map_err(&mut keep).ok();
        match (vocabulary, stages, grid) {
            (Some(padded_vocab_size), Some(stages), Some(grid)) if problems.is_empty() => {
                Ok(Self {
                    chunks: chunks(&stages, sizes.pp_size, facts),
                    vp_size: stages.vp_size,
                    grid,
                    num_experts: facts.num_experts.unwrap_or(0),
                    padded_vocab_size,
                })
            }
            _ => Err(LayoutError { problems }),
        }
    }

    /// Tensor-parallel size.
    #[must_use]
    pub fn tp_size(&self) -> usize {
        self.grid.tp_size
    }

    /// Context-parallel size.
    #[must_use]
    pub fn cp_size(&self) -> usize {
        self.grid.cp_size
    }

    /// Data-parallel size of the dense parameters.
    #[must_use]
    pub fn dp_size(&self) -> usize {
        self.grid.dp_size
    }

    /// Pipeline size.
    #[must_use]
    pub fn pp_size(&self) -> usize {
        self.grid.pp_size
    }

    /// Virtual stages a pipeline rank; 1 without.
    #[must_use]
    pub fn vp_size(&self) -> usize {
        self.vp_size
    }

    /// Expert-parallel size.
    #[must_use]
    pub fn ep_size(&self) -> usize {
        self.grid.ep_size
    }

    /// Expert-tensor-parallel size.
    #[must_use]
    pub fn etp_size(&self) -> usize {
        self.grid.etp_size
    }

    /// Data-parallel size of the experts.
    #[must_use]
    pub fn edp_size(&self) -> usize {
        self.grid.edp_size
    }

    /// All ranks.
    #[must_use]
    pub fn world_size(&self) -> usize {
        self.grid.world_size()
    }

    /// Rows of the vocabulary, padding included, over all tensor-parallel ranks.
    #[must_use]
    pub fn padded_vocab_size(&self) -> usize {
        self.padded_vocab_size
    }

    /// Coordinates of a global rank.
    ///
    /// # Errors
    /// [`LayoutProblem::Rank`] when there is no such rank.
    pub fn coord(&self, global_rank: usize) -> Result<RankCoord, LayoutError> {
        let size = self.world_size();
        if global_rank >= size {
            return Err(LayoutProblem::Rank {
                what: "rank",
                rank: global_rank,
                size,
            }
            .into());
        }
        Ok(self.grid.coord(global_rank))
    }

    /// Every rank, in order.
    pub fn ranks(&self) -> impl ExactSizeIterator<Item = RankCoord> + '_ {
        (0..self.world_size()).map(|global_rank| self.grid.coord(global_rank))
    }

    /// The lowest rank with these coordinates; ranks that differ only in the others hold the same bytes.
    ///
    /// # Errors
    /// [`LayoutProblem::Rank`] when one is out of range, [`LayoutProblem::NoSuchRank`] when no rank has all of them.
    pub fn first_rank(
        &self,
        tp_rank: usize,
        pp_rank: usize,
        ep_rank: usize,
        etp_rank: usize,
    ) -> Result<RankCoord, LayoutError> {
        self.grid.first_rank((tp_rank, pp_rank, ep_rank, etp_rank))
    }

    /// One rank for each part of the model: the lowest of those that hold the same bytes. Other ranks differ from one of
    /// them in `cp_rank`, `dp_rank` and `edp_rank` only.
    pub fn distinct_ranks(&self) -> impl Iterator<Item = RankCoord> + '_ {
        let stage = self.world_size() / self.pp_size();
        let distinct = self.grid.distinct();
        (0..self.pp_size()).flat_map(move |pp_rank| {
            (0..distinct).map(move |within| self.grid.coord(pp_rank * stage + within))
        })
    }

    /// Every chunk in stage order: `vp_stage * PP + pp_rank`.
    #[must_use]
    pub fn chunks(&self) -> &[Chunk] {
        &self.chunks
    }

    /// The chunk of a virtual stage of a pipeline rank.
    ///
    /// # Errors
    /// [`LayoutProblem::Rank`] when there is no such rank or stage.
    pub fn chunk(&self, pp_rank: usize, vp_stage: usize) -> Result<&Chunk, LayoutError> {
        for (what, rank, size) in [
            ("pp_rank", pp_rank, self.pp_size()),
            ("vp_stage", vp_stage, self.vp_size),
        ] {
            if rank >= size {
                return Err(LayoutProblem::Rank { what, rank, size }.into());
            }
        }
        Ok(&self.chunks[vp_stage * self.pp_size() + pp_rank])
    }

    /// The chunks of a pipeline rank, by virtual stage.
    pub fn chunks_of(&self, pp_rank: usize) -> impl Iterator<Item = &Chunk> {
        // A rank that does not exist has none.
        let every_pp = self.chunks.iter().skip(pp_rank).step_by(self.pp_size());
        every_pp.filter(move |chunk| chunk.pp_rank == pp_rank)
    }

    /// The global experts of an expert-parallel rank; names count them from 0. Empty in a dense model.
    #[must_use]
    pub fn experts(&self, ep_rank: usize) -> Range<usize> {
        let each = self.num_experts / self.ep_size();
        ep_rank * each..(ep_rank + 1) * each
    }

    /// Whether the multi-token-prediction head is on another pipeline rank than the output layer.
    #[must_use]
    pub fn mtp_standalone(&self) -> bool {
        let last = self.pp_size() - 1;
        let mut with_head = self.chunks.iter().filter(|chunk| chunk.mtp_num_layers > 0);
        with_head.any(|chunk| chunk.pp_rank != last)
    }

    /// The same split as a layout string: `Et*3|(tt|)*29mL`.
    #[must_use]
    pub fn pipeline_layout(&self) -> PipelineLayout {
        PipelineLayout::new(self.chunks.iter().map(Chunk::words).collect())
    }

    /// Megatron's table of the split, equal neighbours in one line: `PP rank 1-13 | decoder*2 | decoder*2`.
    #[must_use]
    pub fn table(&self) -> String {
        let mut rows: Vec<(Range<usize>, Vec<String>)> = Vec::new();
        for pp_rank in 0..self.pp_size() {
            let cells = self.chunks_of(pp_rank).map(cell).collect();
            match rows.last_mut() {
                Some((ranks, last)) if *last == cells => ranks.end += 1,
                _ => rows.push((pp_rank..pp_rank + 1, cells)),
            }
        }
        let mut table: Vec<Vec<String>> = Vec::with_capacity(rows.len() + 1);
        if self.vp_size > 1 {
            let stages = (0..self.vp_size).map(|stage| format!("VPP rank {stage}"));
            table.push(std::iter::once(String::new()).chain(stages).collect());
        }
        for (ranks, cells) in rows {
            let name = if ranks.len() == 1 {
                format!("PP rank {}", ranks.start)
            } else {
                format!("PP rank {}-{}", ranks.start, ranks.end - 1)
            };
            table.push(std::iter::once(name).chain(cells).collect());
        }
        aligned(&table)
    }
}

fn vocabulary_rows(sizes: &ParallelSizes, facts: &ModelFacts) -> Result<usize, LayoutProblem> {
    let (vocab_size, tp_size) = (facts.vocab_size, sizes.tp_size);
    match facts.make_vocab_size_divisible_by {
        Some(divisor) => vocabulary::padded_vocab_size(vocab_size, divisor, tp_size).ok_or(
            LayoutProblem::Vocabulary {
                vocab_size,
                divisor,
                tp_size,
            },
        ),
        None => {
            let words = "tensor_model_parallel_size, without make_vocab_size_divisible_by";
            indivisible("vocab_size", vocab_size, "TP", vec![tp_size], words)
                .map_or(Ok(vocab_size), Err)
        }
    }
}

fn chunks(stages: &StageCounts, pp_size: usize, facts: &ModelFacts) -> Vec<Chunk> {
    let count = stages.decoder.len();
    let with_last_layer = stages.decoder.iter().rposition(|layers| *layers > 0);
    let mut next_layer = 0;
    (0..count)
        .map(|stage| {
            let (pre_process, post_process) = (stage == 0, stage + 1 == count);
            let layers = next_layer..next_layer + stages.decoder[stage];
            next_layer = layers.end;
            let mtp_num_layers = stages.mtp[stage];
            let tied_here = facts.share_embeddings_and_output_weights && count == 1;
            Chunk {
                pp_rank: stage % pp_size,
                vp_stage: stage / pp_size,
                layers,
                pre_process,
                post_process,
                vision: pre_process && facts.vision,
                embedding: pre_process || mtp_num_layers > 0,
                final_layernorm: if facts.mtp_num_layers > 0 {
                    with_last_layer.unwrap_or(0) == stage
                } else {
                    post_process
                },
                output_layer: post_process && !tied_here,
                mtp_num_layers,
            }
        })
        .collect()
}

fn cell(chunk: &Chunk) -> String {
    let words = chunk.words();
    if words.is_empty() {
        return "(empty stage)".to_owned();
    }
    let text = |run: &[LayerWord]| match run.len() {
        1 => run[0].word().to_owned(),
        length => format!("{}*{length}", run[0].word()),
    };
    let parts: Vec<String> = words.chunk_by(|a, b| a == b).map(text).collect();
    parts.join(",")
}

fn aligned(table: &[Vec<String>]) -> String {
    let columns = table.iter().map(Vec::len).max().unwrap_or(0);
    let widths: Vec<usize> = (0..columns)
        .map(|column| table.iter().map(|row| row[column].len()).max().unwrap_or(0))
        .collect();
    let mut text = String::new();
    for row in table {
        let mut line = String::new();
        for (cell, width) in row.iter().zip(&widths) {
            let separator = if line.is_empty() { "" } else { " | " };
            // Writing to a string cannot fail.
            let _ = write!(line, "{separator}{cell:width$}");
        }
        text.push_str(line.trim_end());
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::super::{Axis, CutSize, World};
    use super::*;

    /// As the 27B model: 64 layers, 16 key heads, 48 value heads; `num_layers` is the test's.
    fn facts(num_layers: usize) -> ModelFacts {
        let sizes = [
            ("num_attention_heads", 24, Axis::Tp),
            ("linear_num_key_heads", 16, Axis::TpCp),
            ("linear_num_value_heads", 48, Axis::TpCp),
            ("num_experts", 256, Axis::Ep),
        ];
        ModelFacts {
            num_layers,
            mtp_num_layers: 1,
            vocab_size: 248_320,
            make_vocab_size_divisible_by: Some(128),
            num_experts: Some(256),
            vision: true,
            share_embeddings_and_output_weights: false,
            cut_sizes: sizes
                .map(|(parameter, size, axis)| CutSize {
                    parameter,
                    size,
                    axis,
                })
                .to_vec(),
        }
    }

    fn error(sizes: ParallelSizes, options: &PipelineOptions, num_layers: usize) -> String {
        ParallelLayout::new(&sizes, options, &facts(num_layers))
            .unwrap_err()
            .to_string()
    }

    fn pipeline(pp_size: usize, vpp_size: Option<usize>) -> ParallelSizes {
        ParallelSizes {
            pp_size,
            vpp_size,
            ..ParallelSizes::default()
        }
    }

    fn ends(first: Option<usize>, last: Option<usize>) -> PipelineOptions {
        PipelineOptions {
            num_layers_in_first_pipeline_stage: first,
            num_layers_in_last_pipeline_stage: last,
            ..PipelineOptions::default()
        }
    }

    fn accounted(embedding: bool, loss: bool) -> PipelineOptions {
        PipelineOptions {
            account_for_embedding_in_pipeline_split: embedding,
            account_for_loss_in_pipeline_split: loss,
            ..PipelineOptions::default()
        }
    }

    fn written(layout: &str) -> PipelineOptions {
        PipelineOptions {
            pipeline_model_parallel_layout: Some(layout.parse().unwrap()),
            ..PipelineOptions::default()
        }
    }

    #[test]
    fn an_impossible_size_is_named_with_its_numbers_and_what_would_do() {
        let sizes = ParallelSizes {
            tp_size: 3,
            ..ParallelSizes::default()
        };
        assert_eq!(
            error(sizes, &PipelineOptions::default(), 64),
            "linear_num_key_heads 16 is not divisible by TP 3 (tensor_model_parallel_size), only by 1, 2, 4, 8, 16"
        );
        let sizes = ParallelSizes {
            tp_size: 8,
            cp_size: 4,
            ep_size: 7,
            ..ParallelSizes::default()
        };
        let found = error(sizes, &PipelineOptions::default(), 64);
        for wanted in [
            "linear_num_key_heads 16 is not divisible by TP x CP 8 x 4",
            "linear_num_value_heads 48 is not divisible by TP x CP 8 x 4",
            "num_experts 256 is not divisible by EP 7",
        ] {
            assert!(found.contains(wanted), "{found}");
        }
        let sizes = ParallelSizes {
            tp_size: 0,
            world: World::Size(0),
            ..ParallelSizes::default()
        };
        let found = error(sizes, &PipelineOptions::default(), 64);
        assert!(found.contains("tensor_model_parallel_size is 0"), "{found}");
        assert!(found.contains("world_size is 0"), "{found}");
    }

    #[test]
    fn a_model_without_experts_refuses_expert_parallelism() {
        let mut dense = facts(64);
        dense.num_experts = None;
        dense.cut_sizes.pop();
        let sizes = ParallelSizes {
            ep_size: 2,
            ..ParallelSizes::default()
        };
        let found = ParallelLayout::new(&sizes, &PipelineOptions::default(), &dense).unwrap_err();
        let found = found.to_string();
        assert!(found.contains("the model has no experts"), "{found}");
    }

    #[test]
    fn a_vocabulary_needs_padding_when_tensor_ranks_do_not_divide_it() {
        let mut unpadded = facts(64);
        unpadded.vocab_size = 248_319;
        unpadded.make_vocab_size_divisible_by = None;
        let sizes = ParallelSizes {
            tp_size: 2,
            ..ParallelSizes::default()
        };
        let options = PipelineOptions::default();
        let found = ParallelLayout::new(&sizes, &options, &unpadded).unwrap_err();
        let found = found.to_string();
        assert!(
            found.contains("vocab_size 248319 is not divisible by TP 2"),
            "{found}"
        );
        unpadded.make_vocab_size_divisible_by = Some(128);
        let layout = ParallelLayout::new(&sizes, &options, &unpadded).unwrap();
        assert_eq!(layout.padded_vocab_size(), 248_320);
    }

    #[test]
    fn pipelines_that_do_not_divide_are_refused_by_their_numbers() {
        let even = PipelineOptions::default();
        for (found, wanted) in [
            (
                error(pipeline(3, None), &even, 4),
                "num_layers 4 is not divisible by PP 3",
            ),
            (
                error(pipeline(2, Some(3)), &even, 4),
                "num_layers_per_pipeline_rank 2 is not divisible by VPP 3",
            ),
            (
                error(pipeline(1, Some(2)), &even, 4),
                "pipeline_model_parallel_size is 1",
            ),
            (
                error(pipeline(4, None), &accounted(true, false), 4),
                "num_layers + 1 for the embedding 5 is not divisible by PP 4",
            ),
            (
                error(pipeline(2, Some(4)), &accounted(true, true), 4),
                "embedding and loss counted, 3 is not divisible by VPP 4",
            ),
            (
                error(pipeline(4, None), &ends(Some(0), None), 4),
                "num_layers_in_first_pipeline_stage is 0",
            ),
            (
                error(pipeline(2, Some(2)), &ends(Some(3), None), 8),
                "num_layers_in_first_pipeline_stage 3 is not divisible by VPP 2",
            ),
            (
                error(pipeline(4, None), &ends(Some(1), None), 6),
                "number of middle layers 5 is not divisible by middle PP 3",
            ),
            (
                error(pipeline(3, Some(2)), &ends(Some(2), Some(2)), 7),
                "number of layers on each middle pipeline rank 3 is not divisible by VPP 2",
            ),
            (
                error(pipeline(3, None), &ends(Some(2), Some(2)), 4),
                "0 layers remain for 1 pipeline ranks",
            ),
            (
                error(pipeline(2, None), &ends(Some(1), Some(1)), 4),
                "2 layers remain for 0 pipeline ranks",
            ),
            (
                error(pipeline(2, None), &ends(Some(9), None), 4),
                "num_layers_in_first_pipeline_stage: 9 layers on 1 pipeline ranks do not fit num_layers 4",
            ),
            (
                error(pipeline(1, None), &ends(Some(2), Some(2)), 4),
                "4 layers on 2 pipeline ranks do not fit",
            ),
            (
                error(pipeline(usize::MAX, None), &even, 0),
                "the number of pipeline stages is more than 262144",
            ),
            (
                error(pipeline(2, Some(4)), &written("Et|t|t|tmL"), 4),
                "conflicts with",
            ),
            (
                error(pipeline(1, None), &written("Et*4|mL"), 4),
                "it should be greater than 1",
            ),
        ] {
            assert!(found.contains(wanted), "{found:?} lacks {wanted:?}");
        }
    }

    #[test]
    fn one_way_of_splitting_excludes_the_others() {
        let options = PipelineOptions {
            num_layers_in_last_pipeline_stage: Some(1),
            ..written("Et*4|mL")
        };
        let found = error(pipeline(2, None), &options, 4);
        assert!(
            found.contains(
                "pipeline_model_parallel_layout cannot be set together with num_layers_in_last"
            ),
            "{found}"
        );
        let options = PipelineOptions {
            account_for_loss_in_pipeline_split: true,
            ..ends(Some(1), None)
        };
        let found = error(pipeline(2, None), &options, 4);
        assert!(
            found.contains(
                "num_layers_in_first_pipeline_stage cannot be set together with account_for_loss"
            ),
            "{found}"
        );
    }

    #[test]
    fn the_table_merges_equal_ranks() {
        let options = written("Ett|(tt|)*29,m|L");
        let layout = ParallelLayout::new(&pipeline(16, None), &options, &facts(60)).unwrap();
        assert_eq!(
            layout.table(),
            "           | VPP rank 0          | VPP rank 1\n\
             PP rank 0    | embedding,decoder*2 | decoder*2\n\
             PP rank 1-13 | decoder*2           | decoder*2\n\
             PP rank 14   | decoder*2           | mtp\n\
             PP rank 15   | decoder*2           | loss\n"
                .replacen("           |", "             |", 1)
        );
        assert!(layout.mtp_standalone());
        assert_eq!(layout.vp_size(), 2);
        assert_eq!(layout.pipeline_layout().to_string(), "Ett|(tt|)*29m|L");
        let options = written("Et|t*3||mL");
        let layout = ParallelLayout::new(&pipeline(4, None), &options, &facts(4)).unwrap();
        assert!(layout.table().contains("PP rank 2 | (empty stage)\n"));
        assert!(!layout.mtp_standalone());
    }

    #[test]
    fn experts_are_numbered_from_zero_on_each_rank() {
        let sizes = ParallelSizes {
            ep_size: 8,
            ..ParallelSizes::default()
        };
        let layout = ParallelLayout::new(&sizes, &PipelineOptions::default(), &facts(64)).unwrap();
        assert_eq!(layout.experts(0), 0..32);
        assert_eq!(layout.experts(7), 224..256);
    }

    #[test]
    fn a_rank_or_stage_that_does_not_exist_is_an_error() {
        let layout =
            ParallelLayout::new(&pipeline(2, None), &PipelineOptions::default(), &facts(4))
                .unwrap();
        let found = layout.coord(2).unwrap_err().to_string();
        assert_eq!(found, "rank 2 does not exist, there are 2, numbered from 0");
        let found = layout.chunk(0, 1).unwrap_err().to_string();
        assert_eq!(
            found,
            "vp_stage 1 does not exist, there are 1, numbered from 0"
        );
    }
}
