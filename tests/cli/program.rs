//! The program under test, and what it is run on.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};

use assert_cmd::Command;
use serde_json::Value;
use tests::golden;

/// Runs `trainer` with these words: exit code, stdout, stderr.
pub(crate) fn trainer(words: impl IntoIterator<Item = impl AsRef<OsStr>>) -> (i32, String, String) {
    done(Command::cargo_bin("trainer").unwrap().args(words))
}

/// Runs a command to its end.
pub(crate) fn done(command: &mut Command) -> (i32, String, String) {
    let output = command.output().unwrap();
    (
        output.status.code().unwrap(),
        String::from_utf8(output.stdout).unwrap(),
        String::from_utf8(output.stderr).unwrap(),
    )
}

/// The directory of a golden checkpoint.
pub(crate) fn model(name: &str) -> PathBuf {
    golden(&format!("checkpoints/{name}"))
}

/// Exit code, stdout, stderr of `trainer COMMAND A B MORE`.
pub(crate) fn two(command: &str, a: &Path, b: &Path, more: &str) -> (i32, String, String) {
    let words = [command.as_ref(), a.as_os_str(), b.as_os_str()];
    trainer(
        words
            .into_iter()
            .chain(more.split_whitespace().map(OsStr::new)),
    )
}

/// What `trainer COMMAND A B MORE --json` prints; its exit code says the same.
pub(crate) fn two_json(command: &str, a: &Path, b: &Path, more: &str) -> Value {
    let (code, stdout, stderr) = two(command, a, b, &format!("{more} --json"));
    let found: Value = serde_json::from_str(&stdout).unwrap();
    assert_eq!(found["schema_version"], 1, "{stdout} {stderr}");
    assert_eq!(found["equal"], code == 0, "{stdout}");
    found
}
