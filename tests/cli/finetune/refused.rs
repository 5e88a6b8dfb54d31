//! What a run refuses or reports: settings, kernels, data, and numbers that are none.

use std::path::Path;

use serde_json::{Value, json};
use tests::golden;

use super::{
    Run, checkpoint, metrics, run_json, scaled, series, shapes, stderr, tensors, text_rows,
};

#[test]
fn misspelt_keys_are_wrong_use_and_answered_with_the_nearest_right_ones() {
    let dir = tempfile::tempdir().unwrap();
    let config = dir.path().join("run.yaml");
    fs_err::write(&config, "learning_rte: 1e-4\nkernels:\n  polcy: auto\n").unwrap();
    let run = Run::new(checkpoint("dense_vl"), shapes(), dir.path().join("out")).with(&[
        "warmup_step=3",
        "--config",
        config.to_str().unwrap(),
    ]);
    let output = run.command().output().unwrap();
    assert_eq!(output.status.code(), Some(2));
    let text = stderr(&output);
    for hint in ["`learning_rate`", "`kernels.policy`", "`warmup_steps`"] {
        assert!(text.contains(&format!("did you mean {hint}?")), "{text}");
    }
    assert!(
        text.contains("run.yaml") && text.contains("command line, warmup_step=3"),
        "{text}"
    );
    assert!(!run.output.exists());
    let output = run.with(&["--json"]).command().output().unwrap();
    let answer: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert!(
        answer["error"]
            .as_str()
            .unwrap()
            .contains("3 settings are wrong")
    );
}

#[test]
fn the_chosen_kernels_are_printed_and_recorded_and_missing_ones_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let data = text_rows(dir.path());
    let run = |name: &str| {
        Run::new(checkpoint("dense_vl"), &data, dir.path().join(name)).with(&[
            "max_steps=1",
            "device=cpu",
            "keep_freed_memory=false",
        ])
    };
    let auto = run("auto");
    let text = stderr(&auto.finish());
    let record = run_json(&auto.output);
    let kernels = record["kernels"].as_object().unwrap();
    for op in ["attention", "gdn", "moe", "norm"] {
        assert!(
            text.contains(&format!("{op}: {}", kernels[op].as_str().unwrap())),
            "{text}"
        );
    }
    assert_eq!(
        (&record["device"], &record["dtype"]),
        (&json!("cpu"), &json!("float32"))
    );
    assert_eq!(record["keep_freed_memory"], false);
    assert!(
        text.contains("freed memory returns to the system"),
        "{text}"
    );

    // Built with an nvcc or without one: there is nothing for the CPU.
    let text = run("cuda").with(&["kernels.policy=cuda"]).fail();
    assert!(
        text.contains("kernels `cuda` were asked for, but"),
        "{text}"
    );
    let typo = run("typo").with(&["kernels.policy=auto,gnd=cuda"]);
    let out = typo.command().output().unwrap();
    assert_eq!(out.status.code(), Some(2));
    let text = stderr(&out);
    assert!(text.contains("`gnd=cuda` names no kernels"), "{text}");
}

#[test]
fn dropout_that_a_config_asks_for_is_refused_and_not_left_out_in_silence() {
    let dir = tempfile::tempdir().unwrap();
    let model = scaled(dir.path(), "dense_vl", &[]);
    let config = model.join("config.json");
    let text = fs_err::read_to_string(&config).unwrap();
    let mut json: Value = serde_json::from_str(&text).unwrap();
    json["text_config"]["attention_dropout"] = json!(0.1);
    fs_err::write(&config, json.to_string()).unwrap();
    let run = Run::new(&model, text_rows(dir.path()), dir.path().join("out"));
    let text = run.fail();
    assert!(
        text.contains("config.json asks for attention_dropout 0.1"),
        "{text}"
    );
    assert!(!run.output.exists());
}

#[test]
fn overwrite_costs_the_earlier_run_nothing_until_the_new_one_begins() {
    let dir = tempfile::tempdir().unwrap();
    let data = text_rows(dir.path());
    let output = dir.path().join("out");
    let run = |data: &Path| {
        Run::new(checkpoint("dense_vl"), data, &output).with(&[
            "max_steps=1",
            "device=cpu",
            "save_steps=1",
        ])
    };
    run(&data).finish();
    let files = ["run/run.json", "run/metrics.jsonl", "checkpoint-1"];
    let left = || {
        files.map(|file| {
            let path = output.join(file);
            path.is_dir() || path.metadata().is_ok_and(|file| file.len() > 0)
        })
    };
    let record = fs_err::read(output.join(files[0])).unwrap();
    assert_eq!(left(), [true; 3]);
    let absent = dir.path().join("absent.jsonl");
    let freeze = "freeze=[vision,projector,language,mtp]";
    for (data, setting, why) in [
        (&data, "kernels.policy=cuda", "kernels `cuda` were asked"),
        (
            &data,
            "optim=adamw_8bit",
            "`optim=adamw_8bit` needs the CUDA kernels of `adamw`, but here it is computed by libtorch, fused; run on a GPU with kernels `auto`, or set optim=adamw",
        ),
        (&absent, "max_steps=2", "absent.jsonl"),
        (&data, freeze, "every part of the model is frozen"),
    ] {
        let text = run(data).with(&[setting, "--overwrite"]).fail();
        assert!(text.contains(why), "{text}");
        assert_eq!(left(), [true; 3], "after: {text}");
        assert_eq!(fs_err::read(output.join(files[0])).unwrap(), record);
    }
    run(&data)
        .with(&["save_steps=null", "--overwrite"])
        .finish();
    assert_eq!(left(), [true, true, false]);
    assert_ne!(fs_err::read(output.join(files[0])).unwrap(), record);
}

