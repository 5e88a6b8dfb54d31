//! What can fail, as kinds with numbers and texts with their chain; the edge where panics end.

use std::any::Any;
use std::error::Error;
use std::fmt::Write as _;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;

use bridge_core::checkpoint::{CheckpointError, FileProblem};
use bridge_core::config::ConfigError;
use bridge_core::convert::ConvertError;
use bridge_core::layout::{LayoutError, PipelineLayoutError};
use bridge_core::provider::run_config::{Difference, RunConfigError};
use bridge_core::shards::RankExportError;
use bridge_core::{BridgeError, Dtype};

/// Kinds of failure: `bridge_status` of the C header, `ErrorCode` of the C++ header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(i32)]
#[expect(missing_docs, reason = "the headers say what they mean")]
pub enum Status {
    Ok = 0,
    Argument = 1,
    Io = 2,
    Checkpoint = 3,
    Layout = 4,
    Tensor = 5,
    Size = 6,
    Dtype = 7,
    Alignment = 8,
    Overlap = 9,
    NonFinite = 10,
    Cancelled = 11,
    Export = 12,
    Internal = 13,
}

/// Why a call failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FfiError {
    /// A pointer that must not be null.
    #[error("{what} is null")]
    Null {
        /// Its name in the header.
        what: &'static str,
    },
    /// A pointer to a struct that cannot stand there.
    #[error("{what} is not aligned")]
    Misaligned {
        /// Its name in the header.
        what: &'static str,
    },
    /// A text that is none.
    #[error("{what} is not valid UTF-8: {}", text.escape_default())]
    Utf8 {
        /// Its name in the header.
        what: &'static str,
        /// What it is, so far as it can be shown.
        text: String,
    },
    /// A struct that was not initialised, or is another version's.
    #[error("struct_size of {what} is {found}, it has {expected} bytes; begin with {init}")]
    StructSize {
        /// The struct.
        what: &'static str,
        /// What it says.
        found: usize,
        /// What it should say.
        expected: usize,
        /// The initialiser.
        init: &'static str,
    },
    /// A number that stands for nothing.
    #[error("{what} {found} is none of {known}")]
    Number {
        /// What it should be.
        what: &'static str,
        /// The number.
        found: i32,
        /// The enumeration.
        known: &'static str,
    },
    /// A number of a tensor that does not exist.
    #[error("tensor number {index} does not exist, there are {size}, numbered from 0")]
    Index {
        /// The number.
        index: usize,
        /// How many there are.
        size: usize,
    },
    /// Both ways to say how many ranks there are.
    #[error(
        "data_parallel_size {data_parallel_size} and world_size {world_size} are both given; give one of them"
    )]
    TwoWorlds {
        /// One way.
        data_parallel_size: usize,
        /// The other.
        world_size: usize,
    },
    /// A provider has no such field, or not of this type.
    #[error("the provider's field `{field}` {problem}")]
    Field {
        /// The name.
        field: String,
        /// What is wrong, with the nearest name where there is none of this.
        problem: String,
    },
    /// A `torch_dist` directory does not say which model it holds.
    #[error(
        "{} is a torch_dist directory, which does not say what its tensors are in the model; give the Hugging Face directory (or config file) that it was made from as `reference`",
        dir.display()
    )]
    NoReference {
        /// The directory.
        dir: PathBuf,
    },
    /// A reference for a directory that needs none.
    #[error("{} is a Hugging Face directory, a `reference` ({}) is for torch_dist directories", dir.display(), reference.display())]
    NeedlessReference {
        /// The directory.
        dir: PathBuf,
        /// What was given.
        reference: PathBuf,
    },
    /// A `torch_dist` directory of another model.
    #[error(
        "{} describes another model than the reference ({} fields): {}; give the reference that it was made from, or set not_strict",
        file.display(), differences.len(), listed(differences)
    )]
    OtherModel {
        /// Its run_config.yaml.
        file: PathBuf,
        /// The fields.
        differences: Vec<Difference>,
    },
    /// A `torch_dist` directory with tensors of another model.
    #[error(
        "{} holds {} tensors that the reference does not know: {}; give the reference that it was made from, or set not_strict",
        dir.display(), keys.len(), listed(keys)
    )]
    UnknownKeys {
        /// The directory.
        dir: PathBuf,
        /// Their keys.
        keys: Vec<String>,
    },
    /// A `torch_dist` directory without all tensors of the rank.
    #[error(
        "{} lacks {} tensors that the rank needs: {}; is it without the multi-token-prediction head? Then set without_mtp",
        dir.display(), names.len(), listed(names)
    )]
    StoredLacks {
        /// The directory.
        dir: PathBuf,
        /// The rank's names.
        names: Vec<String>,
    },
    /// A run_config.yaml that cannot be used.
    #[error(transparent)]
    RunConfig(#[from] RunConfigError),
    /// The rank has no tensor of this name.
    #[error(
        "rank {rank} has no tensor `{name}` in virtual stage {vp_stage}{}",
        did_you_mean(nearest)
    )]
    NoTensor {
        /// The name.
        name: String,
        /// The global rank.
        rank: usize,
        /// The virtual stage.
        vp_stage: usize,
        /// The nearest name.
        nearest: Option<String>,
    },
    /// Tensors without a destination.
    #[error(
        "{} of the rank's tensors have no destination: {}; name them, or set partial to load some of them",
        names.len(), listed(names)
    )]
    NoDestination {
        /// Their names.
        names: Vec<String>,
    },
    /// Rows outside a tensor.
    #[error("rows {first}..{end} of `{name}` were asked for, it has {rows} (shape {shape:?})")]
    Rows {
        /// The tensor.
        name: String,
        /// The first row.
        first: usize,
        /// One past the last.
        end: usize,
        /// Its rows.
        rows: usize,
        /// Its shape.
        shape: Vec<usize>,
    },
    /// Memory of another size.
    #[error("the memory for `{name}` has {found} bytes, {rows} rows of {row_bytes} bytes need {expected} (shape {shape:?}, {dtype}{})", apart(*stride))]
    Bytes {
        /// The tensor.
        name: String,
        /// What was given.
        found: usize,
        /// What is needed.
        expected: usize,
        /// How many rows were asked for.
        rows: usize,
        /// Bytes of one.
        row_bytes: usize,
        /// From one row to the next.
        stride: usize,
        /// The tensor's shape.
        shape: Vec<usize>,
        /// The memory's dtype.
        dtype: Dtype,
    },
    /// Rows that would overlap each other.
    #[error("row_stride_bytes of `{name}` is {stride}, but a row has {row_bytes} bytes")]
    Stride {
        /// The tensor.
        name: String,
        /// From one row to the next.
        stride: usize,
        /// Bytes of a row.
        row_bytes: usize,
    },
    /// Memory whose end cannot be addressed.
    #[error(
        "the memory for `{name}` ({bytes} bytes at {address:#x}) does not fit into the address space"
    )]
    Address {
        /// The tensor.
        name: String,
        /// Where it begins.
        address: usize,
        /// How long it is.
        bytes: usize,
    },
    /// A null pointer for rows that there are.
    #[error("the memory for `{name}` is null")]
    NullData {
        /// The tensor.
        name: String,
    },
    /// Values that cannot be converted.
    #[error("the memory for `{name}` is of dtype {dtype}, weights are F16, BF16, F32 or F64")]
    Dtype {
        /// The tensor.
        name: String,
        /// The memory's dtype.
        dtype: Dtype,
    },
    /// A layout that asks for parameters that cannot be.
    #[error("params_dtype is {dtype}, weights are F16, BF16, F32 or F64")]
    ParamsDtype {
        /// What it asks for.
        dtype: Dtype,
    },
    /// A pointer or stride that no element of the dtype has.
    #[error(
        "{what} of `{name}` is {found}, which is not a multiple of the {size} bytes of {dtype}"
    )]
    Alignment {
        /// `the address of the memory` or `row_stride_bytes`.
        what: &'static str,
        /// The tensor.
        name: String,
        /// Its value, an address in hexadecimal.
        found: String,
        /// Bytes of an element.
        size: usize,
        /// The memory's dtype.
        dtype: Dtype,
    },
    /// Memory that two tensors would stand in.
    #[error(
        "the memory for `{first}` (destination {first_number}) and `{second}` (destination {second_number}) overlaps at {address:#x}"
    )]
    Overlap {
        /// One tensor.
        first: String,
        /// Its place among the destinations.
        first_number: usize,
        /// The other one.
        second: String,
        /// Its place among the destinations.
        second_number: usize,
        /// Where they meet.
        address: usize,
    },
    /// Whoever holds the cancellation, or the callback, asked for it.
    #[error("cancelled after {done} of {total} bytes")]
    Cancelled {
        /// Bytes that were moved.
        done: u64,
        /// Bytes of the whole job.
        total: u64,
    },
    /// The layout does not fit.
    #[error(transparent)]
    Layout(#[from] LayoutError),
    /// A layout string that is none.
    #[error("pipeline_model_parallel_layout cannot be read")]
    PipelineLayout(#[from] PipelineLayoutError),
    /// The checkpoint cannot be used.
    #[error(transparent)]
    Bridge(#[from] BridgeError),
    /// The checkpoint cannot be read.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// Bytes could not be moved.
    #[error(transparent)]
    Convert(#[from] ConvertError),
    /// An export cannot go on.
    #[error(transparent)]
    Export(#[from] RankExportError),
    /// A path without a name, or an id that is none.
    #[error("{what} `{found}` {problem}")]
    Name {
        /// What it is.
        what: &'static str,
        /// As it was given.
        found: String,
        /// What is wrong.
        problem: &'static str,
    },
    /// A defect of this library.
    #[error("the library has a defect, please report it: {text}")]
    Panic {
        /// What it panicked with.
        text: String,
    },
}

impl FfiError {
    /// The kind.
    #[must_use]
    pub fn status(&self) -> Status {
        match self {
            Self::Null { .. }
            | Self::Misaligned { .. }
            | Self::Utf8 { .. }
            | Self::StructSize { .. }
            | Self::Number { .. }
            | Self::Index { .. }
            | Self::Field { .. }
            | Self::NoReference { .. }
            | Self::NeedlessReference { .. }
            | Self::NullData { .. }
            | Self::Address { .. }
            | Self::Name { .. } => Status::Argument,
            Self::TwoWorlds { .. } | Self::Layout(_) | Self::PipelineLayout(_) => Status::Layout,
            Self::OtherModel { .. } | Self::UnknownKeys { .. } | Self::StoredLacks { .. } => {
                Status::Checkpoint
            }
            Self::NoTensor { .. } | Self::NoDestination { .. } => Status::Tensor,
            Self::Rows { .. } | Self::Bytes { .. } | Self::Stride { .. } => Status::Size,
            Self::Dtype { .. } | Self::ParamsDtype { .. } => Status::Dtype,
            Self::Alignment { .. } => Status::Alignment,
            Self::Overlap { .. } => Status::Overlap,
            Self::Cancelled { .. } => Status::Cancelled,
            Self::RunConfig(error) => system_or(error, Status::Checkpoint),
            Self::Bridge(error) => of_bridge(error),
            Self::Checkpoint(error) => of_checkpoint(error),
            Self::Convert(error) => of_convert(error),
            Self::Export(error) => of_export(error),
            Self::Panic { .. } => Status::Internal,
        }
    }

    /// What was wrong, then each cause on a line of its own.
    #[must_use]
    pub fn text(&self) -> String {
        let mut text = self.to_string();
        let mut source = self.source();
        while let Some(cause) = source {
            // Writing to a string cannot fail.
            let _ = write!(text, "\ncaused by: {cause}");
            source = cause.source();
        }
        text
    }
}

/// Runs what may fail; a panic is an error too.
///
/// # Errors
/// What `work` gives, or [`FfiError::Panic`].
pub fn guard<T>(work: impl FnOnce() -> Result<T, FfiError>) -> Result<T, FfiError> {
    // What a panic leaves half-done belongs to the call, whose outputs are not written then.
    match catch_unwind(AssertUnwindSafe(work)) {
        Ok(result) => result,
        Err(payload) => Err(panic_error(payload.as_ref())),
    }
}

/// What a panic said.
pub(crate) fn panic_error(payload: &(dyn Any + Send)) -> FfiError {
    let text = match (
        payload.downcast_ref::<&str>(),
        payload.downcast_ref::<String>(),
    ) {
        (Some(text), _) => (*text).to_owned(),
        (_, Some(text)) => text.clone(),
        _ => "it gave no text".to_owned(),
    };
    FfiError::Panic { text }
}

fn of_bridge(error: &BridgeError) -> Status {
    match error {
        BridgeError::Layout(_) => Status::Layout,
        BridgeError::Checkpoint(error) => of_checkpoint(error),
        BridgeError::Convert(error) => of_convert(error),
        BridgeError::Config(ConfigError::Read { .. }) => Status::Io,
        BridgeError::Overlap { .. } => Status::Export,
        other => system_or(other, Status::Checkpoint),
    }
}

fn of_checkpoint(error: &CheckpointError) -> Status {
    match error {
        CheckpointError::NoWeights { .. } | CheckpointError::NoSpace { .. } => Status::Io,
        CheckpointError::Files { problems, .. } => {
            let missing =
                |problem: &FileProblem| matches!(problem, FileProblem::MissingShard { .. });
            match problems.iter().all(missing) {
                true => Status::Io,
                false => Status::Checkpoint,
            }
        }
        CheckpointError::Exists { .. }
        | CheckpointError::Busy { .. }
        | CheckpointError::OtherExport { .. } => Status::Export,
        CheckpointError::Foreign { source, .. } => match source.downcast_ref::<ConvertError>() {
            Some(error) => of_convert(error),
            None => Status::Checkpoint,
        },
        other => system_or(other, Status::Checkpoint),
    }
}

fn of_convert(error: &ConvertError) -> Status {
    match error {
        ConvertError::NonFinite { .. } => Status::NonFinite,
        ConvertError::Stopped => Status::Cancelled,
        ConvertError::Dtype { .. } => Status::Checkpoint,
        ConvertError::Checkpoint { source, .. } | ConvertError::Finish(source) => {
            of_checkpoint(source)
        }
        other => system_or(other, Status::Checkpoint),
    }
}

fn of_export(error: &RankExportError) -> Status {
    match error {
        RankExportError::Bridge(error) => of_bridge(error),
        RankExportError::Checkpoint(error) => of_checkpoint(error),
        RankExportError::Convert(error) => of_convert(error),
        RankExportError::Missing { .. }
        | RankExportError::NotHandedIn { .. }
        | RankExportError::Twice { .. } => Status::Tensor,
        RankExportError::Id { .. } => Status::Argument,
        _ => Status::Export,
    }
}

/// [`Status::Io`] where the system refused. A file that ends early is damage, not a refusal.
fn system_or(error: &(dyn Error + 'static), other: Status) -> Status {
    let mut next = Some(error);
    while let Some(error) = next {
        if let Some(error) = error.downcast_ref::<io::Error>() {
            return match error.kind() {
                io::ErrorKind::UnexpectedEof => Status::Checkpoint,
                _ => Status::Io,
            };
        }
        next = error.source();
    }
    other
}

/// The first ten.
fn listed<T: ToString>(items: &[T]) -> String {
    let shown: Vec<String> = items
        .iter()
        .take(10)
        .map(|item| format!("`{}`", item.to_string().trim_matches('`')))
        .collect();
    let more = items.len().saturating_sub(10);
    match more {
        0 => shown.join(", "),
        more => format!("{}, and {more} more", shown.join(", ")),
    }
}

fn did_you_mean(nearest: &Option<String>) -> String {
    nearest
        .as_ref()
        .map(|name| format!("; did you mean `{name}`?"))
        .unwrap_or_default()
}

fn apart(stride: usize) -> String {
    match stride {
        0 => String::new(),
        stride => format!(", {stride} bytes apart"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_is_an_error_with_its_text() {
        for (result, wanted) in [
            (guard::<()>(|| panic!("plain")), "plain"),
            (guard::<()>(|| panic!("number {}", 7)), "number 7"),
            (
                guard::<()>(|| std::panic::panic_any(3u8)),
                "it gave no text",
            ),
        ] {
            let error = result.unwrap_err();
            assert_eq!(error.status(), Status::Internal);
            assert!(error.text().contains(wanted), "{}", error.text());
        }
    }

    #[test]
    fn a_text_holds_every_cause_and_the_kind_follows_the_deepest() {
        let cause = |kind| CheckpointError::Io {
            action: "read",
            path: PathBuf::from("a/file"),
            source: io::Error::from(kind),
        };
        let error = |kind| {
            FfiError::Convert(ConvertError::Checkpoint {
                target: "decoder.x".to_owned(),
                source: cause(kind),
            })
        };
        let refused = error(io::ErrorKind::PermissionDenied);
        assert_eq!(
            refused.text(),
            "while making `decoder.x`\ncaused by: cannot read a/file\ncaused by: permission denied"
        );
        assert_eq!(refused.status(), Status::Io);
        assert_eq!(
            error(io::ErrorKind::UnexpectedEof).status(),
            Status::Checkpoint
        );
    }

    #[test]
    fn long_lists_are_cut() {
        let names: Vec<String> = (0..12).map(|number| format!("t{number}")).collect();
        let text = listed(&names);
        assert!(
            text.starts_with("`t0`, `t1`") && text.ends_with("`t9`, and 2 more"),
            "{text}"
        );
    }
}
