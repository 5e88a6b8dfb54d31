//! The command line: inspect.

use std::collections::BTreeMap;

use bridge_core::checkpoint::hf::{HfCheckpoint, HfLayout, HfWriter};
use bridge_core::checkpoint::{Overwrite, TensorSink, TensorSource};
use serde_json::Value;
use sha2::{Digest, Sha256};
use tests::golden;

use crate::program::trainer;
use crate::verify::copied;

/// Exit code, stdout, stderr.
fn inspect(args: &[&str]) -> (i32, String, String) {
    trainer(std::iter::once(&"inspect").chain(args))
}

fn path(name: &str) -> String {
    golden(name).to_string_lossy().into_owned()
}

#[test]
fn a_directory_shows_architecture_parts_dtypes_and_layers() {
    let (code, stdout, stderr) = inspect(&[&path("checkpoints/moe_vl_bf16")]);
    assert_eq!((code, stderr.as_str()), (0, ""));
    for words in [
        "Qwen3_5MoeForConditionalGeneration",
        "Qwen35VLMoEModelProvider",
        "(3 linear_attention, 1 full_attention) x 2",
        "8 experts, 2 a token",
        "projector",
        "1,140,480",
        "BF16",
        "F32",
    ] {
        assert!(stdout.contains(words), "no `{words}` in {stdout}");
    }
}

/// Every published size, from its config alone.
#[test]
fn a_bare_config_gives_the_published_parameter_counts() {
    let counts = fs_err::read(golden("configs/parameter_counts.json")).unwrap();
    let counts: Value = serde_json::from_slice(&counts).unwrap();
    let counts = counts.as_object().unwrap();
    assert_eq!(counts.len(), 10);
    for (name, wanted) in counts {
        let (code, stdout, _) = inspect(&[&path(&format!("configs/{name}.json")), "--json"]);
        assert_eq!(code, 0, "{name}");
        let found: Value = serde_json::from_str(&stdout).unwrap();
        let number = |part: &str| found["parameters"][part].as_u64().unwrap();
        assert_eq!(number("total"), wanted["total"], "{name}");
        assert_eq!(number("language"), wanted["text"], "{name}");
        assert_eq!(number("mtp"), wanted["mtp"], "{name}");
        let vision = number("vision") + number("projector");
        assert_eq!(vision, wanted["vision"], "{name}");
    }
}

#[test]
fn checksums_are_those_of_the_bytes_in_the_file() {
    let (code, stdout, _) = inspect(&[
        &path("checkpoints/dense_vl"),
        "--tensors",
        "--checksum",
        "--json",
    ]);
    assert_eq!(code, 0);
    let found: Value = serde_json::from_str(&stdout).unwrap();
    assert_eq!(found["schema_version"], 1);
    let bytes = fs_err::read(golden("checkpoints/dense_vl/model.safetensors")).unwrap();
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let tensors = found["tensors"].as_array().unwrap();
    assert_eq!(tensors.len(), file.len());
    for tensor in tensors {
        let view = file.tensor(tensor["name"].as_str().unwrap()).unwrap();
        let digest: String = Sha256::digest(view.data())
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect();
        assert_eq!(tensor["sha256"], digest);
        assert_eq!(tensor["dtype"], "F32");
        assert_eq!(tensor["shape"], serde_json::json!(view.shape()));
    }
}

#[test]
fn the_mapping_prints_what_runs() {
    let (code, stdout, _) = inspect(&[&path("checkpoints/dense_vl"), "--mapping"]);
    assert_eq!(code, 0);
    for words in [
        "language_model.decoder.layers.{layer}. <-> model.language_model.layers.{layer}.",
        "gated delta net, layers 0-2",
        "gated attention, layers 3",
        "qkv+gate",
        "self_attn.q_proj.weight",
        "[512, 64]",
        "minus one",
        "mtp.layers.{layer}.",
    ] {
        assert!(stdout.contains(words), "no `{words}` in {stdout}");
    }
    let (_, stdout, _) = inspect(&[&path("checkpoints/dense_vl"), "--mapping", "--json"]);
    let found: Value = serde_json::from_str(&stdout).unwrap();
    let rows = found["mapping"].as_array().unwrap();
    assert!(rows.iter().any(|row| {
        row["megatron"] == "language_model.output_layer.weight"
            && row["hf"][0]["name"] == "lm_head.weight"
    }));
}

