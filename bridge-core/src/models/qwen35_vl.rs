//! Qwen3.5-VL and Qwen3.6-VL, dense and mixture of experts.

use super::facts::Facts;
use super::{language, mtp, vision};
use crate::config::HfConfig;
use crate::mapping::{Registry, RegistryError};

/// Prefixes of the language model: Megatron's and the hub's.
pub(super) const LANGUAGE: (&str, &str) = ("language_model.", "model.language_model.");
/// Prefixes of the vision tower.
pub(super) const VISION: (&str, &str) = ("vision_model.", "model.visual.");

/// The table of a checkpoint of this form.
///
/// # Errors
/// [`RegistryError`] when the table itself is wrong.
pub fn registry_for(config: &HfConfig, facts: &Facts) -> Result<Registry, RegistryError> {
    let mut sections = Vec::new();
    if let Some(tower) = &config.vision {
        sections.extend(vision::sections(tower, VISION.0, VISION.1));
    }
    sections.extend(language::sections(
        config,
        LANGUAGE,
        facts.experts,
        facts.expert_names,
    ));
    sections.extend(mtp::sections(&config.text, LANGUAGE.0, facts));
    Registry::new(sections)
}

/// The table of a new checkpoint, as the hub stores it.
///
/// # Errors
/// [`RegistryError`] when the table itself is wrong.
pub fn registry(config: &HfConfig) -> Result<Registry, RegistryError> {
    registry_for(config, &Facts::published(config))
}
