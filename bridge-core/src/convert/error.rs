//! What can stop a conversion.

use crate::Dtype;
use crate::checkpoint::CheckpointError;
use crate::plan::PlanError;

/// Why a plan could not be carried out.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConvertError {
    /// The plan breaks conservation.
    #[error("the plan is not sound; nothing was written")]
    Plan(#[from] PlanError),
    /// The source lacks a tensor.
    #[error("the source has no tensor `{source_name}`, which `{target}` needs")]
    Missing {
        /// The target.
        target: String,
        /// The source tensor.
        source_name: String,
    },
    /// The source's tensor has another shape than the plan was made for.
    #[error(
        "`{source_name}` has shape {found:?}, the plan for `{target}` was made for {expected:?}"
    )]
    Shape {
        /// The target.
        target: String,
        /// The source tensor.
        source_name: String,
        /// Its shape.
        found: Vec<usize>,
        /// The plan's.
        expected: Vec<usize>,
    },
    /// Values of this type cannot be converted.
    #[error("`{name}` has dtype {dtype}, values of it cannot be converted")]
    Dtype {
        /// The tensor.
        name: String,
        /// Its dtype.
        dtype: Dtype,
    },
    /// A weight is not a number.
    #[error(
        "element {index} of `{source_name}` is {value}; the checkpoint is damaged or was saved from a run that diverged"
    )]
    NonFinite {
        /// The source tensor.
        source_name: String,
        /// The element, in row-major order.
        index: usize,
        /// What it is.
        value: f64,
    },
    /// A source or sink failed.
    #[error("while making `{target}`")]
    Checkpoint {
        /// The target.
        target: String,
        /// What failed.
        #[source]
        source: CheckpointError,
    },
    /// Two sides could not be compared.
    #[error("while comparing `{target}`")]
    Compare {
        /// The tensor.
        target: String,
        /// What failed.
        #[source]
        source: CheckpointError,
    },
    /// More memory than the tensor has elements, or less.
    #[error("memory for elements up to {end} of `{name}` was given, it has {numel}")]
    Outside {
        /// The tensor.
        name: String,
        /// One past the last element that was named.
        end: usize,
        /// The elements that there are.
        numel: usize,
    },
    /// Whoever watched the work asked it to stop.
    #[error("stopped before everything was moved")]
    Stopped,
    /// A finished file could not be completed, or reading it back failed.
    #[error("while finishing a file")]
    Finish(#[source] CheckpointError),
    /// The threads could not be started.
    #[error("cannot start {threads} threads")]
    Threads {
        /// How many.
        threads: usize,
        /// What the pool said.
        #[source]
        source: rayon::ThreadPoolBuildError,
    },
}
