//! The multi-token prediction head: one more layer that predicts the token after the next.

use bridge_core::config::{LayerType, TextConfig};
use tch::Tensor;

use super::ModelError;
use super::layer::{Context, DecoderLayer};
use super::linear::Linear;
use crate::ops::norm::rms_norm;
use crate::params::ParamStore;

/// Norms, `eh_proj` and the layer of the head; embedding and output layer are the trunk's.
#[derive(Debug)]
pub(super) struct MtpHead {
    enorm: Tensor,
    hnorm: Tensor,
    eh_proj: Linear,
    layer: DecoderLayer,
    final_norm: Tensor,
    eps: f64,
}

impl MtpHead {
    pub(super) fn new(config: &TextConfig, params: &ParamStore) -> Result<Self, ModelError> {
        if config.mtp_num_hidden_layers > 1 {
            return Err(ModelError::Unsupported {
                what: "a prediction head of more than one layer",
                found: format!("mtp_num_hidden_layers {}", config.mtp_num_hidden_layers),
            });
        }
        let name = "language_model.mtp.layers.0";
        let layer = format!("{name}.mtp_model_layer");
        Ok(Self {
            enorm: params.get(&format!("{name}.enorm.weight"))?,
            hnorm: params.get(&format!("{name}.hnorm.weight"))?,
            eh_proj: Linear::without_bias(params, &format!("{name}.eh_proj"))?,
            layer: DecoderLayer::new(config, LayerType::FullAttention, params, &layer)?,
            final_norm: params.get(&format!("{name}.final_layernorm.weight"))?,
            eps: config.rms_norm_eps,
        })
    }

    /// What the output layer reads to predict token i + 2, `[batch, seq, hidden]`.
    ///
    /// `next`: embeddings of token i + 1 (placeholders of images keep their word embedding, as in Megatron-Core);
    /// `hidden`: the trunk's output after its final norm. Positions are those of token i.
    pub(super) fn forward(&self, next: &Tensor, hidden: &Tensor, context: &Context<'_>) -> Tensor {
        let joined = Tensor::cat(
            &[
                rms_norm(context.kernels, next, &self.enorm, self.eps),
                rms_norm(context.kernels, hidden, &self.hnorm, self.eps),
            ],
            -1,
        );
        let (y, _router) = self
            .layer
            .forward(&self.eh_proj.forward(&joined), context, None);
        rms_norm(context.kernels, &y, &self.final_norm, self.eps)
    }
}
