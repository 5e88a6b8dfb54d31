//! What a run trains, and what it leaves behind.

use std::path::Path;

use serde_json::{Value, json};

use super::{Run, checkpoint, run_json, series, shapes, stderr, tensors, text_rows};

#[test]
fn print_config_shows_every_value_with_its_origin() {
    let dir = tempfile::tempdir().unwrap();
    let config = dir.path().join("run.toml");
    fs_err::write(&config, "epochs = 3\nfreeze = ['vision']\n").unwrap();
    let run = Run::new("m", "d.jsonl", "o").with(&[
        "--print-config",
        "--config",
        config.to_str().unwrap(),
        "weight_decay=0.1",
    ]);
    let text = String::from_utf8(run.finish().stdout).unwrap();
    let line = |key: &str| {
        text.lines()
            .find(|line| line.starts_with(key))
            .unwrap()
            .to_owned()
    };
    assert!(line("num_train_epochs = 3").contains("run.toml"), "{text}");
    assert!(
        line("weight_decay = 0.1").ends_with("# command line, weight_decay=0.1"),
        "{text}"
    );
    assert!(line("seed = 42").ends_with("# default"), "{text}");
}

#[test]
fn accumulation_and_packing_equal_one_big_batch() {
    let dir = tempfile::tempdir().unwrap();
    let data = text_rows(dir.path());
    let run = |name: &str, settings: &[&str]| {
        let run = Run::new(checkpoint("dense_vl"), &data, dir.path().join(name))
            .with(&["max_steps=2", "shuffle=false"])
            .with(settings);
        run.finish();
        ["loss", "mtp_loss", "grad_norm"].map(|key| series(&run.output, key))
    };
    let whole = run("whole", &["per_device_train_batch_size=8"]);
    let accumulated = run(
        "parts",
        &[
            "per_device_train_batch_size=2",
            "gradient_accumulation_steps=4",
        ],
    );
    let packed = run(
        "packed",
        &[
            "per_device_train_batch_size=8",
            "packing=true",
            "max_length=150",
        ],
    );
    for (other, name) in [(accumulated, "accumulated"), (packed, "packed")] {
        for (key, (a, b)) in ["loss", "mtp_loss", "grad_norm"]
            .iter()
            .zip(whole.iter().zip(&other))
        {
            assert_eq!(a.len(), 2);
            for (step, (a, b)) in a.iter().zip(b).enumerate() {
                // Float32 sums in another order; a mean of means would be off by tens of per cent.
                let tolerance = if step == 0 { 2e-5 } else { 2e-4 };
                assert!(
                    (a - b).abs() / a < tolerance,
                    "{name} {key} step {step}: {a} {b}"
                );
            }
        }
    }
}

#[test]
fn frozen_parts_and_an_untrained_head_are_carried_byte_for_byte_in_the_same_files() {
    let dir = tempfile::tempdir().unwrap();
    let run = Run::new(checkpoint("moe_vl"), shapes(), dir.path().join("out")).with(&[
        "--freeze",
        "vision,projector",
        "mtp_loss_scaling_factor=0",
        "max_steps=2",
    ]);
    let text = stderr(&run.finish());
    let printed = |part: &str| {
        text.lines()
            .find(|line| line.trim().starts_with(part))
            .unwrap()
    };
    assert!(
        printed("vision ").contains("66,240 parameters, frozen"),
        "{text}"
    );
    assert!(
        printed("language ").contains("parameters, trains"),
        "{text}"
    );

    let (before, after) = (tensors(&checkpoint("moe_vl")), tensors(&run.output));
    assert_eq!(
        before.keys().collect::<Vec<_>>(),
        after.keys().collect::<Vec<_>>()
    );
    let mut moved = 0;
    for (name, old) in &before {
        let new = &after[name];
        assert_eq!((&old.0, &old.1, &old.2), (&new.0, &new.1, &new.2), "{name}");
        if name.starts_with("model.visual.") || name.starts_with("mtp.") {
            assert!(old.3 == new.3, "{name} changed");
        } else if old.3 != new.3 {
            moved += 1;
        }
    }
    assert!(moved > 50, "{moved} tensors of the language model moved");
    let index = "model.safetensors.index.json";
    for file in [
        "config.json",
        "tokenizer.json",
        "preprocessor_config.json",
        "merges.txt",
        index,
    ] {
        let read = |dir: &Path| fs_err::read(dir.join(file)).unwrap();
        assert!(read(&checkpoint("moe_vl")) == read(&run.output), "{file}");
    }
}

#[test]
fn a_bfloat16_checkpoint_trains_with_masters_and_keeps_each_dtype() {
    let dir = tempfile::tempdir().unwrap();
    let data = text_rows(dir.path());
    let run = Run::new(
        checkpoint("dense_vl_tied_bf16"),
        data,
        dir.path().join("out"),
    )
    .with(&["max_steps=2", "save_steps=2", "--json"]);
    let output = run.finish();
    let answer: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(
        (&answer["schema_version"], &answer["status"]),
        (&json!(1), &json!("done"))
    );
    assert!(stderr(&output).contains("bfloat16 on cpu"));
    let (before, after) = (
        tensors(&checkpoint("dense_vl_tied_bf16")),
        tensors(&run.output),
    );
    for (name, old) in &before {
        assert_eq!((&old.1, &old.2), (&after[name].1, &after[name].2), "{name}");
    }
    let saved = tensors(&run.output.join("checkpoint-2"));
    assert!(saved.keys().any(|name| name.starts_with("master.")));
}

#[test]
fn evaluation_plot_and_events_are_left_beside_the_metrics() {
    let dir = tempfile::tempdir().unwrap();
    let run = Run::new(checkpoint("dense_vl"), shapes(), dir.path().join("out")).with(&[
        "eval_split=0.1",
        "max_steps=2",
        "eval_steps=1",
        "--freeze",
        "vision",
    ]);
    let output = run.finish();
    assert_eq!(series(&run.output, "eval_loss").len(), 2);
    let record = run_json(&run.output);
    assert_eq!(
        (&record["training_rows"], &record["evaluation_rows"]),
        (&json!(58), &json!(6))
    );
    let files = run.output.join("run");
    let svg = fs_err::read_to_string(files.join("loss.svg")).unwrap();
    assert!(svg.starts_with("<svg") && svg.contains("eval_loss"));
    assert_eq!(
        fs_err::read_dir(files.join("tensorboard")).unwrap().count(),
        1
    );
    let config = fs_err::read_to_string(files.join("config.toml")).unwrap();
    assert!(config.contains("eval_split = 0.1"), "{config}");
    let stdout = String::from_utf8(output.stdout).unwrap();
    assert!(
        stdout.contains("final loss") && stdout.contains("loss.svg"),
        "{stdout}"
    );
}
