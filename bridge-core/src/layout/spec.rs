//! Everything that decides how a model is laid out over ranks, and that all ranks have in common.

use super::sizes::ParallelSizes;
use super::split::PipelineOptions;
use crate::Dtype;

/// A layout as it is asked for, before it meets a model.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct LayoutSpec {
    /// Sizes of the parallel groups.
    pub sizes: ParallelSizes,
    /// How layers are divided among pipeline stages.
    pub pipeline: PipelineOptions,
    /// `make_vocab_size_divisible_by`; `None`: no padding.
    pub make_vocab_size_divisible_by: Option<usize>,
    /// Megatron names of experts as with `moe_grouped_gemm` false.
    pub sequential_experts: bool,
    /// Leaves the multi-token-prediction head out.
    pub without_mtp: bool,
    /// The dtype of every parameter; `None`: each keeps its own.
    pub dtype: Option<Dtype>,
}