#[test]
fn language_models_alone_and_classifiers_are_shown_with_their_own_tables() {
    for (name, provider, words) in [
        (
            "dense_text",
            "GPTModelProvider",
            [
                "  (none) <-> model.\n",
                "decoder.layers.{layer}. <-> model.layers.{layer}.",
            ],
        ),
        (
            "moe_text",
            "GPTModelProvider",
            [
                "mlp.experts.gate_up_proj",
                "decoder.layers.{layer}. <-> model.layers.{layer}.",
            ],
        ),
        (
            "dense_token_classification",
            "Qwen35TokenClassificationModelProvider",
            ["output_layer.bias", "/score.bias"],
        ),
    ] {
        let config = path(&format!("megatron/checkpoints/{name}/config.json"));
        let (code, stdout, stderr) = inspect(&[&config]);
        assert_eq!((code, stderr.as_str()), (0, ""));
        assert!(stdout.contains(provider), "{stdout}");
        assert_eq!(stdout.contains("vision tower"), !name.ends_with("text"));
        assert_eq!(
            stdout.contains("5 labels"),
            name.ends_with("classification")
        );
        let (code, stdout, _) = inspect(&[&config, "--mapping"]);
        assert_eq!(code, 0);
        for words in words {
            assert!(stdout.contains(words), "no `{words}` in {stdout}");
        }
        assert_eq!(stdout.contains("lm_head.weight"), name.ends_with("text"));
        assert_eq!(stdout.contains("MTP head"), name.ends_with("text"));
    }
}

#[test]
fn a_broken_checkpoint_is_an_error_with_the_file_and_code_1() {
    let scratch = tempfile::tempdir().unwrap();
    let source = golden("checkpoints/dense_vl");
    fs_err::copy(
        source.join("config.json"),
        scratch.path().join("config.json"),
    )
    .unwrap();
    let bytes = fs_err::read(source.join("model.safetensors")).unwrap();
    let half = &bytes[..bytes.len() / 2];
    fs_err::write(scratch.path().join("model.safetensors"), half).unwrap();
    let dir = scratch.path().to_string_lossy().into_owned();
    let (code, stdout, stderr) = inspect(&[&dir]);
    assert_eq!((code, stdout.as_str()), (1, ""));
    assert!(stderr.starts_with("error: "), "{stderr}");
    assert!(stderr.contains("model.safetensors"), "{stderr}");
    assert!(stderr.contains("fetch it again"), "{stderr}");
    let (code, stdout, _) = inspect(&[&dir, "--json"]);
    assert_eq!(code, 1);
    let error: Value = serde_json::from_str(&stdout).unwrap();
    assert!(error["error"].as_str().unwrap().contains("fetch it again"));
}

#[test]
fn a_place_without_a_model_is_an_error() {
    let scratch = tempfile::tempdir().unwrap();
    let (code, _, stderr) = inspect(&[&scratch.path().to_string_lossy()]);
    assert_eq!(code, 1);
    assert!(stderr.contains("config.json"), "{stderr}");
    let config = path("configs/Qwen3.5-0.8B.json");
    let (code, _, stderr) = inspect(&[&config, "--checksum"]);
    assert_eq!(code, 1);
    assert!(
        stderr.contains("needs a directory with weights"),
        "{stderr}"
    );
}

fn json(args: &[&str]) -> Value {
    let (code, stdout, stderr) = inspect(args);
    assert_eq!((code, stderr.as_str()), (0, ""), "{args:?}");
    serde_json::from_str(&stdout).unwrap()
}

/// Key to what is said of it.
fn by_name(list: &Value) -> BTreeMap<String, Value> {
    let entries = list.as_array().unwrap().iter().map(|one| {
        let mut one = one.clone();
        let name = one.as_object_mut().unwrap().remove("name").unwrap();
        (name.as_str().unwrap().to_owned(), one)
    });
    entries.collect()
}

