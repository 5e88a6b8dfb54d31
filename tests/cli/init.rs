//! The command line: init.

use std::collections::BTreeSet;
use std::path::Path;

use assert_cmd::Command;
use bridge_core::checkpoint::TensorSource;
use bridge_core::checkpoint::hf::HfCheckpoint;
use bridge_core::plan::PlanOptions;
use bridge_core::{AutoBridge, Dtype};
use half::bf16;
use tests::golden;

/// Exit code and stderr.
fn init(config: &Path, output: &Path, more: &[&str]) -> (i32, String) {
    let result = Command::cargo_bin("trainer")
        .unwrap()
        .args(["init", "--config"])
        .arg(config)
        .arg("--output")
        .arg(output)
        .args(more)
        .output()
        .unwrap();
    assert!(result.stdout.is_empty());
    let stderr = String::from_utf8(result.stderr).unwrap();
    (result.status.code().unwrap(), stderr)
}

fn config(name: &str) -> std::path::PathBuf {
    golden(&format!("checkpoints/{name}/config.json"))
}

fn values(checkpoint: &HfCheckpoint, name: &str) -> Vec<f32> {
    let info = checkpoint.info(name).unwrap();
    let mut bytes = vec![0; usize::try_from(info.num_bytes()).unwrap()];
    checkpoint.read(name, 0, &mut bytes).unwrap();
    match info.dtype {
        Dtype::Bf16 => bytes
            .chunks_exact(2)
            .map(|two| bf16::from_le_bytes([two[0], two[1]]).to_f32())
            .collect(),
        _ => bytes
            .chunks_exact(4)
            .map(|four| f32::from_le_bytes([four[0], four[1], four[2], four[3]]))
            .collect(),
    }
}

/// Same names, shapes and dtypes as the hub's form of the model, so that every reader of the golden one reads it.
#[test]
fn a_new_checkpoint_has_the_tensors_of_a_published_one() {
    let scratch = tempfile::tempdir().unwrap();
    for name in ["dense_vl", "dense_vl_tied_bf16", "moe_vl", "moe_vl_bf16"] {
        let output = scratch.path().join(name);
        let (code, stderr) = init(&config(name), &output, &["--seed", "1"]);
        assert_eq!(code, 0, "{stderr}");
        let wanted = HfCheckpoint::open(&golden(&format!("checkpoints/{name}"))).unwrap();
        let found = HfCheckpoint::open(&output).unwrap();
        let list = |checkpoint: &HfCheckpoint| {
            let mut list: Vec<_> = checkpoint
                .tensors()
                .map(|(name, info)| (name.to_owned(), info.shape.clone(), info.dtype.to_string()))
                .collect();
            list.sort();
            list
        };
        assert_eq!(list(&found), list(&wanted), "{name}");
        let bridge = AutoBridge::from_hf_pretrained(&output).unwrap();
        bridge.plan(&PlanOptions::default()).unwrap();
    }
}

/// The Hugging Face names of the table that Megatron Bridge has for the architecture, and no others.
#[test]
fn language_models_alone_and_classifiers_have_the_tensors_of_their_tables() {
    let scratch = tempfile::tempdir().unwrap();
    for name in ["dense_text", "moe_text", "dense_token_classification"] {
        let config = golden(&format!("megatron/checkpoints/{name}/config.json"));
        let output = scratch.path().join(name);
        let (code, stderr) = init(&config, &output, &["--dtype", "bfloat16"]);
        assert_eq!(code, 0, "{stderr}");
        let table = fs_err::read(golden(&format!("megatron/mapping.{name}.json"))).unwrap();
        let table: serde_json::Value = serde_json::from_slice(&table).unwrap();
        let mut wanted = BTreeSet::new();
        for parameter in table["parameters"].as_array().unwrap() {
            for hf in parameter["hf"].as_object().unwrap().values() {
                wanted.insert(hf["name"].as_str().unwrap().to_owned());
            }
        }
        let found = HfCheckpoint::open(&output).unwrap();
        let found: BTreeSet<String> = found.names().map(str::to_owned).collect();
        assert_eq!(found, wanted, "{name}");
        let bridge = AutoBridge::from_hf_pretrained(&output).unwrap();
        assert_eq!(bridge.config().text.dtype, Some(Dtype::Bf16));
        bridge.plan(&PlanOptions::default()).unwrap();
    }
}

#[test]
fn values_are_distributed_as_transformers_draws_them() {
    let scratch = tempfile::tempdir().unwrap();
    let output = scratch.path().join("out");
    init(&config("dense_vl"), &output, &["--seed", "2"]);
    let checkpoint = HfCheckpoint::open(&output).unwrap();
    let embedding = values(&checkpoint, "model.language_model.embed_tokens.weight");
    let count = embedding.len() as f64;
    let mean = embedding.iter().map(|v| f64::from(*v)).sum::<f64>() / count;
    let square = embedding.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>() / count;
    // Standard errors over 65,536 values are 8e-5 and 6e-5.
    assert!(mean.abs() < 4e-4, "{mean}");
    assert!((square.sqrt() - 0.02).abs() < 3e-4, "{square}");
    let layer = "model.language_model.layers.0";
    let all = |name: &str, value: f32| values(&checkpoint, name).iter().all(|v| *v == value);
    assert!(all(&format!("{layer}.input_layernorm.weight"), 0.0));
    assert!(all(&format!("{layer}.linear_attn.norm.weight"), 1.0));
    assert!(all(&format!("{layer}.linear_attn.dt_bias"), 1.0));
    assert!(all("model.visual.blocks.0.norm1.weight", 1.0));
    assert!(all("model.visual.blocks.0.norm1.bias", 0.0));
    assert!(all("mtp.norm.weight", 0.0));
}

