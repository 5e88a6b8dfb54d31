//! An opened checkpoint directory.

use std::collections::HashSet;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use indexmap::IndexMap;
use serde_json::{Map, Value};

use super::fp8::Scales;
use super::header::{self, Header};
use super::index::{self, INDEX, SINGLE};
use crate::checkpoint::error::{check_range, io};
use crate::checkpoint::links::{self, Links, Refused};
use crate::checkpoint::{CheckpointError, FileProblem, Reader, TensorInfo, TensorSource};

/// A Hugging Face directory of one or more safetensors files, every header read and checked.
#[derive(Debug)]
pub struct HfCheckpoint {
    pub(super) dir: PathBuf,
    files: Vec<OpenFile>,
    pub(super) tensors: IndexMap<String, Place>,
    index_metadata: Option<Map<String, Value>>,
}

#[derive(Debug)]
struct OpenFile {
    name: String,
    file: File,
    metadata: Map<String, Value>,
}

/// Where a tensor stands. Of one with scales, `info` is what is read, not what the file holds.
#[derive(Debug, Clone)]
pub(super) struct Place {
    pub(super) info: TensorInfo,
    file: usize,
    file_offset: u64,
    pub(super) scales: Option<Box<Scales>>,
}

impl HfCheckpoint {
    /// Opens a directory.
    ///
    /// # Errors
    /// [`CheckpointError`] with everything that is wrong with its headers and index.
    pub fn open(dir: &Path) -> Result<Self, CheckpointError> {
        Self::open_with(dir, Links::default())
    }

    /// Opens a directory and says which links are allowed.
    ///
    /// # Errors
    /// As [`HfCheckpoint::open`].
    pub fn open_with(dir: &Path, links: Links) -> Result<Self, CheckpointError> {
        let (index_path, single) = (dir.join(INDEX), dir.join(SINGLE));
        // A link that leads nowhere is there, and refused when it is opened.
        let is_there = |path: &Path| path.symlink_metadata().is_ok();
        if !is_there(&index_path) {
            if !is_there(&single) {
                return Err(CheckpointError::NoWeights {
                    dir: dir.to_owned(),
                });
            }
            let (file, header) = open_weights(dir, SINGLE, links)?;
            return Ok(Self::assemble(
                dir,
                vec![(SINGLE.to_owned(), file, header)],
                None,
            ));
        }
        let index = index::read(dir, links)?;
        if is_there(&single) && !index.shards.contains_key(SINGLE) {
            return Err(CheckpointError::Ambiguous {
                dir: dir.to_owned(),
            });
        }
        let mut problems = Vec::new();
        let mut opened = Vec::with_capacity(index.shards.len());
        for (name, tensors) in index.shards {
            if dir.join(&name).symlink_metadata().is_err() {
                let missing = FileProblem::MissingShard {
                    file: name,
                    count: tensors.len(),
                    first: tensors[0].clone(),
                };
                header::keep(&mut problems, [missing]);
                continue;
            }
            let (file, header) = open_weights(dir, &name, links)?;
            compare(&name, &tensors, &header, &mut problems);
            opened.push((name, file, header));
        }
        if !problems.is_empty() {
            return Err(CheckpointError::Files {
                path: index_path,
                problems,
            });
        }
        Ok(Self::assemble(dir, opened, Some(index.metadata)))
    }

    /// Tensor names are unique here: a file's header has none twice, and the index places each in one file.
    fn assemble(
        dir: &Path,
        opened: Vec<(String, File, Header)>,
        index_metadata: Option<Map<String, Value>>,
    ) -> Self {
        let total = opened
            .iter()
            .map(|(_, _, header)| header.entries.len())
            .sum();
        let mut checkpoint = Self {
            dir: dir.to_owned(),
            files: Vec::with_capacity(opened.len()),
            tensors: IndexMap::with_capacity(total),
            index_metadata,
        };
        for (number, (name, file, header)) in opened.into_iter().enumerate() {
            for entry in header.entries {
                checkpoint.tensors.insert(
                    entry.name,
                    Place {
                        info: entry.info,
                        file: number,
                        file_offset: entry.file_offset,
                        scales: None,
                    },
                );
            }
            checkpoint.files.push(OpenFile {
                name,
                file,
                metadata: header.metadata,
            });
        }
        checkpoint
    }

    /// The same checkpoint with its tensors under other names.
    ///
    /// # Errors
    /// [`FileProblem::SameName`] when two tensors would get the same name.
    pub fn renamed(self, rename: impl Fn(&str) -> String) -> Result<Self, CheckpointError> {
        let mut tensors = IndexMap::with_capacity(self.tensors.len());
        let mut problems = Vec::new();
        for (name, place) in self.tensors {
            let name = rename(&name);
            if tensors.insert(name.clone(), place).is_some() {
                problems.push(FileProblem::SameName { name });
            }
        }
        if !problems.is_empty() {
            return Err(CheckpointError::Files {
                path: self.dir,
                problems,
            });
        }
        Ok(Self { tensors, ..self })
    }

