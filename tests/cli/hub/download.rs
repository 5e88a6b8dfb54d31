//! What is downloaded, and where it goes.

use std::path::{Path, PathBuf};

use tests::golden;

use super::server::{COMMIT, Hub, OLDER_COMMIT, REPOSITORY, etag};
use super::{ID, trainer};
use crate::program::done;

/// A scratch directory and a Hub that has the model with the index.
pub(super) fn hub() -> (tempfile::TempDir, Hub) {
    let scratch = tempfile::tempdir().unwrap();
    let hub = Hub::of(&golden("checkpoints/moe_vl"));
    (scratch, hub)
}

/// Runs `trainer` against the Hub, with its cache in `scratch/home`.
pub(super) fn with(hub: &Hub, scratch: &Path, words: &[&str]) -> (i32, String, String) {
    let mut command = trainer(scratch, words);
    done(command.env("HF_ENDPOINT", hub.endpoint()))
}

pub(super) fn cache(scratch: &Path) -> PathBuf {
    scratch.join("home/.cache/huggingface/hub/models--Qwen--tiny-0.1B")
}

/// All names in a directory, sorted.
pub(super) fn names(dir: &Path) -> Vec<String> {
    let entries = fs_err::read_dir(dir).unwrap();
    let mut names: Vec<String> = entries
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

fn import<'a>(id: &'a str, output: &'a str) -> [&'a str; 6] {
    let [a, b, c] = ["convert", "import", "--hf-model"];
    [a, b, c, id, "--megatron-path", output]
}

fn at_v1<'a>(id: &'a str, output: &'a str) -> Vec<&'a str> {
    [&import(id, output)[..], &["--hf-revision", "v1"]].concat()
}

#[test]
fn a_model_is_downloaded_once_and_read_like_its_directory() {
    let (scratch, hub) = hub();
    let at = scratch.path();
    let dir = golden("checkpoints/moe_vl");
    // What nobody reads stays where it is.
    for name in [
        "pytorch_model.bin",
        "original/consolidated.00.pth",
        "onnx/model.onnx",
        "README.md",
        "other.safetensors",
    ] {
        hub.put(name, "unread");
    }
    let (code, _, stderr) = with(&hub, at, &import(ID, "of_id"));
    assert_eq!(code, 0, "{stderr}");
    let log = hub.lines();
    for name in names(&dir) {
        let head = format!("HEAD /{REPOSITORY}/resolve/{COMMIT}/{name}");
        let get = format!("GET /{REPOSITORY}/resolve/{COMMIT}/{name}");
        for line in [head, get] {
            let count = log.iter().filter(|found| **found == line).count();
            assert_eq!(count, 1, "{line}: {log:?}");
        }
    }
    for unread in [".bin", ".pth", "onnx", "README", "other"] {
        assert!(!log.iter().any(|line| line.contains(unread)), "{log:?}");
    }
    // It is laid out as huggingface_hub does it.
    let cache = cache(at);
    let snapshot = cache.join("snapshots").join(COMMIT);
    assert_eq!(names(&snapshot), names(&dir));
    for name in names(&dir) {
        let content = fs_err::read(dir.join(&name)).unwrap();
        let target = format!("../../blobs/{}", etag(&name, &content));
        assert_eq!(
            fs_err::read_link(snapshot.join(&name)).unwrap(),
            Path::new(&target)
        );
        assert_eq!(fs_err::read(snapshot.join(&name)).unwrap(), content);
    }
    assert_eq!(names(&cache.join("blobs")).len(), names(&dir).len());
    assert_eq!(
        fs_err::read_to_string(cache.join("refs/main")).unwrap(),
        COMMIT
    );
    let absent = cache.join(".no_exist").join(COMMIT);
    assert!(names(&absent).contains(&"processor_config.json".to_owned()));
    // And equals what is made of the directory.
    let dir = dir.to_str().unwrap();
    let (code, _, stderr) = with(&hub, at, &["verify", dir, "of_id"]);
    assert_eq!(code, 0, "{stderr}");
    // From now on the list is asked for, and no file; at a commit not even the list.
    let words = ["convert", "roundtrip", "--hf-model", ID];
    let (code, _, stderr) = with(&hub, at, &words);
    assert_eq!(code, 0, "{stderr}");
    let listing = format!("GET /api/models/{REPOSITORY}/revision/main");
    assert_eq!(hub.lines(), [listing]);
    let pinned = format!("{ID}@{COMMIT}");
    for words in [["verify", &pinned, dir], ["diff", dir, &pinned]] {
        let (code, _, stderr) = with(&hub, at, &words);
        assert_eq!(code, 0, "{words:?}: {stderr}");
        assert_eq!(hub.lines(), [""; 0]);
    }
}

#[test]
fn nothing_but_the_config_is_downloaded_where_it_will_do() {
    let (scratch, hub) = hub();
    let at = scratch.path();
    let config = [
        format!("GET /api/models/{REPOSITORY}/revision/main"),
        format!("HEAD /{REPOSITORY}/resolve/{COMMIT}/config.json"),
        format!("GET /{REPOSITORY}/resolve/{COMMIT}/config.json"),
    ];
    for (number, words) in [
        vec!["plan", ID, "--tp", "2", "--json"],
        vec!["inspect", ID, "--mapping", "--json"],
        vec!["init", "--config", ID, "--output", "new"],
    ]
    .iter()
    .enumerate()
    {
        let scratch = at.join(number.to_string());
        fs_err::create_dir(&scratch).unwrap();
        let (code, _, stderr) = with(&hub, &scratch, words);
        assert_eq!(code, 0, "{words:?}: {stderr}");
        assert_eq!(hub.lines(), config, "{words:?}");
    }
}

