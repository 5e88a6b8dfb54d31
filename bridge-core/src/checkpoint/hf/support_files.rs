//! The small files beside the weights, carried from one directory to the next.

use std::path::{Path, PathBuf};

/// Files that a saved checkpoint takes over from its source when they are there; weights and index are written new.
pub const SUPPORT_FILES: [&str; 14] = [
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "processor_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "LICENSE",
];

/// Those of [`SUPPORT_FILES`] that a directory has.
#[must_use]
pub fn support_files(dir: &Path) -> Vec<PathBuf> {
    SUPPORT_FILES
        .iter()
        .map(|name| dir.join(name))
        .filter(|path| path.is_file())
        .collect()
}
