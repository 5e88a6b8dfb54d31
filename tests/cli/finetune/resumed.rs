//! Runs that end early, and what goes on from them.

use std::process::Command;

use assert_cmd::cargo::cargo_bin;
use serde_json::Value;

use super::{Run, checkpoint, metrics, run_json, shapes, signal, stderr, tensors, text_rows};

#[test]
fn a_run_killed_in_mid_epoch_and_resumed_equals_the_uninterrupted_one_bit_for_bit() {
    let dir = tempfile::tempdir().unwrap();
    // Six rows a step, eleven steps an epoch: steps 10 and 20 stand within an epoch.
    let settings = [
        "max_steps=20",
        "save_steps=10",
        "per_device_train_batch_size=3",
        "gradient_accumulation_steps=2",
        "warmup_steps=4",
    ];
    let run = |name: &str| {
        Run::new(checkpoint("moe_vl"), shapes(), dir.path().join(name)).with(&settings)
    };
    let whole = run("whole");
    whole.finish();

    let killed = run("killed");
    let (mut child, _lines) = killed.start_until("saved ");
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(!killed.output.join("checkpoint-20").exists());
    assert!(!killed.output.join("config.json").exists());
    let resumed = Command::new(cargo_bin("trainer"))
        .args(["finetune", "--resume", "--output"])
        .arg(&killed.output)
        .output()
        .unwrap();
    assert!(resumed.status.success(), "{}", stderr(&resumed));
    assert!(
        stderr(&resumed).contains("resuming behind step 10"),
        "{}",
        stderr(&resumed)
    );

    for file in [
        "checkpoint-20/model.safetensors",
        "checkpoint-20/optimizer.safetensors",
    ] {
        let same = |run: &Run| fs_err::read(run.output.join(file)).unwrap();
        assert!(same(&whole) == same(&killed), "{file} differs");
    }
    let place = |run: &Run| {
        let text = fs_err::read(run.output.join("checkpoint-20/state.json")).unwrap();
        let state: Value = serde_json::from_slice(&text).unwrap();
        let keys = [
            "step",
            "optimizer_steps",
            "tokens",
            "data",
            "streams",
            "learning_rate",
        ];
        keys.map(|key| state[key].clone())
    };
    assert_eq!(place(&whole), place(&killed));
    assert_eq!(place(&whole)[3]["epoch"], 1);
    assert_eq!(metrics(&whole.output), metrics(&killed.output));
    assert_eq!(metrics(&whole.output).len(), 20);
    assert!(
        tensors(&whole.output) == tensors(&killed.output),
        "the trained models differ"
    );
}

#[test]
fn a_partial_checkpoint_and_a_changed_setting_are_refused_on_resume() {
    let dir = tempfile::tempdir().unwrap();
    let data = text_rows(dir.path());
    let run = Run::new(checkpoint("dense_vl"), data, dir.path().join("out")).with(&[
        "max_steps=2",
        "save_steps=1",
        "save_total_limit=1",
    ]);
    run.finish();
    assert!(!run.output.join("checkpoint-1").exists());
    let resume = |settings: &[&str]| {
        let mut command = Command::new(cargo_bin("trainer"));
        command
            .args(["finetune", "--resume", "--output"])
            .arg(&run.output)
            .args(settings);
        let output = command.output().unwrap();
        assert_eq!(output.status.code(), Some(1));
        stderr(&output)
    };
    let text = resume(&["learning_rate=1.0", "seed=1"]);
    for part in [
        "`learning_rate` was 0.001 and is 1.0",
        "`seed` was 42 and is 1",
    ] {
        assert!(text.contains(part), "{part:?} is not in {text}");
    }
    fs_err::remove_file(run.output.join("checkpoint-2/optimizer.safetensors")).unwrap();
    let text = resume(&[]);
    assert!(
        text.contains("partial checkpoint: `optimizer.safetensors` is missing"),
        "{text}"
    );
}

#[test]
fn a_second_writer_is_refused_and_ctrl_c_saves_a_run_that_resumes() {
    let dir = tempfile::tempdir().unwrap();
    let data = text_rows(dir.path());
    let run = Run::new(checkpoint("dense_vl"), data, dir.path().join("out"))
        .with(&["max_steps=100000", "lr_scheduler_type=constant"]);
    let (mut child, mut lines) = run.start_until("step 1/100000");
    let text = run.fail();
    assert!(text.contains("is being written by another run"), "{text}");

    signal(&child, "-INT");
    let status = child.wait().unwrap();
    assert_eq!(status.code(), Some(130));
    let mut rest = String::new();
    std::io::Read::read_to_string(&mut lines, &mut rest).unwrap();
    assert!(
        rest.contains("saved ") && rest.contains("go on with --resume"),
        "{rest}"
    );
    assert_eq!(run_json(&run.output)["status"], "interrupted");
    let done = metrics(&run.output).len();

    let text = run.fail();
    assert!(
        text.contains("already holds a run; go on with --resume"),
        "{text}"
    );
    let more = format!("max_steps={}", done + 1);
    let run = run.with(&["--resume", &more]);
    run.finish();
    assert_eq!(metrics(&run.output).len(), done + 1);
    assert!(run.output.join("model.safetensors").exists());
}
