//! The cross entropy of the output layer.

use tch::Tensor;

use super::policy::{Kernels, Op};
use crate::shim::{at, bridge, one};

/// `sum over targets of -log softmax(hidden weight^T)[target] / normalizer`, a scalar in float32 (float64 for float64).
///
/// `hidden`: `[n, h]`; `weight`: `[V, h]`; `targets`: `[n]` int64, -100 is ignored. Gradients come from the forward pass,
/// so logits exist once, in pieces of rows in the model's dtype, and never for all rows in float32.
///
/// # Panics
/// When shapes do not fit or a target is outside of the vocabulary (kernels, which read no target on the host, then give an
/// infinite loss).
pub fn linear_cross_entropy(
    kernels: Kernels,
    hidden: &Tensor,
    weight: &Tensor,
    targets: &Tensor,
    normalizer: f64,
) -> Tensor {
    let (hidden, weight, targets) = (at(hidden), at(weight), at(targets));
    one(match kernels.run(Op::LinearCrossEntropy) {
        true => bridge::kernel_linear_cross_entropy(hidden, weight, targets, normalizer),
        false => bridge::linear_cross_entropy(hidden, weight, targets, normalizer),
    })
}
