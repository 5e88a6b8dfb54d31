//! What can be wrong with stored tensors.

use std::path::{Path, PathBuf};

use crate::Dtype;
use crate::first_ten::first_ten;

/// Why a checkpoint cannot be read or written.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CheckpointError {
    /// The system refused.
    #[error("cannot {action} {}", path.display())]
    Io {
        /// What was tried: `open`, `read`, `write`, ...
        action: &'static str,
        /// On which file or folder.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: std::io::Error,
    },
    /// The directory holds no weights.
    #[error("{} holds neither model.safetensors.index.json nor model.safetensors; is it a Hugging Face model directory?", dir.display())]
    NoWeights {
        /// The directory.
        dir: PathBuf,
    },
    /// Both a single file and an index of other files.
    #[error("{} holds a model.safetensors beside an index that does not name it; remove the one that is stale", dir.display())]
    Ambiguous {
        /// The directory.
        dir: PathBuf,
    },
    /// The files contradict themselves or each other.
    #[error("{} cannot be used: {}", path.display(), first_ten(problems))]
    Files {
        /// The file or directory.
        path: PathBuf,
        /// All that was found.
        problems: Vec<FileProblem>,
    },
    /// A `torch_dist` directory contradicts itself, or is not trusted.
    #[error("{} cannot be used: {}", path.display(), first_ten(problems))]
    TorchDist {
        /// The file or directory.
        path: PathBuf,
        /// All that was found.
        problems: Vec<super::torch_dist::TorchDistProblem>,
    },
    /// No tensor of this name.
    #[error("there is no tensor `{name}`")]
    NoTensor {
        /// The name.
        name: String,
    },
    /// A range outside a tensor.
    #[error("bytes {start}..{end} of `{name}` were asked for, it has {num_bytes}")]
    Range {
        /// The tensor.
        name: String,
        /// First byte.
        start: u64,
        /// One past the last.
        end: u64,
        /// Bytes of the tensor.
        num_bytes: u64,
    },
    /// The destination is there already.
    #[error("{} exists and is not empty; choose another directory or pass --overwrite", dir.display())]
    Exists {
        /// The destination.
        dir: PathBuf,
    },
    /// The destination of a file is there already.
    #[error("{} exists; choose another file or pass --overwrite", path.display())]
    FileExists {
        /// The destination.
        path: PathBuf,
    },
    /// Another process writes the same destination.
    #[error("{} is being written by another process, which holds {}; wait for it, or choose another directory", dir.display(), partial.display())]
    Busy {
        /// The destination.
        dir: PathBuf,
        /// The directory in the making.
        partial: PathBuf,
    },
    /// Ranks that make a directory together describe it in different ways.
    #[error("{} is being made by other ranks with {difference}; give all ranks the same, and each export an id of its own (what they have made so far is {})", dir.display(), partial.display())]
    OtherExport {
        /// The destination.
        dir: PathBuf,
        /// The directory in the making.
        partial: PathBuf,
        /// In what they differ.
        difference: Box<OtherDescription>,
    },
    /// The disk is too small.
    #[error("{} needs {needed} bytes, its disk has {free} free; make room, or choose another disk", dir.display())]
    NoSpace {
        /// The destination.
        dir: PathBuf,
        /// Bytes that are still to be written.
        needed: u64,
        /// Bytes that are free.
        free: u64,
    },
    /// What was written does not read back as it was.
    #[error("{} does not read back as it was written; {} was not created; is the disk failing?", path.display(), dir.display())]
    ReadBack {
        /// The file.
        path: PathBuf,
        /// The destination.
        dir: PathBuf,
    },
    /// A byte of a tensor was handed in a second time.
    #[error("bytes {start}..{end} of `{name}` were written before; {} was not created", dir.display())]
    Twice {
        /// The tensor.
        name: String,
        /// First byte.
        start: u64,
        /// One past the last.
        end: u64,
        /// The destination.
        dir: PathBuf,
    },
    /// A tensor was not written in full.
    #[error("`{name}` was written to {written} of its {num_bytes} bytes; {} was not created", dir.display())]
    Unfinished {
        /// The tensor.
        name: String,
        /// Bytes that were written.
        written: u64,
        /// Bytes it has.
        num_bytes: u64,
        /// The destination.
        dir: PathBuf,
    },
    /// A scale of an FP8 matrix is not a number.
    #[error(
        "element {index} of `{name}` is {value}; a block of FP8 values cannot be scaled by it, the checkpoint is damaged, fetch it again"
    )]
    Scale {
        /// The scales.
        name: String,
        /// Which of them.
        index: usize,
        /// What it is.
        value: f32,
    },
    /// A sink or source of another crate failed.
    #[error("`{name}` could not be {action}")]
    Foreign {
        /// The tensor.
        name: String,
        /// `read` or `written`.
        action: &'static str,
        /// What it said.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
}

