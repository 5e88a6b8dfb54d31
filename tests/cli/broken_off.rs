//! The command line: imports and exports that are killed, or that the disk has no room for.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use bridge_core::checkpoint::hf::HfCheckpoint;
use bridge_core::checkpoint::torch_dist::TorchDistCheckpoint;
use rand::{RngExt, SeedableRng};
use tests::golden;

use crate::directories::{export, import};
use crate::interrupted::large_model;
use crate::shard::words;
use crate::unshard::assert_same_directory;

/// Bytes that a process has read and written so far; `None` when it is gone.
fn moved(pid: u32) -> Option<u64> {
    let text = fs_err::read_to_string(format!("/proc/{pid}/io")).ok()?;
    let number = |key: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(key))?;
        line.trim().parse::<u64>().ok()
    };
    Some(number("rchar:")? + number("wchar:")?)
}

fn start(args: &str) -> std::process::Child {
    Command::new(assert_cmd::cargo::cargo_bin("trainer"))
        .args(words(args))
        .stderr(Stdio::null())
        .spawn()
        .unwrap()
}

/// Runs `trainer` and kills it as soon as it has moved so many bytes. Whether it was done before.
fn killed_at(args: &str, bytes: u64) -> bool {
    let mut child = start(args);
    while moved(child.id()).is_some_and(|now| now < bytes) {
        if child.try_wait().unwrap().is_some() {
            break;
        }
        std::thread::yield_now();
    }
    let _ = child.kill();
    child.wait().unwrap().success()
}

/// Bytes that `trainer` moves in all: the highest number seen while it runs.
fn moved_in_all(args: &str) -> u64 {
    let mut child = start(args);
    let mut most = 0;
    while child.try_wait().unwrap().is_none() {
        most = most.max(moved(child.id()).unwrap_or_default());
        std::thread::yield_now();
    }
    assert!(child.wait().unwrap().success(), "{args}");
    most
}

/// The most memory that `trainer` has held, in bytes.
fn peak_memory(args: &str) -> u64 {
    let mut child = start(args);
    let mut peak = 0;
    while child.try_wait().unwrap().is_none() {
        let status = fs_err::read_to_string(format!("/proc/{}/status", child.id()));
        let status = status.unwrap_or_default();
        let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
        let kib = line.and_then(|line| line.trim().strip_suffix(" kB")?.parse::<u64>().ok());
        peak = peak.max(kib.unwrap_or_default() << 10);
        std::thread::yield_now();
    }
    assert!(child.wait().unwrap().success(), "{args}");
    peak
}

/// The most memory of each conversion of a model, in bytes.
fn peaks(model: &Path) -> Vec<(String, u64)> {
    let scratch = tempfile::tempdir().unwrap();
    let path = |name: &str| scratch.path().join(name).display().to_string();
    let (model, megatron, out) = (model.display(), path("megatron"), path("out"));
    [
        format!("convert import --hf-model {model} --megatron-path {megatron}"),
        format!("convert export --hf-model {model} --megatron-path {megatron} --hf-path {out}"),
        format!("convert shard --hf-model {model} --output {out}.safetensors"),
        format!("verify {model} {megatron}"),
    ]
    .map(|args| (args.clone(), peak_memory(&args)))
    .into()
}

/// MB 1783, ms-swift 5685: conversions that needed a terabyte of memory.
#[test]
fn a_conversion_holds_a_part_of_the_model_at_a_time() {
    let scratch = tempfile::tempdir().unwrap();
    let large = scratch.path().join("model");
    large_model(&large);
    let small = peaks(&golden("checkpoints/dense_vl"));
    // 102 MB more to convert; a few buffers of half a megabyte for each thread.
    for ((args, large), (_, small)) in peaks(&large).into_iter().zip(small) {
        assert!(small > 0);
        let more = large.saturating_sub(small) >> 20;
        assert!(more < 32, "{more} MiB more: {args}");
    }
}

