//! Which tensors stand in which file.

use serde_json::{Map, Value};

use super::HfCheckpoint;
use super::index::SINGLE;
use crate::checkpoint::{TensorInfo, TensorSource};

/// The key of the index for the bytes of all tensors.
const TOTAL_SIZE: &str = "total_size";

/// One file of a checkpoint to be written.
#[derive(Debug, Clone, PartialEq)]
pub struct LayoutFile {
    /// Its name.
    pub name: String,
    /// Its tensors, in the order of their bytes.
    pub tensors: Vec<(String, TensorInfo)>,
    /// `__metadata__` of its header.
    pub metadata: Map<String, Value>,
}

/// The files of a checkpoint to be written.
#[derive(Debug, Clone, PartialEq)]
pub struct HfLayout {
    /// The files.
    pub files: Vec<LayoutFile>,
    /// What stands beside `weight_map` in the index; `None`: a single file without an index.
    pub index_metadata: Option<Map<String, Value>>,
}

impl HfLayout {
    /// The layout of an opened checkpoint: same files, order, dtypes and metadata.
    ///
    /// Matrices in FP8 have no way back: they are [`super::UNQUANTISED`] here, without scales; a file that held nothing but
    /// scales is left out, and `total_size` of the index is counted anew.
    #[must_use]
    pub fn like(checkpoint: &HfCheckpoint) -> Self {
        let written = checkpoint.as_written();
        let owned = |(name, info): (&str, &TensorInfo)| {
            let info = written.info(name).unwrap_or_else(|| info.clone());
            (name.to_owned(), info)
        };
        let mut layout = Self {
            files: checkpoint
                .files()
                .map(|(name, metadata, tensors)| LayoutFile {
                    name: name.to_owned(),
                    tensors: tensors.into_iter().map(owned).collect(),
                    metadata: metadata.clone(),
                })
                .collect(),
            index_metadata: checkpoint.index_metadata().cloned(),
        };
        if checkpoint.quantised().next().is_some() {
            layout.files.retain(|file| !file.tensors.is_empty());
            let total_size = layout.num_bytes();
            if let Some(metadata) = &mut layout.index_metadata {
                metadata.insert(TOTAL_SIZE.to_owned(), total_size.into());
            }
        }
        layout
    }

    /// A new layout: tensors in the given order, in files of at most `max_shard_bytes` (a larger tensor has a file of
    /// its own); one file needs no index.
    #[must_use]
    pub fn sharded(tensors: Vec<(String, TensorInfo)>, max_shard_bytes: u64) -> Self {
        let mut shards: Vec<Vec<(String, TensorInfo)>> = vec![Vec::new()];
        let (mut total, mut filled) = (0u64, 0u64);
        for (name, info) in tensors {
            let bytes = info.num_bytes();
            if filled > 0 && filled.saturating_add(bytes) > max_shard_bytes {
                shards.push(Vec::new());
                filled = 0;
            }
            filled += bytes;
            total += bytes;
            if let Some(shard) = shards.last_mut() {
                shard.push((name, info));
            }
        }
        let count = shards.len();
        let mut metadata = Map::new();
        metadata.insert("format".to_owned(), "pt".into());
        let files = shards
            .into_iter()
            .enumerate()
            .map(|(number, tensors)| LayoutFile {
                name: if count == 1 {
                    SINGLE.to_owned()
                } else {
                    format!("model-{:05}-of-{count:05}.safetensors", number + 1)
                },
                tensors,
                metadata: metadata.clone(),
            })
            .collect();
        let mut index = Map::new();
        index.insert(TOTAL_SIZE.to_owned(), total.into());
        Self {
            files,
            index_metadata: (count > 1).then_some(index),
        }
    }

    /// All tensors, file by file.
    pub fn tensors(&self) -> impl Iterator<Item = (&str, &TensorInfo)> {
        self.files.iter().flat_map(|file| {
            file.tensors
                .iter()
                .map(|(name, info)| (name.as_str(), info))
        })
    }

    /// Bytes of all tensors.
    #[must_use]
    pub fn num_bytes(&self) -> u64 {
        self.tensors().map(|(_, info)| info.num_bytes()).sum()
    }
}
