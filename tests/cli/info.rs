//! `trainer info`: devices, kernels, and what computes each op.

use assert_cmd::Command;
use predicates::prelude::*;
use serde_json::Value;
use tests::golden;

fn info(args: &[&str]) -> assert_cmd::assert::Assert {
    Command::cargo_bin("trainer")
        .unwrap()
        .args(["info", "--device", "cpu"])
        .args(args)
        .assert()
}

#[test]
fn every_op_is_listed_with_what_computes_it() {
    let out = info(&[]).success();
    let text = String::from_utf8(out.get_output().stdout.clone()).unwrap();
    assert!(text.contains("threads of libtorch"), "{text}");
    for op in [
        "attention",
        "gdn",
        "linear_cross_entropy",
        "moe",
        "norm",
        "rotary",
        "swiglu",
    ] {
        assert!(text.contains(op), "{op}: {text}");
    }
}

#[test]
fn json_is_a_list_of_kernels_with_their_architectures() {
    let config = golden("checkpoints/moe_vl/config.json");
    let out = info(&["--json", config.to_str().unwrap()]).success();
    let rows: Vec<Value> = serde_json::from_slice(&out.get_output().stdout).unwrap();
    for row in &rows {
        assert!(row["by"].as_str().unwrap().starts_with("libtorch"), "{row}");
        let architectures = row["architectures"].as_array().unwrap();
        // Whether there are kernels is the build's affair; a kernel without an architecture is none.
        assert_eq!(row["kernel"].is_null(), architectures.is_empty(), "{row}");
        assert!(
            architectures
                .iter()
                .all(|one| one.as_str().unwrap().starts_with("sm_"))
        );
    }
    assert!(
        rows.iter()
            .any(|row| row["op"] == "attention" && row["kernel"].is_null())
    );
    assert!(rows.iter().any(|row| row["op"] == "gdn"));
}

#[test]
fn kernels_that_cannot_run_are_refused_with_the_reason() {
    info(&["--kernels", "cuda"])
        .failure()
        .code(1)
        .stderr(predicate::str::contains(
            "kernels `cuda` were asked for, but",
        ));
    info(&["--kernels", "fast"])
        .failure()
        .code(2)
        .stderr(predicate::str::contains(
            "`fast` names no kernels; write `auto`, `cuda` or `reference`",
        ));
}