    /// The directory.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Tensor names, file by file in the order of their bytes.
    pub fn names(&self) -> impl ExactSizeIterator<Item = &str> + Clone {
        self.tensors.keys().map(String::as_str)
    }

    /// Names and infos, in the order of [`HfCheckpoint::names`].
    pub fn tensors(&self) -> impl ExactSizeIterator<Item = (&str, &TensorInfo)> {
        self.tensors
            .iter()
            .map(|(name, place)| (name.as_str(), &place.info))
    }

    /// The path of the file that holds a tensor.
    #[must_use]
    pub fn file_of(&self, name: &str) -> Option<PathBuf> {
        let place = self.tensors.get(name)?;
        Some(self.dir.join(&self.files[place.file].name))
    }

    /// Name and metadata of each file, with its tensors in the order of their bytes.
    /// Paths of the weight files.
    pub fn paths(&self) -> impl ExactSizeIterator<Item = PathBuf> {
        self.files.iter().map(|file| self.dir.join(&file.name))
    }

    pub(super) fn files(
        &self,
    ) -> impl Iterator<Item = (&str, &Map<String, Value>, Vec<(&str, &TensorInfo)>)> {
        self.files.iter().enumerate().map(|(number, file)| {
            let tensors = self
                .tensors
                .iter()
                .filter(|(_, place)| place.file == number)
                .map(|(name, place)| (name.as_str(), &place.info))
                .collect();
            (file.name.as_str(), &file.metadata, tensors)
        })
    }

    /// What stands beside `weight_map` in the index; `None` for a single file.
    pub(super) fn index_metadata(&self) -> Option<&Map<String, Value>> {
        self.index_metadata.as_ref()
    }
}

/// Opens one file of a directory, after the checks on where it leads and what it is.
pub(super) fn open_file(dir: &Path, name: &str, links: Links) -> Result<File, CheckpointError> {
    let problem = |problem| CheckpointError::Files {
        path: dir.to_owned(),
        problems: vec![problem],
    };
    let file = name.to_owned();
    let opened = links::open(dir, name, links).map_err(|refused| match refused {
        Refused::Io(action, error) => io(action, &dir.join(name))(error),
        Refused::Link(target) => problem(FileProblem::Link { file, target }),
        Refused::NotAFile => problem(FileProblem::NotAFile { file }),
    });
    Ok(opened?.0)
}

fn open_weights(dir: &Path, name: &str, links: Links) -> Result<(File, Header), CheckpointError> {
    let file = open_file(dir, name, links)?;
    let header = header::read(&file, &dir.join(name))?;
    Ok((file, header))
}

/// Compares what the index places in a file with what the file holds.
fn compare(file: &str, placed: &[String], header: &Header, problems: &mut Vec<FileProblem>) {
    let held: HashSet<&str> = header
        .entries
        .iter()
        .map(|entry| entry.name.as_str())
        .collect();
    let wanted: HashSet<&str> = placed.iter().map(String::as_str).collect();
    let absent = placed.iter().filter(|name| !held.contains(name.as_str()));
    let not_held = absent.map(|name| FileProblem::NotInShard {
        name: name.clone(),
        file: file.to_owned(),
    });
    header::keep(problems, not_held);
    let names = header.entries.iter().map(|entry| entry.name.as_str());
    let not_placed =
        names
            .filter(|name| !wanted.contains(name))
            .map(|name| FileProblem::NotInIndex {
                name: name.to_owned(),
                file: file.to_owned(),
            });
    header::keep(problems, not_placed);
}

impl TensorSource for HfCheckpoint {
    fn info(&self, name: &str) -> Option<TensorInfo> {
        self.tensors.get(name).map(|place| place.info.clone())
    }

    fn read(&self, name: &str, offset_bytes: u64, into: &mut [u8]) -> Result<(), CheckpointError> {
        self.reader(name)?(offset_bytes, into)
    }

    fn reader<'a>(&'a self, name: &'a str) -> Result<Reader<'a>, CheckpointError> {
        let place = self
            .tensors
            .get(name)
            .ok_or_else(|| CheckpointError::NoTensor {
                name: name.to_owned(),
            })?;
        if place.scales.is_some() {
            return Ok(Box::new(move |offset_bytes, into| {
                self.read_scaled(name, offset_bytes, into, f32::to_le_bytes)
            }));
        }
        let num_bytes = place.info.num_bytes();
        Ok(Box::new(move |offset_bytes, into| {
            check_range(name, offset_bytes, into.len(), num_bytes)?;
            self.read_place(place, offset_bytes, into)
        }))
    }
}

impl HfCheckpoint {
    /// Fills `into` with the file's bytes of a tensor from `offset_bytes` on.
    pub(super) fn read_place(
        &self,
        place: &Place,
        offset_bytes: u64,
        into: &mut [u8],
    ) -> Result<(), CheckpointError> {
        let file = &self.files[place.file];
        file.file
            .read_exact_at(into, place.file_offset + offset_bytes)
            .map_err(|source| CheckpointError::Io {
                action: "read",
                path: self.dir.join(&file.name),
                source,
            })
    }
}
