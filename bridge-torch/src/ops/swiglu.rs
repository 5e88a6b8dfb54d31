//! The gated activation of the feed-forward layers.

use tch::Tensor;

use crate::shim::{at, bridge, own};

/// `silu(gate) * up` of a fused `[.., 2 I]` whose first half is the gate; returns `[.., I]`.
///
/// One autograd node with a gradient written by hand.
pub fn swiglu(x: &Tensor) -> Tensor {
    own(bridge::swiglu(at(x)).expect("x [.., 2 I]"))
}
