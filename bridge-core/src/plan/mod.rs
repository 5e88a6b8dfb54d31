//! A model as lists of strided copies.
//!
//! [`build`] turns the rows of a registry into one [`TensorPlan`] a Megatron parameter of one rank, [`build_stage`] does so
//! for one pipeline stage of it, [`gather`] puts all stages of all ranks together again, [`build_stored`] gives the
//! global tensors of a `torch_dist` directory;
//! [`ModelPlan::inverted`] reads the same copies the other way. Copies move whole blocks and never mix values;
//! arithmetic stands apart, in [`TensorPlan::transforms`]. This room reads no files.
//!
//! Invariants, checked by [`ModelPlan::validate`]: every target element is written exactly once (or is padding that
//! [`TensorPlan::fill`] covers), and over a full-model plan every source element is read exactly once.

mod build;
mod copy;
mod coverage;
mod error;
mod model_plan;
mod stage;
mod stored;

pub use build::{Cut, PlanOptions, build};
pub use copy::Copy;
pub use error::{PlanError, TensorProblem};
pub use model_plan::{Fill, ModelPlan, Role, SourceTensor, TensorPlan};
pub use stage::{Held, Stage, build_stage, gather, held, model_size};
pub use stored::{KeyStyle, build_stored, extra_states};
