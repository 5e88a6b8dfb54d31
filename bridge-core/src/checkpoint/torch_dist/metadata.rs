//! `.metadata`, the table of contents, from pickle to typed values.

use std::collections::HashMap;

use indexmap::{IndexMap, IndexSet};

use super::TorchDistProblem;
use super::cover::{self, Cover};
use super::pickle::{self, Dialect, Id, Object, Pickle};
use crate::Dtype;
use crate::checkpoint::TensorInfo;

/// A place in a data file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Place {
    /// Index into [`Table::files`].
    pub(super) file: usize,
    pub(super) offset: u64,
    pub(super) len: u64,
}

/// A box of a tensor and where it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct StoredBox {
    pub(super) offsets: Vec<u64>,
    pub(super) sizes: Vec<u64>,
    pub(super) place: Place,
}

/// A tensor and its boxes; the empty ones are left out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct StoredTensor {
    pub(super) info: TensorInfo,
    pub(super) boxes: Vec<StoredBox>,
    /// How many boxes, the empty ones included.
    pub(super) num_chunks: usize,
}

/// The whole table.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Table {
    pub(super) tensors: IndexMap<String, StoredTensor>,
    pub(super) objects: IndexMap<String, Place>,
    /// Names of the data files, not yet checked.
    pub(super) files: IndexSet<String>,
}

const METADATA: &[&str] = &["torch.distributed.checkpoint.metadata"];
const PROPERTIES: &[&str] = &[
    "torch.distributed.checkpoint.metadata",
    "torch.distributed._shard.sharded_tensor.metadata",
];
const FILESYSTEM: &[&str] = &["torch.distributed.checkpoint.filesystem"];
/// Axes of a tensor; torch's own limit.
const MAX_RANK: usize = 64;

/// Where each chunk is, by name and offsets; objects have no offsets.
type Places<'a> = HashMap<(&'a str, Option<Vec<u64>>), Place>;

type Result<T> = std::result::Result<T, TorchDistProblem>;

fn value(part: &str, what: &'static str) -> TorchDistProblem {
    TorchDistProblem::Value {
        part: part.to_owned(),
        what,
    }
}

/// Parses `.metadata`; all tensors that are wrong are reported together.
pub(super) fn parse(bytes: &[u8]) -> std::result::Result<Table, Vec<TorchDistProblem>> {
    let problem = |problem| TorchDistProblem::Pickle {
        part: ".metadata".to_owned(),
        problem,
    };
    let pickle = pickle::parse(bytes, Dialect::Metadata).map_err(|error| vec![problem(error)])?;
    let (described, stored) = parts(&pickle).map_err(|error| vec![error])?;
    let mut table = Table::default();
    let mut places = places(&pickle, stored, &mut table.files).map_err(|error| vec![error])?;
    let mut problems = Vec::new();
    // A pickle can share one list of chunks between many tensors; a file does not hold more chunks than it has bytes.
    let mut chunks_left = bytes.len();
    for (key, id) in described {
        let read = entry(
            &pickle,
            *key,
            *id,
            &mut places,
            &mut table,
            &mut chunks_left,
        );
        if let Err(error) = read {
            problems.push(error);
        }
        if problems.len() > 1000 {
            break;
        }
    }
    if problems.is_empty()
        && let Some((name, _)) = places.keys().min()
    {
        problems.push(value(&quoted(name), "it is stored, but has no description"));
    }
    if problems.is_empty() {
        Ok(table)
    } else {
        Err(problems)
    }
}

fn quoted(name: &str) -> String {
    format!("`{name}`")
}

type Entries<'p> = &'p [(Id, Id)];

/// The two dicts of `Metadata`.
fn parts<'p>(pickle: &'p Pickle<'_>) -> Result<(Entries<'p>, Entries<'p>)> {
    let root = pickle.instance(pickle.root(), METADATA, "Metadata");
    let state = root.and_then(|object| object.state);
    let state = state.ok_or_else(|| value(".metadata", "it is no Metadata"))?;
    let part = |name| pickle.get(state, name).and_then(|id| pickle.dict(id));
    match (part("state_dict_metadata"), part("storage_data")) {
        (Some(described), Some(stored)) => Ok((described, stored)),
        _ => Err(value(
            ".metadata",
            "it has no state_dict_metadata or storage_data",
        )),
    }
}

