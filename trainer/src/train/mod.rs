//! Fine-tuning: configuration, order of the data, the loop, and what it leaves behind.
//!
//! The loop owns order and time only; loss, optimizer step, checkpoint, evaluation and reports are parts that it calls.
//! Invariants: a run that is killed at any moment resumes to the same numbers; no result depends on the number of
//! preprocessing threads; every random choice comes from a stream of [`streams`].

pub mod checkpoint;
pub mod config;
pub mod output;
pub mod schedule;
pub mod signals;
pub mod streams;
