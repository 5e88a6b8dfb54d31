//! Files that somebody made to do harm: each lie is refused by name, at once, and nothing blocks.
//!
//! The lies about safetensors headers stand with the reader of Hugging Face directories, `checkpoint/hostile.rs`.

mod paths;
mod pickles;

use std::path::Path;

use tests::golden;

/// A copy of a golden `torch_dist` directory of one file, to be damaged.
fn torch_dist() -> tempfile::TempDir {
    let copy = tempfile::tempdir().unwrap();
    for name in [".metadata", "__0_0.distcp", "common.pt", "metadata.json"] {
        let bytes = fs_err::read(golden("torch_dist/minimal_no_torch").join(name)).unwrap();
        fs_err::write(copy.path().join(name), bytes).unwrap();
    }
    copy
}

/// A named pipe, which blocks whoever opens it to read.
fn fifo(path: &Path) {
    let made = std::process::Command::new("mkfifo").arg(path).status();
    assert!(made.unwrap().success());
}