/// What the others say of a directory that ranks make together, and this one does not.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("another `{what}`: theirs is {found}, this rank's {expected}")]
pub struct OtherDescription {
    /// The entry.
    pub what: String,
    /// Theirs, as JSON.
    pub found: String,
    /// This rank's.
    pub expected: String,
}

/// One thing that is wrong with a safetensors file or an index.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum FileProblem {
    /// Shorter than a header's length field.
    #[error("it has {len} bytes, a safetensors file begins with 8 bytes of length")]
    TooShort {
        /// Bytes of the file.
        len: u64,
    },
    /// The length field points behind the end.
    #[error(
        "its header should have {header} bytes, but the file has {len}; the copy or download was cut short, fetch it again"
    )]
    HeaderCut {
        /// What the length field says.
        header: u64,
        /// Bytes of the file.
        len: u64,
    },
    /// More header than any model needs.
    #[error("its header of {header} bytes is above the limit of {limit}")]
    HeaderTooLarge {
        /// What the length field says.
        header: u64,
        /// The limit.
        limit: u64,
    },
    /// The header or index is not the JSON that it should be.
    #[error("{what} is not valid: {reason}")]
    Json {
        /// `its header` or `the index`.
        what: &'static str,
        /// Where and why.
        reason: String,
    },
    /// An entry of the header is malformed.
    #[error("`{name}`: {reason}")]
    Entry {
        /// The tensor.
        name: String,
        /// What is wrong, with the numbers.
        reason: String,
    },
    /// Offsets of a tensor and its shape disagree.
    #[error("`{name}` has {found} bytes by its offsets, but {expected} by dtype and shape")]
    Size {
        /// The tensor.
        name: String,
        /// Bytes by offsets.
        found: u64,
        /// Bytes by dtype and shape.
        expected: u64,
    },
    /// Two tensors share bytes.
    #[error("`{name}` begins at byte {start}, before the tensor in front of it ends ({end})")]
    Overlap {
        /// The tensor.
        name: String,
        /// Where it begins.
        start: u64,
        /// Where the one before ends.
        end: u64,
    },
    /// Bytes between two tensors.
    #[error("bytes {end}..{start} before `{name}` belong to no tensor")]
    Gap {
        /// The tensor.
        name: String,
        /// Where it begins.
        start: u64,
        /// Where the one before ends.
        end: u64,
    },
    /// The file ends before its tensors do.
    #[error(
        "it ends at byte {len}, but its header describes {needed} bytes; the copy or download was cut short, fetch it again"
    )]
    Truncated {
        /// Bytes of the file.
        len: u64,
        /// Bytes that the header describes.
        needed: u64,
    },
    /// The file goes on behind its tensors.
    #[error("it has {extra} bytes behind its last tensor")]
    Trailing {
        /// How many.
        extra: u64,
    },
    /// A shard's name leads elsewhere.
    #[error(
        "the index names the shard {name:?}; a shard is a plain file name in the same directory"
    )]
    ShardName {
        /// The name.
        name: String,
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
    /// The index names a file that is not there.
    #[error("the shard {file} is missing; {count} tensors should be in it, first `{first}`")]
    MissingShard {
        /// The file.
        file: String,
        /// Tensors that the index places there.
        count: usize,
        /// The first one.
        first: String,
    },
    /// The index places a tensor in a shard that lacks it.
    #[error("the index places `{name}` in {file}, which does not hold it")]
    NotInShard {
        /// The tensor.
        name: String,
        /// The shard.
        file: String,
    },
    /// A shard has a tensor that the index does not place there.
    #[error("{file} holds `{name}`, which the index does not place there")]
    NotInIndex {
        /// The tensor.
        name: String,
        /// The shard.
        file: String,
    },
    /// A safetensors file without the description of a rank.
    #[error(
        "its metadata does not say which rank it belongs to; is it a file that `trainer convert shard` wrote?"
    )]
    NotAShard,
    /// An FP8 matrix without scales.
    #[error(
        "`{name}` is in F8_E4M3, but `{scales}` is missing; without its scales its values mean nothing"
    )]
    NoScales {
        /// The matrix.
        name: String,
        /// The name that its scales should have.
        scales: String,
    },
    /// Scales beside a tensor that is not in FP8.
    #[error(
        "`{scales}` would scale `{name}`, which has dtype {dtype} and not F8_E4M3; was only one of them replaced?"
    )]
    NotQuantised {
        /// The scales.
        scales: String,
        /// The tensor.
        name: String,
        /// Its dtype.
        dtype: Dtype,
    },
    /// Scales without a tensor.
    #[error("`{scales}` scales a tensor that is not there")]
    NothingToScale {
        /// The scales.
        scales: String,
    },
    /// An FP8 tensor that is no matrix.
    #[error(
        "`{name}` is in F8_E4M3 with shape {shape:?}; only matrices can be scaled block by block"
    )]
    NoMatrix {
        /// The tensor.
        name: String,
        /// Its shape.
        shape: Vec<usize>,
    },
    /// Scales that do not fit the blocks of their matrix.
    #[error(
        "`{scales}` has shape {found:?}, but blocks of {block:?} in a matrix of {matrix:?} need {expected:?}; weight_block_size in config.json says how large blocks are"
    )]
    ScaleShape {
        /// The scales.
        scales: String,
        /// Their shape.
        found: Vec<usize>,
        /// The shape that fits.
        expected: [usize; 2],
        /// Rows and columns of a block.
        block: [usize; 2],
        /// Rows and columns of the matrix.
        matrix: [usize; 2],
    },
    /// Scales of a type that holds none.
    #[error("`{scales}` has dtype {found}, scales are F32, BF16 or F16")]
    ScaleDtype {
        /// The scales.
        scales: String,
        /// Their dtype.
        found: Dtype,
    },
    /// Two tensors have the same name once prefixes are read as the published ones.
    #[error("`{name}` would stand for two tensors")]
    SameName {
        /// The published name.
        name: String,
    },
}

/// Names what was done to which path when the system refused it.
pub(super) fn io(
    action: &'static str,
    path: &Path,
) -> impl FnOnce(std::io::Error) -> CheckpointError {
    let path = path.to_owned();
    move |source| CheckpointError::Io {
        action,
        path,
        source,
    }
}

/// Refuses a range of bytes that is not all inside tensor `name` of `num_bytes`.
pub(super) fn check_range(
    name: &str,
    offset_bytes: u64,
    len: usize,
    num_bytes: u64,
) -> Result<(), CheckpointError> {
    let end = offset_bytes.saturating_add(len as u64);
    if end > num_bytes {
        return Err(CheckpointError::Range {
            name: name.to_owned(),
            start: offset_bytes,
            end,
            num_bytes,
        });
    }
    Ok(())
}
