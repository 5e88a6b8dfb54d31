//! The steps that make bytes last. Each is logged, so that their order can be seen (`trainer -vv`) and tested.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use rustix::fs::{CWD, RenameFlags};

use crate::checkpoint::CheckpointError;
use crate::checkpoint::error::io;

/// Syncs a file's bytes and length.
pub(in crate::checkpoint) fn sync_file(file: &File, path: &Path) -> Result<(), CheckpointError> {
    file.sync_all().map_err(io("sync", path))?;
    tracing::trace!(path = %path.display(), "synced file");
    Ok(())
}

/// Syncs the names in a directory.
pub(in crate::checkpoint) fn sync_dir(dir: &Path) -> Result<(), CheckpointError> {
    File::open(dir)
        .and_then(|dir| dir.sync_all())
        .map_err(io("sync", dir))?;
    tracing::trace!(path = %dir.display(), "synced directory");
    Ok(())
}

/// Writes a small file in full and syncs it.
pub(in crate::checkpoint) fn write_file(path: &Path, bytes: &[u8]) -> Result<(), CheckpointError> {
    let file = File::create(path).map_err(io("create", path))?;
    file.write_all_at(bytes, 0).map_err(io("write", path))?;
    sync_file(&file, path)
}

/// Checks that the file system of `place`, where the files of `target` are made, has room for `needed` bytes.
///
/// # Errors
/// [`CheckpointError::NoSpace`] with both numbers.
pub fn check_space(place: &Path, target: &Path, needed: u64) -> Result<(), CheckpointError> {
    let system = rustix::fs::statvfs(place)
        .map_err(|error| io("ask for the free space of", place)(error.into()))?;
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

/// Moves a file or directory to a name that is free.
pub(super) fn rename(from: &Path, to: &Path) -> Result<(), CheckpointError> {
    fs_err::rename(from, to).map_err(io("create", to))?;
    tracing::trace!(path = %to.display(), "created");
    Ok(())
}

/// Exchanges two directories in one step: a reader sees the old one or the new one.
pub(super) fn exchange(new: &Path, old: &Path) -> Result<(), CheckpointError> {
    rustix::fs::renameat_with(CWD, new, CWD, old, RenameFlags::EXCHANGE)
        .map_err(|error| io("replace", old)(error.into()))?;
    tracing::trace!(path = %old.display(), "replaced");
    Ok(())
}
