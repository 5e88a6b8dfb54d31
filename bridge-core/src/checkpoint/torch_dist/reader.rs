//! An opened `torch_dist` directory.

use std::cell::Cell;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use super::archive::{Archive, Section};
use super::boxes::BoxCopy;
use super::directory::{self, COMMON, DataFiles, METADATA, RUN_CONFIG, refuse};
use super::item::{self, ItemError, Stored};
use super::metadata::{self, Place, StoredBox, Table};
use super::{Plain, TorchDistProblem, common};
use crate::checkpoint::error::{check_range, io};
use crate::checkpoint::{CheckpointError, Links, Reader, TensorInfo, TensorSource};

/// A checkpoint of Megatron-Core or of torch's distributed checkpoint, its table of contents read and checked.
///
/// Data files are not read before their tensors are.
#[derive(Debug)]
pub struct TorchDistCheckpoint {
    table: Table,
    files: DataFiles,
    links: Links,
    /// What each chunk's archive says, filled when it is first read.
    stored: Vec<Vec<OnceLock<Stored>>>,
}

/// A chunk of a tensor, and where it is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Chunk<'a> {
    /// Where it begins, an index an axis.
    pub offsets: &'a [u64],
    /// Its size, an axis each.
    pub sizes: &'a [u64],
    /// The file's name.
    pub file: &'a str,
    /// The first byte of its archive.
    pub file_offset: u64,
    /// Bytes of its archive.
    pub num_bytes: u64,
}

impl TorchDistCheckpoint {
    /// Opens the directory of an iteration, or of a run (its newest iteration then).
    ///
    /// # Errors
    /// [`CheckpointError`] with everything that is wrong with its table of contents and files.
    pub fn open(dir: &Path) -> Result<Self, CheckpointError> {
        Self::open_with(dir, Links::default())
    }

    /// Opens a directory and says which links are allowed.
    ///
    /// # Errors
    /// As [`TorchDistCheckpoint::open`].
    pub fn open_with(dir: &Path, links: Links) -> Result<Self, CheckpointError> {
        let dir = directory::resolve(dir, links)?;
        if dir.join(METADATA).symlink_metadata().is_err() {
            let interrupted = dir.join(".metadata.tmp").exists();
            return Err(refuse(
                &dir,
                if interrupted {
                    TorchDistProblem::Interrupted
                } else {
                    TorchDistProblem::NoMetadata
                },
            ));
        }
        directory::check_backend(&dir, links)?;
        let bytes = directory::read_small(&dir, METADATA, links)?;
        let table = metadata::parse(&bytes).map_err(|problems| CheckpointError::TorchDist {
            path: dir.clone(),
            problems,
        })?;
        let items = items(&table);
        let files = {
            let mut first = vec![""; table.files.len()];
            for (name, place) in &items {
                first[place.file] = name;
            }
            let names = table.files.iter().map(String::as_str).zip(first);
            DataFiles::look(&dir, links, names)?
        };
        check_places(items, &files)?;
        let stored = table
            .tensors
            .values()
            .map(|tensor| tensor.boxes.iter().map(|_| OnceLock::new()).collect())
            .collect();
        Ok(Self {
            table,
            files,
            links,
            stored,
        })
    }

    /// Whether `dir` means to be such a directory, whole or not: it has one of the files that say where tensors are.
    #[must_use]
    pub fn is_at(dir: &Path) -> bool {
        directory::MARKS
            .iter()
            .any(|name| dir.join(name).symlink_metadata().is_ok())
    }

