//! The parallel sizes that a user asks for.

use super::error::LayoutProblem;

/// How many ranks there are.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
pub enum World {
    /// The fewest that both grids divide.
    #[default]
    Smallest,
    /// This many replicas of the dense grid: `world = TP x CP x DP x PP`.
    DataParallel(usize),
    /// This many ranks.
    Size(usize),
}

/// Sizes of the parallel groups; each 1 by default.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct ParallelSizes {
    /// `tensor_model_parallel_size`.
    pub tp_size: usize,
    /// `context_parallel_size`; changes no parameter.
    pub cp_size: usize,
    /// `pipeline_model_parallel_size`.
    pub pp_size: usize,
    /// `virtual_pipeline_model_parallel_size`; with a layout string `None` means that the string decides.
    pub vpp_size: Option<usize>,
    /// `expert_model_parallel_size`.
    pub ep_size: usize,
    /// `expert_tensor_parallel_size`. 1 by default, as in Megatron Bridge's scripts; Megatron-Core's own is the TP size.
    pub etp_size: usize,
    /// How many ranks there are.
    pub world: World,
}

impl Default for ParallelSizes {
    fn default() -> Self {
        Self {
            tp_size: 1,
            cp_size: 1,
            pp_size: 1,
            vpp_size: None,
            ep_size: 1,
            etp_size: 1,
            world: World::Smallest,
        }
    }
}

impl ParallelSizes {
    /// A problem for each size that is zero; nothing else can be computed then.
    pub(super) fn zeros(&self) -> Vec<LayoutProblem> {
        let (dp_size, world_size) = match self.world {
            World::Smallest => (1, 1),
            World::DataParallel(size) => (size, 1),
            World::Size(size) => (1, size),
        };
        [
            ("tensor_model_parallel_size", self.tp_size),
            ("context_parallel_size", self.cp_size),
            ("pipeline_model_parallel_size", self.pp_size),
            (
                "virtual_pipeline_model_parallel_size",
                self.vpp_size.unwrap_or(1),
            ),
            ("expert_model_parallel_size", self.ep_size),
            ("expert_tensor_parallel_size", self.etp_size),
            ("data_parallel_size", dp_size),
            ("world_size", world_size),
        ]
        .into_iter()
        .filter(|(_, size)| *size == 0)
        .map(|(parameter, _)| LayoutProblem::Zero { parameter })
        .collect()
    }
}
