//! A directory into which inputs are put.

use std::path::Path;

use tempfile::TempDir;

/// A directory of which one file changes from input to input.
#[derive(Debug)]
pub struct Room {
    dir: TempDir,
}

impl Room {
    /// A directory that holds these files.
    ///
    /// # Panics
    /// When the system refuses.
    #[must_use]
    pub fn with(files: &[(&str, Vec<u8>)]) -> Self {
        let dir = tempfile::tempdir().expect("a temporary directory can be made");
        let room = Self { dir };
        for (name, bytes) in files {
            room.put(name, bytes);
        }
        room
    }

    /// Writes a file.
    ///
    /// # Panics
    /// When the system refuses.
    pub fn put(&self, name: &str, bytes: &[u8]) {
        std::fs::write(self.dir.path().join(name), bytes).expect("a temporary file can be written");
    }

    /// Writes a file, lets `read` have the directory, and gives the most bytes that it held at once.
    ///
    /// # Panics
    /// When the system refuses.
    pub fn peak_of(&self, name: &str, bytes: &[u8], read: impl FnOnce(&Path)) -> usize {
        self.put(name, bytes);
        peak_of(|| read(self.dir.path()))
    }
}

/// The most bytes that this thread held at once for `work`.
pub(crate) fn peak_of(work: impl FnOnce()) -> usize {
    let counted = allocation_counter::measure(work);
    usize::try_from(counted.bytes_max).unwrap_or(usize::MAX)
}
