//! What training needs of a rank's memory, estimated.
//!
//! Legend: T tokens of a micro-batch on one rank (micro_batch_size x seq_length / CP), H hidden size, V padded
//! vocabulary, Hq and Hkv attention heads of size d, Kd = Hk x Dk and Vd = Hv x Dv of the delta rule, I intermediate size,
//! k experts a token of E; Hx and Ix the vision tower's sizes, of which a micro-batch has vision_patches patches. Elements
//! have two bytes.

use bridge_core::config::{HfConfig, TextConfig, VisionConfig};
use bridge_core::layout::{Chunk, ParallelLayout};

/// What the estimate assumes, as the output says it.
pub(super) const FORMULA: &str = "\
Training, a parameter: 2 bytes of bfloat16 weights, 4 of float32 gradients, 12 of optimizer (float32 master and two Adam
moments), the latter divided by DP x CP (experts: EDP) with --use-distributed-optimizer.
Activations, elements of 2 bytes a token, nothing recomputed:
  norms 2H a block (divided by TP with --sequence-parallel), full attention (5 Hq + 3 Hkv) d / TP,
  delta rule (6 Kd + 5 Vd + 2 Hv) / TP, MLP 3 I / TP, experts 2 E + k ETP/TP (2 H + 3 I/ETP) in balance, shared expert 3 I / TP,
  output layer 3 V / TP, MTP head 2 H, one layer of full attention and one output layer.
  vision tower, a patch of --vision-patches: 2 Hx + (6 Hx + 2 Ix) / TP a block, Hx + 2 Hx / TP of the merger.
  Pipeline rank p keeps PP - p micro-batches; with V virtual stages 2 (PP - p - 1) + (V - 1) PP + 1 stages of them.
  H hidden size, Hq and Hkv heads of size d, Kd and Vd widths of keys and values of the delta rule with Hv value heads, I
  intermediate size, k of E experts a token, V padded vocabulary, Hx and Ix hidden and intermediate size of the vision tower.
The workspace of libraries is not counted.";

/// The shape of a training step.
#[derive(Debug, Clone, clap::Args)]
#[command(next_help_heading = "Training (for the estimate of memory)")]
pub(crate) struct TrainingArgs {
    /// Samples of a micro-batch.
    #[arg(long, value_name = "N", default_value_t = 1)]
    micro_batch_size: u32,
    /// Tokens of a sample.
    #[arg(long, value_name = "N", default_value_t = 4096)]
    seq_length: u32,
    /// Patches of the images and videos of a micro-batch; 0 for text alone.
    #[arg(long, value_name = "N", default_value_t = 0)]
    vision_patches: u32,
    /// Divide what stands between tensor-parallel blocks over the tensor-parallel ranks.
    #[arg(long)]
    sequence_parallel: bool,
    /// Divide the optimizer's state over the data-parallel ranks.
    #[arg(long)]
    use_distributed_optimizer: bool,
}

/// Bytes of a rank in training.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Memory {
    pub(super) weights: u64,
    pub(super) gradients: u64,
    pub(super) optimizer: u64,
    pub(super) activations: u64,
}

impl Memory {
    pub(super) fn total(&self) -> u64 {
        self.weights + self.gradients + self.optimizer + self.activations
    }

    /// The memory of a rank of pipeline stage `pp_rank` that holds this many parameters outside and inside experts.
    pub(super) fn estimate(
        config: &HfConfig,
        layout: &ParallelLayout,
        training: &TrainingArgs,
        pp_rank: usize,
        (dense, experts): (u64, u64),
    ) -> Self {
        let all = dense + experts;
        let optimizer = if training.use_distributed_optimizer {
            let dense_ranks = (layout.dp_size() * layout.cp_size()) as u64;
            12 * dense.div_ceil(dense_ranks) + 12 * experts.div_ceil(layout.edp_size() as u64)
        } else {
            12 * all
        };
        Self {
            weights: 2 * all,
            gradients: 4 * all,
            optimizer,
            activations: activations(config, layout, training, pp_rank),
        }
    }
}

