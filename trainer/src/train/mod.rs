//! Fine-tuning: configuration, order of the data, the loop, and what it leaves behind.
//!
//! The loop owns order and time only; loss, optimizer step, checkpoint, evaluation and reports are parts that it calls.
//! Invariants: a run that is killed at any moment resumes to the same numbers; no result depends on the number of
//! preprocessing threads; every random choice comes from a stream of `streams`.

mod announce;
pub mod checkpoint;
mod collate;
pub mod config;
mod evaluate;
mod non_finite;
mod optimizer;
mod order;
mod output;
mod prefetch;
mod record;
mod run;
mod run_file;
mod schedule;
mod signals;
mod source;
mod step;
mod streams;
mod trainable;
mod training_loop;

pub use collate::ask_batch;
pub use evaluate::Evaluation;
pub use output::checkpoints;
pub use run::{Outcome, RunOptions, run};
