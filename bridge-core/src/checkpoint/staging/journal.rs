//! The record of finished files, one line of JSON each.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use indexmap::IndexMap;
use serde::{Deserialize, Serialize};

use crate::checkpoint::CheckpointError;
use crate::checkpoint::error::io;

/// The journal's name, in the directory in the making only.
const JOURNAL: &str = ".journal";

#[derive(Serialize, Deserialize)]
struct Head {
    job: String,
}

/// A finished file and the CRC-32 of each of its parts.
#[derive(Serialize, Deserialize)]
struct Line {
    file: String,
    crc32: Vec<u32>,
}

/// Finished files, and the CRC-32 of each of their parts.
pub(super) type Finished = IndexMap<String, Vec<u32>>;

/// An open journal.
#[derive(Debug)]
pub(super) struct Journal {
    path: PathBuf,
    file: Mutex<File>,
}

impl Journal {
    /// Starts a journal in `dir`.
    pub(super) fn start(dir: &Path, job: &str) -> Result<Self, CheckpointError> {
        let path = dir.join(JOURNAL);
        let file = File::create(&path).map_err(io("create", &path))?;
        let journal = Self {
            path,
            file: Mutex::new(file),
        };
        journal.append(&Head {
            job: job.to_owned(),
        })?;
        Ok(journal)
    }

    /// Goes on with the journal of an earlier run, if there is one of the same job: finished files and their checksums.
    pub(super) fn reopen(
        dir: &Path,
        job: &str,
    ) -> Result<Option<(Self, Finished)>, CheckpointError> {
        let path = dir.join(JOURNAL);
        let Ok(text) = fs_err::read_to_string(&path) else {
            return Ok(None);
        };
        let mut lines = text.lines();
        let head = lines.next().map(serde_json::from_str::<Head>);
        if !matches!(head, Some(Ok(head)) if head.job == job) {
            return Ok(None);
        }
        // A line that a kill cut short says nothing.
        let finished: Finished = lines
            .filter_map(|line| serde_json::from_str::<Line>(line).ok())
            .map(|line| (line.file, line.crc32))
            .collect();
        let file = OpenOptions::new()
            .append(true)
            .open(&path)
            .map_err(io("open", &path))?;
        let mut journal = Self {
            path,
            file: Mutex::new(file),
        };
        if !text.ends_with('\n') {
            journal.write(b"\n")?;
        }
        Ok(Some((journal, finished)))
    }

    /// Records a finished file.
    pub(super) fn finished(&self, file: &str, crc32: Vec<u32>) -> Result<(), CheckpointError> {
        self.append(&Line {
            file: file.to_owned(),
            crc32,
        })
    }

    /// Takes the journal away: the directory is complete.
    pub(super) fn remove(self) -> Result<(), CheckpointError> {
        fs_err::remove_file(&self.path).map_err(io("remove", &self.path))
    }

    fn append(&self, line: &impl Serialize) -> Result<(), CheckpointError> {
        let mut text = serde_json::to_vec(line).expect("texts and numbers are always JSON");
        text.push(b'\n');
        let mut file = self
            .file
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner);
        file.write_all(&text)
            .and_then(|()| file.sync_data())
            .map_err(io("write", &self.path))
    }

    fn write(&mut self, bytes: &[u8]) -> Result<(), CheckpointError> {
        let file = self
            .file
            .get_mut()
            .unwrap_or_else(std::sync::PoisonError::into_inner);
        file.write_all(bytes).map_err(io("write", &self.path))
    }
}
