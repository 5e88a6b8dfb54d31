//! A checkpoint directory in the making: beside its destination, complete or not there at all.

use std::ops::Range;
use std::path::{Path, PathBuf};

use indexmap::IndexMap;
use rayon::prelude::*;
use serde_json::{Map, Value};

use super::header;
use super::index::{self, INDEX};
use super::support_files::{put_files_of, put_support_files};
use super::{HfCheckpoint, HfLayout};
use crate::checkpoint::error::{check_range, io};
use crate::checkpoint::staging::{PartPlace, StagedFiles, write_file};
use crate::checkpoint::{CheckpointError, FileSink, Staging, TensorInfo, TensorSink};

/// Writes a Hugging Face directory.
///
/// Files are made in a hidden directory beside the destination. [`HfWriter::finish`] checks that every byte was written
/// exactly once, syncs and renames; a writer that is dropped before leaves nothing, or, with [`Staging::job`], what its
/// next run goes on with.
#[derive(Debug)]
pub struct HfWriter {
    staged: StagedFiles,
    tensors: IndexMap<String, Place>,
    /// The range of each file's tensors among `tensors`.
    of_file: Vec<Range<usize>>,
    index_metadata: Option<Map<String, Value>>,
}

#[derive(Debug)]
struct Place {
    place: PartPlace,
    num_bytes: u64,
}

impl HfWriter {
    /// Starts a directory with the files, order, dtypes and support files of `reference`.
    ///
    /// Matrices that are in FP8 there are unquantised here ([`HfLayout::like`]), and config.json has no
    /// `quantization_config`.
    ///
    /// # Errors
    /// [`CheckpointError`] when the destination is taken or cannot be written.
    pub fn like(
        reference: &HfCheckpoint,
        target: &Path,
        staging: impl Into<Staging>,
    ) -> Result<Self, CheckpointError> {
        let writer = Self::create(&HfLayout::like(reference), target, staging)?;
        put_files_of(reference, writer.staged.path())?;
        Ok(writer)
    }

    /// Starts a directory with the files of `layout`.
    ///
    /// # Errors
    /// [`CheckpointError`] when the destination is taken or cannot be written.
    pub fn create(
        layout: &HfLayout,
        target: &Path,
        staging: impl Into<Staging>,
    ) -> Result<Self, CheckpointError> {
        let mut writer = Self {
            staged: StagedFiles::create(target, &staging.into())?,
            tensors: IndexMap::new(),
            of_file: Vec::with_capacity(layout.files.len()),
            index_metadata: layout.index_metadata.clone(),
        };
        for file in &layout.files {
            writer.add_file(&file.name, &file.tensors, &file.metadata)?;
        }
        writer.staged.begin()?;
        Ok(writer)
    }

    fn add_file(
        &mut self,
        name: &str,
        tensors: &[(String, TensorInfo)],
        metadata: &Map<String, Value>,
    ) -> Result<(), CheckpointError> {
        let entries = tensors.iter().map(|(name, info)| (name.as_str(), info));
        let header = header::write(entries, metadata);
        let file = self.of_file.len();
        let first = self.tensors.len();
        let mut parts = Vec::with_capacity(tensors.len());
        let mut next = header.len() as u64;
        for (name, info) in tensors {
            let num_bytes = info.num_bytes();
            let place = PartPlace {
                file,
                part: parts.len(),
            };
            self.tensors
                .insert(name.clone(), Place { place, num_bytes });
            parts.push((next, num_bytes));
            next += num_bytes;
        }
        self.of_file.push(first..self.tensors.len());
        self.staged.add(name.to_owned(), next, parts)?;
        self.staged.write_around(file, 0, &header)
    }

    /// Copies [`super::SUPPORT_FILES`] but config.json out of a model directory, those that it has.
    ///
    /// # Errors
    /// [`CheckpointError::Files`] for a link that leads out of `dir`: whoever made the directory would choose a file of the
    /// reader's to be passed on. [`CheckpointError::Io`].
    pub fn copy_support_files(&self, dir: &Path) -> Result<(), CheckpointError> {
        put_support_files(dir, self.staged.path())
    }