#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    clippy::cast_precision_loss,
    reason = "an estimate; sizes of models are far below 2^52"
)]
fn activations(
    config: &HfConfig,
    layout: &ParallelLayout,
    training: &TrainingArgs,
    pp_rank: usize,
) -> u64 {
    let tokens = f64::from(training.micro_batch_size) * f64::from(training.seq_length)
        / layout.cp_size() as f64;
    let elements = Elements::new(config, layout, training.sequence_parallel);
    let patches = f64::from(training.vision_patches) / layout.cp_size() as f64;
    let a_patch = config
        .vision
        .as_ref()
        .map_or(0.0, |vision| patch_elements(vision, layout));
    let (pp_size, vp_size) = (layout.pp_size(), layout.vp_size());
    let in_flight = if vp_size == 1 {
        (pp_size - pp_rank) as f64
    } else {
        let stages = 2 * (pp_size - pp_rank - 1) + (vp_size - 1) * pp_size + 1;
        stages as f64 / vp_size as f64
    };
    let of_chunk = |chunk: &Chunk| {
        let kept = elements.kept(&config.text, chunk);
        // The output layer runs backward at once.
        in_flight * kept
            + if chunk.post_process {
                elements.output
            } else {
                0.0
            }
    };
    let a_token: f64 = layout.chunks_of(pp_rank).map(of_chunk).sum();
    let vision = if layout.chunks_of(pp_rank).any(|chunk| chunk.vision) {
        in_flight * patches * a_patch
    } else {
        0.0
    };
    (2.0 * (tokens * a_token + vision)) as u64
}

/// Elements a patch that backward needs of the vision tower, on one rank.
#[expect(
    clippy::cast_precision_loss,
    reason = "an estimate; sizes of models are far below 2^52"
)]
fn patch_elements(vision: &VisionConfig, layout: &ParallelLayout) -> f64 {
    let tp = layout.tp_size() as f64;
    let hidden = vision.hidden_size as f64;
    let block = 2.0 * hidden + (6.0 * hidden + 2.0 * vision.intermediate_size as f64) / tp;
    vision.depth as f64 * block + hidden + 2.0 * hidden / tp
}

/// Elements a token that backward needs, on one rank.
struct Elements {
    hidden: f64,
    full_attention: f64,
    linear_attention: f64,
    mlp: f64,
    output: f64,
}

