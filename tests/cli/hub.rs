//! The command line: Hub ids, found in a cache as huggingface_hub lays it out.

use std::os::unix::fs::symlink;
use std::path::Path;

use assert_cmd::Command;
use sha2::{Digest, Sha256};
use tests::golden;

use crate::program::done;

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";
const ID: &str = "Qwen/tiny-0.1B";

/// Puts `model` into a cache: blobs by their SHA-256, and a snapshot of links that `main` refers to.
fn cached(cache: &Path, model: &str) {
    let repository = cache.join("models--Qwen--tiny-0.1B");
    let snapshot = repository.join("snapshots").join(COMMIT);
    for dir in [
        &repository.join("blobs"),
        &repository.join("refs"),
        &snapshot,
    ] {
        fs_err::create_dir_all(dir).unwrap();
    }
    fs_err::write(repository.join("refs/main"), COMMIT).unwrap();
    for entry in fs_err::read_dir(golden(model)).unwrap() {
        let entry = entry.unwrap();
        let bytes = fs_err::read(entry.path()).unwrap();
        let digest = Sha256::digest(&bytes);
        let blob: String = digest.iter().map(|byte| format!("{byte:02x}")).collect();
        fs_err::write(repository.join("blobs").join(&blob), bytes).unwrap();
        symlink(
            format!("../../blobs/{blob}"),
            snapshot.join(entry.file_name()),
        )
        .unwrap();
    }
}

/// Runs `trainer` in `scratch`, with these variables and none that name another cache.
fn trainer(scratch: &Path, variables: &[(&str, &Path)], words: &[&str]) -> (i32, String, String) {
    let mut command = Command::cargo_bin("trainer").unwrap();
    command
        .current_dir(scratch)
        .env_remove("HF_HUB_CACHE")
        .env_remove("HUGGINGFACE_HUB_CACHE")
        .env_remove("HF_HOME")
        .env_remove("XDG_CACHE_HOME")
        .env("HOME", scratch.join("home"))
        .envs(variables.iter().copied())
        .args(words);
    done(&mut command)
}

#[test]
fn every_variable_that_names_a_cache_is_honoured() {
    let scratch = tempfile::tempdir().unwrap();
    let at = scratch.path();
    for (variable, value, cache) in [
        ("HF_HUB_CACHE", "one", "one"),
        ("HF_HOME", "two", "two/hub"),
        ("XDG_CACHE_HOME", "three", "three/huggingface/hub"),
        ("HOME", "four", "four/.cache/huggingface/hub"),
    ] {
        cached(&at.join(cache), "checkpoints/dense_vl");
        let variables = [(variable, &*at.join(value))];
        let (code, stdout, stderr) = trainer(at, &variables, &["inspect", ID, "--json"]);
        assert_eq!(code, 0, "{variable}: {stderr}");
        assert!(stdout.contains("\"has_weights\":true"), "{stdout}");
    }
}

#[test]
fn commands_take_an_id_as_they_take_its_directory() {
    let scratch = tempfile::tempdir().unwrap();
    let at = scratch.path();
    cached(&at.join("cache"), "checkpoints/dense_vl");
    let variables = [("HF_HUB_CACHE", &*at.join("cache"))];
    let dir = golden("checkpoints/dense_vl");
    let dir = dir.to_str().unwrap();
    let pinned = format!("{ID}@{COMMIT}");
    for words in [
        vec!["inspect", "{}", "--tensors", "--checksum"],
        vec!["plan", "{}", "--tp", "2", "--json"],
        vec!["convert", "roundtrip", "--hf-model", "{}"],
        vec!["verify", "{}", dir],
        vec!["diff", dir, "{}"],
    ] {
        for id in [ID, &pinned] {
            let words: Vec<&str> = words
                .iter()
                .map(|w| if *w == "{}" { id } else { w })
                .collect();
            let (code, _, stderr) = trainer(at, &variables, &words);
            assert_eq!(code, 0, "{words:?}: {stderr}");
        }
    }
    // The cache is not ours to write to.
    let (code, _, stderr) = trainer(at, &variables, &["inspect", ID, "--checksum", "--record"]);
    assert_eq!(code, 1);
    assert!(stderr.contains("give a directory"), "{stderr}");
    let snapshot = format!("cache/models--Qwen--tiny-0.1B/snapshots/{COMMIT}");
    assert!(!at.join(snapshot).join("checksums.json").exists());
    let (_, of_id, _) = trainer(at, &variables, &["inspect", ID, "--checksum", "--json"]);
    let (_, of_dir, _) = trainer(at, &variables, &["inspect", dir, "--checksum", "--json"]);
    assert_eq!(of_id, of_dir);
    let init = ["init", "--config", ID, "--output", "new"];
    let (code, _, stderr) = trainer(at, &variables, &init);
    assert_eq!(code, 0, "{stderr}");
}

#[test]
fn a_path_that_exists_wins_over_the_cache() {
    let scratch = tempfile::tempdir().unwrap();
    let at = scratch.path();
    cached(&at.join("cache"), "checkpoints/dense_vl");
    fs_err::create_dir_all(at.join(ID)).unwrap();
    let config = golden("checkpoints/moe_vl/config.json");
    fs_err::copy(config, at.join(ID).join("config.json")).unwrap();
    let variables = [("HF_HUB_CACHE", &*at.join("cache"))];
    let (code, stdout, stderr) = trainer(at, &variables, &["inspect", ID]);
    assert_eq!(code, 0, "{stderr}");
    assert!(stdout.contains("Qwen3_5Moe"), "{stdout}");
}

#[test]
fn what_the_cache_lacks_is_refused_with_the_command_that_fetches_it() {
    let scratch = tempfile::tempdir().unwrap();
    let at = scratch.path();
    let cache = at.join("cache");
    cached(&cache, "checkpoints/dense_vl");
    let repository = cache.join("models--Qwen--tiny-0.1B");
    fs_err::write(repository.join("refs/broken"), "../../..").unwrap();
    fs_err::write(repository.join("refs/gone"), "f".repeat(40)).unwrap();
    for (id, wanted) in [
        ("Qwen/other", "is no path here, and the Hub cache"),
        ("Qwen/tiny-0.1B@v2", "has no revision `v2`"),
        ("Qwen/tiny-0.1B@broken", "holds no commit"),
        ("Qwen/tiny-0.1B@gone", "has no snapshot of commit fff"),
    ] {
        let (code, stdout, stderr) = trainer(at, &[("HF_HUB_CACHE", &cache)], &["inspect", id]);
        assert_eq!((code, stdout.as_str()), (1, ""), "{id}");
        assert!(stderr.contains(wanted), "{id}: {stderr}");
        assert!(
            stderr.contains("fetch it with `hf download Qwen/"),
            "{stderr}"
        );
    }
}