fn places<'a>(
    pickle: &Pickle<'a>,
    stored: Entries<'_>,
    files: &mut IndexSet<String>,
) -> Result<Places<'a>> {
    let mut places = Places::with_capacity(stored.len());
    for (index, info) in stored {
        let index = state_of(pickle, *index, METADATA, "MetadataIndex")
            .ok_or_else(|| value(".metadata", "a stored item has no MetadataIndex"))?;
        let name = pickle
            .get(index, "fqn")
            .and_then(|id| pickle.text(id))
            .ok_or_else(|| value(".metadata", "a stored item has no name"))?;
        let wrong = |what| value(&quoted(name), what);
        let offsets = match pickle.get(index, "offset") {
            Some(id) if !matches!(pickle.node(id), pickle::Node::None) => {
                Some(size(pickle, id).ok_or_else(|| wrong("its offset is no torch.Size"))?)
            }
            _ => None,
        };
        let info = state_of(pickle, *info, FILESYSTEM, "_StorageInfo")
            .ok_or_else(|| wrong("it has no _StorageInfo"))?;
        if let Some(id) = pickle.get(info, "transform_descriptors")
            && !matches!(pickle.node(id), pickle::Node::None)
            && pickle.items(id).is_none_or(|items| !items.is_empty())
        {
            return Err(wrong("it is stored compressed, which is not supported"));
        }
        let path = pickle
            .get(info, "relative_path")
            .and_then(|id| pickle.text(id));
        let number = |field| {
            let value = pickle.int(pickle.get(info, field)?)?;
            u64::try_from(value).ok()
        };
        let (Some(path), Some(offset), Some(len)) = (path, number("offset"), number("length"))
        else {
            return Err(wrong("its place in a file is incomplete"));
        };
        let file = match files.get_index_of(path) {
            Some(file) => file,
            None => files.insert_full(path.to_owned()).0,
        };
        let place = Place { file, offset, len };
        if places.insert((name, offsets), place).is_some() {
            return Err(wrong("a chunk of it is stored twice"));
        }
    }
    Ok(places)
}

/// One tensor or object.
fn entry<'a>(
    pickle: &Pickle<'a>,
    key: Id,
    id: Id,
    places: &mut Places<'a>,
    table: &mut Table,
    chunks_left: &mut usize,
) -> Result<()> {
    let name = pickle
        .text(key)
        .ok_or_else(|| value(".metadata", "a name is no text"))?;
    let wrong = |what| value(&quoted(name), what);
    if table.tensors.contains_key(name) || table.objects.contains_key(name) {
        return Err(wrong("it is described twice"));
    }
    if pickle
        .instance(id, METADATA, "BytesStorageMetadata")
        .is_some()
    {
        let place = places
            .remove(&(name, None))
            .ok_or_else(|| wrong("it is described, but not stored"))?;
        table.objects.insert(name.to_owned(), place);
        return Ok(());
    }
    let state = state_of(pickle, id, METADATA, "TensorStorageMetadata")
        .ok_or_else(|| wrong("it is neither a tensor nor an object"))?;
    let info = info(pickle, name, state)?;
    let chunks = pickle
        .get(state, "chunks")
        .and_then(|id| pickle.items(id))
        .ok_or_else(|| wrong("it has no list of chunks"))?;
    *chunks_left = chunks_left
        .checked_sub(chunks.len())
        .ok_or_else(|| wrong("there are more chunks than .metadata has bytes"))?;
    let mut boxes = Vec::new();
    for chunk in chunks {
        boxes.extend(stored_box(pickle, name, *chunk, &info, places)?);
    }
    let bounds = boxes.iter().map(|part: &StoredBox| {
        let ends = part.offsets.iter().zip(&part.sizes);
        ends.map(|(offset, size)| *offset..*offset + *size)
            .collect()
    });
    if !info.shape.contains(&0) {
        let name = name.to_owned();
        cover::check(&info.shape, bounds.collect()).map_err(|cover| match cover {
            Cover::Overlap => TorchDistProblem::Overlap { name },
            Cover::Gap => TorchDistProblem::Gap { name },
            Cover::Irregular => TorchDistProblem::Irregular { name },
        })?;
    }
    let stored = StoredTensor {
        info,
        boxes,
        num_chunks: chunks.len(),
    };
    table.tensors.insert(name.to_owned(), stored);
    Ok(())
}

