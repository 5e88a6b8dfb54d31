//! The cross entropy of the output layer.

use tch::Tensor;

use crate::shim::{at, bridge, own};

/// `sum over targets of -log softmax(hidden weight^T)[target] / normalizer`, a scalar in float32 (float64 for float64).
///
/// `hidden`: `[n, h]`; `weight`: `[V, h]`; `targets`: `[n]` int64, -100 is ignored. Gradients come from the forward pass,
/// so logits exist once, in pieces of rows in the model's dtype, and never for all rows in float32.
///
/// # Panics
/// When shapes do not fit or a target is outside of the vocabulary.
pub fn linear_cross_entropy(
    hidden: &Tensor,
    weight: &Tensor,
    targets: &Tensor,
    normalizer: f64,
) -> Tensor {
    let loss = bridge::linear_cross_entropy(at(hidden), at(weight), at(targets), normalizer);
    own(loss.expect("hidden [n, h], weight [V, h] and targets [n] below V"))
}
