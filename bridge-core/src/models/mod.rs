//! The tables: one file a family, one row a parameter. Nothing else knows a model's names.
//!
//! Rows of decoder layers are written relative to the layer, so that the trunk and the multi-token-prediction
//! head share them; dense and mixture-of-experts models share all rows but the MLP's, models with and without a vision
//! tower all rows of the language model under other prefixes.

mod facts;
mod language;
mod mtp;
mod prefixes;
mod qwen35;
mod vision;

pub use facts::{ExpertLayout, ExpertNames, Facts};
pub use prefixes::Prefixes;
pub use qwen35::{registry, registry_for};
