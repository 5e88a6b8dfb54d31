//! The gated delta net between its two projections.

use bridge_core::config::TextConfig;
use tch::Tensor;

use super::ModelError;
use super::layer::Context;
use super::linear::Linear;
use crate::ops::gdn::{GdnContext, GdnDims, GdnState, GdnWeights, gdn_core};
use crate::params::ParamStore;

/// `in_proj` (rows q, k, v, z, b, a), the convolution, the gates' parameters, `out_norm` and `out_proj`.
#[derive(Debug)]
pub(super) struct GatedDeltaNet {
    in_proj: Linear,
    /// `[channels, 1, kernel]`
    conv1d: Tensor,
    a_log: Tensor,
    dt_bias: Tensor,
    out_norm: Tensor,
    out_proj: Linear,
    dims: GdnDims,
}

impl GatedDeltaNet {
    pub(super) fn new(
        config: &TextConfig,
        params: &ParamStore,
        name: &str,
    ) -> Result<Self, ModelError> {
        let size = |value: usize| i64::try_from(value).unwrap_or(i64::MAX);
        Ok(Self {
            in_proj: Linear::without_bias(params, &format!("{name}.in_proj"))?,
            conv1d: params.get(&format!("{name}.conv1d.weight"))?,
            a_log: params.get(&format!("{name}.A_log"))?,
            dt_bias: params.get(&format!("{name}.dt_bias"))?,
            out_norm: params.get(&format!("{name}.out_norm.weight"))?,
            out_proj: Linear::without_bias(params, &format!("{name}.out_proj"))?,
            dims: GdnDims {
                key_heads: size(config.linear_num_key_heads),
                value_heads: size(config.linear_num_value_heads),
                key_dim: size(config.linear_key_head_dim),
                value_dim: size(config.linear_value_head_dim),
                kernel: size(config.linear_conv_kernel_dim),
                eps: config.rms_norm_eps,
            },
        })
    }

    /// `x`: `[batch, seq, hidden]`, normed; returns the same shape.
    pub(super) fn forward(
        &self,
        x: &Tensor,
        context: &Context<'_>,
        state: Option<&mut Option<GdnState>>,
    ) -> Tensor {
        let place = GdnContext {
            sequences: context.sequences,
            pack: context.pack,
            state: state.as_ref().and_then(|state| state.as_ref()),
            state_wanted: state.is_some(),
        };
        let weights = GdnWeights {
            conv1d: &self.conv1d.squeeze_dim(1),
            a_log: &self.a_log,
            dt_bias: &self.dt_bias,
            out_norm: &self.out_norm,
        };
        let projected = self.in_proj.forward(x);
        let (out, after) = gdn_core(context.kernels, &projected, &weights, &self.dims, &place);
        if let Some(state) = state {
            *state = after;
        }
        self.out_proj.forward(&out)
    }
}
