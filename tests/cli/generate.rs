//! The command line: generate.

use assert_cmd::Command;
use predicates::prelude::predicate;
use safetensors::SafeTensors;
use serde_json::{Value, json};
use tests::golden;

fn command(model: &std::path::Path) -> Command {
    let mut command = Command::cargo_bin("trainer").unwrap();
    command.arg("generate").arg("--model").arg(model);
    command
}

/// Numbers of a golden tensor of ids.
fn ids(tensor: &str) -> Vec<i64> {
    let bytes = fs_err::read(golden("generate/dense_vl.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let data = file.tensor(tensor).unwrap().data().to_vec();
    data.chunks(8)
        .map(|b| i64::from_le_bytes(b.try_into().unwrap()))
        .collect()
}

fn prompt() -> String {
    let ids: Vec<String> = ids("text.in.input_ids")
        .iter()
        .map(ToString::to_string)
        .collect();
    ids.join(",")
}

fn answer(command: &mut Command) -> Value {
    let output = command.assert().success().get_output().stdout.clone();
    serde_json::from_slice(&output).unwrap()
}

/// The weights and the config alone.
fn without_tokenizer(dir: &std::path::Path) {
    for name in ["config.json", "generation_config.json", "model.safetensors"] {
        fs_err::copy(golden("checkpoints/dense_vl").join(name), dir.join(name)).unwrap();
    }
}

#[test]
fn raw_ids_need_no_tokenizer_files_and_greedy_ids_equal_transformers() {
    let dir = tempfile::tempdir().unwrap();
    without_tokenizer(dir.path());
    let found = answer(command(dir.path()).args([
        "--prompt-ids",
        &prompt(),
        "--max-new-tokens",
        "32",
        "--ignore-eos",
        "--temperature",
        "0",
        "--json",
    ]));
    assert_eq!(
        found,
        json!({"text": null, "output_ids": ids("text.out.new_ids")})
    );
}

#[test]
fn the_streamed_answer_is_the_json_text() {
    let model = golden("checkpoints/dense_vl");
    let args = [
        "--prompt-ids",
        &prompt(),
        "--max-new-tokens",
        "12",
        "--ignore-eos",
    ];
    let text = answer(command(&model).args(args).arg("--json"))["text"].clone();
    command(&model)
        .args(args)
        .assert()
        .success()
        .stdout(format!("{}\n", text.as_str().unwrap()));
}

#[test]
fn a_prompt_with_an_image_goes_through_the_template() {
    let model = golden("checkpoints/dense_vl");
    let image = golden("data/images/rgb_64x64.png");
    let run = |seed: &str| {
        answer(
            command(&model)
                .args(["--prompt", "What is this?", "--image"])
                .arg(&image)
                .args([
                    "--max-new-tokens",
                    "8",
                    "--ignore-eos",
                    "--temperature",
                    "0.8",
                    "--top-p",
                    "0.9",
                    "--seed",
                    seed,
                    "--json",
                ]),
        )
    };
    let first = run("1");
    assert_eq!(first["output_ids"].as_array().unwrap().len(), 8);
    assert!(first["text"].is_string());
    assert_eq!(first, run("1"));
    assert_ne!(first["output_ids"], run("2")["output_ids"]);
}

#[test]
fn wrong_use_is_told_apart_from_a_failed_job() {
    let model = golden("checkpoints/dense_vl");
    command(&model).assert().code(2);
    command(&model)
        .args(["--prompt-ids", "1,x"])
        .assert()
        .code(2);
    command(&model)
        .args(["--prompt-ids", "1,5000"])
        .assert()
        .code(1)
        .stdout("")
        .stderr(predicate::str::contains(
            "`input_ids` holds 5000 in sample 0 at position 1",
        ));
    command(&model)
        .args(["--prompt-ids", "1,972"])
        .assert()
        .code(1)
        .stderr(predicate::str::contains("1 image placeholders (id 972)"));
    command(&model)
        .args(["--prompt-ids", "1", "--top-p", "1.5"])
        .assert()
        .code(1)
        .stderr(predicate::str::contains("top_p is 1.5"));
    command(&model)
        .args(["--prompt-ids", "1", "--device", "gpu"])
        .assert()
        .code(2)
        .stderr(predicate::str::contains("none of auto, cpu, cuda, cuda:N"));
    // No machine has so many GPUs: a device that was asked for is never replaced by another.
    command(&model)
        .args(["--prompt-ids", "1", "--device", "cuda:99"])
        .assert()
        .code(1)
        .stdout("")
        .stderr(predicate::str::contains("device `cuda:99`"));
    let dir = tempfile::tempdir().unwrap();
    without_tokenizer(dir.path());
    command(dir.path())
        .args(["--prompt", "hello"])
        .assert()
        .code(1)
        .stderr(predicate::str::contains("tokenizer.json"));
}
