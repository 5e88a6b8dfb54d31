//! What a conversion reads and writes, so far as files are concerned.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::time::UNIX_EPOCH;

use super::BridgeError;
use crate::checkpoint::Staging;

/// A conversion, so that its next run knows it again, and does not write over what it reads.
#[derive(Debug)]
pub(super) struct Job {
    text: String,
    reads: Vec<PathBuf>,
}

impl Job {
    /// `what` is done with `files`, whose sizes and times are looked at now; they stand in the directories `reads`.
    pub(super) fn new<'a>(
        what: &str,
        files: impl IntoIterator<Item = PathBuf>,
        reads: impl IntoIterator<Item = &'a Path>,
    ) -> Self {
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
        Self {
            text,
            reads: reads.into_iter().map(Path::to_owned).collect(),
        }
    }

    /// How `target` is written. One that holds what is read, or lies in it, is refused: replacing it would take the source
    /// away.
    pub(super) fn staging(&self, target: &Path, how: &Staging) -> Result<Staging, BridgeError> {
        let written = real(target);
        for path in &self.reads {
            let read = real(path);
            if written.starts_with(&read) || read.starts_with(&written) {
                return Err(BridgeError::Overlap {
                    target: target.to_owned(),
                    path: path.clone(),
                });
            }
        }
        Ok(Staging {
            job: Some(self.text.clone()),
            ..how.clone()
        })
    }
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
