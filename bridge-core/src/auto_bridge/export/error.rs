//! Why a directory cannot become the model.

use std::path::PathBuf;

use crate::Dtype;
use crate::first_ten::first_ten;
use crate::provider::run_config::Difference;

/// A `torch_dist` directory does not hold the reference's model.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ExportError {
    /// run_config.yaml describes another model.
    #[error("{} describes another model than the reference ({} fields): {}; name the reference that it was made from, or pass --not-strict", file.display(), differences.len(), first_ten(differences))]
    OtherModel {
        /// The run_config.yaml.
        file: PathBuf,
        /// The fields.
        differences: Vec<Difference>,
    },
    /// The stored vocabulary is smaller than the reference's.
    #[error("{}: `{key}` has {rows} rows, the reference's vocab_size is {vocab_size}; is it from the same model?", dir.display())]
    Vocabulary {
        /// The directory.
        dir: PathBuf,
        /// The embedding or the output layer.
        key: String,
        /// Its rows.
        rows: usize,
        /// Those that the reference needs.
        vocab_size: usize,
    },
    /// Stored tensors are not those of the reference.
    #[error("{} does not fit the reference ({} problems): {}", dir.display(), problems.len(), first_ten(problems))]
    Keys {
        /// The directory.
        dir: PathBuf,
        /// All that was found.
        problems: Vec<KeyProblem>,
    },
    /// The directory holds more than the reference.
    #[error("{} holds {} tensors that the reference does not know: {}; name the reference that it was made from, or pass --not-strict to leave them out", dir.display(), keys.len(), first_ten(keys))]
    Unknown {
        /// The directory.
        dir: PathBuf,
        /// Their keys.
        keys: Vec<String>,
    },
    /// The directory holds less than the reference.
    #[error("{} lacks {} tensors of the reference: {}; pass --missing copy to take them from the reference, or --missing skip to leave them out", dir.display(), tensors.len(), first_ten(&lacking(tensors)))]
    Missing {
        /// The directory.
        dir: PathBuf,
        /// Each Hugging Face tensor, and the first key that it lacks.
        tensors: Vec<(String, String)>,
    },
    /// A missing tensor cannot be copied from a reference without it.
    #[error(
        "`{name}` is missing, and cannot be copied: the reference does not hold it in the form that was asked for; export without --expert-layout, or without --missing copy"
    )]
    NothingToCopy {
        /// The Hugging Face tensor.
        name: String,
    },
}

/// A stored tensor that is not the reference's.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum KeyProblem {
    /// Another shape.
    #[error("`{key}` has shape {found:?}, the reference needs {expected:?}")]
    Shape {
        /// Its key.
        key: String,
        /// Its shape.
        found: Vec<usize>,
        /// The reference's.
        expected: Vec<usize>,
    },
    /// A dtype that holds no weights.
    #[error("`{key}` has dtype {found}, which holds no weights")]
    Dtype {
        /// Its key.
        key: String,
        /// Its dtype.
        found: Dtype,
    },
}

fn lacking(tensors: &[(String, String)]) -> Vec<String> {
    let lacks = |(name, key): &(String, String)| format!("`{name}` (no `{key}`)");
    tensors.iter().map(lacks).collect()
}