#[test]
fn data_needs_no_weights() {
    let (scratch, hub) = hub();
    let data = golden("data/shapes/train.jsonl");
    let words = [
        "data",
        "--model",
        ID,
        "--data",
        data.to_str().unwrap(),
        "--limit",
        "1",
    ];
    let (code, of_id, stderr) = with(&hub, scratch.path(), &words);
    assert_eq!(code, 0, "{stderr}");
    let log = hub.lines();
    assert!(
        !log.iter().any(|line| line.contains("safetensors")),
        "{log:?}"
    );
    let dir = golden("checkpoints/moe_vl");
    let words = words.map(|word| {
        if word == ID {
            dir.to_str().unwrap()
        } else {
            word
        }
    });
    let (_, of_dir, _) = with(&hub, scratch.path(), &words);
    assert_eq!(of_id, of_dir);
}

#[test]
fn what_is_done_is_said_on_stderr_unless_quiet() {
    let (scratch, hub) = hub();
    let at = scratch.path();
    let (code, stdout, stderr) = with(&hub, at, &["plan", ID, "--json"]);
    assert_eq!(code, 0, "{stderr}");
    serde_json::from_str::<serde_json::Value>(&stdout).unwrap();
    let said = format!("downloading 1 files of {ID} (commit {})", &COMMIT[..12]);
    assert!(stderr.contains(&said), "{stderr}");
    assert!(stderr.contains("downloaded "), "{stderr}");
    let words = ["--quiet", "inspect", ID, "--checksum"];
    let (code, _, stderr) = with(&hub, at, &words);
    assert_eq!((code, stderr.as_str()), (0, ""));
}

#[test]
fn a_revision_is_asked_for_in_two_ways() {
    let (scratch, hub) = hub();
    let at = scratch.path();
    let slashed = format!("{ID}@refs/pr/1");
    let (code, _, stderr) = with(&hub, at, &["plan", &slashed]);
    assert_eq!(code, 0, "{stderr}");
    let listing = format!("GET /api/models/{REPOSITORY}/revision/refs%2Fpr%2F1");
    assert_eq!(hub.lines()[0], listing);
    let reference = cache(at).join("refs/refs/pr/1");
    assert_eq!(fs_err::read_to_string(reference).unwrap(), OLDER_COMMIT);
    let (code, _, stderr) = with(&hub, at, &at_v1(ID, "a"));
    assert_eq!(code, 0, "{stderr}");
    let config = format!("HEAD /{REPOSITORY}/resolve/{OLDER_COMMIT}/model.safetensors.index.json");
    let log = hub.lines();
    assert!(log.contains(&config), "{log:?}");
    let tagged = format!("{ID}@v1");
    let (code, _, stderr) = with(&hub, at, &at_v1(&tagged, "b"));
    assert_eq!(code, 0, "{stderr}");
    hub.log();
    // What contradicts itself is wrong use, and nobody is asked.
    let dir = golden("checkpoints/moe_vl");
    for (id, wanted) in [
        (format!("{ID}@v2"), "`v2`, but --hf-revision says `v1`"),
        (dir.to_str().unwrap().to_owned(), "is a path here"),
    ] {
        let (code, _, stderr) = with(&hub, at, &at_v1(&id, "c"));
        assert_eq!(code, 2, "{stderr}");
        assert!(stderr.contains(wanted), "{stderr}");
    }
    assert_eq!(hub.lines(), [""; 0]);
    let mut help = trainer(at, &["convert", "unshard", "--help"]);
    assert!(done(&mut help).1.contains("--hf-revision <REVISION>"));
}

#[test]
fn a_renamed_model_is_found_under_its_old_name() {
    let (scratch, hub) = hub();
    let (code, _, stderr) = with(&hub, scratch.path(), &["plan", "Qwen/old-name"]);
    assert_eq!(code, 0, "{stderr}");
}

#[cfg(feature = "torch")]
#[test]
fn commands_that_run_the_model_take_an_id() {
    let (scratch, hub) = hub();
    let at = scratch.path();
    let words = "generate --max-new-tokens 2 --prompt-ids 1,2,3 --json --model";
    let words: Vec<&str> = words.split(' ').collect();
    let (code, of_id, stderr) = with(&hub, at, &[&words[..], &[ID]].concat());
    assert_eq!(code, 0, "{stderr}");
    let dir = golden("checkpoints/moe_vl");
    let (_, of_dir, _) = with(&hub, at, &[&words[..], &[dir.to_str().unwrap()]].concat());
    assert_eq!(of_id, of_dir);
    let data = golden("data/shapes/train.jsonl");
    let words = "finetune --max-steps 1 --output tuned --model";
    let words: Vec<&str> = words.split(' ').collect();
    let words = [&words[..], &[ID, "--data", data.to_str().unwrap()]].concat();
    let (code, _, stderr) = with(&hub, at, &words);
    assert_eq!(code, 0, "{stderr}");
    // What a run was made from stays known when the branch moves on.
    let run = fs_err::read_to_string(at.join("tuned/run/run.json")).unwrap();
    assert!(run.contains(&format!("snapshots/{COMMIT}")), "{run}");
}
