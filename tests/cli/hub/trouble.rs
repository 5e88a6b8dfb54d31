//! Downloads that are cut off, repeated, or done by two at once.

use std::path::Path;
use std::process::{Child, Command, Stdio};

use tests::golden;

use super::download::{cache, hub, names, with};
use super::server::{COMMIT, Fault, Host, Hub, nobody, sha256};
use super::{ID, trainer};
use crate::program::done;

/// One of the weight files of the model.
const WEIGHTS: &str = "model-00002-of-00003.safetensors";

/// The blob of the file, as it is in the cache.
fn blob(scratch: &Path) -> (std::path::PathBuf, Vec<u8>) {
    let content = fs_err::read(golden("checkpoints/moe_vl").join(WEIGHTS)).unwrap();
    (cache(scratch).join("blobs").join(sha256(&content)), content)
}

/// What of the weights' content was asked for, since the last call: a range, or all.
fn ranges(hub: &Hub, scratch: &Path) -> Vec<String> {
    let digest = sha256(&blob(scratch).1);
    hub.log()
        .iter()
        .filter(|request| request.host == Host::Files && request.path.contains(&digest))
        .map(|request| request.header("range").unwrap_or("all").to_owned())
        .collect()
}

fn start(hub: &Hub, scratch: &Path, words: &[&str]) -> Child {
    let program = trainer(scratch, words);
    let mut command = Command::new(program.get_program());
    command.args(program.get_args()).current_dir(scratch);
    for (name, value) in program.get_envs() {
        match value {
            Some(value) => command.env(name, value),
            None => command.env_remove(name),
        };
    }
    command
        .env("HF_ENDPOINT", hub.endpoint())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap()
}

const CHECKSUM: [&str; 3] = ["inspect", ID, "--checksum"];

#[test]
fn a_cut_connection_goes_on_where_it_broke() {
    let (scratch, hub) = hub();
    let at = scratch.path();
    let (path, content) = blob(at);
    let digest: &'static str = sha256(&content).leak();
    // More often than one request is tried: whatever came between two cuts, the tries are counted anew.
    for _ in 0..5 {
        hub.fail(digest, Fault::Cut(1000));
    }
    let (code, _, stderr) = with(&hub, at, &CHECKSUM);
    assert_eq!(code, 0, "{stderr}");
    let from = |start| format!("bytes={start}000-");
    let asked = std::iter::once("all".to_owned()).chain((1..=5).map(from));
    assert_eq!(ranges(&hub, at), asked.collect::<Vec<_>>());
    let broke = format!(
        "the connection broke at byte 1000 of {} of {WEIGHTS}",
        content.len()
    );
    assert!(stderr.contains(&broke), "{stderr}");
    assert_eq!(fs_err::read(path).unwrap(), content);
}

#[test]
fn an_interrupted_download_goes_on_in_the_next_run() {
    for signal in ["-INT", "-KILL"] {
        let (scratch, hub) = hub();
        let at = scratch.path();
        let (path, content) = blob(at);
        let digest: &'static str = sha256(&content).leak();
        hub.fail(digest, Fault::Stall(3000));
        let mut child = start(&hub, at, &CHECKSUM);
        let partial = path.with_extension("incomplete");
        while partial.metadata().map_or(0, |found| found.len()) < 3000 {
            assert!(child.try_wait().unwrap().is_none());
            std::thread::yield_now();
        }
        let pid = child.id().to_string();
        let kill = Command::new("kill").args([signal, &pid]).status().unwrap();
        assert!(kill.success());
        assert!(!child.wait().unwrap().success());
        assert_eq!(fs_err::read(&partial).unwrap(), content[..3000]);
        assert_eq!(ranges(&hub, at), ["all"]);
        let (code, _, stderr) = with(&hub, at, &CHECKSUM);
        assert_eq!(code, 0, "{stderr}");
        assert_eq!(ranges(&hub, at), ["bytes=3000-"]);
        assert_eq!(fs_err::read(path).unwrap(), content);
        assert!(!partial.exists());
    }
}

#[test]
fn a_server_that_knows_no_ranges_is_enough() {
    let (scratch, hub) = hub();
    let at = scratch.path();
    let (path, content) = blob(at);
    let digest: &'static str = sha256(&content).leak();
    hub.fail(digest, Fault::Cut(1000));
    hub.fail(digest, Fault::NoRange);
    let (code, _, stderr) = with(&hub, at, &CHECKSUM);
    assert_eq!(code, 0, "{stderr}");
    assert_eq!(ranges(&hub, at), ["all", "bytes=1000-"]);
    assert_eq!(fs_err::read(path).unwrap(), content);
}