/// Name, dtype, shape, chunks and SHA-256 of every tensor, as torch's distributed checkpoint has them.
#[test]
fn every_torch_dist_golden_is_listed_as_torch_reads_it() {
    let mut directories = 0;
    for entry in fs_err::read_dir(golden("torch_dist")).unwrap() {
        let root = entry.unwrap().path();
        if !root.is_dir() {
            continue;
        }
        let iteration = root.join("iter_0000007");
        let paths = if iteration.is_dir() {
            vec![root, iteration]
        } else {
            vec![root]
        };
        let expected = paths.last().unwrap().join("expected.json");
        let expected: Value = serde_json::from_slice(&fs_err::read(expected).unwrap()).unwrap();
        for path in &paths {
            let path = path.to_string_lossy();
            let found = json(&[&path, "--tensors", "--checksum", "--json"]);
            let tensors: BTreeMap<String, Value> =
                serde_json::from_value(expected["tensors"].clone()).unwrap();
            assert_eq!(by_name(&found["tensors"]), tensors, "{path}");
            let objects: BTreeMap<String, Value> =
                serde_json::from_value(expected["objects"].clone()).unwrap();
            assert_eq!(by_name(&found["objects"]), objects, "{path}");
            let files = found["files"].as_array().unwrap();
            let theirs = expected["files"].as_array().unwrap();
            let data = theirs
                .iter()
                .filter(|name| name.as_str().unwrap().ends_with(".distcp"));
            assert_eq!(files.len(), data.count(), "{path}");
            assert!(files.iter().all(|file| theirs.contains(file)));
            assert_eq!(
                (&found["schema_version"], &found["kind"]),
                (&1.into(), &"torch_dist".into())
            );
        }
        directories += 1;
    }
    assert_eq!(directories, 11);
}

#[test]
fn a_torch_dist_directory_shows_the_run_and_counts_its_optimizer_apart() {
    let found = json(&[&path("torch_dist/mcore_dense_dp2_optim"), "--json"]);
    assert_eq!(found["iteration"], 7);
    assert_eq!(found["model"]["tensors"], 22);
    assert_eq!(found["optimizer"]["tensors"], 44);
    assert_eq!(found["extra_states"], 5);
    assert!(
        found["model"]["bytes"].as_u64().unwrap() < found["optimizer"]["bytes"].as_u64().unwrap()
    );
    let (code, stdout, _) = inspect(&[&path("torch_dist/mcore_moe_bf16_tp2pp2ep2")]);
    assert_eq!(code, 0);
    for words in [
        "iter_0000007",
        "Qwen35VLMoEModelProvider",
        "extra states",
        "bfloat16",
        "190",
    ] {
        assert!(stdout.contains(words), "no `{words}` in {stdout}");
    }
    assert!(!stdout.contains("optimizer"), "{stdout}");
    let found = json(&[&path("megatron/torch_dist_bridge/dense_vl_kv2"), "--json"]);
    assert_eq!(
        (&found["hf_model_id"], &found["iteration"]),
        (&"dense_vl_kv2".into(), &0.into())
    );
    let target = found["target"].as_str().unwrap();
    assert!(target.ends_with("Qwen35VLModelProvider"), "{target}");
    let (code, _, stderr) = inspect(&[&path("torch_dist/hand_dense"), "--mapping"]);
    assert_eq!(code, 1);
    assert!(
        stderr.contains("--mapping needs a model directory"),
        "{stderr}"
    );
}

#[test]
fn a_damaged_torch_dist_directory_is_an_error_that_names_the_file() {
    let scratch = tempfile::tempdir().unwrap();
    let ours = scratch.path().join("hand");
    copied(&golden("torch_dist/hand_dense_t3"), &ours);
    let dir = ours.to_string_lossy().into_owned();
    let refused = |words: &[&str]| {
        let (code, stdout, stderr) = inspect(&[&dir]);
        assert_eq!((code, stdout.as_str()), (1, ""), "{stderr}");
        for words in words {
            assert!(stderr.contains(words), "no `{words}` in {stderr}");
        }
    };
    let file = ours.join("__0_1.distcp");
    let bytes = fs_err::read(&file).unwrap();
    fs_err::write(&file, &bytes[..bytes.len() / 2]).unwrap();
    refused(&["__0_1.distcp", "cut short, fetch it again"]);
    fs_err::remove_file(&file).unwrap();
    refused(&["the file __0_1.distcp is missing"]);
    fs_err::rename(ours.join(".metadata"), ours.join(".metadata.tmp")).unwrap();
    refused(&["its save was interrupted"]);
}

