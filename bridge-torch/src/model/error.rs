//! What can go wrong in building, running and saving the model.

use tch::TchError;

use crate::batch::BatchError;
use crate::ops::policy::PolicyError;

/// Why the model cannot be built, run or saved.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ModelError {
    /// The batch does not fit the model.
    #[error("the batch does not fit the model")]
    Batch(#[from] BatchError),
    /// A parameter that the model's shape asks for is not in the plan.
    #[error("the model needs parameter `{name}`, but the checkpoint's plan has no such row")]
    MissingParameter {
        /// Megatron name.
        name: String,
    },
    /// A bridge made from a config alone.
    #[error("there are no weights to load: the bridge was made from a config alone")]
    NoWeights,
    /// A feature of the config that this model does not compute.
    #[error("{what} is not supported: {found}")]
    Unsupported {
        /// The feature.
        what: &'static str,
        /// What the config says.
        found: String,
    },
    /// A dtype that the model does not run in.
    #[error("the model runs in float32, float64 or bfloat16, not in {found:?}")]
    Kind {
        /// The dtype asked for.
        found: tch::Kind,
    },
    /// No token has a target.
    #[error(
        "no token of the batch has a target: all labels behind the first token are -100 or absent"
    )]
    NoTarget,
    /// The plan of the checkpoint cannot be made.
    #[error("cannot plan the checkpoint's tensors")]
    Plan(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// Reading or writing the checkpoint failed.
    #[error("cannot move the checkpoint's tensors")]
    Checkpoint(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// The kernels that were asked for cannot run.
    #[error(transparent)]
    Kernels(#[from] PolicyError),
    /// libtorch refused an operation.
    #[error("libtorch refused an operation")]
    Torch(#[from] TchError),
}
