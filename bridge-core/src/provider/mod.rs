//! The facts of a config in Megatron's field names.
//!
//! Fields and values are those of Megatron Bridge's `Qwen35VLModelProvider`, `Qwen35VLMoEModelProvider`,
//! `Qwen35TokenClassificationModelProvider` and, for language models alone, `GPTModelProvider`, so far as they describe
//! the model. Settings of a Megatron run (parallel sizes, fusions, fp8, ...) are the run's to choose and
//! are not here.

mod fields;
pub mod run_config;

pub use fields::{ClassifierFields, CommonFields, MtpFields, VisionFields};

use serde::Serialize;

use crate::config::HfConfig;

/// A dense model as Megatron describes it, with a vision tower or without.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Qwen35VlProvider {
    /// What dense and mixture-of-experts models have.
    #[serde(flatten)]
    pub common: CommonFields,
    /// Width of the MLP.
    pub ffn_hidden_size: usize,
    /// None: the model is dense.
    pub num_moe_experts: Option<usize>,
}

/// A mixture-of-experts model as Megatron describes it, with a vision tower or without.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[expect(missing_docs, reason = "fields carry Megatron's names")]
pub struct Qwen35VlMoeProvider {
    /// What dense and mixture-of-experts models have.
    #[serde(flatten)]
    pub common: CommonFields,
    /// None: there is no dense MLP. Megatron sets 4 x hidden_size when it builds the model, and uses it nowhere.
    pub ffn_hidden_size: Option<usize>,
    pub num_moe_experts: usize,
    pub moe_router_topk: usize,
    pub moe_ffn_hidden_size: usize,
    pub moe_shared_expert_intermediate_size: usize,
    pub moe_shared_expert_gate: bool,
    pub moe_aux_loss_coeff: f64,
    pub moe_router_load_balancing_type: &'static str,
    pub moe_router_pre_softmax: bool,
    pub moe_router_score_function: &'static str,
    /// `None` without a vision tower: the dtype of the parameters.
    pub moe_router_dtype: Option<&'static str>,
    pub moe_router_enable_expert_bias: bool,
    pub moe_layer_freq: usize,
    pub moe_grouped_gemm: bool,
    pub moe_permute_fusion: bool,
    pub moe_token_dispatcher_type: &'static str,
    /// Of the class with a vision tower.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub audio_token_id: Option<i64>,
}

/// A model as Megatron's providers describe it.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(untagged)]
pub enum Provider {
    /// Dense.
    Dense(Qwen35VlProvider),
    /// Mixture of experts.
    Moe(Qwen35VlMoeProvider),
}

impl Provider {
    /// The provider of a config.
    #[must_use]
    pub fn from_config(config: &HfConfig) -> Self {
        let common = CommonFields::from_config(config);
        match &config.text.moe {
            None => Self::Dense(Qwen35VlProvider {
                common,
                ffn_hidden_size: config.text.intermediate_size.unwrap_or_default(),
                num_moe_experts: None,
            }),
            Some(moe) => Self::Moe(Qwen35VlMoeProvider {
                common,
                ffn_hidden_size: None,
                num_moe_experts: moe.num_experts,
                moe_router_topk: moe.num_experts_per_tok,
                moe_ffn_hidden_size: moe.moe_intermediate_size,
                moe_shared_expert_intermediate_size: moe.shared_expert_intermediate_size,
                moe_shared_expert_gate: true,
                moe_aux_loss_coeff: moe.router_aux_loss_coef,
                moe_router_load_balancing_type: "global_aux_loss",
                moe_router_pre_softmax: false,
                moe_router_score_function: "softmax",
                moe_router_dtype: config.vision.is_some().then_some("fp32"),
                moe_router_enable_expert_bias: false,
                moe_layer_freq: 1,
                moe_grouped_gemm: true,
                moe_permute_fusion: true,
                moe_token_dispatcher_type: "alltoall",
                audio_token_id: config.vision.as_ref().map(|_| config.audio_token_id),
            }),
        }
    }

    /// What dense and mixture-of-experts models have.
    #[must_use]
    pub fn common(&self) -> &CommonFields {
        match self {
            Self::Dense(provider) => &provider.common,
            Self::Moe(provider) => &provider.common,
        }
    }

    /// The path of Megatron Bridge's class, as run_config.yaml names it.
    #[must_use]
    pub fn target(&self) -> String {
        let module = match self.common().vision {
            None => "gpt_provider",
            Some(_) => "qwen_vl.qwen35_vl_provider",
        };
        format!("megatron.bridge.models.{module}.{}", self.class_name())
    }

    /// The path of transformers' class of the vision config; `None` without a vision tower.
    #[must_use]
    pub fn vision_class(&self) -> Option<&'static str> {
        self.common().vision.as_ref()?;
        Some(match self {
            Self::Dense(_) => {
                "transformers.models.qwen3_5.configuration_qwen3_5.Qwen3_5VisionConfig"
            }
            Self::Moe(_) => {
                "transformers.models.qwen3_5_moe.configuration_qwen3_5_moe.Qwen3_5MoeVisionConfig"
            }
        })
    }

    /// The name of Megatron Bridge's class.
    #[must_use]
    pub fn class_name(&self) -> &'static str {
        let common = self.common();
        match self {
            _ if common.vision.is_none() => "GPTModelProvider",
            _ if common.classifier.is_some() => "Qwen35TokenClassificationModelProvider",
            Self::Dense(_) => "Qwen35VLModelProvider",
            Self::Moe(_) => "Qwen35VLMoEModelProvider",
        }
    }
}
