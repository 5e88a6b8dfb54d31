//! What a checkpoint's names say about its form, read once; rows are chosen by it.

use crate::config::HfConfig;

/// How a checkpoint stores the experts of a layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ExpertLayout {
    /// `gate_up_proj` `[E, 2I, h]` and `down_proj` `[E, h, I]`.
    Packed,
    /// One `gate_proj`, `up_proj` and `down_proj` an expert.
    PerExpert,
}

/// How Megatron names experts.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
pub enum ExpertNames {
    /// `experts.linear_fc1.weight{x}`: `moe_grouped_gemm`, the default.
    #[default]
    Grouped,
    /// `experts.local_experts.{x}.linear_fc1.weight`.
    Sequential,
}

/// The form of a checkpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Facts {
    /// Experts of the trunk.
    pub experts: ExpertLayout,
    /// Experts of the multi-token-prediction layer: Qwen3.5 stores them one by one, Qwen3.6 packed.
    pub mtp_experts: ExpertLayout,
    /// Whether the head is part of the mapping.
    pub mtp: bool,
    /// Megatron's names of experts.
    pub expert_names: ExpertNames,
}

impl Facts {
    /// The form in which the hub stores a new Qwen3.5 checkpoint: packed experts, those of the head one by one.
    #[must_use]
    pub fn published(config: &HfConfig) -> Self {
        Self {
            experts: ExpertLayout::Packed,
            mtp_experts: ExpertLayout::PerExpert,
            mtp: config.text.mtp_num_hidden_layers > 0,
            expert_names: ExpertNames::Grouped,
        }
    }

    /// The form of a checkpoint with these tensor names. A mixture of both layouts shows as missing tensors later.
    pub fn detect<'a>(config: &HfConfig, names: impl IntoIterator<Item = &'a str>) -> Self {
        let mut facts = Self {
            experts: ExpertLayout::PerExpert,
            mtp_experts: ExpertLayout::PerExpert,
            ..Self::published(config)
        };
        for name in names {
            if name.ends_with(".mlp.experts.gate_up_proj")
                || name.ends_with(".mlp.experts.down_proj")
            {
                if name.starts_with("mtp.") {
                    facts.mtp_experts = ExpertLayout::Packed;
                } else {
                    facts.experts = ExpertLayout::Packed;
                }
            }
        }
        facts
    }
}
