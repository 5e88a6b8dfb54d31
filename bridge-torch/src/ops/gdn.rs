//! Everything of a gated delta net between its two projections.

use tch::Tensor;

use super::compute_kind;
use super::conv1d::last_inputs;
use super::policy::{Kernels, Op};
use super::sequences::{Pack, Sequences};
use crate::shim::{absent, at, bridge, pair};

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

/// Whose tokens a call of [`gdn_core`] gets, what it goes on from, and whether another will go on from it.
#[derive(Debug, Clone, Copy)]
pub struct GdnContext<'a> {
    /// Which tokens belong together.
    pub sequences: &'a Sequences,
    /// Of the same sequences; kernels need it.
    pub pack: Option<&'a Pack>,
    /// What an earlier call returned for the same samples; zeros if absent.
    pub state: Option<&'a GdnState>,
    /// Whether the state is to be returned; training wants none.
    pub state_wanted: bool,
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
/// - returns `[batch, seq, V]` in the input's kind, and the state after the last real token of each sample
///
/// One node of the autograd graph with a gradient written by hand, float32 inside (float64 for float64). States take no part
/// in the gradient.
///
/// # Panics
/// When kernels are to run and there is no `pack`.
pub fn gdn_core(
    kernels: Kernels,
    in_proj_out: &Tensor,
    weights: &GdnWeights<'_>,
    dims: &GdnDims,
    context: &GdnContext<'_>,
) -> (Tensor, Option<GdnState>) {
    let GdnContext {
        sequences,
        pack,
        state,
        state_wanted,
    } = *context;
    let channels = 2 * dims.key_heads * dims.key_dim + dims.value_heads * dims.value_dim;
    let conv = state_wanted.then(|| {
        tch::no_grad(|| {
            let inputs = sequences.zero_padding(&in_proj_out.narrow(2, 0, channels));
            last_inputs(
                &inputs,
                dims.kernel,
                state.map(|state| &state.conv),
                sequences,
            )
        })
    });
    let joined =
        |conv: Option<Tensor>, recurrent: Tensor| conv.map(|conv| GdnState { conv, recurrent });
    if kernels.run(Op::Gdn) {
        let pack = pack.expect("kernels get the pack of the sequences");
        let (b, s) = (in_proj_out.size()[0], in_proj_out.size()[1]);
        let (out, recurrent) = pair(bridge::kernel_gdn_core(
            at(&in_proj_out.flatten(0, 1)),
            at(weights.conv1d),
            at(weights.a_log),
            at(weights.dt_bias),
            at(weights.out_norm),
            at(&state.map_or_else(absent, |state| pack.spread(&state.conv))),
            at(&state.map_or_else(absent, |state| pack.spread(&state.recurrent))),
            at(&pack.cu_seqlens),
            at(&pack.chunk_map),
            dims.key_heads,
            dims.eps,
            state_wanted,
        ));
        let out = sequences.zero_padding(&out.view([b, s, -1]));
        let recurrent = match state_wanted {
            true => pack.samples(&recurrent),
            false => recurrent,
        };
        return (out, joined(conv, recurrent));
    }
    let conv_before = state.map_or_else(absent, |state| state.conv.shallow_clone());
    let recurrent_before = state.map_or_else(absent, |state| state.recurrent.shallow_clone());
    let mask = sequences.current_mask().unwrap_or_else(absent);
    let (out, recurrent) = pair(bridge::gdn_core(
        at(in_proj_out),
        at(weights.conv1d),
        at(weights.a_log),
        at(weights.dt_bias),
        at(weights.out_norm),
        at(&conv_before),
        at(&recurrent_before),
        at(&mask),
        sequences.borders(),
        dims.key_heads,
        dims.key_dim,
        dims.eps,
    ));
    (out, joined(conv, recurrent))
}
