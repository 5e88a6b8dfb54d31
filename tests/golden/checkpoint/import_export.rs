//! Every member of the family through a directory of Megatron-Core's, by the library.

use std::ffi::OsString;

use bridge_core::checkpoint::Staging;
use bridge_core::checkpoint::torch_dist::TorchDistCheckpoint;
use bridge_core::provider::run_config::RunConfig;
use bridge_core::{ExportOptions, ImportOptions};

use super::*;

fn files(dir: &Path) -> Vec<(OsString, Vec<u8>)> {
    let mut files: Vec<(OsString, Vec<u8>)> = fs_err::read_dir(dir)
        .unwrap()
        .map(|entry| {
            let entry = entry.unwrap();
            (entry.file_name(), fs_err::read(entry.path()).unwrap())
        })
        .collect();
    files.sort();
    files
}

#[test]
fn every_member_of_the_family_comes_back_byte_for_byte() {
    for name in [
        "dense_text",
        "moe_text",
        "dense_token_classification",
        "dense_vl_deepstack",
        "moe_vl_mtp_packed",
        "moe_vl_per_expert",
        "dense_vl_kv2",
    ] {
        let scratch = tempfile::tempdir().unwrap();
        let reference = directory(name, scratch.path());
        let bridge = AutoBridge::from_hf_pretrained(&reference).unwrap();
        let (megatron, out) = (scratch.path().join("megatron"), scratch.path().join("out"));
        let staging = Staging::default();
        bridge
            .import_ckpt(&megatron, &ImportOptions::default(), &staging)
            .unwrap();
        bridge
            .export_ckpt(&megatron, &out, &ExportOptions::default(), &staging)
            .unwrap();
        let (found, wanted) = (files(&out), files(&reference));
        let names = |files: &[(OsString, Vec<u8>)]| -> Vec<OsString> {
            files.iter().map(|(name, _)| name.clone()).collect()
        };
        assert_eq!(names(&found), names(&wanted), "{name}");
        for ((file, ours), (_, theirs)) in found.iter().zip(&wanted) {
            assert!(ours == theirs, "{name}: {}", file.display());
        }
        let stored = TorchDistCheckpoint::open(&megatron).unwrap();
        let run = RunConfig::read(&stored.run_config().unwrap()).unwrap();
        let golden = json_of(&golden(&format!(
            "megatron/provider.{}.json",
            provider_of(name)
        )));
        let class = golden["mro"][0].as_str().unwrap();
        assert_eq!(run.target(), Some(class), "{name}");
    }
}

/// Checkpoints of one config in other forms have one provider.
fn provider_of(name: &str) -> &str {
    match name {
        "dense_vl_deepstack" => "dense_vl",
        "moe_vl_mtp_packed" | "moe_vl_per_expert" => "moe_vl",
        name => name,
    }
}

fn json_of(file: &Path) -> serde_json::Value {
    serde_json::from_slice(&fs_err::read(file).unwrap()).unwrap()
}