/// A draw of 0 in 16 bits has the logarithm -inf, and the head never learns.
#[test]
fn a_log_is_finite_and_in_float32_whatever_the_dtype() {
    let scratch = tempfile::tempdir().unwrap();
    for seed in ["0", "1", "2", "3"] {
        let output = scratch.path().join(seed);
        let more = ["--seed", seed, "--dtype", "bfloat16"];
        let (code, stderr) = init(&config("moe_vl"), &output, &more);
        assert_eq!(code, 0, "{stderr}");
        let checkpoint = HfCheckpoint::open(&output).unwrap();
        let names: Vec<&str> = checkpoint
            .names()
            .filter(|n| n.ends_with("A_log"))
            .collect();
        assert_eq!(names.len(), 6);
        for name in names {
            assert_eq!(checkpoint.info(name).unwrap().dtype, Dtype::F32);
            for value in values(&checkpoint, name) {
                assert!((0.01f32.ln()..=16f32.ln()).contains(&value), "{value}");
            }
        }
        let text = fs_err::read_to_string(output.join("config.json")).unwrap();
        let config: serde_json::Value = serde_json::from_str(&text).unwrap();
        assert_eq!(config["dtype"], "bfloat16");
        assert_eq!(config["text_config"]["dtype"], "bfloat16");
    }
}

#[test]
fn a_seed_gives_the_same_bytes_and_another_seed_others() {
    let scratch = tempfile::tempdir().unwrap();
    let bytes = |name: &str, seed: &str| {
        let output = scratch.path().join(name);
        init(&config("dense_vl"), &output, &["--seed", seed]);
        fs_err::read(output.join("model.safetensors")).unwrap()
    };
    let first = bytes("a", "7");
    assert!(first == bytes("b", "7"));
    assert!(first != bytes("c", "8"));
}

#[test]
fn shards_are_no_larger_than_asked() {
    let scratch = tempfile::tempdir().unwrap();
    let output = scratch.path().join("out");
    let (code, stderr) = init(&config("moe_vl"), &output, &["--max-shard-size", "600KB"]);
    assert_eq!(code, 0, "{stderr}");
    let mut files = 0;
    for entry in fs_err::read_dir(&output).unwrap() {
        let entry = entry.unwrap();
        if entry
            .file_name()
            .to_string_lossy()
            .ends_with(".safetensors")
        {
            files += 1;
            assert!(entry.metadata().unwrap().len() < 620_000);
        }
    }
    assert!(files > 5, "{files}");
    let index = fs_err::read(output.join("model.safetensors.index.json")).unwrap();
    let index: serde_json::Value = serde_json::from_slice(&index).unwrap();
    let first = format!("model-00001-of-{files:05}.safetensors");
    assert!(
        index["weight_map"]
            .as_object()
            .unwrap()
            .values()
            .any(|file| *file == first)
    );
    assert!(HfCheckpoint::open(&output).is_ok());
}

#[test]
fn a_taken_output_and_a_wrong_config_are_refused() {
    let scratch = tempfile::tempdir().unwrap();
    let output = scratch.path().join("out");
    fs_err::create_dir(&output).unwrap();
    fs_err::write(output.join("kept"), "").unwrap();
    let (code, stderr) = init(&config("dense_vl"), &output, &[]);
    assert_eq!(code, 1);
    assert!(stderr.contains("--overwrite"), "{stderr}");
    assert!(output.join("kept").exists());
    let (code, stderr) = init(&config("dense_vl"), &output, &["--overwrite"]);
    assert_eq!(code, 0, "{stderr}");
    assert!(!output.join("kept").exists());

    let text = fs_err::read_to_string(config("dense_vl")).unwrap();
    let misspelt = scratch.path().join("misspelt.json");
    fs_err::write(
        &misspelt,
        text.replace("num_hidden_layers", "num_hiden_layers"),
    )
    .unwrap();
    let (code, stderr) = init(&misspelt, &scratch.path().join("x"), &[]);
    assert_eq!(code, 1);
    assert!(
        stderr.contains("did you mean `num_hidden_layers`"),
        "{stderr}"
    );
    let huge = scratch.path().join("huge.json");
    let wide = text.replace("\"vocab_size\": 1024", "\"vocab_size\": 4294967296");
    fs_err::write(
        &huge,
        wide.replace("\"hidden_size\": 64", "\"hidden_size\": 4294967296"),
    )
    .unwrap();
    let (code, stderr) = init(&huge, &scratch.path().join("x"), &[]);
    assert_eq!(code, 1, "{stderr}");
    let (code, stderr) = init(
        &config("dense_vl"),
        &scratch.path().join("x"),
        &["--dtype", "int8"],
    );
    assert_eq!(code, 2);
    assert!(stderr.contains("bfloat16"), "{stderr}");
    assert!(!scratch.path().join("x").exists());
}
