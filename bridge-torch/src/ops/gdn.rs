//! Everything of a gated delta net between its two projections.

use tch::Tensor;

use super::compute_kind;
use super::conv1d::causal_conv1d_silu;
use super::delta_rule::gated_delta_rule;
use super::norm::rms_norm_gated;
use super::sequences::Sequences;

/// Sizes of a gated delta net.
#[derive(Debug, Clone, Copy)]
pub struct GdnDims {
    /// Heads of q and k.
    pub key_heads: i64,
    /// Heads of v, z and of the states.
    pub value_heads: i64,
    /// Width of a q or k head.
    pub key_dim: i64,
    /// Width of a v head.
    pub value_dim: i64,
    /// Taps of the convolution.
    pub kernel: i64,
    /// Of the gated norm.
    pub eps: f64,
}

/// The small parameters of a gated delta net, under Megatron's names.
#[derive(Debug, Clone, Copy)]
pub struct GdnWeights<'a> {
    /// `[2 K + V, kernel]`, K and V the widths of all key and value heads.
    pub conv1d: &'a Tensor,
    /// `[value_heads]`.
    pub a_log: &'a Tensor,
    /// `[value_heads]`.
    pub dt_bias: &'a Tensor,
    /// `[value_dim]`, zero-centred.
    pub out_norm: &'a Tensor,
}

/// What a gated delta net remembers of the tokens before.
#[derive(Debug)]
pub struct GdnState {
    /// The last `kernel - 1` inputs of the convolution, `[n, 2 K + V, kernel - 1]`.
    pub conv: Tensor,
    /// `[n, value_heads, key_dim, value_dim]`, float32 (float64 in a float64 model).
    pub recurrent: Tensor,
}

impl GdnState {
    /// The same tensors again.
    pub fn shallow_clone(&self) -> Self {
        Self {
            conv: self.conv.shallow_clone(),
            recurrent: self.recurrent.shallow_clone(),
        }
    }
}

/// `beta = sigmoid(b)` in `b`'s kind and `g = -exp(a_log) softplus(a + dt_bias)` in float32 (float64 for float64).
///
/// `b`, `a`: `[.., value_heads]`.
pub fn gdn_gates(a: &Tensor, b: &Tensor, a_log: &Tensor, dt_bias: &Tensor) -> (Tensor, Tensor) {
    let wide = compute_kind(a.kind());
    let g = -a_log.to_kind(wide).exp() * (a.to_kind(wide) + dt_bias.to_kind(wide)).softplus();
    (b.sigmoid(), g)
}

/// Convolution, gates, delta rule and gated norm: from `in_proj`'s output to `out_proj`'s input.
///
/// - `in_proj_out`: `[batch, seq, 2 K + 2 V + 2 value_heads]` in the order q, k, v, z, b, a
/// - `state`: what an earlier call returned for the same samples
/// - returns `[batch, seq, V]` in the input's kind, and the state after the last real token of each sample
pub fn gdn_core(
    in_proj_out: &Tensor,
    weights: &GdnWeights<'_>,
    dims: &GdnDims,
    sequences: &Sequences,
    state: Option<&GdnState>,
) -> (Tensor, GdnState) {
    let (batch, seq) = (in_proj_out.size()[0], in_proj_out.size()[1]);
    let keys = dims.key_heads * dims.key_dim;
    let values = dims.value_heads * dims.value_dim;
    let masked = sequences.zero_padding(in_proj_out);
    let parts = masked.split_with_sizes(
        [
            2 * keys + values,
            values,
            dims.value_heads,
            dims.value_heads,
        ],
        -1,
    );
    let (u, conv) = causal_conv1d_silu(
        &parts[0],
        weights.conv1d,
        state.map(|state| &state.conv),
        sequences,
    );
    let qkv = u.split_with_sizes([keys, keys, values], -1);
    let heads = |x: &Tensor, heads, dim| x.reshape([batch, seq, heads, dim]);
    let (beta, g) = gdn_gates(&parts[3], &parts[2], weights.a_log, weights.dt_bias);
    let v = heads(&qkv[2], dims.value_heads, dims.value_dim);
    let (out, recurrent) = gated_delta_rule(
        &heads(&qkv[0], dims.key_heads, dims.key_dim),
        &heads(&qkv[1], dims.key_heads, dims.key_dim),
        &v,
        &g,
        &beta,
        state.map(|state| &state.recurrent),
        sequences,
    );
    let z = heads(&parts[1], dims.value_heads, dims.value_dim);
    let out = rms_norm_gated(&out, &z, weights.out_norm, dims.eps);
    (
        out.reshape([batch, seq, values]),
        GdnState { conv, recurrent },
    )
}