    /// Copies a small file into the directory, under its own name.
    ///
    /// # Errors
    /// [`CheckpointError::Io`].
    pub fn copy_file(&self, from: &Path) -> Result<(), CheckpointError> {
        let name = from.file_name().unwrap_or_default();
        self.copy_file_as(from, &name.to_string_lossy())
    }

    /// Copies a small file into the directory, under another name.
    ///
    /// # Errors
    /// [`CheckpointError::Io`].
    pub fn copy_file_as(&self, from: &Path, name: &str) -> Result<(), CheckpointError> {
        let bytes = fs_err::read(from).map_err(io("read", from))?;
        self.write_file(name, &bytes)
    }

    /// Writes a small file into the directory.
    ///
    /// # Errors
    /// [`CheckpointError::Io`].
    pub fn write_file(&self, name: &str, bytes: &[u8]) -> Result<(), CheckpointError> {
        write_file(&self.staged.path().join(name), bytes)
    }

    /// Names of the tensors that are to be written.
    pub fn names(&self) -> impl ExactSizeIterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// Checks that everything was written, syncs, and moves the directory to its destination.
    ///
    /// # Errors
    /// [`CheckpointError::Unfinished`] names the first tensor with missing bytes; otherwise what the system said.
    /// The destination is untouched then.
    pub fn finish(self) -> Result<PathBuf, CheckpointError> {
        self.check_written(0..self.tensors.len())?;
        (0..self.of_file.len())
            .into_par_iter()
            .filter(|file| !self.staged.is_finished(*file))
            .try_for_each(|file| self.staged.finish_file(file))?;
        self.write_index()?;
        self.staged.finish()
    }

    fn check_written(&self, tensors: Range<usize>) -> Result<(), CheckpointError> {
        for (name, tensor) in &self.tensors[tensors] {
            let written = self.staged.written(tensor.place);
            if written != tensor.num_bytes {
                return Err(CheckpointError::Unfinished {
                    name: name.clone(),
                    written,
                    num_bytes: tensor.num_bytes,
                    dir: self.staged.target().to_owned(),
                });
            }
        }
        Ok(())
    }

    fn write_index(&self) -> Result<(), CheckpointError> {
        let Some(metadata) = &self.index_metadata else {
            return Ok(());
        };
        let places = self.tensors.iter();
        let text = index::text(
            metadata,
            places.map(|(name, tensor)| (name.as_str(), self.staged.name(tensor.place.file))),
        );
        self.write_file(INDEX, text.as_bytes())
    }
}

impl TensorSink for HfWriter {
    fn write(&self, name: &str, offset_bytes: u64, bytes: &[u8]) -> Result<(), CheckpointError> {
        let tensor = self
            .tensors
            .get(name)
            .ok_or_else(|| CheckpointError::NoTensor {
                name: name.to_owned(),
            })?;
        check_range(name, offset_bytes, bytes.len(), tensor.num_bytes)?;
        if self.staged.write(tensor.place, offset_bytes, bytes)? {
            return Ok(());
        }
        Err(CheckpointError::Twice {
            name: name.to_owned(),
            start: offset_bytes,
            end: offset_bytes + bytes.len() as u64,
            dir: self.staged.target().to_owned(),
        })
    }
}

impl FileSink for HfWriter {
    fn num_files(&self) -> usize {
        self.of_file.len()
    }

    fn file_bytes(&self, file: usize) -> u64 {
        let tensors = self.tensors[self.of_file[file].clone()].values();
        tensors.map(|tensor| tensor.num_bytes).sum()
    }

    fn unwritten(&self, file: usize) -> Vec<&str> {
        if self.staged.is_finished(file) {
            return Vec::new();
        }
        let tensors = self.tensors[self.of_file[file].clone()].keys();
        tensors.map(String::as_str).collect()
    }

    fn finish_file(&self, file: usize) -> Result<(), CheckpointError> {
        self.check_written(self.of_file[file].clone())?;
        self.staged.finish_file(file)
    }
}
