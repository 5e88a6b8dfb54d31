//! Models that are in the cache, laid out as huggingface_hub does it.

use std::os::unix::fs::symlink;
use std::path::Path;

use sha2::{Digest, Sha256};
use tests::golden;

use super::{ID, trainer};
use crate::program::done;

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

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

/// Runs `trainer` with this cache and no network.
fn offline(scratch: &Path, cache: &Path, words: &[&str]) -> (i32, String, String) {
    let mut command = trainer(scratch, words);
    done(
        command
            .env("HF_HUB_CACHE", cache)
            .env("HF_HUB_OFFLINE", "1"),
    )
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
        let variables = [
            (variable, &*at.join(value)),
            ("HF_HUB_OFFLINE", Path::new("1")),
        ];
        let (code, stdout, stderr) = done(trainer(at, &["inspect", ID, "--json"]).envs(variables));
        assert_eq!(code, 0, "{variable}: {stderr}");
        assert!(stdout.contains("\"has_weights\":true"), "{stdout}");
    }
}

#[test]
fn commands_take_an_id_as_they_take_its_directory() {
    let scratch = tempfile::tempdir().unwrap();
    let at = scratch.path();
    cached(&at.join("cache"), "checkpoints/dense_vl");
    let cache = at.join("cache");
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
            let (code, _, stderr) = offline(at, &cache, &words);
            assert_eq!(code, 0, "{words:?}: {stderr}");
        }
    }
    // The cache is not ours to write to.
    let (code, _, stderr) = offline(at, &cache, &["inspect", ID, "--checksum", "--record"]);
    assert_eq!(code, 1);
    assert!(stderr.contains("give a directory"), "{stderr}");
    let snapshot = format!("cache/models--Qwen--tiny-0.1B/snapshots/{COMMIT}");
    assert!(!at.join(snapshot).join("checksums.json").exists());
    let (_, of_id, _) = offline(at, &cache, &["inspect", ID, "--checksum", "--json"]);
    let (_, of_dir, _) = offline(at, &cache, &["inspect", dir, "--checksum", "--json"]);
    assert_eq!(of_id, of_dir);
    let init = ["init", "--config", ID, "--output", "new"];
    let (code, _, stderr) = offline(at, &cache, &init);
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
    let cache = at.join("cache");
    let (code, stdout, stderr) = offline(at, &cache, &["inspect", ID]);
    assert_eq!(code, 0, "{stderr}");
    assert!(stdout.contains("Qwen3_5Moe"), "{stdout}");
}

#[test]
fn what_the_cache_lacks_is_refused_offline() {
    let scratch = tempfile::tempdir().unwrap();
    let at = scratch.path();
    let cache = at.join("cache");
    cached(&cache, "checkpoints/moe_vl");
    let repository = cache.join("models--Qwen--tiny-0.1B");
    fs_err::write(repository.join("refs/broken"), "../../..").unwrap();
    fs_err::write(repository.join("refs/gone"), "f".repeat(40)).unwrap();
    let snapshot = repository.join("snapshots").join(COMMIT);
    for (id, wanted) in [
        ("Qwen/other", "is no path here, and the Hub cache"),
        ("Qwen/tiny-0.1B@v2", "has no revision `v2`"),
        ("Qwen/tiny-0.1B@broken", "holds no commit"),
        ("Qwen/tiny-0.1B@gone", "has no snapshot of commit fff"),
    ] {
        let (code, stdout, stderr) = offline(at, &cache, &["inspect", id]);
        assert_eq!((code, stdout.as_str()), (1, ""), "{id}");
        assert!(stderr.contains(wanted), "{id}: {stderr}");
        if wanted != "holds no commit" {
            assert!(stderr.contains("HF_HUB_OFFLINE is set"), "{stderr}");
        }
    }
    // The config is there, so what needs no more is served.
    fs_err::remove_file(snapshot.join("model-00002-of-00003.safetensors")).unwrap();
    let (code, stdout, stderr) = offline(at, &cache, &["inspect", ID, "--json"]);
    assert_eq!(code, 0, "{stderr}");
    assert!(stdout.contains("\"has_weights\":false"), "{stdout}");
    let words = ["convert", "roundtrip", "--hf-model", ID];
    let (code, _, stderr) = offline(at, &cache, &words);
    assert_eq!(code, 1);
    let wanted = format!("lacks 1 files of {ID}@main, first `model-00002-of-00003.safetensors`");
    assert!(stderr.contains(&wanted), "{stderr}");
}

#[cfg(not(feature = "hub"))]
#[test]
fn a_build_without_downloads_says_so() {
    let scratch = tempfile::tempdir().unwrap();
    let (code, _, stderr) = done(&mut trainer(scratch.path(), &["plan", ID]));
    assert_eq!(code, 1);
    assert!(stderr.contains("this build has no downloads"), "{stderr}");
    assert!(
        stderr.contains("hf download Qwen/tiny-0.1B --revision main"),
        "{stderr}"
    );
}
