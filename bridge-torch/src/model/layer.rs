//! One decoder layer: a mixer and an MLP, each behind a norm and beside a residual.

use bridge_core::config::{LayerType, TextConfig};
use tch::Tensor;

use super::ModelError;
use super::attention::Attention;
use super::cache::LayerCache;
use super::gated_delta_net::GatedDeltaNet;
use super::mlp::Mlp;
use super::moe::{MixtureOfExperts, RouterOutput};
use crate::ops::norm::{add_rms_norm, rms_norm};
use crate::ops::policy::Kernels;
use crate::ops::sequences::{Pack, Sequences};
use crate::params::ParamStore;

/// What all layers of one forward pass share.
#[derive(Debug)]
pub(super) struct Context<'a> {
    pub(super) kernels: Kernels,
    pub(super) sequences: &'a Sequences,
    /// Of `sequences`, where kernels need it.
    pub(super) pack: Option<&'a Pack>,
    /// Of [`crate::ops::rotary::mrope_cos_sin`].
    pub(super) cos: &'a Tensor,
    pub(super) sin: &'a Tensor,
    /// Tokens that the cache holds already.
    pub(super) seen: i64,
}

#[derive(Debug)]
enum Mixer {
    Attention(Attention),
    DeltaNet(Box<GatedDeltaNet>),
}

#[derive(Debug)]
enum FeedForward {
    Dense(Mlp),
    Experts(Box<MixtureOfExperts>),
}

/// A layer of the decoder, or the one inside the prediction head.
#[derive(Debug)]
pub(super) struct DecoderLayer {
    mixer_norm: Tensor,
    mixer: Mixer,
    feed_norm: Tensor,
    feed: FeedForward,
    eps: f64,
}

impl DecoderLayer {
    /// Takes the parameters under `name` (`language_model.decoder.layers.0`, ...).
    pub(super) fn new(
        config: &TextConfig,
        kind: LayerType,
        params: &ParamStore,
        name: &str,
    ) -> Result<Self, ModelError> {
        let mixer_name = format!("{name}.self_attention");
        let mlp_name = format!("{name}.mlp");
        let (mixer, mixer_norm) = match kind {
            LayerType::FullAttention => (
                Mixer::Attention(Attention::new(config, params, &mixer_name)?),
                format!("{mixer_name}.linear_qkv.layer_norm_weight"),
            ),
            LayerType::LinearAttention => (
                Mixer::DeltaNet(Box::new(GatedDeltaNet::new(config, params, &mixer_name)?)),
                format!("{mixer_name}.in_proj.layer_norm_weight"),
            ),
        };
        let (feed, feed_norm) = match &config.moe {
            Some(moe) => (
                FeedForward::Experts(Box::new(MixtureOfExperts::new(moe, params, &mlp_name)?)),
                format!("{name}.pre_mlp_layernorm.weight"),
            ),
            None => (
                FeedForward::Dense(Mlp::new(params, &mlp_name)?),
                format!("{mlp_name}.linear_fc1.layer_norm_weight"),
            ),
        };
        Ok(Self {
            mixer_norm: params.get(&mixer_norm)?,
            mixer,
            feed_norm: params.get(&feed_norm)?,
            feed,
            eps: config.rms_norm_eps,
        })
    }

    /// `x`: `[batch, seq, hidden]`; returns the same shape, and what the router decided if there is one.
    pub(super) fn forward(
        &self,
        x: &Tensor,
        context: &Context<'_>,
        cache: Option<&mut LayerCache>,
    ) -> (Tensor, Option<RouterOutput>) {
        let kernels = context.kernels;
        let normed = rms_norm(kernels, x, &self.mixer_norm, self.eps);
        let mixed = match &self.mixer {
            Mixer::Attention(attention) => {
                let cache = cache.map(|cache| &mut cache.keys_values);
                attention.forward(&normed, context, cache)
            }
            Mixer::DeltaNet(net) => {
                net.forward(&normed, context, cache.map(|cache| &mut cache.delta))
            }
        };
        let (normed, x) = add_rms_norm(kernels, x, &mixed, &self.feed_norm, self.eps);
        let (fed, router) = match &self.feed {
            FeedForward::Dense(mlp) => (mlp.forward(kernels, &normed), None),
            FeedForward::Experts(moe) => {
                let (out, router) = moe.forward(kernels, &normed);
                (out, Some(router))
            }
        };
        (x + fed, router)
    }
}
