//! `model.safetensors.index.json`.

use std::io::Read;
use std::path::{Component, Path};

use indexmap::IndexMap;
use serde_json::{Map, Value};

use super::reader::open_file;
use crate::checkpoint::error::io;
use crate::checkpoint::{CheckpointError, FileProblem, Links};
use crate::json;

/// The index's file name.
pub(super) const INDEX: &str = "model.safetensors.index.json";
/// A checkpoint's file name when there is only one.
pub(super) const SINGLE: &str = "model.safetensors";

/// A checked index.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Index {
    /// Tensor to shard, in the file's order.
    pub(super) weight_map: IndexMap<String, String>,
    /// `total_size` and whatever else was there.
    pub(super) metadata: Map<String, Value>,
}

/// Reads the index of a directory; shard names are plain file names.
pub(super) fn read(dir: &Path, links: Links) -> Result<Index, CheckpointError> {
    let path = dir.join(INDEX);
    let mut text = Vec::new();
    open_file(dir, INDEX, links)?
        .read_to_end(&mut text)
        .map_err(io("read", &path))?;
    parse(&text).map_err(|problems| CheckpointError::Files { path, problems })
}

fn parse(text: &[u8]) -> Result<Index, Vec<FileProblem>> {
    let invalid = |reason: String| {
        vec![FileProblem::Json {
            what: "the index",
            reason,
        }]
    };
    let value = json::parse(text).map_err(|error| invalid(error.to_string()))?;
    let map = value
        .get("weight_map")
        .and_then(Value::as_object)
        .ok_or_else(|| invalid("it has no object `weight_map`".to_owned()))?;
    let metadata = value
        .get("metadata")
        .and_then(Value::as_object)
        .cloned()
        .unwrap_or_default();
    let mut weight_map = IndexMap::with_capacity(map.len());
    let mut problems = Vec::new();
    for (name, file) in map {
        match file.as_str() {
            Some(file) if is_plain(file) => {
                weight_map.insert(name.clone(), file.to_owned());
            }
            Some(file) => {
                let problem = FileProblem::ShardName {
                    name: file.to_owned(),
                };
                if !problems.contains(&problem) {
                    problems.push(problem);
                }
            }
            None => problems.push(FileProblem::Entry {
                name: name.clone(),
                reason: "its shard is no text".to_owned(),
            }),
        }
    }
    if problems.is_empty() {
        Ok(Index {
            weight_map,
            metadata,
        })
    } else {
        Err(problems)
    }
}

/// One relative component that means the same file on every system.
fn is_plain(name: &str) -> bool {
    let mut components = Path::new(name).components();
    let single = matches!(components.next(), Some(Component::Normal(part)) if part == name);
    single
        && components.next().is_none()
        && name.len() <= 255
        && name.ends_with(".safetensors")
        && !name.contains(['\\', ':'])
        && !name.chars().any(char::is_control)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_plain_name_in_the_same_directory_is_a_shard() {
        assert!(is_plain("model-00001-of-00002.safetensors"));
        for name in [
            "../x.safetensors",
            "/x.safetensors",
            "a/../../x.safetensors",
            "a/x.safetensors",
            "./x.safetensors",
            "..\\x.safetensors",
            "c:x.safetensors",
            "x\0.safetensors",
            "x.bin",
            "",
            "..",
            "x.safetensors/",
            &format!("{}.safetensors", "x".repeat(300)),
        ] {
            assert!(!is_plain(name), "{name:?}");
        }
    }
}