#[test]
fn a_bad_row_names_file_and_row_and_can_be_left_out() {
    let dir = tempfile::tempdir().unwrap();
    let mut rows = fs_err::read_to_string(text_rows(dir.path())).unwrap();
    rows.push_str("\n{\"messages\": [{\"role\": \"user\", \"content\": \"no answer\"}]}\n");
    let data = dir.path().join("bad.jsonl");
    fs_err::write(&data, rows).unwrap();
    let run = |name: &str| {
        Run::new(checkpoint("dense_vl"), &data, dir.path().join(name))
            .with(&["per_device_train_batch_size=9", "epochs=1"])
    };
    let text = run("stop").fail();
    assert!(
        text.contains("bad.jsonl") && text.contains("row 8"),
        "{text}"
    );
    let skipping = run("skip").with(&["on_bad_row=skip"]);
    let text = stderr(&skipping.finish());
    assert!(
        text.contains("warning: row left out") && text.contains("row 8"),
        "{text}"
    );
    assert_eq!(series(&skipping.output, "loss").len(), 1);
}

#[test]
fn a_loss_that_is_not_finite_names_the_layer_and_the_step_is_not_applied() {
    let dir = tempfile::tempdir().unwrap();
    let data = text_rows(dir.path());
    let name = "model.language_model.layers.1.mlp.down_proj.weight";
    let model = scaled(dir.path(), "dense_vl", &[(name, 1e38)]);
    let run = Run::new(&model, &data, dir.path().join("out")).with(&["max_steps=2"]);
    let text = run.fail();
    for part in [
        "step 1: the loss is NaN",
        "was not applied",
        "output of decoder layer 1 (`hidden.2`)",
    ] {
        assert!(text.contains(part), "{part:?} is not in {text}");
    }
    assert_eq!(run_json(&run.output)["status"], "failed");

    let skipping = Run::new(&model, &data, dir.path().join("skip"))
        .with(&["max_steps=2", "on_non_finite=skip"]);
    let text = stderr(&skipping.finish());
    assert!(text.contains("step 2 left out"), "{text}");
    assert!(
        tensors(&model) == tensors(&skipping.output),
        "weights moved"
    );
    assert_eq!(metrics(&skipping.output).len(), 2);
}

#[test]
fn a_gradient_that_is_not_finite_names_parameters_and_the_sample() {
    let dir = tempfile::tempdir().unwrap();
    // Huge activations, made small again without denormals: the loss is finite, the squares of the gradient of what makes
    // them small are not.
    let factors = [
        ("model.visual.merger.linear_fc1.weight", 1e35),
        ("model.visual.merger.linear_fc1.bias", 1e35),
        ("model.visual.merger.linear_fc2.weight", 1e-34),
        ("model.visual.merger.linear_fc2.bias", 0.0),
    ];
    let model = scaled(dir.path(), "dense_vl", &factors);
    let mut rows = fs_err::read_to_string(text_rows(dir.path())).unwrap();
    let picture = golden("data/shapes/images/000.png");
    let content =
        json!([{ "type": "image", "image": picture }, { "type": "text", "text": "What?" }]);
    let messages = json!([
        { "role": "user", "content": content },
        { "role": "assistant", "content": "red" },
    ]);
    rows.push_str(&format!("\n{}\n", json!({ "messages": messages })));
    let data = dir.path().join("mixed.jsonl");
    fs_err::write(&data, rows).unwrap();
    let run = Run::new(&model, &data, dir.path().join("out"))
        .with(&["max_steps=1", "per_device_train_batch_size=9"]);
    let text = run.fail();
    assert!(
        text.contains("step 1: the gradient's norm is inf, and the step was not applied"),
        "{text}"
    );
    assert!(
        text.contains("the gradient of `vision_model.merger.linear_fc2.weight`"),
        "{text}"
    );
    assert!(text.contains("data row 8 causes it"), "{text}");
    assert!(!dir.path().join("out/config.json").exists());
}
