//! Optimizers over the tensors of a [`crate::ops`] model; they know names and decay, nothing of layers.

mod adamw;

pub use adamw::{AdamW, AdamWError, AdamWOptions, OptimizedParam};
