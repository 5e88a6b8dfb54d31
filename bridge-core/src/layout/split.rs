//! How many decoder layers each stage has.

use super::error::LayoutProblem;
use super::model_facts::{ModelFacts, indivisible};
use super::pipeline_layout::{LayerWord, PipelineLayout};
use super::sizes::ParallelSizes;

/// How layers are divided among pipeline stages; evenly by default. Fields have Megatron's names.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct PipelineOptions {
    /// Everything of each stage; excludes the other options.
    pub pipeline_model_parallel_layout: Option<PipelineLayout>,
    /// Decoder layers of the first pipeline rank; the others share the rest.
    pub num_layers_in_first_pipeline_stage: Option<usize>,
    /// Decoder layers of the last pipeline rank; the others share the rest.
    pub num_layers_in_last_pipeline_stage: Option<usize>,
    /// Counts the embedding as a layer of the first stage.
    pub account_for_embedding_in_pipeline_split: bool,
    /// Counts the output layer as a layer of the last stage.
    pub account_for_loss_in_pipeline_split: bool,
}

/// Decoder layers and MTP layers of each stage, in stage order (`vp_stage * PP + pp_rank`).
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct StageCounts {
    pub(super) vp_size: usize,
    pub(super) decoder: Vec<usize>,
    pub(super) mtp: Vec<usize>,
}

/// The most stages that a pipeline may have.
const MAX_STAGES: usize = 1 << 18;

const LAYOUT: &str = "pipeline_model_parallel_layout";
const FIRST: &str = "num_layers_in_first_pipeline_stage";
const LAST: &str = "num_layers_in_last_pipeline_stage";
const BOTH: &str = "num_layers_in_first_pipeline_stage and num_layers_in_last_pipeline_stage";
const EMBEDDING: &str = "account_for_embedding_in_pipeline_split";
const LOSS: &str = "account_for_loss_in_pipeline_split";
const PP: &str = "pipeline_model_parallel_size";
const VPP: &str = "virtual_pipeline_model_parallel_size";

impl PipelineOptions {
    /// Divides the layers of a model. Sizes are not zero.
    pub(super) fn split(
        &self,
        sizes: &ParallelSizes,
        facts: &ModelFacts,
    ) -> Result<StageCounts, LayoutProblem> {
        self.check_conflicts()?;
        let (pp_size, num_layers) = (sizes.pp_size, facts.num_layers);
        if let Some(layout) = &self.pipeline_model_parallel_layout {
            let mtp = facts.mtp_num_layers;
            let vp_size = layout.check(pp_size, sizes.vpp_size, num_layers, mtp)?;
            check_virtual(pp_size, vp_size)?;
            return Ok(StageCounts {
                vp_size,
                decoder: layout.counts(LayerWord::Decoder).collect(),
                mtp: layout.counts(LayerWord::Mtp).collect(),
            });
        }
        let vp_size = sizes.vpp_size.unwrap_or(1);
        check_virtual(pp_size, vp_size)?;
        let stages = pp_size
            .checked_mul(vp_size)
            .filter(|stages| *stages <= MAX_STAGES)
            .ok_or(LayoutProblem::TooLarge {
                what: "the number of pipeline stages",
                limit: MAX_STAGES,
            })?;
        let uneven = self.num_layers_in_first_pipeline_stage.is_some()
            || self.num_layers_in_last_pipeline_stage.is_some();
        let decoder = if uneven {
            self.uneven(num_layers, pp_size, vp_size)?
        } else {
            self.even(num_layers, pp_size, vp_size)?
        };
        let mut mtp = vec![0; stages];
        mtp[stages - 1] = facts.mtp_num_layers;
        Ok(StageCounts {
            vp_size,
            decoder,
            mtp,
        })
    }