fn info(pickle: &Pickle<'_>, name: &str, state: Id) -> Result<TensorInfo> {
    let wrong = |what| value(&quoted(name), what);
    let properties = pickle
        .get(state, "properties")
        .and_then(|id| state_of(pickle, id, PROPERTIES, "TensorProperties"))
        .ok_or_else(|| wrong("it has no TensorProperties"))?;
    let dtype = match pickle.items(properties) {
        Some([dtype, ..]) => Some(*dtype),
        _ => pickle.get(properties, "dtype"),
    };
    let Some(("torch", word)) = dtype.and_then(|id| pickle.global(id)) else {
        return Err(wrong("it has no dtype"));
    };
    let dtype: Dtype = word.parse().map_err(|_| TorchDistProblem::Dtype {
        name: name.to_owned(),
        dtype: word.to_owned(),
    })?;
    let shape = pickle
        .get(state, "size")
        .and_then(|id| size(pickle, id))
        .ok_or_else(|| wrong("its size is no torch.Size"))?;
    // The product of the axes that are not empty: strides of an empty tensor must not overflow either.
    let numel = shape
        .iter()
        .filter(|size| **size > 0)
        .try_fold(1u64, |product, size| product.checked_mul(*size));
    let num_bytes = numel.and_then(|numel| numel.checked_mul(dtype.size_bytes() as u64));
    if num_bytes.is_none_or(|bytes| bytes > i64::MAX as u64) {
        return Err(wrong("its size overflows"));
    }
    let shape = shape
        .into_iter()
        .map(|size| usize::try_from(size).map_err(|_| wrong("its size overflows")))
        .collect::<Result<_>>()?;
    Ok(TensorInfo { dtype, shape })
}

/// A chunk that is not empty, with its place.
fn stored_box<'a>(
    pickle: &Pickle<'a>,
    name: &'a str,
    id: Id,
    info: &TensorInfo,
    places: &mut Places<'a>,
) -> Result<Option<StoredBox>> {
    let wrong = |what| value(&quoted(name), what);
    let state = state_of(pickle, id, METADATA, "ChunkStorageMetadata")
        .ok_or_else(|| wrong("a chunk is no ChunkStorageMetadata"))?;
    let part = |field| pickle.get(state, field).and_then(|id| size(pickle, id));
    let (Some(offsets), Some(sizes)) = (part("offsets"), part("sizes")) else {
        return Err(wrong("a chunk has no offsets or sizes"));
    };
    let rank = info.shape.len();
    let inside = offsets.len() == rank
        && sizes.len() == rank
        && info
            .shape
            .iter()
            .zip(offsets.iter().zip(&sizes))
            .all(|(axis, (offset, size))| {
                offset
                    .checked_add(*size)
                    .is_some_and(|end| end <= *axis as u64)
            });
    if !inside {
        return Err(wrong("a chunk lies outside of it"));
    }
    let place = places.remove(&(name, Some(offsets.clone())));
    if sizes.contains(&0) {
        return Ok(None);
    }
    let place = place.ok_or_else(|| wrong("a chunk of it is described, but not stored"))?;
    Ok(Some(StoredBox {
        offsets,
        sizes,
        place,
    }))
}

fn state_of(pickle: &Pickle<'_>, id: Id, modules: &[&str], class: &str) -> Option<Id> {
    let object: Object = pickle.instance(id, modules, class)?;
    object.state
}

/// The numbers of a `torch.Size`, or of a plain tuple.
fn size(pickle: &Pickle<'_>, id: Id) -> Option<Vec<u64>> {
    let tuple = match pickle.instance(id, &["torch"], "Size") {
        Some(call) => match pickle.items(call.args)? {
            [] => return Some(Vec::new()),
            [tuple] => *tuple,
            _ => return None,
        },
        None => id,
    };
    let items = pickle
        .items(tuple)
        .filter(|items| items.len() <= MAX_RANK)?;
    let numbers = items.iter().map(|id| u64::try_from(pickle.int(*id)?).ok());
    numbers.collect()
}
