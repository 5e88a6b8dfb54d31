//! The way back: directories that ranks make together are their source, byte for byte.

use std::ffi::OsString;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use crate::cases::{model, run, run_c};

/// Says which rank a process of this binary is, and what it does.
const PROCESS: &str = "BRIDGE_FFI_TEST_PROCESS";
const SCRATCH: &str = "BRIDGE_FFI_TEST_SCRATCH";

fn files(dir: &Path) -> Vec<(OsString, Vec<u8>)> {
    let mut files: Vec<(OsString, Vec<u8>)> = fs_err::read_dir(dir)
        .unwrap()
        .map(|entry| {
            let entry = entry.unwrap();
            (entry.file_name(), fs_err::read(entry.path()).unwrap())
        })
        .collect();
    files.sort();
    files
}

/// Every file of the reference is there with its bytes, and nothing is left beside the directory.
fn assert_is(scratch: &Path, reference: &Path) {
    let found = files(&scratch.join("out"));
    let wanted = files(reference);
    let names = |files: &[(OsString, Vec<u8>)]| -> Vec<OsString> {
        files.iter().map(|(name, _)| name.clone()).collect()
    };
    assert_eq!(names(&found), names(&wanted));
    for ((name, ours), (_, theirs)) in found.iter().zip(&wanted) {
        assert!(ours == theirs, "{}", name.display());
    }
    assert_eq!(fs_err::read_dir(scratch).unwrap().count(), 1);
}

#[test]
fn one_process_makes_the_directory_that_it_loaded() {
    for name in ["moe_vl", "dense_vl_tied_bf16"] {
        let scratch = tempfile::tempdir().unwrap();
        run("one_process_exports", &model(name), scratch.path(), "");
        assert_is(scratch.path(), &model(name));
    }
    let scratch = tempfile::tempdir().unwrap();
    run_c("exporting", &model("moe_vl"), scratch.path());
    assert_is(scratch.path(), &model("moe_vl"));
}

/// Sizes are TP, PP, VPP, EP, ETP and DP.
#[test]
fn ranks_of_any_layout_make_the_directory_together() {
    for (name, layout) in [
        ("moe_vl", "2 2 2 2 1 1"),
        ("moe_vl_bf16", "2 1 0 2 2 4"),
        ("moe_vl", "1 4 0 2 1 2"),
        ("dense_vl_tied_bf16", "2 2 0 1 1 2"),
    ] {
        let scratch = tempfile::tempdir().unwrap();
        run("all_ranks_export", &model(name), scratch.path(), layout);
        assert_is(scratch.path(), &model(name));
    }
}

/// This binary again, as one rank.
fn process(scratch: &Path, rank: usize, what: &str) -> Child {
    Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "exporting::a_rank_in_a_process_of_its_own"])
        .env(PROCESS, format!("{rank} {what}"))
        .env(SCRATCH, scratch)
        .stdout(Stdio::null())
        .spawn()
        .unwrap()
}

/// Does nothing unless it is started by the tests below.
#[test]
fn a_rank_in_a_process_of_its_own() {
    let (Ok(what), Some(scratch)) = (std::env::var(PROCESS), std::env::var_os(SCRATCH)) else {
        return;
    };
    run(
        "a_process_exports_its_rank",
        &model("moe_vl"),
        scratch.as_ref(),
        &what,
    );
}

#[test]
fn processes_that_run_at_once_make_one_directory() {
    let scratch = tempfile::tempdir().unwrap();
    let ranks: Vec<Child> = (0..4)
        .map(|rank| process(scratch.path(), rank, "runs"))
        .collect();
    for mut rank in ranks {
        assert!(rank.wait().unwrap().success());
    }
    assert_is(scratch.path(), &model("moe_vl"));
}

#[test]
fn a_rank_that_dies_leaves_nothing_at_the_target_and_can_come_again() {
    let scratch = tempfile::tempdir().unwrap();
    for rank in [0, 1, 3] {
        assert!(
            process(scratch.path(), rank, "waits")
                .wait()
                .unwrap()
                .success()
        );
    }
    let died = process(scratch.path(), 2, "dies").wait().unwrap();
    assert_eq!(died.code(), Some(7));
    assert!(!scratch.path().join("out").exists());
    assert!(process(scratch.path(), 2, "last").wait().unwrap().success());
    assert_is(scratch.path(), &model("moe_vl"));
}

#[test]
fn an_export_that_cannot_be_is_refused_with_the_reason() {
    let scratch = tempfile::tempdir().unwrap();
    fs_err::write(scratch.path().join("file"), "").unwrap();
    run(
        "an_export_that_cannot_be",
        &model("moe_vl"),
        scratch.path(),
        "",
    );
    assert_eq!(fs_err::read_dir(scratch.path()).unwrap().count(), 1);
}

#[test]
fn replicas_that_differ_are_refused_and_nothing_is_made() {
    let scratch = tempfile::tempdir().unwrap();
    run("replicas_that_differ", &model("moe_vl"), scratch.path(), "");
}

#[test]
fn a_directory_is_replaced_in_one_step_and_takes_what_is_missing_from_the_reference() {
    let scratch = tempfile::tempdir().unwrap();
    run(
        "what_is_there_is_replaced",
        &model("moe_vl"),
        scratch.path(),
        "",
    );
    assert_is(scratch.path(), &model("moe_vl"));
}
