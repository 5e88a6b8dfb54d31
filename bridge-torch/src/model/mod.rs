//! The model, a file a block. Blocks are plain structs over tensors of the [`crate::params::ParamStore`]: they read no
//! files, no flags and no environment, and leave every job that may have a kernel to [`crate::ops`].
//!
//! Invariants: nothing loops over tokens, nothing asks the device for a number to decide a shape; what needs numbers
//! (positions, places of images, targets) is computed on the host from the batch before the first op.

mod attention;
mod cache;
mod checkpoint;
mod error;
mod gated_delta_net;
mod initial;
mod input;
mod language;
mod layer;
mod linear;
mod mlp;
mod moe;
mod mtp;
mod options;
mod positions;
mod qwen3_vl;
mod vision;
pub mod vision_tables;

pub(crate) use cache::{Cache, grown_mask};
pub use checkpoint::SaveOptions;
pub use error::ModelError;
pub(crate) use input::{ModelInput, TextPositions};
pub use moe::RouterOutput;
pub use options::{ForwardOptions, LossOptions, Losses, ModelOptions, ModelOutput};
pub use qwen3_vl::Qwen3VlModel;
