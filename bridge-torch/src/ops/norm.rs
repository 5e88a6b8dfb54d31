//! Normalisations over the last dimension.

use tch::{Kind, Tensor};

use super::compute_kind;
use crate::shim::{at, bridge, own};

/// Zero-centred RMSNorm: `x * rsqrt(mean(x^2) + eps) * (1 + weight)` over the last dimension, in float32, cast back once.
///
/// `x`: `[.., d]`, `weight`: `[d]`. One autograd node with a gradient written by hand. Defined by: transformers, `Qwen3_5RMSNorm`.
pub fn rms_norm(x: &Tensor, weight: &Tensor, eps: f64) -> Tensor {
    let out = bridge::rms_norm(at(x), at(weight), eps);
    own(out.expect("x [.., d] and a weight [d]"))
}

/// The norm behind the delta rule: `rms(x) * (1 + weight) * silu(gate)` over the last dimension.
///
/// `x`, `gate`: `[.., d]`; `weight`: `[d]`, zero-centred as Megatron's `out_norm` stores it. The normed value is rounded to
/// `x`'s kind before the weight, the rest is float32. Defined by: transformers, `Qwen3_5RMSNormGated`.
pub fn rms_norm_gated(x: &Tensor, gate: &Tensor, weight: &Tensor, eps: f64) -> Tensor {
    let wide = compute_kind(x.kind());
    let normed = unit_rms(&x.to_kind(wide), eps).to_kind(x.kind());
    let scaled = normed.to_kind(wide) * (weight.to_kind(wide) + 1.0);
    (scaled * gate.to_kind(wide).silu()).to_kind(x.kind())
}

/// LayerNorm over the last dimension, with the usual weight and bias `[d]`.
pub fn layer_norm(x: &Tensor, weight: &Tensor, bias: &Tensor, eps: f64) -> Tensor {
    x.layer_norm(weight.size(), Some(weight), Some(bias), eps, false)
}

fn unit_rms(x: &Tensor, eps: f64) -> Tensor {
    let mean = x.square().mean_dim([-1i64].as_slice(), true, None::<Kind>);
    x * (mean + eps).rsqrt()
}
