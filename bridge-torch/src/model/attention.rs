//! Full attention with an output gate, in Megatron's fused layout.
//!
//! Shapes: b batch, s new tokens, t all tokens, g groups (key-value heads), n query heads of a group, d head.

use bridge_core::config::TextConfig;
use tch::Tensor;

use super::ModelError;
use super::cache::KeysValues;
use super::layer::Context;
use super::linear::Linear;
use crate::ops::attention::attention;
use crate::ops::norm::rms_norm;
use crate::ops::rotary::apply_rotary;
use crate::params::ParamStore;

/// `linear_qkv`, the q and k norms and `linear_proj` of one layer.
#[derive(Debug)]
pub(super) struct Attention {
    qkv: Linear,
    q_norm: Tensor,
    k_norm: Tensor,
    proj: Linear,
    groups: i64,
    heads_a_group: i64,
    head_dim: i64,
    eps: f64,
}

impl Attention {
    pub(super) fn new(
        config: &TextConfig,
        params: &ParamStore,
        name: &str,
    ) -> Result<Self, ModelError> {
        let size = |value: usize| i64::try_from(value).unwrap_or(i64::MAX);
        let groups = size(config.num_key_value_heads);
        Ok(Self {
            qkv: Linear::without_bias(params, &format!("{name}.linear_qkv"))?,
            q_norm: params.get(&format!("{name}.q_layernorm.weight"))?,
            k_norm: params.get(&format!("{name}.k_layernorm.weight"))?,
            proj: Linear::without_bias(params, &format!("{name}.linear_proj"))?,
            groups,
            heads_a_group: size(config.num_attention_heads) / groups,
            head_dim: size(config.head_dim),
            eps: config.rms_norm_eps,
        })
    }

    /// `x`: `[b, s, hidden]`, normed; returns the same shape.
    pub(super) fn forward(
        &self,
        x: &Tensor,
        context: &Context<'_>,
        cache: Option<&mut KeysValues>,
    ) -> Tensor {
        let (b, s) = (x.size()[0], x.size()[1]);
        let (d, heads) = (self.head_dim, self.groups * self.heads_a_group);
        // A group's rows: its queries, their gates, the key, the value. One split, because its
        // backward is one concatenation.
        let queries = self.heads_a_group * d;
        let mut parts = self
            .qkv
            .forward(x)
            .view([b, s, self.groups, 2 * queries + 2 * d])
            .split_with_sizes([queries, queries, d, d], -1)
            .into_iter();
        let mut next = || parts.next().expect("four sizes give four parts");
        let q = next().reshape([b, s, heads, d]);
        let gate = next().reshape([b, s, heads * d]);
        let (k, v) = (next(), next()); // [b, s, g, d]
        let q = rms_norm(context.kernels, &q, &self.q_norm, self.eps);
        let k = rms_norm(context.kernels, &k, &self.k_norm, self.eps);
        let (q, k) = apply_rotary(context.kernels, &q, &k, context.cos, context.sin);
        let (k, v) = match cache {
            Some(cache) => cache.append(&k, &v), // [b, t, g, d]
            None => (k, v),
        };
        let out = attention(&q, &k, &v, context.sequences, Some(context.seen));
        self.proj
            .forward(&(out.reshape([b, s, heads * d]) * gate.sigmoid()))
    }
}