/// What stands at `target` is whole, if anything does.
fn assert_whole_or_absent(target: &Path, reference: &Path, wanted: &Path) {
    if !target.exists() {
        return;
    }
    if target.join("config.json").exists() {
        assert_same_directory(target, reference);
        return;
    }
    let (ours, theirs) = (
        TorchDistCheckpoint::open(target).unwrap(),
        TorchDistCheckpoint::open(wanted).unwrap(),
    );
    ours.verify().unwrap();
    assert!(ours.tensors().eq(theirs.tensors()));
}

/// Killed at 50 moments, each run going on behind the one before or from the start, a conversion leaves the old directory,
/// nothing, or the whole result; and comes to its end.
#[test]
fn a_conversion_killed_at_any_moment_leaves_nothing_that_looks_complete() {
    let scratch = tempfile::tempdir().unwrap();
    let path = |name: &str| scratch.path().join(name);
    let (model, megatron) = (path("model"), path("megatron"));
    large_model(&model);
    assert_eq!(import(&model, &megatron, "").0, 0);
    let mut random = rand_chacha::ChaCha8Rng::seed_from_u64(7);
    let (model_text, megatron_text) = (model.display(), megatron.display());
    for (target, command) in [
        (
            path("imported"),
            format!("convert import --hf-model {model_text} --megatron-path"),
        ),
        (
            path("exported"),
            format!(
                "convert export --hf-model {model_text} --megatron-path {megatron_text} --hf-path"
            ),
        ),
    ] {
        let run = format!("{command} {}", target.display());
        let most = moved_in_all(&run);
        fs_err::remove_dir_all(&target).unwrap();
        let mut killed = 0;
        for number in 0..25 {
            let resume = if number % 3 == 0 { "" } else { " --resume" };
            let done = killed_at(&format!("{run}{resume}"), random.random_range(0..most));
            assert!(!done || target.exists());
            assert_whole_or_absent(&target, &model, &megatron);
            killed += u32::from(!done);
            if target.exists() {
                fs_err::remove_dir_all(&target).unwrap();
            }
        }
        assert!(killed > 12, "{killed} of 25 were killed in time");
        assert_eq!(trainer_code(&format!("{run} --resume")), 0);
        assert_whole_or_absent(&target, &model, &megatron);
        assert!(target.exists());
        // What was killed left nothing beside it.
        let left = fs_err::read_dir(scratch.path()).unwrap().filter(|entry| {
            let name = entry.as_ref().unwrap().file_name();
            name.to_string_lossy().contains(".partial")
        });
        assert_eq!(left.count(), 0);
    }
}

fn trainer_code(args: &str) -> i32 {
    crate::program::trainer(words(args)).0
}

/// A directory on a file system of its own of `bytes`; `None` where the system allows none.
pub(crate) struct SmallDisk(PathBuf);

impl SmallDisk {
    pub(crate) fn mount(at: &Path, bytes: u64) -> Option<Self> {
        fs_err::create_dir_all(at).unwrap();
        let size = format!("size={bytes}");
        let words = ["-t", "tmpfs", "-o", size.as_str(), "none"].map(OsStr::new);
        let mounted = Command::new("mount")
            .args(words.into_iter().chain([at.as_os_str()]))
            .output();
        mounted
            .is_ok_and(|output| output.status.success())
            .then(|| Self(at.to_owned()))
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(&self.0).output();
    }
}

