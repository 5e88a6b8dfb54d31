//! The facts of a config in Megatron's field names.

use crate::config::HfConfig;

/// A model as Megatron's providers describe it.
#[derive(Debug, Clone, PartialEq)]
pub enum Provider {
    /// Dense.
    Dense,
    /// Mixture of experts.
    Moe,
}

impl Provider {
    pub(crate) fn from_config(config: &HfConfig) -> Self {
        if config.architecture.is_moe() {
            Self::Moe
        } else {
            Self::Dense
        }
    }
}
