//! Where the goldens are.

use std::path::PathBuf;

/// The path of a file or folder under `tests/goldens`.
pub fn golden(name: &str) -> PathBuf {
    [env!("CARGO_MANIFEST_DIR"), "goldens", name]
        .iter()
        .collect()
}
