//! The command line: convert import and export.

mod forms;
mod refused;

use std::collections::BTreeSet;
use std::path::Path;

use bridge_core::checkpoint::TensorSource;
use bridge_core::checkpoint::hf::HfCheckpoint;
use bridge_core::checkpoint::torch_dist::TorchDistCheckpoint;
use serde_json::Value;
use tests::golden;
use tests::tensors::bytes;

use crate::program::{model, trainer};
use crate::shard::words;
use crate::unshard::assert_same_directory;

pub(super) fn shown(path: &Path) -> String {
    path.to_string_lossy().into_owned()
}

/// `trainer convert import`: exit code and stderr.
pub(crate) fn import(model: &Path, target: &Path, more: &str) -> (i32, String) {
    let args = format!(
        "--hf-model {} --megatron-path {}",
        shown(model),
        shown(target)
    );
    let (code, stdout, stderr) = trainer(words(&format!("convert import {args} {more}")));
    assert_eq!(stdout, "");
    (code, stderr)
}

/// `trainer convert export`: exit code and stderr.
pub(crate) fn export(model: &Path, source: &Path, target: &Path, more: &str) -> (i32, String) {
    let (model, source, target) = (shown(model), shown(source), shown(target));
    let args = format!("--hf-model {model} --megatron-path {source} --hf-path {target}");
    let (code, stdout, stderr) = trainer(words(&format!("convert export {args} {more}")));
    assert_eq!(stdout, "");
    (code, stderr)
}

pub(super) fn config(dir: &Path) -> Value {
    serde_json::from_slice(&fs_err::read(dir.join("config.json")).unwrap()).unwrap()
}

/// Imports `reference`, exports it with `more`, and asserts that nothing at all changed.
pub(super) fn comes_back(reference: &Path, import_flags: &str, export_flags: &str) {
    let scratch = tempfile::tempdir().unwrap();
    let (between, out) = (scratch.path().join("megatron"), scratch.path().join("out"));
    let (code, stderr) = import(reference, &between, import_flags);
    assert_eq!(code, 0, "{stderr}");
    let (code, stderr) = export(reference, &between, &out, export_flags);
    assert_eq!(code, 0, "{stderr}");
    assert_same_directory(&out, reference);
    // Nothing half-made stays beside them.
    assert_eq!(fs_err::read_dir(scratch.path()).unwrap().count(), 2);
}

/// MB 2789: 1733 tensors were not written back, those of the head and others.
#[test]
fn every_file_comes_back_byte_for_byte() {
    for name in ["dense_vl", "dense_vl_tied_bf16", "moe_vl", "moe_vl_bf16"] {
        comes_back(&model(name), "", "");
    }
    comes_back(&golden("megatron/checkpoints/dense_vl_kv2"), "", "");
    comes_back(&model("moe_vl"), "--make-vocab-size-divisible-by 96", "");
    comes_back(
        &model("dense_vl"),
        "--no-extra-states --no-verify --no-progress",
        "--no-verify",
    );
    comes_back(&model("moe_vl"), "--no-mtp", "--missing copy");
}

/// What Megatron-Core and Megatron Bridge wrote at other layouts, with chunks of their own.
#[test]
fn directories_of_megatron_come_back_as_the_model_that_was_trained() {
    let scratch = tempfile::tempdir().unwrap();
    let (reference, source) = (model("dense_vl"), golden("torch_dist/mcore_dense_tp2pp2"));
    let out = scratch.path().join("exact");
    let (code, stderr) = export(&reference, &source, &out, "");
    assert_eq!(code, 0, "{stderr}");
    assert_same_directory(&out, &reference);
    // Those were saved with every parameter in bfloat16; the reference has two kinds in float32, and gets them so.
    for (reference, source) in [
        (
            "checkpoints/dense_vl_tied_bf16",
            "torch_dist/mcore_dense_tied_bf16_tp1",
        ),
        (
            "checkpoints/moe_vl_bf16",
            "torch_dist/mcore_moe_bf16_tp2pp2ep2/iter_0000007",
        ),
        (
            "megatron/checkpoints/dense_vl_kv2",
            "megatron/torch_dist_bridge/dense_vl_kv2",
        ),
    ] {
        let reference = golden(reference);
        let out = scratch.path().join("rounded");
        let (code, stderr) = export(&reference, &golden(source), &out, "--overwrite");
        assert_eq!(code, 0, "{stderr}");
        let (ours, theirs) = (
            HfCheckpoint::open(&out).unwrap(),
            HfCheckpoint::open(&reference).unwrap(),
        );
        let mut rounded = BTreeSet::new();
        for (tensor, info) in theirs.tensors() {
            assert_eq!(ours.info(tensor).as_ref(), Some(info), "{tensor}");
            if bytes(&ours, tensor) != bytes(&theirs, tensor) {
                rounded.insert(tensor.rsplit_once("linear_attn.").unwrap().1.to_owned());
            }
        }
        let expected = ["A_log", "norm.weight"].map(str::to_owned);
        assert_eq!(rounded, BTreeSet::from(expected), "{source}");
    }
}

/// The directory holds 22 tensors of the model beside the optimizer's.
#[test]
fn states_of_an_optimizer_are_no_tensors_of_the_model() {
    let scratch = tempfile::tempdir().unwrap();
    let source = golden("torch_dist/mcore_dense_dp2_optim");
    let out = scratch.path().join("out");
    let (code, stderr) = export(&model("dense_vl"), &source, &out, "");
    assert_eq!(code, 1);
    assert!(
        stderr.contains("lacks ") && !stderr.contains("optimizer"),
        "{stderr}"
    );
    let (code, stderr) = export(&model("dense_vl"), &source, &out, "--missing copy");
    assert_eq!(code, 0, "{stderr}");
    assert!(!stderr.contains("optimizer"), "{stderr}");
    let stored = TorchDistCheckpoint::open(&source).unwrap();
    let ours = HfCheckpoint::open(&out).unwrap();
    for (tensor, key) in [
        (
            "model.language_model.norm.weight",
            "language_model.decoder.final_layernorm.weight",
        ),
        (
            "mtp.norm.weight",
            "language_model.mtp.layers.0.final_layernorm.weight",
        ),
    ] {
        assert!(bytes(&ours, tensor) == bytes(&stored, key), "{tensor}");
    }
}

#[test]
fn a_config_alone_is_reference_enough() {
    let scratch = tempfile::tempdir().unwrap();
    let between = scratch.path().join("megatron");
    assert_eq!(import(&model("moe_vl"), &between, "").0, 0);
    let file = scratch.path().join("moe.json");
    fs_err::copy(model("moe_vl").join("config.json"), &file).unwrap();
    let out = scratch.path().join("out");
    let (code, stderr) = export(&file, &between, &out, "");
    assert_eq!(code, 0, "{stderr}");
    let (ours, theirs) = (
        HfCheckpoint::open(&out).unwrap(),
        HfCheckpoint::open(&model("moe_vl")).unwrap(),
    );
    assert_eq!(ours.names().len(), theirs.names().len());
    for (tensor, info) in theirs.tensors() {
        assert_eq!(ours.info(tensor).as_ref(), Some(info));
        assert!(bytes(&ours, tensor) == bytes(&theirs, tensor), "{tensor}");
    }
    assert_eq!(config(&out), config(&model("moe_vl")));
}