    fn check_conflicts(&self) -> Result<(), LayoutProblem> {
        let set = [
            (LAYOUT, self.pipeline_model_parallel_layout.is_some()),
            (FIRST, self.num_layers_in_first_pipeline_stage.is_some()),
            (LAST, self.num_layers_in_last_pipeline_stage.is_some()),
            (EMBEDDING, self.account_for_embedding_in_pipeline_split),
            (LOSS, self.account_for_loss_in_pipeline_split),
        ];
        let first_set = |range: &[(&'static str, bool)]| {
            range.iter().find(|(_, set)| *set).map(|(name, _)| *name)
        };
        // The layout excludes all others; layer counts exclude what is accounted for.
        for (one, others) in [(&set[..1], &set[1..]), (&set[1..3], &set[3..])] {
            if let (Some(first), Some(second)) = (first_set(one), first_set(others)) {
                return Err(LayoutProblem::Conflict { first, second });
            }
        }
        Ok(())
    }

    /// Every stage the same; an embedding and a loss that are accounted for take the place of a layer.
    fn even(
        &self,
        num_layers: usize,
        pp_size: usize,
        vp_size: usize,
    ) -> Result<Vec<usize>, LayoutProblem> {
        let embedding = usize::from(self.account_for_embedding_in_pipeline_split);
        let loss = usize::from(self.account_for_loss_in_pipeline_split);
        let (total, rank_total, a_rank) = match (embedding, loss) {
            (0, 0) => (num_layers, "num_layers", "num_layers_per_pipeline_rank"),
            (1, 0) => (
                num_layers + 1,
                "num_layers + 1 for the embedding",
                "layers a pipeline rank, the embedding counted,",
            ),
            (0, _) => (
                num_layers + 1,
                "num_layers + 1 for the loss",
                "layers a pipeline rank, the loss counted,",
            ),
            _ => (
                num_layers + 2,
                "num_layers + 2 for the embedding and the loss",
                "layers a pipeline rank, embedding and loss counted,",
            ),
        };
        divides(rank_total, total, "PP", pp_size, PP)?;
        divides(a_rank, total / pp_size, "VPP", vp_size, VPP)?;
        let mut counts = vec![total / pp_size / vp_size; pp_size * vp_size];
        let last = counts.len() - 1;
        let too_few = |parameters| LayoutProblem::Ends {
            parameters,
            layers: embedding + loss,
            ends: embedding + loss,
            num_layers,
            pp_size,
        };
        counts[0] = counts[0]
            .checked_sub(embedding)
            .ok_or_else(|| too_few(EMBEDDING))?;
        counts[last] = counts[last]
            .checked_sub(loss)
            .ok_or_else(|| too_few(LOSS))?;
        Ok(counts)
    }

    /// The first and the last rank have their own numbers; each virtual stage repeats the pattern.
    fn uneven(
        &self,
        num_layers: usize,
        pp_size: usize,
        vp_size: usize,
    ) -> Result<Vec<usize>, LayoutProblem> {
        let first = self.num_layers_in_first_pipeline_stage;
        let last = self.num_layers_in_last_pipeline_stage;
        for (parameter, layers) in [(FIRST, first), (LAST, last)] {
            match layers {
                Some(0) => return Err(LayoutProblem::Zero { parameter }),
                Some(layers) => divides(parameter, layers, "VPP", vp_size, VPP)?,
                None => {}
            }
        }
        let ends = usize::from(first.is_some()) + usize::from(last.is_some());
        let layers = first.unwrap_or(0).saturating_add(last.unwrap_or(0));
        let (Some(middle_layers), Some(middle_stages)) =
            (num_layers.checked_sub(layers), pp_size.checked_sub(ends))
        else {
            return Err(LayoutProblem::Ends {
                parameters: match (first, last) {
                    (Some(_), Some(_)) => BOTH,
                    (Some(_), None) => FIRST,
                    _ => LAST,
                },
                layers,
                ends,
                num_layers,
                pp_size,
            });
        };
        if (middle_layers == 0) != (middle_stages == 0) {
            return Err(LayoutProblem::Middle {
                middle_layers,
                middle_stages,
            });
        }
        let middle = if middle_stages == 0 {
            0
        } else {
            let words = "the pipeline ranks between the first and the last stage";
            divides(
                "number of middle layers",
                middle_layers,
                "middle PP",
                middle_stages,
                words,
            )?;
            let a_rank = middle_layers / middle_stages;
            divides(
                "number of layers on each middle pipeline rank",
                a_rank,
                "VPP",
                vp_size,
                VPP,
            )?;
            a_rank / vp_size
        };
        let mut pattern = vec![middle; pp_size];
        if let Some(layers) = first {
            pattern[0] = layers / vp_size;
        }
        if let Some(layers) = last {
            pattern[pp_size - 1] = layers / vp_size;
        }
        Ok(pattern.repeat(vp_size))
    }
}

fn check_virtual(pp_size: usize, vpp_size: usize) -> Result<(), LayoutProblem> {
    if vpp_size > 1 && pp_size == 1 {
        return Err(LayoutProblem::VirtualWithoutPipeline { vpp_size });
    }
    Ok(())
}

fn divides(
    parameter: &'static str,
    size: usize,
    by: &'static str,
    divisor: usize,
    megatron: &'static str,
) -> Result<(), LayoutProblem> {
    indivisible(parameter, size, by, vec![divisor], megatron).map_or(Ok(()), Err)
}
