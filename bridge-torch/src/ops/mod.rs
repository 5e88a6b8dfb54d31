//! The operations of the model: one file an op, with its shapes, its libtorch implementation and its gradient.
//!
//! Blocks call these functions and know nothing of implementations. Every op runs in float32, bfloat16 (float32 inside
//! where the model demands it) and float64, on any device, and is differentiable. Ops that mix positions take
//! [`sequences::Sequences`], so that no padding and no neighbour can leak into a sample.

pub mod attention;
pub mod conv1d;
pub mod delta_rule;
pub mod gdn;
pub mod loss;
pub mod moe;
pub mod norm;
pub mod policy;
pub mod rotary;
pub mod self_check;
pub mod sequences;
pub mod swiglu;

use tch::Kind;

/// The kind in which sums and exponentials are taken: float64 stays, everything else is float32.
pub(crate) fn compute_kind(kind: Kind) -> Kind {
    if kind == Kind::Double {
        Kind::Double
    } else {
        Kind::Float
    }
}
