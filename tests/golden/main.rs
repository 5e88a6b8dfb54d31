//! Tests of the golden room.
#![expect(clippy::unwrap_used, reason = "a test may panic")]

mod chat;
mod checkpoint;
mod delta_rule;
mod fixture;
mod generation;
mod gradcheck;
mod gradients;
mod images;
mod layout;
mod mapping;
mod model;
mod ops;
mod optimizer;
mod packing;
mod tokenizer;
mod torch_dist;
mod training;
