//! A checkpoint directory in the making: beside its destination, complete or not there at all.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use indexmap::IndexMap;
use serde_json::{Map, Value};

use super::header;
use super::index::INDEX;
use super::{HfCheckpoint, HfLayout, support_files};
use crate::checkpoint::beside::{Beside, write_file};
use crate::checkpoint::error::{check_range, io};
use crate::checkpoint::{CheckpointError, Overwrite, TensorInfo, TensorSink};

/// Writes a Hugging Face directory.
///
/// Files are made in a hidden directory beside the destination. [`HfWriter::finish`] checks that every tensor was
/// written in full, syncs and renames; a writer that is dropped before leaves nothing.
#[derive(Debug)]
pub struct HfWriter {
    beside: Beside,
    files: Vec<(String, File)>,
    tensors: IndexMap<String, Place>,
    index_metadata: Option<Map<String, Value>>,
}

#[derive(Debug)]
struct Place {
    file: usize,
    file_offset: u64,
    num_bytes: u64,
    written: AtomicU64,
}

impl HfWriter {
    /// Starts a directory with the files, order, dtypes and support files of `reference`.
    ///
    /// # Errors
    /// [`CheckpointError`] when the destination is taken or cannot be written.
    pub fn like(
        reference: &HfCheckpoint,
        target: &Path,
        overwrite: Overwrite,
    ) -> Result<Self, CheckpointError> {
        let writer = Self::create(&HfLayout::like(reference), target, overwrite)?;
        for file in support_files(reference.dir()) {
            writer.copy_file(&file)?;
        }
        Ok(writer)
    }

    /// Starts a directory with the files of `layout`.
    ///
    /// # Errors
    /// [`CheckpointError`] when the destination is taken or cannot be written.
    pub fn create(
        layout: &HfLayout,
        target: &Path,
        overwrite: Overwrite,
    ) -> Result<Self, CheckpointError> {
        let mut writer = Self {
            beside: Beside::create(target, overwrite)?,
            files: Vec::with_capacity(layout.files.len()),
            tensors: IndexMap::new(),
            index_metadata: layout.index_metadata.clone(),
        };
        for file in &layout.files {
            writer.add_file(&file.name, &file.tensors, &file.metadata)?;
        }
        Ok(writer)
    }

    fn add_file(
        &mut self,
        name: &str,
        tensors: &[(String, TensorInfo)],
        metadata: &Map<String, Value>,
    ) -> Result<(), CheckpointError> {
        let path = self.beside.path().join(name);
        let entries = tensors.iter().map(|(name, info)| (name.as_str(), info));
        let header = header::write(entries, metadata);
        let file = File::create_new(&path).map_err(io("create", &path))?;
        let mut next = header.len() as u64;
        file.write_all_at(&header, 0).map_err(io("write", &path))?;
        for (name, info) in tensors {
            let num_bytes = info.num_bytes();
            self.tensors.insert(
                name.clone(),
                Place {
                    file: self.files.len(),
                    file_offset: next,
                    num_bytes,
                    written: AtomicU64::new(0),
                },
            );
            next += num_bytes;
        }
        file.set_len(next).map_err(io("extend", &path))?;
        self.files.push((name.to_owned(), file));
        Ok(())
    }

    /// Copies a small file into the directory, under its own name.
    ///
    /// # Errors
    /// [`CheckpointError::Io`].
    pub fn copy_file(&self, from: &Path) -> Result<(), CheckpointError> {
        let bytes = fs_err::read(from).map_err(io("read", from))?;
        self.write_file(
            &from.file_name().unwrap_or_default().to_string_lossy(),
            &bytes,
        )
    }

    /// Writes a small file into the directory.
    ///
    /// # Errors
    /// [`CheckpointError::Io`].
    pub fn write_file(&self, name: &str, bytes: &[u8]) -> Result<(), CheckpointError> {
        write_file(&self.beside.path().join(name), bytes)
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
        for (name, place) in &self.tensors {
            let written = place.written.load(Ordering::Relaxed);
            if written != place.num_bytes {
                return Err(CheckpointError::Unfinished {
                    name: name.clone(),
                    written,
                    num_bytes: place.num_bytes,
                    dir: self.beside.target().to_owned(),
                });
            }
        }
        self.write_index()?;
        for (name, file) in &self.files {
            let path = self.beside.path().join(name);
            file.sync_all().map_err(io("sync", &path))?;
        }
        self.beside.finish()
    }

    fn write_index(&self) -> Result<(), CheckpointError> {
        let Some(metadata) = &self.index_metadata else {
            return Ok(());
        };
        let mut names: Vec<(&String, &Place)> = self.tensors.iter().collect();
        names.sort_by_key(|(name, _)| *name);
        let weight_map: Map<String, Value> = names
            .into_iter()
            .map(|(name, place)| (name.clone(), self.files[place.file].0.clone().into()))
            .collect();
        let index = serde_json::json!({"metadata": metadata, "weight_map": weight_map});
        let mut text = serde_json::to_string_pretty(&index).expect("maps of texts are always JSON");
        text.push('\n');
        self.write_file(INDEX, text.as_bytes())
    }
}

impl TensorSink for HfWriter {
    fn write(&self, name: &str, offset_bytes: u64, bytes: &[u8]) -> Result<(), CheckpointError> {
        let place = self
            .tensors
            .get(name)
            .ok_or_else(|| CheckpointError::NoTensor {
                name: name.to_owned(),
            })?;
        check_range(name, offset_bytes, bytes.len(), place.num_bytes)?;
        let (file_name, file) = &self.files[place.file];
        file.write_all_at(bytes, place.file_offset + offset_bytes)
            .map_err(io("write", &self.beside.path().join(file_name)))?;
        place
            .written
            .fetch_add(bytes.len() as u64, Ordering::Relaxed);
        Ok(())
    }
}
