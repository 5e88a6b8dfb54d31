//! The small files beside the weights, carried from one directory to the next.

use std::io::Read;
use std::path::Path;

use serde_json::Value;

use super::HfCheckpoint;
use super::reader::open_file;
use crate::checkpoint::error::io;
use crate::checkpoint::staging::write_file;
use crate::checkpoint::{CheckpointError, FileProblem, Links};
use crate::{config, json};

/// The file that says what the weights are.
pub const CONFIG: &str = "config.json";

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

/// Copies what stands beside the weights of `reference` into another directory. A config of weights in FP8 then describes
/// weights that are not.
pub(super) fn put_files_of(reference: &HfCheckpoint, into: &Path) -> Result<(), CheckpointError> {
    put_support_files(reference.dir(), into)?;
    let (config, copy) = (reference.dir().join(CONFIG), into.join(CONFIG));
    if reference.quantised().next().is_some() {
        write_file(&copy, &unquantised_config(&config)?)
    } else if config.is_file() {
        write_file(&copy, &fs_err::read(&config).map_err(io("read", &config))?)
    } else {
        Ok(())
    }
}

/// Copies [`SUPPORT_FILES`] but config.json, those that there are. A link that leads out of `from` is refused.
pub(super) fn put_support_files(from: &Path, into: &Path) -> Result<(), CheckpointError> {
    for name in support_files(from).filter(|name| *name != CONFIG) {
        let mut bytes = Vec::new();
        open_file(from, name, Links::default())?
            .read_to_end(&mut bytes)
            .map_err(io("read", &from.join(name)))?;
        write_file(&into.join(name), &bytes)?;
    }
    Ok(())
}

/// Those of [`SUPPORT_FILES`] that a directory has, be they readable files or not: a link to nothing is an error later, and
/// not a file less.
fn support_files(dir: &Path) -> impl Iterator<Item = &'static str> {
    SUPPORT_FILES
        .into_iter()
        .filter(|name| dir.join(name).symlink_metadata().is_ok())
}

/// The content of a config for weights that are no longer in FP8.
fn unquantised_config(file: &Path) -> Result<Vec<u8>, CheckpointError> {
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
