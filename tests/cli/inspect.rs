//! The command line: inspect.

use serde_json::Value;
use sha2::{Digest, Sha256};
use tests::golden;

use crate::program::trainer;

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
