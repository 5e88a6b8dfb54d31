//! The command line: finetune.
//!
//! Runs are a few steps of the tiny golden checkpoints; each takes seconds.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

use assert_cmd::cargo::cargo_bin;
use safetensors::SafeTensors;
use serde_json::{Value, json};
use tests::golden;

/// A run's command line, so far.
struct Run {
    model: PathBuf,
    data: PathBuf,
    output: PathBuf,
    settings: Vec<String>,
}

impl Run {
    fn new(
        model: impl Into<PathBuf>,
        data: impl Into<PathBuf>,
        output: impl Into<PathBuf>,
    ) -> Self {
        let settings = ["num_threads=1", "save_steps=null", "learning_rate=1e-3"];
        Self {
            model: model.into(),
            data: data.into(),
            output: output.into(),
            settings: settings.map(str::to_owned).to_vec(),
        }
    }

    fn with(mut self, settings: &[&str]) -> Self {
        self.settings
            .extend(settings.iter().map(|&setting| setting.to_owned()));
        self
    }

    fn command(&self) -> Command {
        let mut command = Command::new(cargo_bin("trainer"));
        command.arg("finetune");
        command
            .arg("--model")
            .arg(&self.model)
            .arg("--data")
            .arg(&self.data);
        command
            .arg("--output")
            .arg(&self.output)
            .args(&self.settings);
        command
    }

    fn finish(&self) -> Output {
        let output = self.command().output().unwrap();
        assert!(output.status.success(), "{}", stderr(&output));
        output
    }

    fn fail(&self) -> String {
        let output = self.command().output().unwrap();
        assert_eq!(output.status.code(), Some(1), "{}", stderr(&output));
        assert!(output.stdout.is_empty());
        stderr(&output)
    }

    /// Starts the run and waits until its stderr says `text`.
    #[expect(clippy::zombie_processes, reason = "the caller waits for the child")]
    fn start_until(&self, text: &str) -> (Child, BufReader<std::process::ChildStderr>) {
        let mut child = self
            .command()
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stderr.take().unwrap());
        let mut all = String::new();
        loop {
            let mut line = String::new();
            if lines.read_line(&mut line).unwrap() == 0 {
                child.wait().unwrap();
                panic!("the run ended: {all}");
            }
            if line.contains(text) {
                return (child, lines);
            }
            all.push_str(&line);
        }
    }
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn shapes() -> PathBuf {
    golden("data/shapes/train.jsonl")
}

fn checkpoint(name: &str) -> PathBuf {
    golden("checkpoints").join(name)
}

/// Text rows whose answers have very different lengths.
fn text_rows(dir: &Path) -> PathBuf {
    let rows: Vec<String> = (1..=8)
        .map(|length| {
            let answer = vec!["word"; length * length].join(" ");
            let messages = json!([
                { "role": "user", "content": format!("say it {length} times") },
                { "role": "assistant", "content": answer },
            ]);
            json!({ "messages": messages }).to_string()
        })
        .collect();
    let path = dir.join("text.jsonl");
    fs_err::write(&path, rows.join("\n")).unwrap();
    path
}

/// The lines of metrics.jsonl without what a clock decides.
fn metrics(output: &Path) -> Vec<Value> {
    let text = fs_err::read_to_string(output.join("run/metrics.jsonl")).unwrap();
    let mut lines: Vec<Value> = text
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    for line in &mut lines {
        let line = line.as_object_mut().unwrap();
        line.remove("seconds");
        line.remove("tokens_per_second");
    }
    lines
}

fn series(output: &Path, key: &str) -> Vec<f64> {
    metrics(output)
        .iter()
        .filter_map(|line| line[key].as_f64())
        .collect()
}

fn run_json(output: &Path) -> Value {
    serde_json::from_slice(&fs_err::read(output.join("run/run.json")).unwrap()).unwrap()
}

/// Every tensor of a checkpoint directory: file, dtype, shape and bytes.
fn tensors(dir: &Path) -> BTreeMap<String, (String, String, Vec<usize>, Vec<u8>)> {
    let mut found = BTreeMap::new();
    for entry in fs_err::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path
            .extension()
            .is_none_or(|extension| extension != "safetensors")
        {
            continue;
        }
        let file = path.file_name().unwrap().to_string_lossy().into_owned();
        let bytes = fs_err::read(&path).unwrap();
        for (name, view) in SafeTensors::deserialize(&bytes).unwrap().tensors() {
            let dtype = format!("{:?}", view.dtype());
            let tensor = (
                file.clone(),
                dtype,
                view.shape().to_vec(),
                view.data().to_vec(),
            );
            found.insert(name, tensor);
        }
    }
    found
}

/// A copy of a golden checkpoint of one file whose float32 tensors are multiplied by `factors`.
fn scaled(dir: &Path, model: &str, factors: &[(&str, f32)]) -> PathBuf {
    let copy = dir.join("model");
    fs_err::create_dir(&copy).unwrap();
    for entry in fs_err::read_dir(checkpoint(model)).unwrap() {
        let path = entry.unwrap().path();
        fs_err::copy(&path, copy.join(path.file_name().unwrap())).unwrap();
    }
    let path = copy.join("model.safetensors");
    let mut bytes = fs_err::read(&path).unwrap();
    let (header, metadata) = SafeTensors::read_metadata(&bytes).unwrap();
    let data = 8 + header;
    for (name, factor) in factors {
        let (start, end) = metadata.info(name).unwrap().data_offsets;
        for value in bytes[data + start..data + end].chunks_exact_mut(4) {
            let scaled = f32::from_le_bytes((&*value).try_into().unwrap()) * factor;
            value.copy_from_slice(&scaled.to_le_bytes());
        }
    }
    fs_err::write(path, bytes).unwrap();
    copy
}

fn signal(child: &Child, name: &str) {
    let status = Command::new("kill")
        .arg(name)
        .arg(child.id().to_string())
        .status()
        .unwrap();
    assert!(status.success());
}

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
