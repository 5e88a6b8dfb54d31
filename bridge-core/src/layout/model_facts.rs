//! What a layout needs to know about a model.

use super::error::{Indivisible, LayoutProblem};
use super::sizes::ParallelSizes;
use crate::config::{HfConfig, LayerType};

/// The parallel size that cuts something.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Axis {
    /// Tensor parallelism.
    Tp,
    /// Tensor and context parallelism: the heads of the gated delta net.
    TpCp,
    /// Expert-tensor parallelism.
    Etp,
    /// Expert parallelism.
    Ep,
}

/// A number that a parallel size must divide.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct CutSize {
    /// Its name in `config.json`.
    pub parameter: &'static str,
    /// Its value.
    pub size: usize,
    /// What cuts it.
    pub axis: Axis,
}

/// A model as a layout sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ModelFacts {
    /// Decoder layers.
    pub num_layers: usize,
    /// Layers of the multi-token-prediction head; 0 when it is left out.
    pub mtp_num_layers: usize,
    /// Rows of the vocabulary without padding.
    pub vocab_size: usize,
    /// `make_vocab_size_divisible_by`; `None`: no padding.
    pub make_vocab_size_divisible_by: Option<usize>,
    /// Experts of a layer; `None` in a dense model.
    pub num_experts: Option<usize>,
    /// Whether there is a vision tower.
    pub vision: bool,
    /// Whether the output layer is the embedding (`tie_word_embeddings`).
    pub share_embeddings_and_output_weights: bool,
    /// What parallel sizes must divide, the vocabulary aside.
    pub cut_sizes: Vec<CutSize>,
}

impl ModelFacts {
    /// The facts of a config, the multi-token-prediction head included, without padding of the vocabulary.
    #[must_use]
    pub fn from_config(config: &HfConfig) -> Self {
        let text = &config.text;
        let has = |kind| text.layer_types.contains(&kind);
        let mtp = text.mtp_num_hidden_layers;
        let mut sizes = Vec::new();
        let mut add = |list: &[(&'static str, usize, Axis)]| {
            sizes.extend(list.iter().map(|(parameter, size, axis)| CutSize {
                parameter,
                size: *size,
                axis: *axis,
            }));
        };
        if has(LayerType::FullAttention) || mtp > 0 {
            let key_and_value = text
                .num_key_value_heads
                .saturating_mul(text.head_dim)
                .saturating_mul(2);
            add(&[
                ("num_attention_heads", text.num_attention_heads, Axis::Tp),
                (
                    "2 * num_key_value_heads * head_dim",
                    key_and_value,
                    Axis::Tp,
                ),
            ]);
        }
        if has(LayerType::LinearAttention) {
            add(&[
                (
                    "linear_num_key_heads",
                    text.linear_num_key_heads,
                    Axis::TpCp,
                ),
                (
                    "linear_num_value_heads",
                    text.linear_num_value_heads,
                    Axis::TpCp,
                ),
            ]);
        }
        if let Some(size) = text.intermediate_size {
            add(&[("intermediate_size", size, Axis::Tp)]);
        }
        if let Some(moe) = &text.moe {
            let (shared, width) = (
                moe.shared_expert_intermediate_size,
                moe.moe_intermediate_size,
            );
            add(&[
                ("shared_expert_intermediate_size", shared, Axis::Tp),
                ("num_experts", moe.num_experts, Axis::Ep),
                ("moe_intermediate_size", width, Axis::Etp),
            ]);
        }
        if mtp > 0 {
            add(&[("hidden_size", text.hidden_size, Axis::Tp)]);
        }
        if let Some(vision) = &config.vision {
            let merged = vision.merged_size();
            add(&[
                ("vision_config.num_heads", vision.num_heads, Axis::Tp),
                (
                    "vision_config.intermediate_size",
                    vision.intermediate_size,
                    Axis::Tp,
                ),
                (
                    "vision_config.hidden_size * spatial_merge_size^2",
                    merged,
                    Axis::Tp,
                ),
            ]);
        }
        Self {
            num_layers: text.num_hidden_layers,
            mtp_num_layers: mtp,
            vocab_size: text.vocab_size,
            make_vocab_size_divisible_by: None,
            num_experts: text.moe.as_ref().map(|moe| moe.num_experts),
            vision: config.vision.is_some(),
            share_embeddings_and_output_weights: config.tie_word_embeddings,
            cut_sizes: sizes,
        }
    }

    /// Everything that `sizes` do not divide.
    pub(super) fn indivisible(&self, sizes: &ParallelSizes) -> Vec<LayoutProblem> {
        let mut problems: Vec<LayoutProblem> = self
            .cut_sizes
            .iter()
            .filter_map(|cut| cut.check(sizes))
            .collect();
        if self.num_experts.is_none() && sizes.ep_size > 1 {
            problems.push(LayoutProblem::NoExperts {
                parameter: "expert_model_parallel_size",
                size: sizes.ep_size,
            });
        }
        problems
    }
}

impl CutSize {
    fn check(&self, sizes: &ParallelSizes) -> Option<LayoutProblem> {
        let (by, parts, megatron) = match self.axis {
            Axis::Tp => ("TP", vec![sizes.tp_size], "tensor_model_parallel_size"),
            Axis::TpCp if sizes.cp_size == 1 => {
                ("TP", vec![sizes.tp_size], "tensor_model_parallel_size")
            }
            Axis::TpCp => (
                "TP x CP",
                vec![sizes.tp_size, sizes.cp_size],
                "tensor_model_parallel_size * context_parallel_size",
            ),
            Axis::Etp => ("ETP", vec![sizes.etp_size], "expert_tensor_parallel_size"),
            Axis::Ep => ("EP", vec![sizes.ep_size], "expert_model_parallel_size"),
        };
        indivisible(self.parameter, self.size, by, parts, megatron)
    }
}

/// A problem unless the product of `sizes` divides `size`.
pub(super) fn indivisible(
    parameter: &'static str,
    size: usize,
    by: &'static str,
    sizes: Vec<usize>,
    megatron: &'static str,
) -> Option<LayoutProblem> {
    let product = sizes
        .iter()
        .try_fold(1usize, |product, size| product.checked_mul(*size));
    if product.is_some_and(|product| size.is_multiple_of(product)) {
        return None;
    }
    Some(LayoutProblem::Indivisible(Indivisible {
        parameter,
        size,
        by,
        sizes,
        megatron,
    }))
}
