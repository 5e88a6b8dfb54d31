//! Tests of the golden room.
#![expect(clippy::unwrap_used, reason = "a test may panic")]

mod chat;
mod checkpoint;
#[cfg(feature = "torch")]
mod delta_rule;
#[cfg(feature = "torch")]
mod fixture;
#[cfg(feature = "torch")]
mod generation;
#[cfg(feature = "torch")]
mod gradcheck;
#[cfg(feature = "torch")]
mod gradients;
mod images;
mod layout;
mod mapping;
#[cfg(feature = "torch")]
mod model;
mod nothing_lost;
#[cfg(feature = "torch")]
mod ops;
#[cfg(feature = "torch")]
mod optimizer;
#[cfg(feature = "torch")]
mod packing;
mod stored;
mod surprises;
mod tokenizer;
mod torch_dist;
#[cfg(feature = "torch")]
mod training;
mod untrusted;
mod verify;
