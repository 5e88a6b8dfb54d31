//! A checkpoint directory that several processes fill, each with ranges of its own.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::OnceLock;

use indexmap::IndexMap;
use serde_json::{Map, Value};

use super::header;
use super::index::{self, INDEX};
use super::support_files::put_files_of;
use super::{HfCheckpoint, HfLayout};
use crate::checkpoint::error::{check_range, io};
use crate::checkpoint::staging::{Shared, sync_file, write_file};
use crate::checkpoint::{CheckpointError, Overwrite, Published, TensorSink};

/// Writes ranges of tensors into a directory like a reference, beside other processes that write the rest.
///
/// Nothing here knows who writes what: that each byte comes from somebody, and from one alone, is the callers' to see to
/// before [`SharedHfWriter::publish`].
#[derive(Debug)]
pub struct SharedHfWriter {
    shared: Shared,
    files: Vec<SharedFile>,
    tensors: IndexMap<String, Place>,
}

#[derive(Debug)]
struct SharedFile {
    name: String,
    /// Opened when this process first writes to it.
    file: OnceLock<File>,
}

#[derive(Debug)]
struct Place {
    file: usize,
    offset: u64,
    num_bytes: u64,
}

impl SharedHfWriter {
    /// Joins the export `id` to `target`; whoever is first makes files of full length with the reference's headers, and the
    /// small files beside them. `description` must be equal for all.
    ///
    /// # Errors
    /// [`CheckpointError::Exists`], [`CheckpointError::OtherExport`], [`CheckpointError::NoSpace`].
    pub fn like(
        reference: &HfCheckpoint,
        target: &Path,
        id: &str,
        overwrite: Overwrite,
        description: &Map<String, Value>,
    ) -> Result<Self, CheckpointError> {
        let layout = HfLayout::like(reference);
        let mut tensors = IndexMap::new();
        let (mut files, mut headers) = (Vec::new(), Vec::new());
        for file in &layout.files {
            let entries = file
                .tensors
                .iter()
                .map(|(name, info)| (name.as_str(), info));
            let header = header::write(entries, &file.metadata);
            let mut offset = header.len() as u64;
            for (name, info) in &file.tensors {
                let (file, num_bytes) = (files.len(), info.num_bytes());
                let place = Place {
                    file,
                    offset,
                    num_bytes,
                };
                tensors.insert(name.clone(), place);
                offset += num_bytes;
            }
            files.push(SharedFile {
                name: file.name.clone(),
                file: OnceLock::new(),
            });
            headers.push((file.name.as_str(), header, offset));
        }
        let make = |dir: &Path| {
            check_space(dir, target, layout.num_bytes())?;
            for (name, header, len) in &headers {
                let path = dir.join(name);
                let file = File::create(&path).map_err(io("create", &path))?;
                file.set_len(*len).map_err(io("extend", &path))?;
                file.write_all_at(header, 0).map_err(io("write", &path))?;
                sync_file(&file, &path)?;
            }
            if let Some(metadata) = &layout.index_metadata {
                let places = tensors.iter();
                let places = places
                    .map(|(name, place): (&String, &Place)| (name.as_str(), headers[place.file].0));
                write_file(&dir.join(INDEX), index::text(metadata, places).as_bytes())?;
            }
            put_files_of(reference, dir)
        };
        let shared = Shared::join(target, id, overwrite, description, make)?;
        Ok(Self {
            shared,
            files,
            tensors,
        })
    }

    /// Names and bytes of the tensors of the directory.
    pub fn tensors(&self) -> impl ExactSizeIterator<Item = (&str, u64)> {
        let tensors = self.tensors.iter();
        tensors.map(|(name, place)| (name.as_str(), place.num_bytes))
    }

    /// Syncs every file that this process has written to.
    ///
    /// # Errors
    /// [`CheckpointError::Io`].
    pub fn sync(&self) -> Result<(), CheckpointError> {
        for file in &self.files {
            if let Some(opened) = file.file.get() {
                sync_file(opened, &self.shared.model().join(&file.name))?;
            }
        }
        Ok(())
    }

    /// Tells the others that a part is finished.
    ///
    /// # Errors
    /// [`CheckpointError::Io`].
    pub fn record(&self, name: &str, text: &[u8]) -> Result<(), CheckpointError> {
        self.shared.record(name, text)
    }

    /// What was told under a name.
    ///
    /// # Errors
    /// [`CheckpointError::Io`].
    pub fn recorded(&self, name: &str) -> Result<Option<Vec<u8>>, CheckpointError> {
        self.shared.recorded(name)
    }

    /// Whether the directory is still in the making.
    #[must_use]
    pub fn is_open(&self) -> bool {
        self.shared.is_open()
    }

    /// Moves the directory to its destination once `ready` says so.
    ///
    /// # Errors
    /// What `ready` gives, or [`CheckpointError::Io`]; the destination is untouched then.
    pub fn publish<E: From<CheckpointError>>(
        &self,
        ready: impl FnOnce() -> Result<bool, E>,
    ) -> Result<Published, E> {
        self.shared.publish(ready)
    }

    fn file(&self, number: usize) -> Result<&File, CheckpointError> {
        let file = &self.files[number];
        if let Some(opened) = file.file.get() {
            return Ok(opened);
        }
        let path = self.shared.model().join(&file.name);
        let opened = OpenOptions::new()
            .write(true)
            .open(&path)
            .map_err(io("open", &path))?;
        Ok(file.file.get_or_init(|| opened))
    }
}

impl TensorSink for SharedHfWriter {
    fn write(&self, name: &str, offset_bytes: u64, bytes: &[u8]) -> Result<(), CheckpointError> {
        let place = self
            .tensors
            .get(name)
            .ok_or_else(|| CheckpointError::NoTensor {
                name: name.to_owned(),
            })?;
        check_range(name, offset_bytes, bytes.len(), place.num_bytes)?;
        self.file(place.file)?
            .write_all_at(bytes, place.offset + offset_bytes)
            .map_err(|source| CheckpointError::Io {
                action: "write",
                path: self.shared.model().join(&self.files[place.file].name),
                source,
            })
    }
}

fn check_space(dir: &Path, target: &Path, needed: u64) -> Result<(), CheckpointError> {
    let system = rustix::fs::statvfs(dir)
        .map_err(|error| io("ask for the free space of", dir)(error.into()))?;
    let free = system.f_bavail.saturating_mul(system.f_frsize);
    if needed > free {
        return Err(CheckpointError::NoSpace {
            dir: target.to_owned(),
            needed,
            free,
        });
    }
    Ok(())
}
