//! The data files of a directory in the making.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

use rayon::prelude::*;

use super::beside::Beside;
use super::disk::{self, sync_file};
use super::journal::{Finished, Journal};
use super::written::Written;
use super::{ReadBack, Resume, Staging};
use crate::checkpoint::CheckpointError;
use crate::checkpoint::error::io;

/// Bytes that one thread reads back in a row, and at a time.
const PIECE_BYTES: u64 = 16 << 20;
const BUFFER_BYTES: usize = 256 << 10;

/// A part of a file: the bytes of a tensor, or of a chunk of one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::checkpoint) struct PartPlace {
    /// Which file.
    pub(in crate::checkpoint) file: usize,
    /// Which part of it.
    pub(in crate::checkpoint) part: usize,
}

/// A directory in the making with data files that are filled from any thread and finished one by one.
#[derive(Debug)]
pub(in crate::checkpoint) struct StagedFiles {
    beside: Beside,
    files: Vec<StagedFile>,
    journal: Option<Journal>,
    /// What an earlier run finished.
    earlier: Finished,
    read_back: ReadBack,
}

#[derive(Debug)]
struct StagedFile {
    name: String,
    path: PathBuf,
    file: File,
    parts: Vec<Part>,
    finished: AtomicBool,
}

#[derive(Debug)]
struct Part {
    offset: u64,
    num_bytes: u64,
    written: Mutex<Written>,
}

impl StagedFiles {
    /// Makes the directory beside `target`, or goes on with the one of an earlier run.
    pub(in crate::checkpoint) fn create(
        target: &Path,
        staging: &Staging,
    ) -> Result<Self, CheckpointError> {
        let beside = Beside::create(target, staging.overwrite)?;
        let mut earlier = Finished::new();
        let mut journal = None;
        if let (Resume::Yes, Some(job)) = (staging.resume, &staging.job)
            && let Some((reopened, finished)) = Journal::reopen(beside.path(), job)?
        {
            beside.keep();
            (journal, earlier) = (Some(reopened), finished);
        }
        if journal.is_none() {
            beside.clear()?;
            if let Some(job) = &staging.job {
                journal = Some(Journal::start(beside.path(), job)?);
            }
        }
        Ok(Self {
            beside,
            files: Vec::new(),
            journal,
            earlier,
            read_back: staging.read_back,
        })
    }

    pub(in crate::checkpoint) fn path(&self) -> &Path {
        self.beside.path()
    }

    pub(in crate::checkpoint) fn target(&self) -> &Path {
        self.beside.target()
    }

    /// Adds a file of `num_bytes`; `name` may have folders in front. Parts are (offset, length).
    ///
    /// A file that an earlier run finished is opened as it is; [`StagedFiles::begin`] checks its parts.
    pub(in crate::checkpoint) fn add(
        &mut self,
        name: String,
        num_bytes: u64,
        parts: impl IntoIterator<Item = (u64, u64)>,
    ) -> Result<(), CheckpointError> {
        let path = self.beside.path().join(&name);
        let earlier = self.earlier.contains_key(&name);
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(!earlier)
            .open(&path)
            .map_err(io("create", &path))?;
        file.set_len(num_bytes).map_err(io("extend", &path))?;
        self.files.push(StagedFile {
            name,
            path,
            file,
            parts: parts
                .into_iter()
                .map(|(offset, num_bytes)| Part {
                    offset,
                    num_bytes,
                    written: Mutex::default(),
                })
                .collect(),
            finished: AtomicBool::new(false),
        });
        Ok(())
    }

    /// Reads what an earlier run finished: files that are as recorded count as finished, the others are written anew. Then
    /// checks that there is room for those.
    pub(in crate::checkpoint) fn begin(&self) -> Result<(), CheckpointError> {
        self.check_earlier()?;
        let unwritten = self.files.iter().enumerate();
        let needed: u64 = unwritten
            .filter(|(number, _)| !self.is_finished(*number))
            .flat_map(|(_, file)| &file.parts)
            .map(|part| part.num_bytes)
            .sum();
        disk::check_space(self.beside.path(), self.target(), needed)
    }

    fn check_earlier(&self) -> Result<(), CheckpointError> {
        self.files.par_iter().try_for_each(|file| {
            let Some(recorded) = self.earlier.get(&file.name) else {
                return Ok(());
            };
            let found = file.checksums()?;
            if found == *recorded {
                for (part, crc) in file.parts.iter().zip(found) {
                    *lock(&part.written) = Written::whole(part.num_bytes, crc);
                }
                file.finished.store(true, Ordering::Release);
            } else {
                tracing::warn!(
                    "{} was changed since and is written anew",
                    file.path.display()
                );
            }
            Ok(())
        })
    }

    pub(in crate::checkpoint) fn name(&self, file: usize) -> &str {
        &self.files[file].name
    }

