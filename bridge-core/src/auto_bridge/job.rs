//! What a conversion reads and writes, so far as files are concerned.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::time::UNIX_EPOCH;

use super::BridgeError;

/// A text that names a conversion for [`crate::checkpoint::Staging::job`]: `what`, and size and time of every file it reads.
pub(super) fn describe(what: &str, files: impl IntoIterator<Item = PathBuf>) -> String {
    let mut text = what.to_owned();
    for file in files {
        let _ = write!(text, "\n{}", file.display());
        if let Ok(metadata) = fs_err::metadata(&file) {
            let changed = metadata
                .modified()
                .ok()
                .and_then(|time| time.duration_since(UNIX_EPOCH).ok())
                .unwrap_or_default();
            let _ = write!(text, " {} {}", metadata.len(), changed.as_nanos());
        }
    }
    text
}

/// Refuses a destination that holds what is read, or lies in it: replacing it would take the source away.
pub(super) fn check_apart(target: &Path, sources: &[&Path]) -> Result<(), BridgeError> {
    let written = real(target);
    for source in sources {
        let read = real(source);
        if written.starts_with(&read) || read.starts_with(&written) {
            return Err(BridgeError::Overlap {
                target: target.to_owned(),
                path: (*source).to_owned(),
            });
        }
    }
    Ok(())
}

/// The path without links, so far as it exists.
fn real(path: &Path) -> PathBuf {
    if let Ok(real) = fs_err::canonicalize(path) {
        return real;
    }
    let parent = match path.parent() {
        Some(parent) if parent != Path::new("") => real(parent),
        Some(_) => real(Path::new(".")),
        None => return path.to_owned(),
    };
    match path.file_name() {
        Some(name) => parent.join(name),
        None => parent,
    }
}