#[test]
fn a_shard_shows_whose_part_it_is_and_the_hashes_of_its_tensors() {
    let scratch = tempfile::tempdir().unwrap();
    let file = scratch.path().join("rank.safetensors");
    let name = file.to_string_lossy().into_owned();
    let model = path("checkpoints/moe_vl");
    let layout = ["--tp", "2", "--ep", "2", "--rank", "1", "--output", &name];
    let shard = ["convert", "shard", "--hf-model", &model];
    assert_eq!(trainer(shard.iter().chain(&layout)).0, 0);
    let found = json(&[&name, "--checksum", "--json"]);
    assert_eq!(found["kind"], "shard");
    assert_eq!(
        found["shard"]["architecture"],
        "Qwen3_5MoeForConditionalGeneration"
    );
    assert_eq!(found["shard"]["tensor_model_parallel_size"], 2);
    assert_eq!(
        (&found["shard"]["rank"], &found["shard"]["tp_rank"]),
        (&1.into(), &1.into())
    );
    let bytes = fs_err::read(&file).unwrap();
    let tensors = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let listed = by_name(&found["tensors"]);
    assert_eq!(listed.len(), tensors.len());
    for (tensor, view) in tensors.tensors() {
        let digest: String = Sha256::digest(view.data())
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect();
        assert_eq!(listed[&tensor]["sha256"], digest, "{tensor}");
    }
    let (_, stdout, _) = inspect(&[&name]);
    assert!(stdout.contains("tensor_model_parallel_size"), "{stdout}");
    let (_, stdout, _) = inspect(&[&name, "--tensors"]);
    assert_eq!(stdout.lines().count(), tensors.len());
    let whole = path("checkpoints/dense_vl/model.safetensors");
    let (code, _, stderr) = inspect(&[&whole]);
    assert_eq!(code, 1);
    assert!(stderr.contains("which rank it belongs to"), "{stderr}");
}

/// Megatron-Bridge 1481: the gate doubles the rows of the head's query, and what failed was a view deep inside.
#[test]
fn a_query_of_the_head_without_its_gate_is_refused_with_both_shapes_and_the_reason() {
    let scratch = tempfile::tempdir().unwrap();
    let (model, out) = (scratch.path().join("model"), scratch.path().join("out"));
    let source = HfCheckpoint::open(&golden("checkpoints/dense_vl")).unwrap();
    let query = "mtp.layers.0.self_attn.q_proj.weight";
    let tensors = source.tensors().map(|(name, info)| {
        let mut info = info.clone();
        if name == query {
            info.shape[0] /= 2;
        }
        (name.to_owned(), info)
    });
    let layout = HfLayout::sharded(tensors.collect(), u64::MAX);
    let writer = HfWriter::create(&layout, &model, Overwrite::No).unwrap();
    for (name, info) in layout.tensors() {
        let mut bytes = vec![0; usize::try_from(info.num_bytes()).unwrap()];
        source.read(name, 0, &mut bytes).unwrap();
        writer.write(name, 0, &bytes).unwrap();
    }
    let config = golden("checkpoints/dense_vl/config.json");
    writer.copy_file(&config).unwrap();
    writer.finish().unwrap();
    let model = model.to_string_lossy().into_owned();
    let out_path = out.to_string_lossy().into_owned();
    let import = [
        "convert",
        "import",
        "--hf-model",
        &model,
        "--megatron-path",
        &out_path,
    ];
    for command in [
        vec!["inspect", &model],
        import.to_vec(),
        vec!["plan", &model],
    ] {
        let (code, stdout, stderr) = trainer(&command);
        assert_eq!((code, stdout.as_str()), (1, ""), "{command:?}");
        let texts = [
            query,
            "model.safetensors",
            "[256, 64]",
            "[512, 64]",
            "a model without output gate",
        ];
        for text in texts {
            assert!(stderr.contains(text), "no `{text}` in {stderr}");
        }
        assert!(!out.exists());
    }
}
