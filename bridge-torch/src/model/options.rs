//! Options of building and running the model.

use bridge_core::config::TextConfig;
use tch::{Device, Kind, Tensor};

use super::moe::RouterOutput;
use crate::ops::policy::{Implementation, KernelFacts, KernelPolicy, Kernels, PolicyError};

/// How a model is built.
#[derive(Debug, Clone)]
pub struct ModelOptions {
    /// float32, float64 or bfloat16. In bfloat16 the parameters of the delta net's decay (`A_log`, and `dt_bias` where
    /// the checkpoint holds it in float32) and its `out_norm` stay in float32.
    pub dtype: Kind,
    /// Where parameters and batches live.
    pub device: Device,
    /// Which implementation of each op runs.
    pub kernels: KernelPolicy,
    /// Whether the prediction head is built when the checkpoint has one.
    pub mtp: bool,
}

impl Default for ModelOptions {
    fn default() -> Self {
        Self {
            dtype: Kind::Float,
            device: Device::Cpu,
            kernels: KernelPolicy::default(),
            mtp: true,
        }
    }
}

impl ModelOptions {
    /// Which ops run on kernels, and how each is computed, in words; without a config, as far as no size decides.
    ///
    /// # Errors
    /// As [`KernelPolicy::resolve`].
    pub fn resolve_kernels(
        &self,
        config: Option<&TextConfig>,
    ) -> Result<(Kernels, Vec<Implementation>), PolicyError> {
        self.kernels.resolve(&KernelFacts {
            config,
            dtype: self.dtype,
            device: self.device,
        })
    }
}

/// What a forward pass gives beside the positions.
#[derive(Debug, Clone)]
pub struct ForwardOptions {
    /// Input of every layer, and the last one's output.
    pub hidden_states: bool,
    /// Logits of every token.
    pub logits: bool,
    /// Logits and losses of the prediction head, when the model has one.
    pub mtp: bool,
    /// Weight of the router's auxiliary loss in `loss`; `None`: `router_aux_loss_coef` of the config.
    pub router_aux_loss_coef: Option<f64>,
    /// Weight of the prediction head's loss in `total_loss`.
    pub mtp_loss_scaling_factor: f64,
}

impl Default for ForwardOptions {
    fn default() -> Self {
        Self {
            hidden_states: true,
            logits: true,
            mtp: true,
            router_aux_loss_coef: None,
            mtp_loss_scaling_factor: 0.1,
        }
    }
}

/// Outputs of a forward pass. Losses are absent without a label that is a target.
#[derive(Debug)]
pub struct ModelOutput {
    /// `[3, batch, seq]`: temporal, height, width.
    pub position_ids: Tensor,
    /// For each sample: largest position + 1 - number of real tokens. Only with images or videos.
    pub rope_deltas: Option<Vec<i64>>,
    /// `[image tokens, hidden]`
    pub visual: Option<Tensor>,
    /// `[video tokens, hidden]`
    pub visual_videos: Option<Tensor>,
    /// `[batch, seq, hidden]` each.
    pub hidden_states: Vec<Tensor>,
    /// `[batch, seq, hidden]` after the final norm.
    pub hidden_norm: Tensor,
    /// `[batch, seq, vocabulary]`
    pub logits: Option<Tensor>,
    /// One a layer with experts.
    pub routers: Vec<RouterOutput>,
    /// Language-model loss, with the weighted auxiliary loss.
    pub loss: Option<Tensor>,
    /// Of all routers together, over real tokens.
    pub aux_loss: Option<Tensor>,
    /// `[batch, seq, vocabulary]`
    pub mtp_logits: Option<Tensor>,
    /// Loss of the prediction head.
    pub mtp_loss: Option<Tensor>,
    /// `loss` and the weighted loss of the head.
    pub total_loss: Option<Tensor>,
}

/// How a training loss is made.
#[derive(Debug, Clone)]
pub struct LossOptions {
    /// Weight of the router's auxiliary loss; 0 leaves it out.
    pub router_aux_loss_coef: f64,
    /// Weight of the prediction head's loss; 0 leaves the head out.
    pub mtp_loss_scaling_factor: f64,
    /// The sum over this batch's targets is divided by it; `None`: the number of targets (the mean). With
    /// accumulation it is the number of targets of all batches of a step.
    pub normalizer: Option<f64>,
    /// The same for the prediction head.
    pub mtp_normalizer: Option<f64>,
}

impl Default for LossOptions {
    fn default() -> Self {
        Self {
            router_aux_loss_coef: 0.0,
            mtp_loss_scaling_factor: 0.1,
            normalizer: None,
            mtp_normalizer: None,
        }
    }
}

/// Losses of a batch. All are scalars that gradients reach.
#[derive(Debug)]
pub struct Losses {
    /// The weighted sum, to call `backward` on.
    pub total: Tensor,
    /// Language-model loss alone.
    pub lm: Tensor,
    /// Loss of the prediction head, unweighted.
    pub mtp: Option<Tensor>,
    /// Auxiliary loss of the routers, unweighted.
    pub aux: Option<Tensor>,
    /// Targets of the language model in this batch.
    pub supervised_tokens: i64,
    /// Targets of the prediction head in this batch.
    pub mtp_tokens: i64,
}
