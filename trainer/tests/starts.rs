//! The binary starts on its own. Having a test here also makes `cargo test` build it for `tests/cli`.

use std::process::Command;

#[test]
fn the_binary_starts_without_a_library_path() {
    let output = Command::new(env!("CARGO_BIN_EXE_trainer"))
        .env_remove("LD_LIBRARY_PATH")
        .arg("--version")
        .output()
        .expect("the binary exists");
    assert!(output.status.success(), "{output:?}");
    assert!(output.stdout.starts_with(b"trainer "), "{output:?}");
}
