//! A directory that several processes make together: hidden beside its destination, complete or not there at all.
//!
//! `.NAME.ID.export` holds `model`, which becomes the destination, and what the processes tell each other: a description
//! that all of them must agree with, and a record of each that has finished. The directory appears in one step, made by
//! whoever comes first, and goes in one step when all records are there. A process that dies leaves no record.

use std::fs::File;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::FlockOperation;
use rustix::io::Errno;
use serde_json::{Map, Value};

use super::Overwrite;
use super::beside::{is_taken, parent_of};
use super::disk::{exchange, rename, sync_dir, write_file};
use crate::checkpoint::error::io;
use crate::checkpoint::{CheckpointError, OtherDescription};

/// The directory that becomes the destination.
const MODEL: &str = "model";
const DESCRIPTION: &str = "export.json";
const LOCK: &str = "lock";
/// Holds the inode of `model` from the moment on at which it may stand at the destination.
const PUBLISHING: &str = "publishing";
const SUFFIX: &str = ".export";

/// One process's view of the directory.
#[derive(Debug)]
pub(in crate::checkpoint) struct Shared {
    target: PathBuf,
    control: PathBuf,
    overwrite: Overwrite,
}

/// What became of an attempt to move the directory to its destination.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Published {
    /// It stands there.
    Yes,
    /// Something is still to come.
    NotYet,
}

impl Shared {
    /// Makes the directory with what `make` puts into the future destination, or joins the one that is there.
    ///
    /// # Errors
    /// [`CheckpointError::Exists`], [`CheckpointError::OtherExport`] when the others describe another job.
    pub(in crate::checkpoint) fn join(
        target: &Path,
        id: &str,
        overwrite: Overwrite,
        description: &Map<String, Value>,
        make: impl FnOnce(&Path) -> Result<(), CheckpointError>,
    ) -> Result<Self, CheckpointError> {
        let parent = parent_of(target);
        let shared = Self {
            target: target.to_owned(),
            control: parent.join(format!("{}{id}{SUFFIX}", prefix(target))),
            overwrite,
        };
        if !shared.control.is_dir() {
            if overwrite == Overwrite::No && is_taken(target) {
                let dir = target.to_owned();
                return Err(CheckpointError::Exists { dir });
            }
            fs_err::create_dir_all(parent).map_err(io("create", parent))?;
            shared.create(parent, description, make)?;
        }
        shared.check(description)?;
        Ok(shared)
    }

    /// Makes everything under another name, so that nobody joins a half of it.
    fn create(
        &self,
        parent: &Path,
        description: &Map<String, Value>,
        make: impl FnOnce(&Path) -> Result<(), CheckpointError>,
    ) -> Result<(), CheckpointError> {
        let name = format!("{}tmp-", prefix(&self.target));
        let fresh = tempfile::Builder::new()
            .prefix(&name)
            .suffix(SUFFIX)
            .tempdir_in(parent)
            .map_err(io("create a directory in", parent))?;
        let model = fresh.path().join(MODEL);
        fs_err::create_dir(&model).map_err(io("create", &model))?;
        make(&model)?;
        sync_dir(&model)?;
        write_file(&fresh.path().join(LOCK), b"")?;
        let text = Value::Object(description.clone()).to_string();
        write_file(&fresh.path().join(DESCRIPTION), text.as_bytes())?;
        sync_dir(fresh.path())?;
        match std::fs::rename(fresh.path(), &self.control) {
            // The name is not the temporary directory's any more.
            Ok(()) => {
                let _ = fresh.keep();
                sync_dir(parent)
            }
            // Somebody else was first; ours goes.
            Err(_) if self.control.is_dir() => Ok(()),
            Err(error) => Err(io("create", &self.control)(error)),
        }
    }

    /// Refuses the directory of another job.
    fn check(&self, description: &Map<String, Value>) -> Result<(), CheckpointError> {
        let path = self.control.join(DESCRIPTION);
        let bytes = fs_err::read(&path).map_err(io("read", &path))?;
        let found: Map<String, Value> = serde_json::from_slice(&bytes).unwrap_or_default();
        let differs = |key: &&String| found.get(*key) != description.get(*key);
        let keys = || description.keys().chain(found.keys());
        match keys().find(differs) {
            None => Ok(()),
            Some(key) => {
                let word =
                    |map: &Map<String, Value>| map.get(key).unwrap_or(&Value::Null).to_string();
                Err(CheckpointError::OtherExport {
                    dir: self.target.clone(),
                    partial: self.control.clone(),
                    difference: Box::new(OtherDescription {
                        what: key.clone(),
                        found: word(&found),
                        expected: word(description),
                    }),
                })
            }
        }
    }

    /// The future destination.
    pub(in crate::checkpoint) fn model(&self) -> PathBuf {
        self.control.join(MODEL)
    }

    /// Records that a part is finished.
    pub(in crate::checkpoint) fn record(
        &self,
        name: &str,
        text: &[u8],
    ) -> Result<(), CheckpointError> {
        let temporary = self
            .control
            .join(format!("{name}.tmp-{}", std::process::id()));
        write_file(&temporary, text)?;
        let path = self.control.join(name);
        fs_err::rename(&temporary, &path).map_err(io("create", &path))?;
        sync_dir(&self.control)
    }

