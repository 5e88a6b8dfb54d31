//! What can be wrong with a `config.json`.

use std::path::PathBuf;

use super::Architecture;

/// Why a `config.json` cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("cannot read {}; a Hugging Face model directory has a config.json", file.display())]
    Read {
        /// The file.
        file: PathBuf,
        /// What the system said.
        #[source]
        source: std::io::Error,
    },
    /// The file is not JSON, or a key stands twice.
    #[error("{} is not valid JSON", file.display())]
    Json {
        /// The file.
        file: PathBuf,
        /// Where and why.
        #[source]
        source: serde_json::Error,
    },
    /// The architecture has no table here.
    #[error("{} names architecture `{found}`, which is not supported; supported are {}", file.display(), Architecture::names())]
    Architecture {
        /// The file.
        file: PathBuf,
        /// `architectures[0]`, or a note that there is none.
        found: String,
    },
    /// One or more keys cannot be used.
    #[error("{} cannot be used: {}", file.display(), list(problems))]
    Problems {
        /// The file.
        file: PathBuf,
        /// All that was found.
        problems: Vec<ConfigProblem>,
    },
}

/// One key that cannot be used; `key` is its dotted path.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ConfigProblem {
    /// A value of another JSON type, or out of range.
    #[error("`{key}` is {found}, expected {expected}")]
    Type {
        /// Dotted path of the key.
        key: String,
        /// The value, as JSON.
        found: String,
        /// What would do.
        expected: &'static str,
    },
    /// A value that asks for maths that this model does not have.
    #[error("`{key}` is {found}, but only {supported} is supported")]
    Unsupported {
        /// Dotted path of the key.
        key: String,
        /// The value, as JSON.
        found: String,
        /// The value that is supported.
        supported: &'static str,
    },
    /// Two values that do not fit.
    #[error("`{key}` is {found}, which does not fit: {reason}")]
    Inconsistent {
        /// Dotted path of the key.
        key: String,
        /// Its value.
        found: String,
        /// The rule it breaks, with the other numbers.
        reason: String,
    },
    /// An unknown key that looks like a misspelt one.
    #[error("`{key}` is unknown; did you mean `{nearest}`?")]
    Misspelt {
        /// Dotted path of the key.
        key: String,
        /// The known key that is closest.
        nearest: String,
    },
}

/// Joins the first ten with "; " and counts the rest.
fn list(problems: &[ConfigProblem]) -> String {
    let mut parts: Vec<String> = problems.iter().take(10).map(ToString::to_string).collect();
    let more = problems.len().saturating_sub(10);
    if more > 0 {
        parts.push(format!("and {more} more"));
    }
    parts.join("; ")
}
