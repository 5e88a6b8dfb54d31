//! Hubs that refuse, and Hubs that are not to be trusted.

use super::download::{cache, hub, names, with};
use super::server::{Fault, Host, Hub, sha256};
use super::{ID, trainer};
use crate::program::done;
use std::path::Path;

use tests::golden;

const TOKEN: &str = "hf_aSecretThatStaysHere";
const WEIGHTS: &str = "model-00001-of-00003.safetensors";

/// Runs `trainer` against the Hub with the token in this variable.
fn with_token(hub: &Hub, scratch: &Path, variable: &str, words: &[&str]) -> (i32, String, String) {
    let value = match variable {
        "HF_TOKEN" => TOKEN.to_owned(),
        // The variable names a file, or the folder of one.
        _ => {
            let home = scratch.join("hf");
            fs_err::create_dir_all(&home).unwrap();
            fs_err::write(home.join("token"), format!("{TOKEN}\n")).unwrap();
            let file = if variable == "HF_HOME" {
                "hf"
            } else {
                "hf/token"
            };
            scratch.join(file).to_str().unwrap().to_owned()
        }
    };
    let mut command = trainer(scratch, words);
    done(
        command
            .env("HF_ENDPOINT", hub.endpoint())
            .env(variable, value),
    )
}

#[test]
fn the_token_goes_to_the_endpoint_and_nowhere_else() {
    for variable in ["HF_TOKEN", "HF_HOME", "HF_TOKEN_PATH"] {
        let (scratch, hub) = hub();
        hub.demand(TOKEN);
        let words = ["-vv", "inspect", "Qwen/old-name", "--checksum"];
        let (code, _, stderr) = with_token(&hub, scratch.path(), variable, &words);
        assert_eq!(code, 0, "{stderr}");
        assert!(!stderr.contains(TOKEN), "{stderr}");
        let log = hub.log();
        for host in [Host::Endpoint, Host::Files] {
            assert!(log.iter().any(|request| request.host == host), "{log:?}");
        }
        for request in log {
            let expected = match request.host {
                Host::Endpoint => Some(format!("Bearer {TOKEN}")),
                Host::Files => None,
            };
            assert_eq!(
                request.header("authorization"),
                expected.as_deref(),
                "{request:?}"
            );
        }
    }
}

/// Another host could send us back, to a place of its choice.
#[test]
fn the_token_does_not_come_back_from_another_host() {
    let (scratch, hub) = hub();
    let location = format!("Location: {}/api/whoami", hub.endpoint()).leak();
    hub.fail("GET /blobs/", Fault::Status(302, location));
    let words = ["inspect", ID, "--checksum"];
    let (code, _, stderr) = with_token(&hub, scratch.path(), "HF_TOKEN", &words);
    assert_eq!(code, 1, "{stderr}");
    let log = hub.log();
    let back: Vec<_> = log
        .iter()
        .filter(|request| request.path == "/api/whoami")
        .map(|request| request.header("authorization"))
        .collect();
    assert_eq!(back, [None]);
}

#[test]
fn redirects_end() {
    let (scratch, hub) = hub();
    for _ in 0..20 {
        hub.fail(
            "GET /api/models",
            Fault::Status(302, "Location: /api/models/again"),
        );
    }
    let (code, _, stderr) = with(&hub, scratch.path(), &["plan", ID]);
    assert_eq!(code, 1);
    assert!(stderr.contains("and so on without an end"), "{stderr}");
    assert_eq!(hub.lines().len(), 10);
}

#[test]
fn refusals_say_what_to_do() {
    let (scratch, hub) = hub();
    let at = scratch.path();
    fs_err::create_dir_all(at.join("models/Qwen3.5-0.8B")).unwrap();
    let unknown = "X-Error-Code: RepoNotFound\nX-Error-Message: Repository not found";
    let gated = "X-Error-Code: GatedRepo";
    for (status, lines, id, wanted, with_a_token) in [
        (
            401,
            unknown,
            ID,
            "a private or gated one needs HF_TOKEN",
            "that your HF_TOKEN may read",
        ),
        (
            404,
            unknown,
            "models/Qwen3.5-0.8",
            "did you mean models/Qwen3.5-0.8B?",
            "did you mean",
        ),
        (
            401,
            gated,
            ID,
            "is gated or private; ask for access at",
            "that your HF_TOKEN belongs to",
        ),
        (
            403,
            "",
            ID,
            "and set HF_TOKEN",
            "that your HF_TOKEN belongs to",
        ),
    ] {
        for (token, wanted) in [(false, wanted), (true, with_a_token)] {
            hub.fail("GET /api/models", Fault::Status(status, lines));
            let words = ["inspect", id];
            let (code, _, stderr) = if token {
                with_token(&hub, at, "HF_TOKEN", &words)
            } else {
                with(&hub, at, &words)
            };
            assert_eq!(code, 1, "{status}");
            assert!(stderr.contains(wanted), "{status}: {stderr}");
            assert!(stderr.contains(&format!("answered {status}")), "{stderr}");
            assert_eq!(hub.lines().len(), 1);
        }
    }
    let (code, _, stderr) = with(&hub, at, &["inspect", "Qwen/tiny-0.1B@v3"]);
    assert_eq!(code, 1);
    assert!(
        stderr.contains("Qwen/tiny-0.1B has no revision `v3`"),
        "{stderr}"
    );
    hub.fail("HEAD /Qwen", Fault::Status(403, gated));
    let (code, _, stderr) = with(&hub, at, &["inspect", ID]);
    assert_eq!(code, 1);
    assert!(stderr.contains("is gated or private"), "{stderr}");
}