/// MB 1855: an export that could not end went on for ever.
#[test]
fn a_disk_that_fills_up_leaves_nothing_that_looks_complete() {
    let scratch = tempfile::tempdir().unwrap();
    let at = scratch.path().join("disk");
    let reference = golden("checkpoints/moe_vl");
    let megatron = scratch.path().join("megatron");
    assert_eq!(import(&reference, &megatron, "").0, 0);
    let tensors: u64 = HfCheckpoint::open(&reference)
        .unwrap()
        .tensors()
        .map(|(_, info)| info.num_bytes())
        .sum();
    let (mut refused, mut filled, mut whole) = (0, 0, 0);
    // From half of what is needed, past the room for tensors alone, to enough.
    for step in 0..16 {
        let bytes = tensors / 2 + tensors * step / 20;
        let Some(disk) = SmallDisk::mount(&at, bytes) else {
            eprintln!("not run: this system mounts no tmpfs for the test");
            return;
        };
        for (target, done) in [
            (
                at.join("imported"),
                import(&reference, &at.join("imported"), ""),
            ),
            (
                at.join("exported"),
                export(&reference, &megatron, &at.join("exported"), ""),
            ),
        ] {
            let (code, stderr) = done;
            assert_eq!(target.exists(), code == 0, "{stderr}");
            assert_whole_or_absent(&target, &reference, &megatron);
            if code == 0 {
                whole += 1;
                fs_err::remove_dir_all(&target).unwrap();
            } else if stderr.contains(" bytes free") || stderr.contains("make room") {
                refused += 1;
            } else {
                assert!(stderr.contains("No space left on device"), "{stderr}");
                filled += 1;
            }
            let _ = fs_err::remove_dir_all(bridge_core::checkpoint::partial_path(&target));
        }
        drop(disk);
    }
    assert!(
        refused > 0 && filled > 0 && whole > 0,
        "{refused} {filled} {whole}"
    );
}

/// The steps that `trainer -vv` logs: what was done, and to which path.
fn steps(args: &str) -> Vec<(String, String)> {
    let (code, _, stderr) = crate::program::trainer(words(&format!("-vv {args}")));
    assert_eq!(code, 0, "{stderr}");
    let step = |line: &str| {
        let (what, path) = line.trim().strip_prefix("TRACE ")?.split_once(" path=")?;
        Some((what.to_owned(), path.to_owned()))
    };
    stderr.lines().filter_map(step).collect()
}

/// A name that is there before its bytes are would be an empty file after a power cut.
#[test]
fn every_file_is_synced_before_its_directory_and_that_before_the_name_it_gets() {
    let scratch = tempfile::tempdir().unwrap();
    let path = |name: &str| scratch.path().join(name);
    let reference = golden("checkpoints/moe_vl");
    let (model, parent) = (reference.display(), scratch.path().display());
    let imported = format!("convert import --hf-model {model} --megatron-path {parent}/megatron");
    let exported = format!(
        "convert export --hf-model {model} --megatron-path {parent}/megatron --hf-path {parent}/out"
    );
    for (args, target, made) in [
        (imported.clone(), path("megatron"), "created"),
        (exported.clone(), path("out"), "created"),
        (
            format!("{imported} --overwrite"),
            path("megatron"),
            "replaced",
        ),
        (format!("{exported} --overwrite"), path("out"), "replaced"),
    ] {
        let steps = steps(&args);
        let partial = bridge_core::checkpoint::partial_path(&target);
        let at = |what: &str, path: &Path| {
            let wanted = (what.to_owned(), path.display().to_string());
            let place = steps.iter().position(|step| *step == wanted);
            place.unwrap_or_else(|| panic!("no {wanted:?} in {steps:?}"))
        };
        let named = at(made, &target);
        let mut folders = vec![partial.clone()];
        let mut files = 0;
        for entry in fs_err::read_dir(&target).unwrap() {
            let entry = entry.unwrap();
            let inner = partial.join(entry.file_name());
            if !entry.path().is_dir() {
                assert!(at("synced file", &inner) < at("synced directory", &partial));
                files += 1;
                continue;
            }
            for below in fs_err::read_dir(entry.path()).unwrap() {
                let file = inner.join(below.unwrap().file_name());
                assert!(at("synced file", &file) < at("synced directory", &inner));
                files += 1;
            }
            folders.push(inner);
        }
        assert!(files > 6);
        for folder in folders {
            assert!(at("synced directory", &folder) < named);
        }
        assert!(named < at("synced directory", scratch.path()));
    }
}
