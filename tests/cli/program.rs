//! The program under test.

use std::ffi::OsStr;

use assert_cmd::Command;

/// Runs `trainer` with these words: exit code, stdout, stderr.
pub(crate) fn trainer(words: impl IntoIterator<Item = impl AsRef<OsStr>>) -> (i32, String, String) {
    let output = Command::cargo_bin("trainer")
        .unwrap()
        .args(words)
        .output()
        .unwrap();
    (
        output.status.code().unwrap(),
        String::from_utf8(output.stdout).unwrap(),
        String::from_utf8(output.stderr).unwrap(),
    )
}
