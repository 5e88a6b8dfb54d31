//! The command line: conversions that are interrupted or killed.

use std::ffi::OsStr;
use std::path::Path;
use std::process::Stdio;

use bridge_core::checkpoint::shard::ShardFile;
use serde_json::Value;
use tests::golden;

use crate::program::trainer;
use crate::shard::{convert, words};
use crate::unshard::unshard;

/// A model of 100 MB, so that there is time to interrupt its conversion.
pub(crate) fn large_model(dir: &Path) {
    let text = fs_err::read(golden("checkpoints/dense_vl/config.json")).unwrap();
    let mut config: Value = serde_json::from_slice(&text).unwrap();
    config["text_config"]["vocab_size"] = 400_000.into();
    let file = dir.with_extension("json");
    fs_err::write(&file, config.to_string()).unwrap();
    let words = ["init", "--dtype", "bfloat16", "--config"].map(OsStr::new);
    let paths = [file.as_os_str(), OsStr::new("--output"), dir.as_os_str()];
    let (code, _, stderr) = trainer(words.into_iter().chain(paths));
    assert_eq!(code, 0, "{stderr}");
}

/// Starts the trainer, sends it a signal as soon as something half-made lies in `folder`, and gives code and stderr.
fn interrupted(signal: &str, args: &[&OsStr], folder: &Path) -> (Option<i32>, String) {
    let mut child = std::process::Command::new(assert_cmd::cargo::cargo_bin("trainer"))
        .args(args)
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let half_made = || {
        let mut entries = fs_err::read_dir(folder).unwrap();
        entries.any(|entry| {
            let name = entry.unwrap().file_name();
            name.to_string_lossy().contains(".partial")
        })
    };
    while !half_made() && child.try_wait().unwrap().is_none() {
        std::thread::yield_now();
    }
    let pid = child.id().to_string();
    let _ = std::process::Command::new("kill")
        .args([signal, &pid])
        .output()
        .unwrap();
    let output = child.wait_with_output().unwrap();
    let stderr = String::from_utf8(output.stderr).unwrap();
    (output.status.code(), stderr)
}

/// Whenever it comes, Ctrl-C leaves the finished result or nothing.
#[test]
fn an_interrupt_takes_away_what_is_half_made() {
    let scratch = tempfile::tempdir().unwrap();
    let model = scratch.path().join("model");
    large_model(&model);
    let shards = scratch.path().join("shards");
    let folder = scratch.path().join("folder");
    fs_err::create_dir(&folder).unwrap();
    let shard = |output: &Path| {
        let args = format!(
            "--hf-model {} --output {}",
            model.display(),
            output.display()
        );
        words(&args)
    };
    let (code, _, stderr) = convert("shard", &shard(&shards.join("rank0.safetensors")));
    assert_eq!(code, 0, "{stderr}");
    let back = format!(
        "{} --hf-model {} --hf-path {}",
        shards.display(),
        model.display(),
        folder.join("out").display()
    );
    let init = format!(
        "--config {} --output {} --dtype bfloat16",
        model.with_extension("json").display(),
        folder.join("out").display()
    );
    for (command, args) in [
        ("convert shard", shard(&folder.join("out"))),
        ("convert unshard", words(&back)),
        ("init", words(&init)),
    ] {
        let args: Vec<&OsStr> = command
            .split(' ')
            .chain(args.iter().map(String::as_str))
            .map(OsStr::new)
            .collect();
        // A run may be done before the signal reaches it.
        let stopped = (0..20).any(|_| {
            let (code, stderr) = interrupted("-INT", &args, &folder);
            let left: Vec<_> = fs_err::read_dir(&folder).unwrap().collect();
            if code == Some(0) {
                assert_eq!(left.len(), 1, "{left:?}");
                let out = folder.join("out");
                let _ = fs_err::remove_file(&out).or_else(|_| fs_err::remove_dir_all(&out));
                return false;
            }
            assert_eq!(code, Some(130), "{stderr}");
            assert!(
                stderr.contains("interrupted; the output was not made"),
                "{stderr}"
            );
            assert!(left.is_empty(), "{left:?}");
            true
        });
        assert!(stopped, "{command} was never interrupted in time");
    }
}

/// A process that is killed cannot tidy up; what it leaves is hidden, is not taken for a shard, and is in nobody's way.
#[test]
fn a_killed_run_leaves_nothing_that_looks_complete() {
    let scratch = tempfile::tempdir().unwrap();
    let model = scratch.path().join("model");
    large_model(&model);
    let folder = scratch.path().join("folder");
    fs_err::create_dir(&folder).unwrap();
    let output = folder.join("rank0.safetensors");
    let args = format!(
        "convert shard --hf-model {} --output {}",
        model.display(),
        output.display()
    );
    let args = words(&args);
    let args: Vec<&OsStr> = args.iter().map(OsStr::new).collect();
    let killed = (0..20).any(|_| {
        let (code, _) = interrupted("-KILL", &args, &folder);
        assert_eq!(output.exists(), code == Some(0));
        if code == Some(0) {
            fs_err::remove_file(&output).unwrap();
        }
        code.is_none()
    });
    assert!(killed, "never killed in time");
    let (code, stderr) = unshard(
        std::slice::from_ref(&folder),
        "dense_vl",
        &scratch.path().join("out"),
        "",
    );
    assert_eq!(code, 1);
    assert!(stderr.contains("holds no .safetensors files"), "{stderr}");
    let (code, _, stderr) = trainer(args);
    assert_eq!(code, 0, "{stderr}");
    ShardFile::open(&output).unwrap();
}
