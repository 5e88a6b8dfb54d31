//! What can be wrong with a `torch_dist` directory.

use std::path::PathBuf;

use super::PickleProblem;

/// One thing that is wrong with a `torch_dist` directory.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum TorchDistProblem {
    /// No table of contents.
    #[error("it holds no .metadata; is it a torch_dist checkpoint?")]
    NoMetadata,
    /// The save was cut off.
    #[error("it holds a .metadata.tmp and no .metadata; its save was interrupted")]
    Interrupted,
    /// The tracker names no checkpoint.
    #[error("{file} says `{content}`, which names no iteration")]
    Tracker {
        /// The file.
        file: &'static str,
        /// The beginning of what it holds.
        content: String,
    },
    /// Written by another backend.
    #[error("metadata.json says {found}; only `torch_dist` version 1 is understood")]
    Backend {
        /// Backend and version.
        found: String,
    },
    /// Not JSON.
    #[error("metadata.json is not valid: {reason}")]
    Json {
        /// Where and why.
        reason: String,
    },
    /// A pickle is refused.
    #[error("{part}: {problem}")]
    Pickle {
        /// Which one.
        part: String,
        /// Why.
        problem: PickleProblem,
    },
    /// A value is not what it should be.
    #[error("{part}: {what}")]
    Value {
        /// The tensor, object or file.
        part: String,
        /// What was expected there.
        what: &'static str,
    },
    /// A dtype without a counterpart here.
    #[error("`{name}` has the dtype `{dtype}`, which is not supported")]
    Dtype {
        /// The tensor.
        name: String,
        /// Its dtype.
        dtype: String,
    },
    /// A number is not what the rest of the directory implies.
    #[error("`{name}`: {what} is {found}, expected {expected}")]
    Mismatch {
        /// The tensor.
        name: String,
        /// Which number.
        what: &'static str,
        /// What stands there.
        found: String,
        /// What should.
        expected: String,
    },
    /// Chunks lie over each other.
    #[error("chunks of `{name}` overlap")]
    Overlap {
        /// The tensor.
        name: String,
    },
    /// Chunks leave something out.
    #[error("chunks of `{name}` leave a part of it out")]
    Gap {
        /// The tensor.
        name: String,
    },
    /// Chunks that no sharding makes.
    #[error("`{name}` is cut into chunks too irregularly")]
    Irregular {
        /// The tensor.
        name: String,
    },
    /// Two items share bytes of a file.
    #[error("`{name}` begins at byte {start} of {file}, inside of `{other}`")]
    SharedBytes {
        /// The item.
        name: String,
        /// The one before.
        other: String,
        /// The file.
        file: String,
        /// Where it begins.
        start: u64,
    },
    /// An item behind its file's end.
    #[error(
        "`{name}` ends at byte {end} of {file}, which has {len}; the copy or download was cut short, fetch it again"
    )]
    Truncated {
        /// The item.
        name: String,
        /// The file.
        file: String,
        /// Where it ends.
        end: u64,
        /// Bytes of the file.
        len: u64,
    },
    /// A data file's name leads elsewhere.
    #[error(
        ".metadata names the file {name:?}; a data file is a plain file name in the same directory"
    )]
    FileName {
        /// The name.
        name: String,
    },
    /// A data file is not there.
    #[error("the file {file} is missing; `{first}` should be in it")]
    MissingFile {
        /// The file.
        file: String,
        /// An item that should be there.
        first: String,
    },
    /// A link leads out of the directory.
    #[error("{file} is a link to {}, outside the directory; copy the file, or allow links", target.display())]
    Link {
        /// The file.
        file: String,
        /// Where it leads.
        target: PathBuf,
    },
    /// Not a regular file.
    #[error("{file} is not a regular file")]
    NotAFile {
        /// The file.
        file: String,
    },
    /// An archive is refused.
    #[error("the archive of {part} is malformed: {reason}")]
    Archive {
        /// The tensor, object or file.
        part: String,
        /// What is wrong.
        reason: &'static str,
    },
    /// The bytes are not those that were written.
    #[error(
        "the entry `{entry}` of {part} has CRC-32 {found:08x}, its archive says {expected:08x}; the file is damaged"
    )]
    Checksum {
        /// The tensor, object or file.
        part: String,
        /// The entry.
        entry: String,
        /// Of the bytes.
        found: u32,
        /// In the archive's directory.
        expected: u32,
    },
}