#[test]
fn settings_that_cannot_be_are_refused_without_a_word_of_the_token() {
    let scratch = tempfile::tempdir().unwrap();
    for (variable, value, wanted) in [
        (
            "HF_ENDPOINT",
            "huggingface.co",
            "HF_ENDPOINT is `huggingface.co`, which is no address",
        ),
        ("HF_TOKEN", "two words", "HF_TOKEN holds no token"),
    ] {
        let mut command = trainer(scratch.path(), &["plan", ID]);
        let (code, _, stderr) = done(command.env(variable, value));
        assert_eq!(code, 1);
        assert!(stderr.contains(wanted), "{stderr}");
        assert!(!stderr.contains("two words"), "{stderr}");
    }
}

#[test]
fn names_that_lead_out_of_the_cache_are_refused() {
    let (scratch, hub) = hub();
    let at = scratch.path();
    hub.put("../../x", "x");
    let (code, _, stderr) = with(&hub, at, &["plan", ID]);
    assert_eq!(code, 1);
    assert!(stderr.contains("lists a file `../../x`"), "{stderr}");
    assert_eq!(hub.lines().len(), 1);

    // An index may name any file.
    let hub = Hub::of(&golden("checkpoints/moe_vl"));
    let index = "model.safetensors.index.json";
    let text = fs_err::read_to_string(golden("checkpoints/moe_vl").join(index)).unwrap();
    hub.put(index, text.replace(WEIGHTS, "../../../x.safetensors"));
    let (code, _, stderr) = with(&hub, at, &["inspect", ID, "--checksum"]);
    assert_eq!(code, 1);
    assert!(stderr.contains("../../../x.safetensors"), "{stderr}");
    assert!(
        !hub.lines()
            .iter()
            .any(|line| line.contains("x.safetensors"))
    );

    // The name of a blob comes from the Hub, and so does the commit.
    for (lines, wanted) in [
        ("ETag: \"../../../../x\"", "no usable `ETag`"),
        ("ETag: \"/x\"", "no usable `ETag`"),
        ("X-Repo-Commit: ../../x", "no usable `X-Repo-Commit`"),
        ("X-Linked-Size: -1", "no usable `Content-Length`"),
    ] {
        let hub = Hub::of(&golden("checkpoints/moe_vl"));
        hub.fail("HEAD /Qwen", Fault::Header(lines));
        let scratch = tempfile::tempdir().unwrap();
        let (code, _, stderr) = with(&hub, scratch.path(), &["plan", ID]);
        assert_eq!(code, 1, "{lines}");
        assert!(stderr.contains(wanted), "{lines}: {stderr}");
        assert!(!cache(scratch.path()).join("blobs").exists(), "{lines}");
    }
}

#[test]
fn content_that_is_not_what_was_announced_is_refused_and_removed() {
    let (scratch, hub) = hub();
    let at = scratch.path();
    let content = fs_err::read(golden("checkpoints/moe_vl").join(WEIGHTS)).unwrap();
    let digest: &'static str = sha256(&content).leak();
    let blob = cache(at).join("blobs").join(digest);
    let words = ["inspect", ID, "--checksum"];
    // Of the three the first is too long for what the Hub says, the second too short, the third other bytes.
    for (asked, fault, wanted) in [
        (
            "HEAD",
            Fault::Header("X-Linked-Size: 100"),
            "but 100 were announced",
        ),
        (
            "HEAD",
            Fault::Header("X-Linked-Size: 99999999"),
            "but 99999999 were announced",
        ),
        (digest, Fault::Flipped, "has the SHA-256"),
    ] {
        let asked = match asked {
            "HEAD" => "/model-00001-of-00003.safetensors",
            other => other,
        };
        hub.fail(asked, fault);
        let (code, _, stderr) = with(&hub, at, &words);
        assert_eq!(code, 1, "{wanted}: {stderr}");
        assert!(
            stderr.contains(wanted) && stderr.contains(WEIGHTS),
            "{stderr}"
        );
        assert!(!blob.exists() && !blob.with_extension("incomplete").exists());
        let snapshots = cache(at).join("snapshots");
        let snapshot = snapshots.join(&names(&snapshots)[0]);
        assert!(!names(&snapshot).contains(&WEIGHTS.to_owned()));
    }
    let (code, _, stderr) = with(&hub, at, &words);
    assert_eq!(code, 0, "{stderr}");
}

#[test]
fn a_model_larger_than_the_disk_is_refused_before_it_comes() {
    let (scratch, hub) = hub();
    let size = Fault::Header("X-Linked-Size: 1152921504606846976");
    hub.fail("/model-00001-of-00003.safetensors", size);
    let words = ["inspect", ID, "--checksum"];
    let (code, _, stderr) = with(&hub, scratch.path(), &words);
    assert_eq!(code, 1);
    assert!(
        stderr.contains("needs 115292") && stderr.contains("make room"),
        "{stderr}"
    );
    let log = hub.lines();
    assert!(
        !log.iter().any(|line| line.starts_with("GET /blobs/")),
        "{log:?}"
    );
}

#[test]
fn models_without_safetensors_are_refused() {
    let scratch = tempfile::tempdir().unwrap();
    let model = scratch.path().join("model");
    fs_err::create_dir(&model).unwrap();
    let config = golden("checkpoints/moe_vl/config.json");
    fs_err::copy(config, model.join("config.json")).unwrap();
    let hub = Hub::of(&model);
    hub.put("pytorch_model.bin", "pickle");
    let words = ["convert", "roundtrip", "--hf-model", ID];
    let (code, _, stderr) = with(&hub, scratch.path(), &words);
    assert_eq!(code, 1);
    assert!(
        stderr.contains("has no weights in safetensors files"),
        "{stderr}"
    );
}
