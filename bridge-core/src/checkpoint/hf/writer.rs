//! A checkpoint directory in the making: beside its destination, complete or not there at all.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use indexmap::IndexMap;
use serde_json::{Map, Value};
use tempfile::TempDir;

use super::header;
use super::index::INDEX;
use super::{HfCheckpoint, HfLayout, support_files};
use crate::checkpoint::{CheckpointError, TensorInfo, TensorSink};

/// What happens to a destination that is there already.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Overwrite {
    /// It is an error, unless the directory is empty.
    #[default]
    No,
    /// The finished directory takes its place in one step.
    Yes,
}

/// Writes a Hugging Face directory.
///
/// Files are made in a hidden directory beside the destination. [`HfWriter::finish`] checks that every tensor was
/// written in full, syncs and renames; a writer that is dropped before leaves nothing.
#[derive(Debug)]
pub struct HfWriter {
    target: PathBuf,
    overwrite: Overwrite,
    partial: TempDir,
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

fn io(action: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> CheckpointError {
    let path = path.to_owned();
    move |source| CheckpointError::Io {
        action,
        path,
        source,
    }
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
        if overwrite == Overwrite::No && is_taken(target) {
            return Err(CheckpointError::Exists {
                dir: target.to_owned(),
            });
        }
        let parent = parent_of(target);
        fs_err::create_dir_all(parent).map_err(io("create", parent))?;
        let name = target.file_name().unwrap_or_default().to_string_lossy();
        let partial = tempfile::Builder::new()
            .prefix(&format!(".{name}.partial-"))
            .tempdir_in(parent)
            .map_err(io("create a directory in", parent))?;
        let mut writer = Self {
            target: target.to_owned(),
            overwrite,
            partial,
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
        let path = self.partial.path().join(name);
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
        let path = self.partial.path().join(name);
        let file = File::create(&path).map_err(io("create", &path))?;
        file.write_all_at(bytes, 0)
            .and_then(|()| file.sync_all())
            .map_err(io("write", &path))
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
                    dir: self.target.clone(),
                });
            }
        }
        self.write_index()?;
        for (name, file) in &self.files {
            let path = self.partial.path().join(name);
            file.sync_all().map_err(io("sync", &path))?;
        }
        sync_dir(self.partial.path())?;
        self.rename()
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

    fn rename(self) -> Result<PathBuf, CheckpointError> {
        let target = self.target;
        // Made with a private directory's rights; the result is an ordinary one.
        let rights = std::os::unix::fs::PermissionsExt::from_mode(0o755);
        fs_err::set_permissions(self.partial.path(), rights)
            .map_err(io("set the rights of", self.partial.path()))?;
        if self.overwrite == Overwrite::Yes && is_taken(&target) {
            // One step: a reader sees the old directory or the new one. The old one then goes with `partial`.
            rustix::fs::renameat_with(
                rustix::fs::CWD,
                self.partial.path(),
                rustix::fs::CWD,
                &target,
                rustix::fs::RenameFlags::EXCHANGE,
            )
            .map_err(|error| io("replace", &target)(error.into()))?;
            sync_dir(parent_of(&target))?;
            self.partial
                .close()
                .map_err(io("remove the old content of", &target))?;
        } else {
            fs_err::rename(self.partial.path(), &target).map_err(io("create", &target))?;
            // The directory is the result now.
            let _ = self.partial.keep();
            sync_dir(parent_of(&target))?;
        }
        Ok(target)
    }
}

fn parent_of(target: &Path) -> &Path {
    match target.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

/// Whether something other than an empty directory is there.
fn is_taken(target: &Path) -> bool {
    match fs_err::read_dir(target) {
        Ok(mut entries) => entries.next().is_some(),
        Err(_) => target.symlink_metadata().is_ok(),
    }
}

fn sync_dir(dir: &Path) -> Result<(), CheckpointError> {
    File::open(dir)
        .and_then(|dir| dir.sync_all())
        .map_err(io("sync", dir))
}

impl TensorSink for HfWriter {
    fn write(&self, name: &str, offset_bytes: u64, bytes: &[u8]) -> Result<(), CheckpointError> {
        let place = self
            .tensors
            .get(name)
            .ok_or_else(|| CheckpointError::NoTensor {
                name: name.to_owned(),
            })?;
        let end = offset_bytes.saturating_add(bytes.len() as u64);
        if end > place.num_bytes {
            return Err(CheckpointError::Range {
                name: name.to_owned(),
                start: offset_bytes,
                end,
                num_bytes: place.num_bytes,
            });
        }
        let (file_name, file) = &self.files[place.file];
        file.write_all_at(bytes, place.file_offset + offset_bytes)
            .map_err(io("write", &self.partial.path().join(file_name)))?;
        place
            .written
            .fetch_add(bytes.len() as u64, Ordering::Relaxed);
        Ok(())
    }
}