    /// The directory of the iteration.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.files.dir
    }

    /// Tensors by their stored names, in the file's order. Optimizer states are among them.
    pub fn tensors(&self) -> impl ExactSizeIterator<Item = (&str, &TensorInfo)> {
        let tensors = self.table.tensors.iter();
        tensors.map(|(name, tensor)| (name.as_str(), &tensor.info))
    }

    /// Tensors of the model: all but the optimizer's.
    pub fn model_tensors(&self) -> impl Iterator<Item = (&str, &TensorInfo)> {
        self.tensors()
            .filter(|(name, _)| !name.starts_with("optimizer.") && !name.starts_with("chained_"))
    }

    /// Names of objects, with the bytes they take. They are never opened.
    pub fn objects(&self) -> impl ExactSizeIterator<Item = (&str, u64)> {
        let objects = self.table.objects.iter();
        objects.map(|(name, place)| (name.as_str(), place.len))
    }

    /// Names of the data files.
    pub fn files(&self) -> impl ExactSizeIterator<Item = &str> {
        self.files.files.iter().map(|file| file.name.as_str())
    }

    /// Paths of the table of contents and of the data files.
    pub fn paths(&self) -> impl Iterator<Item = PathBuf> {
        std::iter::once(METADATA)
            .chain(self.files())
            .map(|name| self.dir().join(name))
    }

    /// The chunks of a tensor that hold anything; none for an unknown name.
    pub fn chunks(&self, name: &str) -> impl Iterator<Item = Chunk<'_>> {
        let boxes = self.table.tensors.get(name).map(|tensor| &tensor.boxes);
        boxes.into_iter().flatten().map(|part| Chunk {
            offsets: &part.offsets,
            sizes: &part.sizes,
            file: &self.files.files[part.place.file].name,
            file_offset: part.place.offset,
            num_bytes: part.place.len,
        })
    }

    /// How many chunks a tensor is stored in, the empty ones included.
    #[must_use]
    pub fn num_chunks(&self, name: &str) -> Option<usize> {
        let tensor = self.table.tensors.get(name)?;
        Some(tensor.num_chunks)
    }

    /// The iteration: what common.pt says, or the directory's name; `None` where neither does.
    ///
    /// # Errors
    /// As [`TorchDistCheckpoint::common`].
    pub fn iteration(&self) -> Result<Option<u64>, CheckpointError> {
        if let Some(common) = self.common()?
            && let Some(Plain::Int(iteration)) = common.get("iteration")
        {
            return Ok(u64::try_from(*iteration).ok());
        }
        Ok(directory::iteration_of(self.dir()))
    }

    /// What common.pt holds; `None` where there is none.
    ///
    /// # Errors
    /// [`CheckpointError`] when it cannot be read, or names what no checkpoint needs.
    pub fn common(&self) -> Result<Option<Plain>, CheckpointError> {
        if self.dir().join(COMMON).symlink_metadata().is_err() {
            return Ok(None);
        }
        let bytes = directory::read_small(self.dir(), COMMON, self.links)?;
        let plain = common::parse(&bytes, COMMON);
        plain
            .map(Some)
            .map_err(|problem| refuse(self.dir(), problem))
    }

    /// Megatron Bridge's run_config.yaml, where there is one.
    #[must_use]
    pub fn run_config(&self) -> Option<PathBuf> {
        let path = self.dir().join(RUN_CONFIG);
        path.symlink_metadata().is_ok().then_some(path)
    }

    /// Reads everything and compares it with the checksums of its archives.
    ///
    /// # Errors
    /// [`CheckpointError::TorchDist`] with every item that differs, or what the system said.
    pub fn verify(&self) -> Result<(), CheckpointError> {
        use rayon::prelude::*;
        let problems: Vec<TorchDistProblem> = items(&self.table)
            .par_iter()
            .map(|(name, place)| self.verify_item(name, *place))
            .collect::<Result<Vec<_>, _>>()?
            .into_iter()
            .flatten()
            .collect();
        if problems.is_empty() {
            return Ok(());
        }
        Err(CheckpointError::TorchDist {
            path: self.dir().to_owned(),
            problems,
        })
    }

    fn verify_item(
        &self,
        name: &str,
        place: Place,
    ) -> Result<Vec<TorchDistProblem>, CheckpointError> {
        let file = self.files.open(place.file)?;
        let section = Section {
            file: &file,
            start: place.offset,
            len: place.len,
        };
        let check = || -> Result<Vec<TorchDistProblem>, ItemError> {
            let archive = Archive::open(section)?;
            let mut problems = Vec::new();
            for entry in archive.entries() {
                let found = archive.crc(entry)?;
                if found != entry.crc {
                    problems.push(TorchDistProblem::Checksum {
                        part: format!("`{name}`"),
                        entry: entry.name.clone(),
                        found,
                        expected: entry.crc,
                    });
                }
            }
            Ok(problems)
        };
        check().or_else(|error| match error.into_problem(name) {
            Ok(problem) => Ok(vec![problem]),
            Err(error) => Err(io("read", &self.path_of(place))(error)),
        })
    }

    fn path_of(&self, place: Place) -> PathBuf {
        self.dir().join(&self.files.files[place.file].name)
    }

    /// What the archive of a chunk says, after a comparison with the table.
    fn stored(
        &self,
        name: &str,
        number: (usize, usize),
        info: &TensorInfo,
        part: &StoredBox,
        section: Section<'_>,
    ) -> Result<&Stored, CheckpointError> {
        let cell = &self.stored[number.0][number.1];
        if let Some(stored) = cell.get() {
            return Ok(stored);
        }
        let path = self.path_of(part.place);
        let mut stored = item::open(section).map_err(|error| match error.into_problem(name) {
            Ok(problem) => refuse(&path, problem),
            Err(error) => io("read", &path)(error),
        })?;
        let mismatch = |what, found: String, expected: String| {
            refuse(
                &path,
                TorchDistProblem::Mismatch {
                    name: name.to_owned(),
                    what,
                    found,
                    expected,
                },
            )
        };
        if stored.dtype != info.dtype {
            let (found, expected) = (stored.dtype.to_string(), info.dtype.to_string());
            return Err(mismatch("the dtype of a chunk", found, expected));
        }
        // A chunk may lack the leading axes of length one that its table counts, or have them in addition.
        let bare = |sizes: &[u64]| -> Vec<u64> {
            sizes
                .iter()
                .copied()
                .skip_while(|size| *size == 1)
                .collect()
        };
        if bare(&stored.shape) != bare(&part.sizes) {
            let (found, expected) = (format!("{:?}", stored.shape), format!("{:?}", part.sizes));
            return Err(mismatch("the shape of a chunk", found, expected));
        }
        let kept = bare(&stored.shape).len();
        let inner = stored.strides.split_off(stored.strides.len() - kept);
        stored.strides = vec![0; part.sizes.len() - kept];
        stored.strides.extend(inner);
        stored.shape.clone_from(&part.sizes);
        Ok(cell.get_or_init(|| stored))
    }
}

