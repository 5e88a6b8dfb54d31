//! The small files beside the weights, carried from one directory to the next.

use std::path::Path;

use serde_json::Value;

use crate::checkpoint::error::io;
use crate::checkpoint::{CheckpointError, FileProblem};
use crate::{config, json};

/// The file that says what the weights are.
pub(crate) const CONFIG: &str = "config.json";

/// Files that a saved checkpoint takes over from its source when they are there; weights and index are written new.
pub const SUPPORT_FILES: [&str; 14] = [
    CONFIG,
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

/// Those of [`SUPPORT_FILES`] that a directory has, be they readable files or not: a link to nothing is an error later, and
/// not a file less.
pub(super) fn support_files(dir: &Path) -> impl Iterator<Item = &'static str> {
    SUPPORT_FILES
        .into_iter()
        .filter(|name| dir.join(name).symlink_metadata().is_ok())
}

/// The content of a config for weights that are no longer in FP8.
pub(super) fn unquantised_config(file: &Path) -> Result<Vec<u8>, CheckpointError> {
    let text = fs_err::read(file).map_err(io("read", file))?;
    let invalid = |reason: String| CheckpointError::Files {
        path: file.to_owned(),
        problems: vec![FileProblem::Json {
            what: "the config",
            reason,
        }],
    };
    let value = json::parse(&text).map_err(|error| invalid(error.to_string()))?;
    let Value::Object(raw) = value else {
        return Err(invalid("it is no object".to_owned()));
    };
    Ok(json::as_python_writes(&config::unquantised(&raw)).into_bytes())
}