#[test]
fn trouble_that_passes_is_waited_out() {
    let (scratch, hub) = hub();
    let at = scratch.path();
    hub.fail("GET /api/models", Fault::Status(500, "Retry-After: 0"));
    hub.fail("HEAD /Qwen", Fault::Status(503, "Retry-After: 0"));
    hub.fail("GET /Qwen", Fault::Status(429, "Retry-After: 0"));
    hub.fail("GET /Qwen", Fault::HangUp);
    // The address of a large file that has become too old.
    hub.fail("GET /blobs/", Fault::Status(403, "Retry-After: 0"));
    let (code, _, stderr) = with(&hub, at, &CHECKSUM);
    assert_eq!(code, 0, "{stderr}");
    for status in [
        "answered 500",
        "answered 503",
        "answered 429",
        "answered 403",
    ] {
        assert!(stderr.contains(status), "{stderr}");
    }
    assert_eq!(stderr.matches("trying again").count(), 5, "{stderr}");
}

#[test]
fn trouble_that_lasts_is_one_clear_error() {
    let (scratch, hub) = hub();
    let at = scratch.path();
    for _ in 0..10 {
        hub.fail("GET /api/models", Fault::Status(503, "Retry-After: 0"));
    }
    let (code, stdout, stderr) = with(&hub, at, &["plan", ID]);
    assert_eq!((code, stdout.as_str()), (1, ""));
    let error = stderr.split("error: ").nth(1).unwrap();
    assert!(
        error.contains("the list of its files cannot be had from"),
        "{error}"
    );
    assert!(error.contains("answered 503"), "{error}");
    assert_eq!(hub.lines().len(), 5);
}

#[test]
fn a_server_that_asks_for_a_long_pause_is_not_waited_for() {
    let (scratch, hub) = hub();
    let at = scratch.path();
    hub.fail("HEAD /Qwen", Fault::Status(429, "Retry-After: 100000"));
    let (code, _, stderr) = with(&hub, at, &["plan", ID]);
    assert_eq!(code, 1);
    assert!(
        stderr.contains("answered 429 and asks to wait for 100000 s"),
        "{stderr}"
    );
    assert_eq!(hub.lines().len(), 2);
}

#[test]
fn the_cache_will_do_where_the_hub_is_unreachable() {
    let (scratch, hub) = hub();
    let at = scratch.path();
    let (code, _, stderr) = with(&hub, at, &CHECKSUM);
    assert_eq!(code, 0, "{stderr}");
    let away = |words: &[&str]| {
        let mut command = trainer(at, words);
        done(command.env("HF_ENDPOINT", nobody()))
    };
    let (code, _, stderr) = away(&CHECKSUM);
    assert_eq!(code, 0, "{stderr}");
    assert!(stderr.contains("from the cache"), "{stderr}");
    let (code, _, stderr) = away(&["inspect", "Qwen/other"]);
    assert_eq!(code, 1);
    assert!(
        stderr.contains("is no path here and not in the cache"),
        "{stderr}"
    );
    // Nobody is asked twice who is not there.
    assert!(!stderr.contains("trying again"), "{stderr}");
}

#[test]
fn offline_nobody_is_asked() {
    let (scratch, hub) = hub();
    let at = scratch.path();
    for variable in ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"] {
        let mut command = trainer(at, &["plan", ID]);
        let (code, _, stderr) = done(
            command
                .env("HF_ENDPOINT", hub.endpoint())
                .env(variable, "1"),
        );
        assert_eq!(code, 1);
        assert!(stderr.contains(&format!("{variable} is set")), "{stderr}");
    }
    assert_eq!(hub.lines(), [""; 0]);
}

#[test]
fn two_processes_download_a_file_once() {
    let (scratch, hub) = hub();
    let at = scratch.path();
    let digest: &'static str = sha256(&blob(at).1).leak();
    // The first one gets the content when the second one knows of the file, too, and is about to get it.
    let known = format!("HEAD /{ID}/resolve/{COMMIT}/{WEIGHTS}").leak();
    hub.fail(digest, Fault::After(known, 2));
    let children = [start(&hub, at, &CHECKSUM), start(&hub, at, &CHECKSUM)];
    for child in children {
        let output = child.wait_with_output().unwrap();
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{stderr}");
    }
    assert_eq!(ranges(&hub, at), ["all"]);
    let blobs = names(&cache(at).join("blobs"));
    assert!(!blobs.iter().any(|name| name.contains('.')), "{blobs:?}");
}
