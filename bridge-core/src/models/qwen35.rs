//! Qwen3.5 and Qwen3.6: dense and mixture of experts, with a vision tower or without, with an output layer or a classifier.

use super::facts::Facts;
use super::{language, mtp, vision};
use crate::config::{Architecture, HfConfig};
use crate::mapping::{Registry, RegistryError};

/// Prefixes of the vision tower: Megatron's and the hub's.
pub(super) const VISION: (&str, &str) = ("vision_model.", "model.visual.");

/// Prefixes of the language model: Megatron's and the hub's.
pub(super) fn language_prefixes(architecture: Architecture) -> (&'static str, &'static str) {
    if architecture.is_text_only() {
        ("", "model.")
    } else {
        ("language_model.", "model.language_model.")
    }
}

/// The table of a checkpoint of this form.
///
/// # Errors
/// [`RegistryError`] when the table itself is wrong.
pub fn registry_for(config: &HfConfig, facts: &Facts) -> Result<Registry, RegistryError> {
    let mut sections = Vec::new();
    if let Some(tower) = &config.vision {
        sections.extend(vision::sections(tower, VISION.0, VISION.1));
    }
    let prefixes = language_prefixes(config.architecture);
    sections.extend(language::sections(
        config,
        prefixes,
        facts.experts,
        facts.expert_names,
    ));
    sections.extend(mtp::sections(&config.text, prefixes.0, facts));
    Registry::new(sections)
}

/// The table of a new checkpoint, as the hub stores it.
///
/// # Errors
/// [`RegistryError`] when the table itself is wrong.
pub fn registry(config: &HfConfig) -> Result<Registry, RegistryError> {
    registry_for(config, &Facts::published(config))
}