    pub(in crate::checkpoint) fn is_finished(&self, file: usize) -> bool {
        self.files[file].finished.load(Ordering::Acquire)
    }

    /// Writes bytes that belong to no part: a header, what stands around a tensor.
    pub(in crate::checkpoint) fn write_around(
        &self,
        file: usize,
        offset: u64,
        bytes: &[u8],
    ) -> Result<(), CheckpointError> {
        let file = &self.files[file];
        file.file
            .write_all_at(bytes, offset)
            .map_err(io("write", &file.path))
    }

    /// Writes `bytes` at `offset` of a part; `false` if a byte of them was written before.
    pub(in crate::checkpoint) fn write(
        &self,
        place: PartPlace,
        offset: u64,
        bytes: &[u8],
    ) -> Result<bool, CheckpointError> {
        let file = &self.files[place.file];
        let part = &file.parts[place.part];
        file.file
            .write_all_at(bytes, part.offset + offset)
            .map_err(io("write", &file.path))?;
        let crc = crc32fast::hash(bytes);
        Ok(lock(&part.written).insert(offset, offset + bytes.len() as u64, crc))
    }

    /// Bytes of a part that have arrived.
    pub(in crate::checkpoint) fn written(&self, place: PartPlace) -> u64 {
        lock(&self.files[place.file].parts[place.part].written).count()
    }

    /// CRC-32 of a part that has arrived in full.
    pub(in crate::checkpoint) fn crc(&self, place: PartPlace) -> u32 {
        lock(&self.files[place.file].parts[place.part].written).crc()
    }

    /// Syncs a file all of whose parts have arrived, reads it back when that was asked for, and records it.
    pub(in crate::checkpoint) fn finish_file(&self, file: usize) -> Result<(), CheckpointError> {
        let file = &self.files[file];
        // The disk is busy with the one while the processors are with the other. What is read comes from the page cache, before
        // a sync and after it.
        let (synced, found) = std::thread::scope(|scope| {
            let sync = scope.spawn(|| sync_file(&file.file, &file.path));
            let found = match self.read_back {
                ReadBack::Yes => file.checksums().map(Some),
                ReadBack::No => Ok(None),
            };
            (sync.join(), found)
        });
        synced.unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
        let handed_in: Vec<u32> = file
            .parts
            .iter()
            .map(|part| lock(&part.written).crc())
            .collect();
        if found?.is_some_and(|found| found != handed_in) {
            return Err(CheckpointError::ReadBack {
                path: file.path.clone(),
                dir: self.target().to_owned(),
            });
        }
        if let Some(journal) = &self.journal {
            journal.finished(&file.name, handed_in)?;
            self.beside.keep();
        }
        file.finished.store(true, Ordering::Release);
        Ok(())
    }

    /// Moves the directory, whose files are all finished, to its destination.
    pub(in crate::checkpoint) fn finish(mut self) -> Result<PathBuf, CheckpointError> {
        if let Some(journal) = self.journal.take() {
            journal.remove()?;
        }
        self.beside.finish()
    }
}

impl StagedFile {
    /// CRC-32 of each part, as the file is now.
    fn checksums(&self) -> Result<Vec<u32>, CheckpointError> {
        let pieces: Vec<(usize, u64, u64)> = self
            .parts
            .iter()
            .enumerate()
            .flat_map(|(number, part)| {
                let starts =
                    (0..part.num_bytes.div_ceil(PIECE_BYTES)).map(|piece| piece * PIECE_BYTES);
                starts.map(move |start| (number, start, (start + PIECE_BYTES).min(part.num_bytes)))
            })
            .collect();
        let sums = pieces
            .par_iter()
            .map(|(part, start, end)| self.checksum(self.parts[*part].offset, *start, *end))
            .collect::<Result<Vec<u32>, _>>()?;
        let mut parts: Vec<Written> = self.parts.iter().map(|_| Written::default()).collect();
        for ((part, start, end), crc) in pieces.into_iter().zip(sums) {
            parts[part].insert(start, end, crc);
        }
        Ok(parts.iter().map(Written::crc).collect())
    }

    fn checksum(&self, offset: u64, start: u64, end: u64) -> Result<u32, CheckpointError> {
        let mut buffer = [0; BUFFER_BYTES];
        let mut hasher = crc32fast::Hasher::new();
        let mut at = start;
        while at < end {
            let len = usize::try_from(end - at).map_or(BUFFER_BYTES, |left| left.min(BUFFER_BYTES));
            self.file
                .read_exact_at(&mut buffer[..len], offset + at)
                .map_err(io("read back", &self.path))?;
            hasher.update(&buffer[..len]);
            at += len as u64;
        }
        Ok(hasher.finalize())
    }
}

fn lock(written: &Mutex<Written>) -> std::sync::MutexGuard<'_, Written> {
    written
        .lock()
        .unwrap_or_else(std::sync::PoisonError::into_inner)
}
