//! The gated activation of the feed-forward layers.

use tch::Tensor;

use super::policy::{Kernels, Op};
use crate::shim::{at, bridge, one};

/// `silu(gate) * up` of a fused `[.., 2 I]` whose first half is the gate; returns `[.., I]`.
///
/// One autograd node with a gradient written by hand.
pub fn swiglu(kernels: Kernels, x: &Tensor) -> Tensor {
    one(match kernels.run(Op::Swiglu) {
        true => bridge::kernel_swiglu(at(x)),
        false => bridge::swiglu(at(x)),
    })
}
