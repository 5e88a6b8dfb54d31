//! A directory in the making: hidden beside its destination, complete or not there at all.

use std::fs::File;
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::{Path, PathBuf};

use tempfile::TempDir;

use super::CheckpointError;
use super::error::io;

/// What happens to a destination that is there already.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Overwrite {
    /// It is an error, unless the directory is empty.
    #[default]
    No,
    /// The finished directory takes its place in one step.
    Yes,
}

/// A directory that takes its place in one step; dropped before, it leaves nothing.
#[derive(Debug)]
pub(super) struct Beside {
    target: PathBuf,
    overwrite: Overwrite,
    partial: TempDir,
}

impl Beside {
    pub(super) fn create(target: &Path, overwrite: Overwrite) -> Result<Self, CheckpointError> {
        if overwrite == Overwrite::No && is_taken(target) {
            let dir = target.to_owned();
            return Err(CheckpointError::Exists { dir });
        }
        let parent = parent_of(target);
        fs_err::create_dir_all(parent).map_err(io("create", parent))?;
        let name = target.file_name().unwrap_or_default().to_string_lossy();
        let partial = tempfile::Builder::new()
            .prefix(&format!(".{name}.partial-"))
            .tempdir_in(parent)
            .map_err(io("create a directory in", parent))?;
        Ok(Self {
            target: target.to_owned(),
            overwrite,
            partial,
        })
    }

    pub(super) fn path(&self) -> &Path {
        self.partial.path()
    }

    pub(super) fn target(&self) -> &Path {
        &self.target
    }

    /// Moves the directory, whose files are synced, to its destination.
    pub(super) fn finish(self) -> Result<PathBuf, CheckpointError> {
        let Self {
            target,
            overwrite,
            partial,
        } = self;
        // Made with a private directory's rights; the result is an ordinary one.
        fs_err::set_permissions(partial.path(), PermissionsExt::from_mode(0o755))
            .map_err(io("set the rights of", partial.path()))?;
        sync_dir(partial.path())?;
        if overwrite == Overwrite::Yes && is_taken(&target) {
            // One step: a reader sees the old directory or the new one. The old one then goes with `partial`.
            rustix::fs::renameat_with(
                rustix::fs::CWD,
                partial.path(),
                rustix::fs::CWD,
                &target,
                rustix::fs::RenameFlags::EXCHANGE,
            )
            .map_err(|error| io("replace", &target)(error.into()))?;
            sync_dir(parent_of(&target))?;
            partial
                .close()
                .map_err(io("remove the old content of", &target))?;
        } else {
            fs_err::rename(partial.path(), &target).map_err(io("create", &target))?;
            // The directory is the result now.
            let _ = partial.keep();
            sync_dir(parent_of(&target))?;
        }
        Ok(target)
    }
}

/// Writes a small file in full and syncs it.
pub(super) fn write_file(path: &Path, bytes: &[u8]) -> Result<(), CheckpointError> {
    let file = File::create(path).map_err(io("create", path))?;
    file.write_all_at(bytes, 0)
        .and_then(|()| file.sync_all())
        .map_err(io("write", path))
}

pub(super) fn sync_dir(dir: &Path) -> Result<(), CheckpointError> {
    File::open(dir)
        .and_then(|dir| dir.sync_all())
        .map_err(io("sync", dir))
}

pub(super) fn parent_of(target: &Path) -> &Path {
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