/// Everything that is stored.
fn items(table: &Table) -> Vec<(&str, Place)> {
    let tensors = table.tensors.iter().flat_map(|(name, tensor)| {
        let places = tensor.boxes.iter().map(|part| part.place);
        places.map(move |place| (name.as_str(), place))
    });
    let objects = table.objects.iter();
    tensors
        .chain(objects.map(|(name, place)| (name.as_str(), *place)))
        .collect()
}

/// Items lie in their files, and not over each other.
fn check_places(mut items: Vec<(&str, Place)>, files: &DataFiles) -> Result<(), CheckpointError> {
    items.sort_by_key(|(_, place)| (place.file, place.offset, place.len));
    let mut problems = Vec::new();
    let mut before: Option<(&str, usize, u64)> = None;
    for (name, place) in items {
        let file = &files.files[place.file];
        let end = place.offset.saturating_add(place.len);
        if end > file.len {
            problems.push(TorchDistProblem::Truncated {
                name: name.to_owned(),
                file: file.name.clone(),
                end,
                len: file.len,
            });
        }
        if let Some((other, other_file, other_end)) = before
            && other_file == place.file
            && place.offset < other_end
        {
            problems.push(TorchDistProblem::SharedBytes {
                name: name.to_owned(),
                other: other.to_owned(),
                file: file.name.clone(),
                start: place.offset,
            });
        }
        before = Some((name, place.file, end));
    }
    if problems.is_empty() {
        return Ok(());
    }
    Err(CheckpointError::TorchDist {
        path: files.dir.clone(),
        problems,
    })
}

impl TensorSource for TorchDistCheckpoint {
    fn info(&self, name: &str) -> Option<TensorInfo> {
        self.table
            .tensors
            .get(name)
            .map(|tensor| tensor.info.clone())
    }

    fn read(&self, name: &str, offset_bytes: u64, into: &mut [u8]) -> Result<(), CheckpointError> {
        self.reader(name)?(offset_bytes, into)
    }

    fn reader<'a>(&'a self, name: &'a str) -> Result<Reader<'a>, CheckpointError> {
        let Some((number, _, tensor)) = self.table.tensors.get_full(name) else {
            let name = name.to_owned();
            return Err(CheckpointError::NoTensor { name });
        };
        let num_bytes = tensor.info.num_bytes();
        let reaches = tensor.boxes.iter().map(|part| reach(&tensor.info, part));
        let reaches: Vec<Range<u64>> = reaches.collect();
        // A file that the directory does not keep open stays open from one range to the next.
        let last = Cell::new(None);
        Ok(Box::new(move |offset_bytes, into| {
            check_range(name, offset_bytes, into.len(), num_bytes)?;
            if into.is_empty() {
                return Ok(());
            }
            let end = offset_bytes + into.len() as u64;
            for (box_number, (part, reach)) in tensor.boxes.iter().zip(&reaches).enumerate() {
                if reach.start >= end || reach.end <= offset_bytes {
                    continue;
                }
                let file = match last.take() {
                    Some((number, file)) if number == part.place.file => file,
                    _ => self.files.open(part.place.file)?,
                };
                let section = Section {
                    file: &file,
                    start: part.place.offset,
                    len: part.place.len,
                };
                let stored =
                    self.stored(name, (number, box_number), &tensor.info, part, section)?;
                let copy = BoxCopy {
                    shape: &tensor.info.shape,
                    offsets: &part.offsets,
                    sizes: &part.sizes,
                    stored,
                    item_start: part.place.offset,
                    file: &file,
                };
                copy.copy(offset_bytes, into)
                    .map_err(io("read", &self.path_of(part.place)))?;
                last.set(Some((part.place.file, file)));
            }
            Ok(())
        }))
    }
}

/// From the first byte of a box to its last, counted in its tensor.
fn reach(info: &TensorInfo, part: &StoredBox) -> Range<u64> {
    let mut stride = info.dtype.size_bytes() as u64;
    let (mut start, mut end) = (0, stride);
    for (axis, size) in info.shape.iter().enumerate().rev() {
        start += part.offsets[axis] * stride;
        end += (part.offsets[axis] + part.sizes[axis] - 1) * stride;
        stride *= *size as u64;
    }
    start..end
}
