//! What can keep a plan from being made.

use std::path::PathBuf;

use crate::Dtype;
use crate::first_ten::first_ten;

/// Why there is no plan.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PlanError {
    /// The checkpoint's tensors are not those that its config describes; nothing was written.
    #[error("{} does not hold the tensors that its config.json describes ({} problems): {}", dir.display(), problems.len(), first_ten(problems))]
    Tensors {
        /// The checkpoint.
        dir: PathBuf,
        /// All that was found.
        problems: Vec<TensorProblem>,
    },
    /// A section does not divide into equal parts.
    #[error(
        "`{name}`: {len} {what} cannot be cut into {size} equal parts; choose a parallel size that divides {len}"
    )]
    Indivisible {
        /// The parameter.
        name: String,
        /// Rows or columns.
        what: &'static str,
        /// How many there are.
        len: usize,
        /// How many parts were asked for.
        size: usize,
    },
    /// A rank that does not exist.
    #[error("rank {rank} does not exist in a group of {size}")]
    Rank {
        /// The rank.
        rank: usize,
        /// The group's size.
        size: usize,
    },
    /// The layout was made for another model.
    #[error(
        "the layout has {layout_layers} decoder layers and {layout_mtp} MTP layers, the model has {model_layers} and {model_mtp}; make the layout from the model that is planned"
    )]
    Layout {
        /// Decoder layers of the layout.
        layout_layers: usize,
        /// MTP layers of the layout.
        layout_mtp: usize,
        /// Decoder layers of the model.
        model_layers: usize,
        /// MTP layers of the model.
        model_mtp: usize,
    },
    /// The vocabulary would be cut instead of padded.
    #[error("`{name}` has {rows} rows, it cannot be padded to {padded}")]
    Padding {
        /// The parameter.
        name: String,
        /// Rows of the vocabulary.
        rows: usize,
        /// Rows asked for.
        padded: usize,
    },
    /// A tensor whose size cannot be counted in this machine's words.
    #[error(
        "`{name}` with shape {shape:?} has more elements than can be counted; is the config right?"
    )]
    TooLarge {
        /// The tensor.
        name: String,
        /// Its shape.
        shape: Vec<usize>,
    },
    /// A copy leaves its tensor.
    #[error("a copy into `{name}` ends at element {end} of {side} with {numel} elements")]
    OutOfBounds {
        /// The target.
        name: String,
        /// `its source ...` or `the target`.
        side: String,
        /// Where it ends.
        end: usize,
        /// Elements of that tensor.
        numel: usize,
    },
    /// Target elements that no copy writes.
    #[error("elements {start}..{end} of `{name}` are written by no copy")]
    Gap {
        /// The target.
        name: String,
        /// First element.
        start: usize,
        /// One past the last.
        end: usize,
    },
    /// Target elements that two copies write.
    #[error("elements from {start} of `{name}` are written twice")]
    Overlap {
        /// The target.
        name: String,
        /// First element.
        start: usize,
    },
    /// Source elements that nothing reads.
    #[error("elements {start}..{end} of `{name}` are read by no copy and would be lost")]
    Unread {
        /// The source.
        name: String,
        /// First element.
        start: usize,
        /// One past the last.
        end: usize,
    },
    /// Source elements that are read twice.
    #[error("elements from {start} of `{name}` are read twice")]
    ReadTwice {
        /// The source.
        name: String,
        /// First element.
        start: usize,
    },
    /// The same target stands twice in a plan.
    #[error("`{name}` stands twice in the plan")]
    Duplicate {
        /// The target.
        name: String,
    },
}

/// One tensor of a checkpoint that is not as its config describes it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum TensorProblem {
    /// The config implies it and no file has it.
    #[error("`{name}` {shape:?} is missing{}", note(hint))]
    Missing {
        /// The tensor.
        name: String,
        /// The shape it should have.
        shape: Vec<usize>,
        /// The likely reason.
        hint: Option<&'static str>,
    },
    /// A file has it and no row claims it.
    #[error("`{name}` in {} is claimed by no row of the mapping and would be lost{}", file.display(), suggestion(nearest, *hint))]
    Unexpected {
        /// The tensor.
        name: String,
        /// Its file.
        file: PathBuf,
        /// The closest name of the mapping.
        nearest: Option<String>,
        /// The likely reason.
        hint: Option<&'static str>,
    },
    /// Its shape is another.
    #[error("`{name}` in {} has shape {found:?}, but config.json implies {expected:?}{}", file.display(), note(hint))]
    Shape {
        /// The tensor.
        name: String,
        /// Its file.
        file: PathBuf,
        /// The shape in the file.
        found: Vec<usize>,
        /// The shape that the config implies.
        expected: Vec<usize>,
        /// The likely reason.
        hint: Option<&'static str>,
    },
    /// Its dtype holds no weights.
    #[error("`{name}` in {} has dtype {found}, expected BF16, F16, F32 or F64", file.display())]
    Dtype {
        /// The tensor.
        name: String,
        /// Its file.
        file: PathBuf,
        /// The dtype in the file.
        found: Dtype,
    },
}

fn note(hint: &Option<&'static str>) -> String {
    hint.map(|text| format!(" ({text})")).unwrap_or_default()
}

fn suggestion(nearest: &Option<String>, hint: Option<&'static str>) -> String {
    match (hint, nearest) {
        (Some(text), _) => format!(" ({text})"),
        (None, Some(name)) => format!(" (the closest known name is `{name}`)"),
        (None, None) => String::new(),
    }
}