    /// What was recorded under a name.
    pub(in crate::checkpoint) fn recorded(
        &self,
        name: &str,
    ) -> Result<Option<Vec<u8>>, CheckpointError> {
        let path = self.control.join(name);
        match fs_err::read(&path) {
            Ok(text) => Ok(Some(text)),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(io("read", &path)(error)),
        }
    }

    /// Whether the directory is still in the making.
    pub(in crate::checkpoint) fn is_open(&self) -> bool {
        self.control.join(DESCRIPTION).is_file()
    }

    /// Moves the directory to its destination once `ready` says so; of several processes one does it.
    ///
    /// # Errors
    /// What `ready` gives, or what the system said; the destination is untouched then.
    pub(in crate::checkpoint) fn publish<E: From<CheckpointError>>(
        &self,
        ready: impl FnOnce() -> Result<bool, E>,
    ) -> Result<Published, E> {
        let Some(_lock) = self.lock()? else {
            return Ok(Published::Yes);
        };
        if !self.is_open() {
            return Ok(Published::Yes);
        }
        let mark = self.control.join(PUBLISHING);
        let moved = fs_err::read_to_string(&mark).is_ok_and(|inode| {
            let there = fs_err::metadata(&self.target);
            there.is_ok_and(|there| there.ino().to_string() == inode)
        });
        if !moved {
            if !ready()? {
                return Ok(Published::NotYet);
            }
            self.publish_now(&mark)?;
        }
        self.remove()?;
        Ok(Published::Yes)
    }

    fn publish_now(&self, mark: &Path) -> Result<(), CheckpointError> {
        let model = self.model();
        // Made with a private directory's rights; the result is an ordinary one.
        fs_err::set_permissions(&model, PermissionsExt::from_mode(0o755))
            .map_err(io("set the rights of", &model))?;
        sync_dir(&model)?;
        let inode = fs_err::metadata(&model)
            .map_err(io("look at", &model))?
            .ino();
        write_file(mark, inode.to_string().as_bytes())?;
        sync_dir(&self.control)?;
        if self.overwrite == Overwrite::Yes && is_taken(&self.target) {
            // The old one then goes with the directory.
            exchange(&model, &self.target)?;
        } else {
            rename(&model, &self.target)?;
        }
        sync_dir(parent_of(&self.target))
    }

    /// Takes the directory away, in one step for those who look for it.
    fn remove(&self) -> Result<(), CheckpointError> {
        let name = format!("{}tmp-{}{SUFFIX}", prefix(&self.target), std::process::id());
        let gone = parent_of(&self.target).join(name);
        fs_err::rename(&self.control, &gone).map_err(io("remove", &self.control))?;
        fs_err::remove_dir_all(&gone).map_err(io("remove", &gone))
    }

    /// Waits for the lock; `None` when the directory is gone.
    fn lock(&self) -> Result<Option<File>, CheckpointError> {
        let path = self.control.join(LOCK);
        let file = match File::open(&path) {
            Ok(file) => file,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(io("open", &path)(error)),
        };
        match rustix::fs::flock(&file, FlockOperation::LockExclusive) {
            Ok(()) => Ok(Some(file)),
            // Some network file systems have no locks; the rename at the end is still one step there.
            Err(Errno::NOTSUP | Errno::NOLCK | Errno::NOSYS) => Ok(Some(file)),
            Err(error) => Err(io("lock", &path)(error.into())),
        }
    }
}

/// Removes what unfinished exports left beside a destination; gives their number.
///
/// # Errors
/// [`CheckpointError::Io`].
pub fn discard_exports(target: &Path) -> Result<usize, CheckpointError> {
    let parent = parent_of(target);
    let prefix = prefix(target);
    let entries = match fs_err::read_dir(parent) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(0),
        Err(error) => return Err(io("read", parent)(error)),
    };
    let mut removed = 0;
    for entry in entries {
        let entry = entry.map_err(io("read", parent))?;
        let name = entry.file_name();
        let id = name
            .to_str()
            .and_then(|name| name.strip_prefix(&prefix)?.strip_suffix(SUFFIX));
        // An id has no dot, so this is no other destination's whose name goes on behind ours.
        if id.is_some_and(|id| id.chars().all(is_plain)) {
            fs_err::remove_dir_all(entry.path()).map_err(io("remove", &entry.path()))?;
            removed += 1;
        }
    }
    Ok(removed)
}

/// Whether a text can name an export: letters, digits, `-` and `_`, 100 at most.
#[must_use]
pub fn is_id(text: &str) -> bool {
    !text.is_empty() && text.len() <= 100 && text.chars().all(is_plain)
}

fn is_plain(c: char) -> bool {
    c.is_ascii_alphanumeric() || c == '-' || c == '_'
}

fn prefix(target: &Path) -> String {
    let name = target.file_name().unwrap_or_default().to_string_lossy();
    format!(".{name}.")
}
