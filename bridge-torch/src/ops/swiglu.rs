//! The gated activation of the feed-forward layers.

use tch::Tensor;

/// `silu(gate) * up` of a fused `[.., 2 I]` whose first half is the gate; returns `[.., I]`.
pub fn swiglu(x: &Tensor) -> Tensor {
    let halves = x.chunk(2, -1);
    halves[0].silu() * &halves[1]
}
