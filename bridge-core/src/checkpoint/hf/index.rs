//! `model.safetensors.index.json`.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::io::Read;
use std::path::{Component, Path};

use serde::Deserialize;
use serde::de::{DeserializeSeed, Deserializer, IgnoredAny, MapAccess, Visitor};
use serde_json::{Map, Value};

use super::header::{keep, repeated};
use super::reader::open_file;
use crate::checkpoint::error::io;
use crate::checkpoint::{CheckpointError, FileProblem, Links};
use crate::json::{self, Strict};

/// The index's file name.
pub const INDEX: &str = "model.safetensors.index.json";
/// A checkpoint's file name when there is only one.
pub const SINGLE: &str = "model.safetensors";

/// A checked index.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Index {
    /// The tensors of each shard, in the file's order.
    pub(super) shards: BTreeMap<String, Vec<String>>,
    /// `total_size` and whatever else was there.
    pub(super) metadata: Map<String, Value>,
}

/// An index as it is written: `metadata`, then each tensor's file, by name.
pub(super) fn text<'a>(
    metadata: &Map<String, Value>,
    places: impl Iterator<Item = (&'a str, &'a str)>,
) -> String {
    let mut places: Vec<(&str, &str)> = places.collect();
    places.sort_by_key(|(name, _)| *name);
    let weight_map: Map<String, Value> = places
        .into_iter()
        .map(|(name, file)| (name.to_owned(), file.into()))
        .collect();
    let index = serde_json::json!({"metadata": metadata, "weight_map": weight_map});
    let mut text = serde_json::to_string_pretty(&index).expect("maps of texts are always JSON");
    text.push('\n');
    text
}

/// Reads the index of a directory; shard names are plain file names.
pub(super) fn read(dir: &Path, links: Links) -> Result<Index, CheckpointError> {
    let path = dir.join(INDEX);
    let mut text = Vec::new();
    open_file(dir, INDEX, links)?
        .read_to_end(&mut text)
        .map_err(io("read", &path))?;
    parse(text).map_err(|problems| CheckpointError::Files { path, problems })
}

/// The weight files that a directory's index names, sorted, whether they are there or not; without an index the one file.
///
/// # Errors
/// [`CheckpointError`] when the index cannot be read, or names a file outside the directory.
pub fn weight_files(dir: &Path) -> Result<BTreeSet<String>, CheckpointError> {
    if !dir.join(INDEX).exists() {
        return Ok(BTreeSet::from([SINGLE.to_owned()]));
    }
    let index = read(dir, Links::default())?;
    Ok(index.shards.into_keys().collect())
}

fn parse(text: Vec<u8>) -> Result<Index, Vec<FileProblem>> {
    let invalid = |reason: String| {
        vec![FileProblem::Json {
            what: "the index",
            reason,
        }]
    };
    let mut reading = Reading::default();
    let mut deserializer = serde_json::Deserializer::from_slice(&text);
    deserializer
        .deserialize_map(&mut reading)
        .and_then(|()| deserializer.end())
        .map_err(|error| match &reading.at {
            Some(name) => invalid(format!("`{name}`: {error}")),
            None => invalid(error.to_string()),
        })?;
    drop(text);
    let Reading {
        index,
        problems,
        has_map,
        ..
    } = reading;
    if !has_map {
        return Err(invalid("it has no object `weight_map`".to_owned()));
    }
    if !problems.is_empty() {
        return Err(problems);
    }
    let names = index.shards.values().flatten();
    match repeated(names.map(String::as_str)) {
        Some(name) => Err(invalid(format!("the key `{name}` stands twice"))),
        None => Ok(index),
    }
}

/// An index that is read entry by entry: it may place a hundred thousand tensors.
#[derive(Default)]
struct Reading {
    index: Index,
    problems: Vec<FileProblem>,
    has_map: bool,
    /// Whose shard is read.
    at: Option<String>,
}

impl<'de> Visitor<'de> for &mut Reading {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object with `weight_map`")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        let mut has_metadata = false;
        while let Some(key) = map.next_key::<String>()? {
            match key.as_str() {
                "weight_map" if self.has_map => return Err(json::twice(&key)),
                "weight_map" => {
                    self.has_map = true;
                    map.next_value_seed(WeightMap(self))?;
                }
                "metadata" if has_metadata => return Err(json::twice(&key)),
                "metadata" => {
                    has_metadata = true;
                    if let Value::Object(metadata) = map.next_value::<Strict>()?.0 {
                        self.index.metadata = metadata;
                    }
                }
                _ => drop(map.next_value::<IgnoredAny>()?),
            }
        }
        Ok(())
    }
}

/// The object that maps tensors to shards.
struct WeightMap<'a>(&'a mut Reading);

impl<'de> DeserializeSeed<'de> for WeightMap<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for WeightMap<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object `weight_map`")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        let Reading {
            index,
            problems,
            at,
            ..
        } = self.0;
        while let Some(name) = map.next_key::<String>()? {
            *at = Some(name.clone());
            let file: Cow<'_, str> = map.next_value::<Text<'_>>()?.0;
            if let Some(tensors) = index.shards.get_mut(&*file) {
                tensors.push(name);
            } else if is_plain(&file) {
                index.shards.insert(file.into_owned(), vec![name]);
            } else {
                let name = file.into_owned();
                keep(problems, [FileProblem::ShardName { name }]);
            }
            *at = None;
        }
        Ok(())
    }
}

/// A text that is copied only where it is spelled with escapes.
#[derive(Deserialize)]
#[serde(transparent)]
struct Text<'a>(#[serde(borrow)] Cow<'a, str>);

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
