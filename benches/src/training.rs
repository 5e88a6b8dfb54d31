//! Synthetic models at real shapes, and a training step as `peers/hf_train.py` makes it.

use std::path::Path;

use bridge_core::AutoBridge;
use bridge_core::config::HfConfig;
use bridge_torch::batch::Batch;
use bridge_torch::model::{LossOptions, ModelOptions, Qwen3VlModel};
use bridge_torch::optim::{AdamW, AdamWOptions, OptimizedParam};
use serde_json::{Value, json};
use tch::{Device, Kind, Tensor};

/// The model that `peers/hf_train.py` trains: hidden 512, `layer_types` of its layers, vocabulary 32000.
pub fn config(moe: bool, layer_types: &[&str]) -> Value {
    let mut text = json!({
        "vocab_size": 32000, "hidden_size": 512, "num_hidden_layers": layer_types.len(),
        "layer_types": layer_types, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 64,
        "linear_conv_kernel_dim": 4, "linear_key_head_dim": 64, "linear_value_head_dim": 64,
        "linear_num_key_heads": 4, "linear_num_value_heads": 8, "max_position_embeddings": 4096,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10_000_000, "partial_rotary_factor": 0.25,
            "mrope_interleaved": true, "mrope_section": [3, 3, 2]},
    });
    let own = if moe {
        json!({"num_experts": 16, "num_experts_per_tok": 4, "moe_intermediate_size": 256,
            "shared_expert_intermediate_size": 256})
    } else {
        json!({"intermediate_size": 1536})
    };
    if let (Value::Object(text), Value::Object(own)) = (&mut text, own) {
        text.extend(own);
    }
    let family = if moe { "Qwen3_5Moe" } else { "Qwen3_5" };
    json!({
        "architectures": [format!("{family}ForConditionalGeneration")],
        "image_token_id": 31990, "video_token_id": 31991, "vision_start_token_id": 31992,
        "vision_end_token_id": 31993, "text_config": text,
        "vision_config": {"depth": 2, "hidden_size": 128, "intermediate_size": 256, "num_heads": 4,
            "patch_size": 16, "spatial_merge_size": 2, "temporal_patch_size": 2, "out_hidden_size": 512,
            "num_position_embeddings": 256},
    })
}

/// The eight layers of the whole model.
pub const EIGHT_LAYERS: [&str; 8] = [
    "linear_attention",
    "linear_attention",
    "linear_attention",
    "full_attention",
    "linear_attention",
    "linear_attention",
    "linear_attention",
    "full_attention",
];

/// A model of `config` with random weights.
pub fn model(config: Value, dtype: Kind) -> Qwen3VlModel {
    let config = HfConfig::from_json(config, Path::new("config.json")).expect("a sound config");
    let options = ModelOptions {
        dtype,
        ..ModelOptions::default()
    };
    Qwen3VlModel::random(&AutoBridge::from_hf_config(config), &options, 0).expect("a model")
}

/// Random text, every token a target.
pub fn batch(rows: i64, seq: i64) -> Batch {
    tch::manual_seed(1);
    let ids = Tensor::randint(31000, [rows, seq], (Kind::Int64, Device::Cpu));
    Batch {
        labels: Some(ids.shallow_clone()),
        ..Batch::new(ids)
    }
}

/// Trains as `peers/hf_train.py` does: clip to 1, AdamW with states in the weights' dtype and decay on every parameter.
pub struct Training {
    model: Qwen3VlModel,
    optimizer: AdamW,
    options: LossOptions,
}

impl Training {
    /// A run from the first step.
    pub fn new(model: Qwen3VlModel) -> Self {
        let params: Vec<OptimizedParam> = model
            .params()
            .iter()
            .map(|(name, tensor)| OptimizedParam {
                name: name.to_owned(),
                tensor: tensor.shallow_clone(),
                weight_decay: 0.1,
            })
            .collect();
        let options = AdamWOptions {
            masters: false,
            ..AdamWOptions::default()
        };
        let moe = model.config().text.moe.as_ref();
        let coefficient = moe.map_or(0.0, |moe| moe.router_aux_loss_coef);
        Self {
            optimizer: AdamW::new(&params, &options).expect("an optimizer"),
            options: LossOptions {
                router_aux_loss_coef: coefficient,
                mtp_loss_scaling_factor: 0.0,
                ..LossOptions::default()
            },
            model,
        }
    }

    /// One step; returns the loss before it.
    pub fn step(&mut self, batch: &Batch) -> f64 {
        let losses = self
            .model
            .loss(batch, &self.options)
            .expect("a batch that fits");
        losses.total.backward();
        self.optimizer.step(1e-4, Some(1.0)).expect("a step");
        self.optimizer.zero_grad();
        losses.total.double_value(&[])
    }
}
