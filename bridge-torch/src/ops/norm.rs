//! Normalisations over the last dimension.

use tch::{Kind, Tensor};

use super::compute_kind;
use super::policy::{Kernels, Op};
use crate::shim::{at, bridge, one, pair};

/// Zero-centred RMSNorm: `x * rsqrt(mean(x^2) + eps) * (1 + weight)` over the last dimension, in float32, cast back once.
///
/// `x`: `[.., d]`, `weight`: `[d]`. One autograd node with a gradient written by hand. Defined by: transformers, `Qwen3_5RMSNorm`.
pub fn rms_norm(kernels: Kernels, x: &Tensor, weight: &Tensor, eps: f64) -> Tensor {
    one(match kernels.run(Op::Norm) {
        true => bridge::kernel_rms_norm(at(x), at(weight), eps),
        false => bridge::rms_norm(at(x), at(weight), eps),
    })
}

/// The [`rms_norm`] of `x + residual`, and `x + residual` itself, rounded to their kind before it is normalised.
///
/// `x`, `residual`: `[.., d]`; returns two of the same shape.
pub fn add_rms_norm(
    kernels: Kernels,
    x: &Tensor,
    residual: &Tensor,
    weight: &Tensor,
    eps: f64,
) -> (Tensor, Tensor) {
    if kernels.run(Op::Norm) {
        let out = bridge::kernel_add_rms_norm(at(x), at(residual), at(weight), eps);
        return pair(out);
    }
    let sum = x + residual;
    (rms_norm(kernels, &sum, weight, eps), sum)
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
