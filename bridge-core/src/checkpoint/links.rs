//! Where the files of an untrusted directory may lead.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

use crate::regular_file;

/// Whether files of a checkpoint may be links that lead out of its directory.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Links {
    /// Only as the hub's cache makes them: from below `snapshots/REVISION` to `blobs/HASH`.
    #[default]
    HubCache,
    /// Anywhere.
    Anywhere,
}

/// Why a file is not opened.
#[derive(Debug)]
pub(super) enum Refused {
    /// The system refused what was tried.
    Io(&'static str, io::Error),
    /// It leads out of the directory.
    Link(PathBuf),
    /// It is a folder, a device, a FIFO.
    NotAFile,
}

/// Opens a regular file of the directory, with its length.
pub(super) fn open(dir: &Path, name: &str, links: Links) -> Result<(File, u64), Refused> {
    let find = |path: &Path| {
        path.canonicalize()
            .map_err(|error| Refused::Io("find", error))
    };
    let target = find(&dir.join(name))?;
    if links == Links::HubCache && !stays(&find(dir)?, &target) {
        return Err(Refused::Link(target));
    }
    regular_file::open(&target)
        .map_err(|error| Refused::Io("open", error))?
        .ok_or(Refused::NotAFile)
}

/// Whether `target` lies in `home`, or in the blobs of the hub's cache that belong to the snapshot around `home`.
fn stays(home: &Path, target: &Path) -> bool {
    let Some(folder) = target.parent() else {
        return false;
    };
    let snapshots = home
        .ancestors()
        .find(|dir| dir.file_name().is_some_and(|name| name == "snapshots"));
    let blobs = snapshots
        .and_then(Path::parent)
        .map(|cache| cache.join("blobs"));
    folder == home || blobs.is_some_and(|blobs| folder == blobs)
}