impl Elements {
    #[expect(
        clippy::cast_precision_loss,
        reason = "an estimate; sizes of models are far below 2^52"
    )]
    fn new(config: &HfConfig, layout: &ParallelLayout, sequence_parallel: bool) -> Self {
        let text = &config.text;
        let tp = layout.tp_size() as f64;
        let hidden = text.hidden_size as f64;
        let between = if sequence_parallel {
            hidden / tp
        } else {
            hidden
        };
        let (queries, keys) = (
            text.num_attention_heads as f64,
            text.num_key_value_heads as f64,
        );
        let key_width = (text.linear_num_key_heads * text.linear_key_head_dim) as f64;
        let value_width = (text.linear_num_value_heads * text.linear_value_head_dim) as f64;
        let value_heads = text.linear_num_value_heads as f64;
        let dense = 3.0 * text.intermediate_size.unwrap_or(0) as f64 / tp;
        let experts = text.moe.as_ref().map_or(0.0, |moe| {
            let etp = layout.etp_size() as f64;
            let routed = moe.num_experts_per_tok as f64 * etp / tp;
            2.0 * moe.num_experts as f64
                + routed * (2.0 * hidden + 3.0 * moe.moe_intermediate_size as f64 / etp)
                + 3.0 * moe.shared_expert_intermediate_size as f64 / tp
        });
        Self {
            hidden: between,
            full_attention: 2.0 * between
                + (5.0 * queries + 3.0 * keys) * text.head_dim as f64 / tp,
            linear_attention: 2.0 * between
                + (6.0 * key_width + 5.0 * value_width + 2.0 * value_heads) / tp,
            mlp: 2.0 * between + dense + experts,
            // A classifier is whole on every rank.
            output: 3.0
                * config
                    .classifier
                    .as_ref()
                    .map_or(layout.padded_vocab_size() as f64 / tp, |classifier| {
                        classifier.num_labels as f64
                    }),
        }
    }

    /// What one micro-batch leaves in a chunk.
    #[expect(
        clippy::cast_precision_loss,
        reason = "an estimate; sizes of models are far below 2^52"
    )]
    fn kept(&self, text: &TextConfig, chunk: &Chunk) -> f64 {
        let layer = |number: usize| {
            let attention = if text.is_full_attention(number) {
                self.full_attention
            } else {
                self.linear_attention
            };
            attention + self.mlp
        };
        let layers: f64 = chunk.layers.clone().map(layer).sum();
        let embedding = if chunk.pre_process { self.hidden } else { 0.0 };
        let head = 2.0 * self.hidden + self.full_attention + self.mlp + self.output;
        layers + embedding + chunk.mtp_num_layers as f64 * head
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use bridge_core::layout::{ModelFacts, ParallelSizes, PipelineOptions, World};
    use serde_json::json;

    use super::*;

    /// Four layers, the last of full attention; all sizes different primes times powers of two.
    fn config() -> HfConfig {
        let config = json!({
            "architectures": ["Qwen3_5ForConditionalGeneration"],
            "text_config": {
                "vocab_size": 4096, "hidden_size": 24, "num_hidden_layers": 4,
                "intermediate_size": 80, "num_attention_heads": 4, "num_key_value_heads": 2,
                "head_dim": 16, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
                "linear_key_head_dim": 8, "linear_value_head_dim": 16,
                "rope_parameters": {"mrope_section": [1, 1, 0], "partial_rotary_factor": 0.25},
                "full_attention_interval": 4, "mtp_num_hidden_layers": 1,
            },
            "vision_config": {
                "depth": 1, "hidden_size": 8, "num_heads": 2, "intermediate_size": 12,
                "out_hidden_size": 24, "patch_size": 2, "num_position_embeddings": 4,
            },
        });
        HfConfig::from_json(config, Path::new("config.json")).unwrap()
    }

    fn layout(sizes: ParallelSizes) -> ParallelLayout {
        let facts = ModelFacts::from_config(&config());
        ParallelLayout::new(&sizes, &PipelineOptions::default(), &facts).unwrap()
    }

    fn training() -> TrainingArgs {
        TrainingArgs {
            micro_batch_size: 3,
            seq_length: 100,
            vision_patches: 0,
            sequence_parallel: false,
            use_distributed_optimizer: false,
        }
    }

    fn estimate(sizes: ParallelSizes, training: &TrainingArgs, pp_rank: usize) -> Memory {
        Memory::estimate(&config(), &layout(sizes), training, pp_rank, (1000, 600))
    }

    #[test]
    fn activations_are_those_of_the_formula() {
        // Per token: H = 24, attention (5 * 4 + 3 * 2) * 16, delta rule 6 * 16 + 5 * 64 + 2 * 4, MLP 3 * 80, output 3 * 4096.
        let (full, delta, mlp, output) = (48 + 416, 48 + 424, 48 + 240, 12_288);
        let layers = 3 * delta + full + 4 * mlp;
        let head = 48 + full + mlp + output;
        let found = estimate(ParallelSizes::default(), &training(), 0);
        assert_eq!(found.activations, 2 * 300 * (24 + layers + head + output));

        // Tensor parallelism divides the blocks, sequence parallelism what stands between them.
        let sizes = ParallelSizes {
            tp_size: 2,
            ..ParallelSizes::default()
        };
        let (full, delta, mlp, output) = (48 + 208, 48 + 212, 48 + 120, 6144);
        let layers = 3 * delta + full + 4 * mlp;
        let head = 48 + full + mlp + output;
        let found = estimate(sizes, &training(), 0);
        assert_eq!(found.activations, 2 * 300 * (24 + layers + head + output));
        let sequence_parallel = TrainingArgs {
            sequence_parallel: true,
            ..training()
        };
        let saved = 2 * 300 * (12 + 10 * 24 + 24);
        let found_less = estimate(sizes, &sequence_parallel, 0);
        assert_eq!(found_less.activations, found.activations - saved);
    }

    #[test]
    fn a_classifier_keeps_its_labels_and_not_the_vocabulary() {
        let mut raw = config().raw;
        raw["architectures"][0] = "Qwen3_5ForTokenClassification".into();
        raw.insert("num_labels".to_owned(), 7.into());
        let config = HfConfig::from_json(raw.into(), Path::new("config.json")).unwrap();
        let sizes = ParallelSizes {
            tp_size: 2,
            ..ParallelSizes::default()
        };
        let facts = ModelFacts::from_config(&config);
        let layout = ParallelLayout::new(&sizes, &PipelineOptions::default(), &facts).unwrap();
        let found = Memory::estimate(&config, &layout, &training(), 0, (1000, 600));
        let (full, delta, mlp, output) = (48 + 208, 48 + 212, 48 + 120, 3 * 7);
        let layers = 3 * delta + full + 4 * mlp;
        assert_eq!(found.activations, 2 * 300 * (24 + layers + output));
    }

    #[test]
    fn earlier_pipeline_ranks_keep_more_micro_batches() {
        let sizes = ParallelSizes {
            pp_size: 4,
            ..ParallelSizes::default()
        };
        let delta_layer = 48 + 424 + 48 + 240;
        let at = |pp_rank| estimate(sizes, &training(), pp_rank).activations;
        assert_eq!(at(0), 2 * 300 * 4 * (24 + delta_layer));
        assert_eq!(at(1), 2 * 300 * 3 * delta_layer);
        assert_eq!(at(2), 2 * 300 * 2 * delta_layer);
        let sizes = ParallelSizes {
            pp_size: 2,
            vpp_size: Some(2),
            ..ParallelSizes::default()
        };
        // Two stages of one layer each; five stages in flight.
        let first = estimate(sizes, &training(), 0).activations;
        assert_eq!(first, 2 * 300 * (24 + 2 * delta_layer) * 5 / 2);
    }

    #[test]
    fn patches_count_on_the_stage_of_the_vision_tower() {
        let sizes = ParallelSizes {
            tp_size: 2,
            pp_size: 2,
            ..ParallelSizes::default()
        };
        let with_images = TrainingArgs {
            vision_patches: 50,
            ..training()
        };
        let more = |pp_rank| {
            let text = estimate(sizes, &training(), pp_rank).activations;
            estimate(sizes, &with_images, pp_rank).activations - text
        };
        // One block of Hx = 8, Ix = 12, then the merger; two micro-batches.
        let patch = 16 + (48 + 24) / 2 + 8 + 8;
        assert_eq!((more(0), more(1)), (2 * 2 * 50 * patch, 0));
    }

    #[test]
    fn a_distributed_optimizer_divides_its_state_over_the_replicas() {
        let sizes = ParallelSizes {
            tp_size: 2,
            world: World::DataParallel(4),
            ..ParallelSizes::default()
        };
        let found = estimate(sizes, &training(), 0);
        let sixteen_hundred = (2 * 1600, 4 * 1600, 12 * 1600);
        assert_eq!(
            (found.weights, found.gradients, found.optimizer),
            sixteen_hundred
        );
        let distributed = TrainingArgs {
            use_distributed_optimizer: true,
            ..training()
        };
        let found = estimate(sizes, &distributed, 0);
        // Four replicas of dense parameters, eight ranks without a cut of experts.
        assert_eq!(found.optimizer, 12 * 1000 / 4 + 12 * 600 / 8);
        assert_eq!(
            found.total(),
            found.weights + found.gradients + found.optimizer + found.activations
        );
    }
}
