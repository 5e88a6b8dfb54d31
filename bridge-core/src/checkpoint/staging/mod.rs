//! A directory in the making: hidden beside its destination, complete or not there at all.
//!
//! `Beside` is the directory and its lock, [`StagedFiles`] its data files. A file is finished by itself: synced, read
//! back when asked for, and recorded in a journal, so that a later run of the same job goes on behind it. `Shared` is a
//! directory that several processes fill.
//! This room knows no formats: a file is a name, a length and parts that are filled from any side.

mod beside;
mod disk;
mod files;
mod journal;
mod shared;
mod written;

pub(super) use beside::parent_of;
pub use beside::partial_path;
pub use disk::check_space;
pub(super) use disk::{sync_dir, sync_file, write_file};
pub(super) use files::{PartPlace, StagedFiles};
pub(super) use shared::Shared;
pub use shared::{Published, discard_exports, is_id};
pub(super) use written::Written;

/// What happens to a destination that is there already.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Overwrite {
    /// It is an error, unless the directory is empty.
    #[default]
    No,
    /// The finished directory takes its place in one step.
    Yes,
}

impl From<bool> for Overwrite {
    /// Whether it was asked for.
    fn from(asked: bool) -> Self {
        if asked { Self::Yes } else { Self::No }
    }
}

/// Whether finished files of an interrupted run are kept.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Resume {
    /// Everything is written anew.
    #[default]
    No,
    /// Files that an earlier run of the same job finished are checked and kept.
    Yes,
}

/// Whether what was written is read back.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum ReadBack {
    /// It is not.
    #[default]
    No,
    /// Every byte is read again and compared, by CRC-32, with what was handed in.
    Yes,
}

/// How a directory is made.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Staging {
    /// What happens to a destination that is there already.
    pub overwrite: Overwrite,
    /// A text that names what is written from what, and differs when either does. With it finished files are recorded,
    /// and a run that stops with some of them leaves them for the next one; without it nothing is left.
    pub job: Option<String>,
    /// Goes on behind the files that an earlier run of the same job finished.
    pub resume: Resume,
    /// Reads back what was written before it counts as finished.
    pub read_back: ReadBack,
}

impl From<Overwrite> for Staging {
    fn from(overwrite: Overwrite) -> Self {
        Self {
            overwrite,
            ..Self::default()
        }
    }
}
