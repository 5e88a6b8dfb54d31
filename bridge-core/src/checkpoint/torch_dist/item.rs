//! A stored tensor: an archive with a pickle that describes it and an entry with its bytes.

use std::ops::Range;

use super::archive::{Archive, ArchiveError, ReadAt};
use super::pickle::{self, Dialect, Id, Node, Pickle};
use super::{PickleProblem, TorchDistProblem};
use crate::Dtype;

/// Where the elements of a stored tensor are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Stored {
    pub(super) dtype: Dtype,
    pub(super) shape: Vec<u64>,
    /// In bytes.
    pub(super) strides: Vec<u64>,
    /// The first element's byte, from the archive's start.
    pub(super) first: u64,
    /// The storage's bytes, from the archive's start.
    pub(super) data: Range<u64>,
}

impl Stored {
    /// Whether elements follow each other in row-major order.
    pub(super) fn is_contiguous(&self) -> bool {
        let mut expected = self.dtype.size_bytes() as u64;
        self.shape
            .iter()
            .zip(&self.strides)
            .rev()
            .all(|(size, stride)| {
                let fits = *size == 1 || *stride == expected;
                expected *= size;
                fits
            })
            || self.shape.contains(&0)
    }
}

/// Why an item is refused.
#[derive(Debug)]
pub(super) enum ItemError {
    Archive(ArchiveError),
    Pickle(PickleProblem),
    Value(&'static str),
    Dtype(String),
}

impl ItemError {
    /// The problem, or what the system said.
    pub(super) fn into_problem(self, part: &str) -> Result<TorchDistProblem, std::io::Error> {
        let part = format!("`{part}`");
        Ok(match self {
            ItemError::Archive(ArchiveError::Io(error)) => return Err(error),
            ItemError::Archive(ArchiveError::Malformed(reason)) => {
                TorchDistProblem::Archive { part, reason }
            }
            ItemError::Pickle(problem) => TorchDistProblem::Pickle { part, problem },
            ItemError::Value(what) => TorchDistProblem::Value { part, what },
            ItemError::Dtype(dtype) => TorchDistProblem::Dtype { name: part, dtype },
        })
    }
}

impl From<ArchiveError> for ItemError {
    fn from(error: ArchiveError) -> Self {
        ItemError::Archive(error)
    }
}

impl From<PickleProblem> for ItemError {
    fn from(problem: PickleProblem) -> Self {
        ItemError::Pickle(problem)
    }
}

/// Opens the archive of one tensor.
pub(super) fn open(source: impl ReadAt) -> Result<Stored, ItemError> {
    let archive = Archive::open(source)?;
    let (entry, folder) = archive.pickle()?;
    check_byte_order(&archive, folder)?;
    let bytes = archive.read(entry)?;
    let pickle = pickle::parse(&bytes, Dialect::Tensor)?;
    tensor(&archive, folder, &pickle, pickle.root())
}

fn check_byte_order<R: ReadAt>(archive: &Archive<R>, folder: &str) -> Result<(), ItemError> {
    if let Some(entry) = archive.find(&format!("{folder}/byteorder"))
        && (entry.len != 6 || archive.read(entry)? != b"little")
    {
        return Err(ItemError::Value("its byte order is not little"));
    }
    Ok(())
}

const REBUILD: &str = "torch._utils";

/// The tensor that a value of an archive's pickle stands for.
pub(super) fn tensor<R: ReadAt>(
    archive: &Archive<R>,
    folder: &str,
    pickle: &Pickle<'_>,
    id: Id,
) -> Result<Stored, ItemError> {
    let id = match pickle.instance(id, &[REBUILD], "_rebuild_parameter") {
        Some(parameter) => *pickle
            .items(parameter.args)
            .and_then(<[Id]>::first)
            .ok_or(ItemError::Value("a parameter holds no tensor"))?,
        None => id,
    };
    let v2 = pickle.instance(id, &[REBUILD], "_rebuild_tensor_v2");
    let v3 = pickle.instance(id, &[REBUILD], "_rebuild_tensor_v3");
    let Some(call) = v2.or(v3) else {
        return Err(ItemError::Value("it is no tensor"));
    };
    let args = pickle.items(call.args).unwrap_or_default();
    let [storage, offset, shape, strides, ..] = args else {
        return Err(ItemError::Value("its tensor has too few arguments"));
    };
    let (key, count, storage_dtype) = storage_of(pickle, *storage)?;
    let dtype = match (storage_dtype, args.get(6)) {
        (Some(dtype), _) => dtype,
        (None, Some(id)) => dtype_of(pickle, *id)?,
        (None, None) => return Err(ItemError::Value("its tensor has no dtype")),
    };
    let size = dtype.size_bytes() as u64;
    let storage_bytes = match storage_dtype {
        Some(_) => count.checked_mul(size),
        None => Some(count),
    };
    let entry = archive
        .find(&format!("{folder}/data/{key}"))
        .ok_or(ItemError::Value("its storage is missing"))?;
    if storage_bytes != Some(entry.len) {
        return Err(ItemError::Value(
            "its storage has another size than its description",
        ));
    }
    let data = archive.range(entry)?;
    let shape = numbers(pickle, *shape)?;
    let strides = numbers(pickle, *strides)?;
    let offset = number(pickle, *offset)?;
    if shape.len() != strides.len() {
        return Err(ItemError::Value("its shape and strides differ in length"));
    }
    let last = shape
        .iter()
        .zip(&strides)
        .try_fold(offset, |last, (size, stride)| {
            last.checked_add(size.saturating_sub(1).checked_mul(*stride)?)
        });
    let fits = last
        .and_then(|last| last.checked_add(1)?.checked_mul(size))
        .is_some_and(|end| end <= entry.len);
    if !fits && !shape.contains(&0) {
        return Err(ItemError::Value("its elements lie outside of its storage"));
    }
    let first = if fits {
        data.start + offset * size
    } else {
        data.start
    };
    let strides = strides
        .into_iter()
        .map(|stride| stride.saturating_mul(size))
        .collect();
    Ok(Stored {
        dtype,
        shape,
        strides,
        first,
        data,
    })
}

/// Key, number of elements (bytes without a dtype) and dtype of a storage.
fn storage_of<'a>(pickle: &Pickle<'a>, id: Id) -> Result<(&'a str, u64, Option<Dtype>), ItemError> {
    let wrong = ItemError::Value("its storage is not described as torch does");
    let Node::Persistent(id) = pickle.node(id) else {
        return Err(wrong);
    };
    let Some([kind, class, key, _, count]) = pickle.items(id) else {
        return Err(wrong);
    };
    let (Some("storage"), Some((module, class)), Some(key)) =
        (pickle.text(*kind), pickle.global(*class), pickle.text(*key))
    else {
        return Err(wrong);
    };
    let count = number(pickle, *count)?;
    if (module, class) == ("torch.storage", "UntypedStorage") {
        return Ok((key, count, None));
    }
    let word = pickle::STORAGES.iter().find(|(name, _)| *name == class);
    match word {
        Some((_, word)) if module == "torch" => {
            let dtype = word
                .parse()
                .map_err(|_| ItemError::Dtype((*word).to_owned()))?;
            Ok((key, count, Some(dtype)))
        }
        _ => Err(wrong),
    }
}

fn dtype_of(pickle: &Pickle<'_>, id: Id) -> Result<Dtype, ItemError> {
    match pickle.global(id) {
        Some(("torch", word)) => word.parse().map_err(|_| ItemError::Dtype(word.to_owned())),
        _ => Err(ItemError::Value("its dtype is none")),
    }
}

fn number(pickle: &Pickle<'_>, id: Id) -> Result<u64, ItemError> {
    pickle
        .int(id)
        .and_then(|value| u64::try_from(value).ok())
        .ok_or(ItemError::Value("a size is no positive integer"))
}

fn numbers(pickle: &Pickle<'_>, id: Id) -> Result<Vec<u64>, ItemError> {
    let items = pickle
        .items(id)
        .filter(|items| items.len() <= 64)
        .ok_or(ItemError::Value("its shape is no tuple"))?;
    items.iter().map(|id| number(pickle, *id)).collect()
}
