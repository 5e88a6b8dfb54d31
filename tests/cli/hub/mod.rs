//! The command line: Hub ids, found in a cache as huggingface_hub lays it out or downloaded from a Hub in the test.

mod cached;
#[cfg(feature = "hub")]
mod download;
#[cfg(feature = "hub")]
mod refused;
#[cfg(feature = "hub")]
mod server;
#[cfg(feature = "hub")]
mod trouble;

use std::path::Path;

use assert_cmd::Command;

const ID: &str = "Qwen/tiny-0.1B";

/// `trainer` in `scratch`, with no variable that names another Hub, cache, token or proxy than the test does.
fn trainer(scratch: &Path, words: &[&str]) -> Command {
    let mut command = Command::cargo_bin("trainer").unwrap();
    for variable in [
        "HF_HUB_CACHE",
        "HUGGINGFACE_HUB_CACHE",
        "HF_HOME",
        "XDG_CACHE_HOME",
        "HF_ENDPOINT",
        "HF_TOKEN",
        "HF_TOKEN_PATH",
        "HF_HUB_OFFLINE",
        "TRANSFORMERS_OFFLINE",
        "HTTP_PROXY",
        "http_proxy",
        "ALL_PROXY",
        "all_proxy",
    ] {
        command.env_remove(variable);
    }
    command
        .current_dir(scratch)
        .env("HOME", scratch.join("home"))
        .args(words);
    command
}
