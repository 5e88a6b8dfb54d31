//! A shard in the making: beside its destination, complete or not there at all.

use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use indexmap::IndexMap;
use tempfile::NamedTempFile;

use super::ShardInfo;
use crate::checkpoint::error::{check_range, io};
use crate::checkpoint::hf::header;
use crate::checkpoint::staging::{Written, parent_of, sync_dir, sync_file};
use crate::checkpoint::{CheckpointError, Overwrite, TensorInfo, TensorSink};

/// Writes one rank's file.
///
/// It is made under a hidden name beside the destination. [`ShardWriter::finish`] checks that every byte was written
/// exactly once, syncs and renames; a writer that is dropped before leaves nothing.
#[derive(Debug)]
pub struct ShardWriter {
    target: PathBuf,
    overwrite: Overwrite,
    partial: NamedTempFile,
    tensors: IndexMap<String, Place>,
}

#[derive(Debug)]
struct Place {
    file_offset: u64,
    num_bytes: u64,
    written: Mutex<Written>,
}

impl Place {
    fn lock(&self) -> std::sync::MutexGuard<'_, Written> {
        self.written.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl ShardWriter {
    /// Starts a file with these tensors, in this order.
    ///
    /// # Errors
    /// [`CheckpointError`] when the destination is taken or cannot be written.
    pub fn create(
        shard: &ShardInfo,
        tensors: &[(String, TensorInfo)],
        target: &Path,
        overwrite: Overwrite,
    ) -> Result<Self, CheckpointError> {
        if overwrite == Overwrite::No && target.symlink_metadata().is_ok() {
            let path = target.to_owned();
            return Err(CheckpointError::FileExists { path });
        }
        let parent = parent_of(target);
        fs_err::create_dir_all(parent).map_err(io("create", parent))?;
        let name = target.file_name().unwrap_or_default().to_string_lossy();
        // The end of the name tells it from a shard, whatever becomes of this process.
        let partial = tempfile::Builder::new()
            .prefix(&format!(".{name}.partial-"))
            .permissions(PermissionsExt::from_mode(0o644))
            .tempfile_in(parent)
            .map_err(io("create a file in", parent))?;
        let entries = tensors.iter().map(|(name, info)| (name.as_str(), info));
        let header = header::write(entries, &shard.metadata());
        let mut places = IndexMap::with_capacity(tensors.len());
        let mut next = header.len() as u64;
        for (name, info) in tensors {
            let num_bytes = info.num_bytes();
            let place = Place {
                file_offset: next,
                num_bytes,
                written: Mutex::default(),
            };
            places.insert(name.clone(), place);
            next += num_bytes;
        }
        let file = partial.as_file();
        file.write_all_at(&header, 0)
            .and_then(|()| file.set_len(next))
            .map_err(io("write", partial.path()))?;
        Ok(Self {
            target: target.to_owned(),
            overwrite,
            partial,
            tensors: places,
        })
    }

    /// Checks that everything was written, syncs, and moves the file to its destination.
    ///
    /// # Errors
    /// [`CheckpointError::Unfinished`] names the first tensor with missing bytes; otherwise what the system said.
    /// The destination is untouched then.
    pub fn finish(self) -> Result<PathBuf, CheckpointError> {
        for (name, place) in &self.tensors {
            let written = place.lock().count();
            if written != place.num_bytes {
                return Err(CheckpointError::Unfinished {
                    name: name.clone(),
                    written,
                    num_bytes: place.num_bytes,
                    dir: self.target,
                });
            }
        }
        let file = self.partial.as_file();
        sync_file(file, self.partial.path())?;
        let moved = match self.overwrite {
            Overwrite::Yes => self.partial.persist(&self.target),
            // Somebody may have made the destination since.
            Overwrite::No => self.partial.persist_noclobber(&self.target),
        };
        moved.map_err(|error| io("create", &self.target)(error.error))?;
        sync_dir(parent_of(&self.target))?;
        Ok(self.target)
    }
}

impl TensorSink for ShardWriter {
    fn write(&self, name: &str, offset_bytes: u64, bytes: &[u8]) -> Result<(), CheckpointError> {
        let place = self
            .tensors
            .get(name)
            .ok_or_else(|| CheckpointError::NoTensor {
                name: name.to_owned(),
            })?;
        check_range(name, offset_bytes, bytes.len(), place.num_bytes)?;
        self.partial
            .as_file()
            .write_all_at(bytes, place.file_offset + offset_bytes)
            .map_err(io("write", self.partial.path()))?;
        let (start, end) = (offset_bytes, offset_bytes + bytes.len() as u64);
        if place.lock().insert(start, end, crc32fast::hash(bytes)) {
            return Ok(());
        }
        Err(CheckpointError::Twice {
            name: name.to_owned(),
            start,
            end,
            dir: self.target.clone(),
        })
    }
}
