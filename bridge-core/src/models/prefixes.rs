//! Names under other prefixes than the published ones.
//!
//! Checkpoints saved by other tools nest the model differently (`model.layers`, `language_model.model.layers`,
//! `model.language_model.language_model.layers`). The prefixes in a file are found from two tensors that every model
//! has, and names are read as the published ones.

use super::qwen35::{VISION, language_prefixes};
use crate::checkpoint::CheckpointError;
use crate::checkpoint::hf::HfCheckpoint;
use crate::config::Architecture;

const LANGUAGE_MARK: &str = "embed_tokens.weight";
const VISION_MARK: &str = "patch_embed.proj.weight";
const HEAD: &str = "lm_head.weight";
const CLASSIFIER_MARK: &str = "score.weight";
const MTP_MARK: &str = "mtp.fc.weight";

/// The prefixes that a file uses, beside those of the published checkpoints.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Prefixes {
    /// (in the file, published), longest first.
    pairs: Vec<(String, &'static str)>,
}

impl Prefixes {
    /// Finds the prefixes among a checkpoint's names; the published ones are those of `architecture`.
    pub fn detect<'a>(
        architecture: Architecture,
        names: impl Iterator<Item = &'a str> + Clone,
    ) -> Self {
        let marks = [
            (LANGUAGE_MARK, "", language_prefixes(architecture).1),
            (VISION_MARK, "", VISION.1),
            (HEAD, HEAD, HEAD),
            (CLASSIFIER_MARK, "score.", "score."),
            (MTP_MARK, "mtp.", "mtp."),
        ];
        let mut pairs = Vec::new();
        for (mark, kept, published) in marks {
            let mut found = names.clone().filter_map(|name| {
                let prefix = name.strip_suffix(mark)?;
                (prefix.is_empty() || prefix.ends_with('.')).then_some(prefix)
            });
            // Two candidates are left alone: the names then fail the equality check with the table.
            if let (Some(prefix), None) = (found.next(), found.next()) {
                let stored = format!("{prefix}{kept}");
                if !stored.is_empty() {
                    pairs.push((stored, published));
                }
            }
        }
        pairs.sort_by_key(|(stored, _)| std::cmp::Reverse(stored.len()));
        Self { pairs }
    }

    /// Shows the tensors of `checkpoint` under the published names of `architecture`.
    ///
    /// # Errors
    /// [`CheckpointError::Files`] when two tensors would have one name.
    pub fn publish(
        architecture: Architecture,
        checkpoint: HfCheckpoint,
    ) -> Result<HfCheckpoint, CheckpointError> {
        let prefixes = Self::detect(architecture, checkpoint.names());
        if prefixes.are_published() {
            return Ok(checkpoint);
        }
        checkpoint.renamed(|name| prefixes.published(name))
    }

    /// Whether the file uses the published names.
    #[must_use]
    pub fn are_published(&self) -> bool {
        self.pairs
            .iter()
            .all(|(stored, published)| stored == published)
    }

    /// The published name of a tensor of the file.
    #[must_use]
    pub fn published(&self, name: &str) -> String {
        for (stored, published) in &self.pairs {
            if let Some(rest) = name.strip_prefix(stored.as_str()) {
                return format!("{published}{rest}");
            }
        }
        name.to_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn published(architecture: Architecture, names: &[&str]) -> Vec<String> {
        let prefixes = Prefixes::detect(architecture, names.iter().copied());
        names.iter().map(|name| prefixes.published(name)).collect()
    }

    const WANTED: [&str; 5] = [
        "model.language_model.embed_tokens.weight",
        "model.language_model.layers.0.mlp.up_proj.weight",
        "model.visual.patch_embed.proj.weight",
        "lm_head.weight",
        "mtp.fc.weight",
    ];

    #[test]
    fn every_known_nesting_reads_as_the_published_names() {
        for (language, vision, outer) in [
            ("model.language_model.", "model.visual.", ""),
            ("model.", "visual.", ""),
            ("language_model.model.", "visual.", "language_model."),
            ("model.language_model.language_model.", "model.visual.", ""),
            (
                "model.model.language_model.",
                "model.model.visual.",
                "model.",
            ),
        ] {
            let names = [
                format!("{language}embed_tokens.weight"),
                format!("{language}layers.0.mlp.up_proj.weight"),
                format!("{vision}patch_embed.proj.weight"),
                format!("{outer}lm_head.weight"),
                format!("{outer}mtp.fc.weight"),
            ];
            let names: Vec<&str> = names.iter().map(String::as_str).collect();
            assert_eq!(
                published(Architecture::Qwen35Vl, &names),
                WANTED,
                "{names:?}"
            );
        }
    }

    #[test]
    fn the_published_prefix_of_a_language_model_alone_is_model() {
        for language in [
            "model.",
            "",
            "language_model.model.",
            "model.language_model.",
        ] {
            let names = [
                format!("{language}embed_tokens.weight"),
                format!("{language}layers.0.mlp.up_proj.weight"),
                "lm_head.weight".to_owned(),
                "mtp.fc.weight".to_owned(),
            ];
            let names: Vec<&str> = names.iter().map(String::as_str).collect();
            let wanted = [
                "model.embed_tokens.weight",
                "model.layers.0.mlp.up_proj.weight",
                "lm_head.weight",
                "mtp.fc.weight",
            ];
            if language.is_empty() {
                // No prefix at all: every name of the file would have it, so names are left alone.
                assert_eq!(published(Architecture::Qwen35, &names), names);
            } else {
                assert_eq!(published(Architecture::Qwen35, &names), wanted, "{names:?}");
            }
        }
    }
}
