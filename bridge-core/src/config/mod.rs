//! What `config.json` says, with transformers' defaults in place of absent keys.
//!
//! Parsing is the only check: an [`HfConfig`] that exists describes a model that the rest of the
//! workspace computes as transformers does. Values that would need other maths are refused here, all
//! of them at once. Unknown keys are kept in [`HfConfig::raw`]; one that looks like a misspelt known key is refused.

mod classifier;
mod edit;
mod error;
mod hf_config;
mod quantization;
mod reader;
mod text;
mod vision;

pub use classifier::ClassifierConfig;
pub use error::{ConfigError, ConfigProblem};
pub use hf_config::{Architecture, HfConfig};
pub use quantization::QuantizationConfig;
pub(crate) use quantization::unquantised;
pub use text::{LayerType, MoeConfig, RopeParameters, TextConfig};
pub use vision::VisionConfig;
