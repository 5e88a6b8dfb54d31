//! The hidden directory, its lock, and the step that makes it the destination.

use std::fs::{DirBuilder, File};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::fs::FlockOperation;
use rustix::io::Errno;

use super::Overwrite;
use super::disk::{exchange, rename, sync_dir};
use crate::checkpoint::CheckpointError;
use crate::checkpoint::error::io;

/// A directory that takes its place in one step; dropped before, it leaves nothing unless it is to be kept.
///
/// Its name follows from the destination's, and it is locked: a second writer of the same destination is refused, and what
/// a killed run left is found again.
#[derive(Debug)]
pub(in crate::checkpoint) struct Beside {
    target: PathBuf,
    overwrite: Overwrite,
    partial: PathBuf,
    /// Holds the lock while it is open.
    _lock: File,
    /// Left where it is when dropped.
    kept: AtomicBool,
}

impl Beside {
    /// Makes the directory, or takes over what an earlier run left in it.
    pub(in crate::checkpoint) fn create(
        target: &Path,
        overwrite: Overwrite,
    ) -> Result<Self, CheckpointError> {
        if overwrite == Overwrite::No && is_taken(target) {
            let dir = target.to_owned();
            return Err(CheckpointError::Exists { dir });
        }
        let parent = parent_of(target);
        fs_err::create_dir_all(parent).map_err(io("create", parent))?;
        let partial = partial_path(target);
        let lock = lock(&partial, target)?;
        Ok(Self {
            target: target.to_owned(),
            overwrite,
            partial,
            _lock: lock,
            kept: AtomicBool::new(false),
        })
    }

    pub(in crate::checkpoint) fn path(&self) -> &Path {
        &self.partial
    }

    pub(in crate::checkpoint) fn target(&self) -> &Path {
        &self.target
    }

    /// Removes everything in it.
    pub(super) fn clear(&self) -> Result<(), CheckpointError> {
        let entries = fs_err::read_dir(&self.partial).map_err(io("read", &self.partial))?;
        for entry in entries {
            let entry = entry.map_err(io("read", &self.partial))?;
            let path = entry.path();
            if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                fs_err::remove_dir_all(&path).map_err(io("remove", &path))?;
            } else {
                fs_err::remove_file(&path).map_err(io("remove", &path))?;
            }
        }
        Ok(())
    }

    /// From now on a writer that stops leaves the directory for the next run.
    pub(super) fn keep(&self) {
        self.kept.store(true, Ordering::Relaxed);
    }

    /// Moves the directory, whose files are synced, to its destination.
    pub(in crate::checkpoint) fn finish(self) -> Result<PathBuf, CheckpointError> {
        let target = self.target.clone();
        // Made with a private directory's rights; the result is an ordinary one.
        fs_err::set_permissions(&self.partial, PermissionsExt::from_mode(0o755))
            .map_err(io("set the rights of", &self.partial))?;
        sync_dir(&self.partial)?;
        if self.overwrite == Overwrite::Yes && is_taken(&target) {
            // The old one then goes with `self`.
            exchange(&self.partial, &target)?;
            sync_dir(parent_of(&target))?;
            self.keep();
            remove(&self.partial).map_err(io("remove the old content of", &target))?;
        } else {
            rename(&self.partial, &target)?;
            // The directory is the result now.
            self.keep();
            sync_dir(parent_of(&target))?;
        }
        Ok(target)
    }
}

impl Drop for Beside {
    fn drop(&mut self) {
        if !self.kept.load(Ordering::Relaxed)
            && let Err(error) = remove(&self.partial)
        {
            tracing::warn!("{} could not be removed: {error}", self.partial.display());
        }
    }
}

/// Where a directory is made before it stands at `target`. An interrupted job leaves its finished files there.
#[must_use]
pub fn partial_path(target: &Path) -> PathBuf {
    let name = target.file_name().unwrap_or_default().to_string_lossy();
    parent_of(target).join(format!(".{name}.partial"))
}

/// Makes the directory where it is not there, and locks it.
fn lock(partial: &Path, target: &Path) -> Result<File, CheckpointError> {
    // A writer that just finished may move the directory between the two steps.
    for _ in 0..100 {
        match DirBuilder::new().mode(0o700).create(partial) {
            Ok(()) => {}
            Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {}
            Err(error) => return Err(io("create", partial)(error)),
        }
        let file = match File::open(partial) {
            Ok(file) => file,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => continue,
            Err(error) => return Err(io("open", partial)(error)),
        };
        match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            // Some network file systems have no locks; the rename at the end is still one step there.
            Err(Errno::NOTSUP | Errno::NOLCK | Errno::NOSYS) => {}
            Err(Errno::WOULDBLOCK) => {
                return Err(CheckpointError::Busy {
                    dir: target.to_owned(),
                    partial: partial.to_owned(),
                });
            }
            Err(error) => return Err(io("lock", partial)(error.into())),
        }
        let locked = file.metadata().map_err(io("look at", partial))?;
        let there = fs_err::symlink_metadata(partial);
        if there.is_ok_and(|there| (there.dev(), there.ino()) == (locked.dev(), locked.ino())) {
            return Ok(file);
        }
    }
    Err(CheckpointError::Busy {
        dir: target.to_owned(),
        partial: partial.to_owned(),
    })
}

fn remove(dir: &Path) -> std::io::Result<()> {
    if dir
        .symlink_metadata()
        .is_ok_and(|metadata| metadata.is_dir())
    {
        fs_err::remove_dir_all(dir)
    } else {
        fs_err::remove_file(dir)
    }
}

pub(in crate::checkpoint) fn parent_of(target: &Path) -> &Path {
    match target.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

/// Whether something other than an empty directory is there.
pub(super) fn is_taken(target: &Path) -> bool {
    match fs_err::read_dir(target) {
        Ok(mut entries) => entries.next().is_some(),
        Err(_) => target.symlink_metadata().is_ok(),
    }
}
