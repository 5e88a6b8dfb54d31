//! The flags that say how a model is laid out over ranks, in Megatron's words.

use bridge_core::Dtype;
use bridge_core::layout::{
    Chunk, LayoutError, LayoutSpec, ParallelLayout, ParallelSizes, PipelineLayout, PipelineOptions,
    RankCoord, World,
};

/// Sizes, the split of the pipeline, and the form of the parameters.
#[derive(Debug, Clone, clap::Args)]
#[command(next_help_heading = "Layout")]
pub(crate) struct LayoutArgs {
    /// Tensor-parallel size.
    #[arg(long, visible_aliases = ["tp", "tensor-parallel-size"], value_name = "N", default_value_t = 1)]
    tensor_model_parallel_size: usize,
    /// Pipeline size.
    #[arg(long, visible_aliases = ["pp", "pipeline-parallel-size"], value_name = "N", default_value_t = 1)]
    pipeline_model_parallel_size: usize,
    /// Virtual stages a pipeline rank; a pipeline layout decides by itself.
    #[arg(long, visible_aliases = ["vpp"], value_name = "N")]
    virtual_pipeline_model_parallel_size: Option<usize>,
    /// Expert-parallel size.
    #[arg(long, visible_aliases = ["ep", "expert-parallel-size"], value_name = "N", default_value_t = 1)]
    expert_model_parallel_size: usize,
    /// Expert-tensor-parallel size; 1 as in Megatron Bridge's scripts (Megatron-Core's own default is the TP size).
    #[arg(long, visible_aliases = ["etp"], value_name = "N", default_value_t = 1)]
    expert_tensor_parallel_size: usize,
    /// Context-parallel size; it changes no parameter.
    #[arg(long, visible_aliases = ["cp"], value_name = "N", default_value_t = 1)]
    context_parallel_size: usize,
    /// Data-parallel size; by default the smallest that the other sizes allow.
    #[arg(long, visible_aliases = ["dp"], value_name = "N")]
    data_parallel_size: Option<usize>,
    /// Every stage written out, as 'Et*3|(tt|)*29,m|L': embedding, decoder layers, MTP head, loss.
    #[arg(long, visible_aliases = ["pipeline-model-parallel-layout"], value_name = "LAYOUT")]
    pipeline_layout: Option<PipelineLayout>,
    /// Decoder layers of the first pipeline rank; the others share the rest.
    #[arg(long, value_name = "N")]
    num_layers_in_first_pipeline_stage: Option<usize>,
    /// Decoder layers of the last pipeline rank; the others share the rest.
    #[arg(long, value_name = "N")]
    num_layers_in_last_pipeline_stage: Option<usize>,
    /// Count the embedding as a layer of the first stage.
    #[arg(long)]
    account_for_embedding_in_pipeline_split: bool,
    /// Count the output layer as a layer of the last stage.
    #[arg(long)]
    account_for_loss_in_pipeline_split: bool,
    /// Pad the vocabulary to a multiple of N x TP; without it there is no padding.
    #[arg(long, value_name = "N")]
    make_vocab_size_divisible_by: Option<usize>,
    /// Name experts one by one, as Megatron does without grouped GEMM.
    #[arg(long)]
    sequential_experts: bool,
    /// Leave the multi-token-prediction head out.
    #[arg(long)]
    no_mtp: bool,
    /// bfloat16, float16 or float32 for every tensor; without it each keeps the source's (Megatron Bridge's default is
    /// bfloat16).
    #[arg(long, value_name = "DTYPE", value_parser = super::init::parse_dtype)]
    torch_dtype: Option<Dtype>,
}

impl LayoutArgs {
    /// What was asked for, before it meets a model.
    pub(crate) fn spec(&self) -> LayoutSpec {
        LayoutSpec {
            sizes: ParallelSizes {
                tp_size: self.tensor_model_parallel_size,
                cp_size: self.context_parallel_size,
                pp_size: self.pipeline_model_parallel_size,
                vpp_size: self.virtual_pipeline_model_parallel_size,
                ep_size: self.expert_model_parallel_size,
                etp_size: self.expert_tensor_parallel_size,
                world: self
                    .data_parallel_size
                    .map_or(World::Smallest, World::DataParallel),
            },
            pipeline: PipelineOptions {
                pipeline_model_parallel_layout: self.pipeline_layout.clone(),
                num_layers_in_first_pipeline_stage: self.num_layers_in_first_pipeline_stage,
                num_layers_in_last_pipeline_stage: self.num_layers_in_last_pipeline_stage,
                account_for_embedding_in_pipeline_split: self
                    .account_for_embedding_in_pipeline_split,
                account_for_loss_in_pipeline_split: self.account_for_loss_in_pipeline_split,
            },
            make_vocab_size_divisible_by: self.make_vocab_size_divisible_by,
            sequential_experts: self.sequential_experts,
            without_mtp: self.no_mtp,
            dtype: self.torch_dtype,
        }
    }
}

/// One rank and one of its virtual stages.
#[derive(Debug, Clone, clap::Args)]
#[command(next_help_heading = "Rank")]
pub(crate) struct RankArgs {
    /// Tensor-parallel rank.
    #[arg(long, value_name = "R", default_value_t = 0)]
    tp_rank: usize,
    /// Pipeline rank.
    #[arg(long, value_name = "R", default_value_t = 0)]
    pp_rank: usize,
    /// Virtual stage of the pipeline rank.
    #[arg(long, value_name = "S", default_value_t = 0)]
    vp_stage: usize,
    /// Expert-parallel rank.
    #[arg(long, value_name = "R", default_value_t = 0)]
    ep_rank: usize,
    /// Expert-tensor-parallel rank.
    #[arg(long, value_name = "R", default_value_t = 0)]
    etp_rank: usize,
    /// Global rank in Megatron's order tp-cp-ep-dp-pp, instead of the ranks above.
    #[arg(
        long,
        value_name = "G",
        conflicts_with_all = ["tp_rank", "pp_rank", "ep_rank", "etp_rank"]
    )]
    rank: Option<usize>,
}

impl RankArgs {
    /// The rank and its stage in `layout`.
    pub(crate) fn of<'a>(
        &self,
        layout: &'a ParallelLayout,
    ) -> Result<(RankCoord, &'a Chunk), LayoutError> {
        let rank = match self.rank {
            Some(global_rank) => layout.coord(global_rank)?,
            None => layout.first_rank(self.tp_rank, self.pp_rank, self.ep_rank, self.etp_rank)?,
        };
        Ok((rank, layout.chunk(rank.pp_rank, self.vp_stage)?))
    }
}
