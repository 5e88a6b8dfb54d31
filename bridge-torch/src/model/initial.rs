//! A model without a checkpoint: random weights of the published form, for measurements.

use bridge_core::AutoBridge;
use tch::{Kind, Tensor};

use super::error::ModelError;
use super::options::ModelOptions;
use super::qwen3_vl::Qwen3VlModel;
use crate::params::ParamStore;

impl Qwen3VlModel {
    /// Builds the model of a config with random weights (`trainer init` writes random checkpoints).
    ///
    /// Draws from libtorch's generator, which it seeds.
    ///
    /// # Errors
    /// [`ModelError`] when the config asks for what the model does not compute.
    pub fn random(
        bridge: &AutoBridge,
        options: &ModelOptions,
        seed: i64,
    ) -> Result<Self, ModelError> {
        let plan = super::checkpoint::plan(bridge, options)?;
        let experts = bridge.config().text.moe.as_ref();
        let mut params = ParamStore::allocate(&plan, experts.map_or(1, |moe| moe.num_experts))?;
        tch::manual_seed(seed);
        for (name, tensor) in params.iter() {
            fill(name, tensor, bridge.config().text.initializer_range);
        }
        params.move_to(options.device)?;
        Self::from_params(bridge.config().clone(), params, options)
    }
}

/// Zero-centred norms and biases 0, LayerNorm weights and dt_bias 1, A_log the log of uniform(0.01, 16), all others normal.
fn fill(name: &str, tensor: &Tensor, range: f64) {
    let mut tensor = tensor.shallow_clone();
    let layer_norm = name.starts_with("vision_model.")
        && (name.ends_with("layer_norm_weight") || name.ends_with("norm.weight"));
    if name.ends_with(".A_log") {
        let drawn = tensor.to_kind(Kind::Float).uniform_(0.01, 16.0).log();
        tensor.copy_(&drawn);
    } else if name.ends_with(".dt_bias") || layer_norm {
        let _ = tensor.fill_(1.0);
    } else if tensor.dim() == 1 {
        let _ = tensor.zero_();
    } else {
        let _ = tensor.normal_(0.0, range);
    }
}
