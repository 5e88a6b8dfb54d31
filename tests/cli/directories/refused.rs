//! What a directory lacks, has too much, or should not be.

use std::path::Path;

use bridge_core::Dtype;
use bridge_core::checkpoint::hf::HfCheckpoint;
use bridge_core::checkpoint::{TensorInfo, TensorSource};
use tests::golden;
use tests::tensors::{bytes, filtered};

use super::{comes_back, config, export, import};
use crate::program::model;
use crate::unshard::assert_same_directory;

/// AReaL 1403, MB 4188: a head that was off took its neighbours with it, and the config went on to claim it.
#[test]
fn a_head_that_was_left_out_is_missed_copied_or_left_out_with_its_config() {
    let scratch = tempfile::tempdir().unwrap();
    for name in ["dense_vl", "moe_vl"] {
        let reference = model(name);
        let between = scratch
            .path()
            .join(format!("{name} megatron").replace(' ', "-"));
        let (code, stderr) = import(&reference, &between, "--no-mtp");
        assert_eq!(code, 0, "{stderr}");
        assert!(stderr.contains("are left out, first `mtp."), "{stderr}");
        let out = scratch.path().join(name);
        let (code, stderr) = export(&reference, &between, &out, "");
        assert_eq!(code, 1);
        for text in [
            "lacks ",
            "`mtp.",
            "no `language_model.mtp.",
            "--missing copy",
        ] {
            assert!(stderr.contains(text), "no {text} in {stderr}");
        }
        assert!(!out.exists());

        let (code, stderr) = export(&reference, &between, &out, "--missing copy");
        assert_eq!(code, 0, "{stderr}");
        assert!(
            stderr.contains("are the reference's, first `mtp."),
            "{stderr}"
        );
        assert_same_directory(&out, &reference);

        let (code, stderr) = export(&reference, &between, &out, "--missing skip --overwrite");
        assert_eq!(code, 0, "{stderr}");
        assert!(stderr.contains("are left out, first `mtp."), "{stderr}");
        let theirs = HfCheckpoint::open(&reference).unwrap();
        let ours = HfCheckpoint::open(&out).unwrap();
        for (tensor, info) in theirs.tensors() {
            let wanted = (!tensor.starts_with("mtp.")).then_some(info);
            assert_eq!(ours.info(tensor).as_ref(), wanted, "{tensor}");
            assert!(wanted.is_none() || bytes(&ours, tensor) == bytes(&theirs, tensor));
        }
        let mut expected = config(&reference);
        expected["text_config"]["mtp_num_hidden_layers"] = 0.into();
        assert_eq!(config(&out), expected);
        // The result is a model of its own, whole without a head.
        comes_back(&out, "", "");
    }
}

/// A tensor that is left out must not be missed first by whoever loads the result.
#[test]
fn a_result_that_lacks_what_its_config_describes_is_said_to_load_nowhere() {
    let scratch = tempfile::tempdir().unwrap();
    let path = |name: &str| scratch.path().join(name);
    let reference = model("dense_vl");
    assert_eq!(import(&reference, &path("whole"), "").0, 0);
    for (gone, is_said) in [
        ("decoder.final_layernorm", true),
        ("mtp.layers.0.eh_proj", true),
        // A whole head may be left out: its config no longer claims it.
        ("mtp.", false),
    ] {
        filtered(
            &path("whole"),
            &path("part"),
            |key| !key.contains(gone),
            &[],
        );
        let flags = "--missing skip --overwrite";
        let (code, stderr) = export(&reference, &path("part"), &path("out"), flags);
        assert_eq!(code, 0, "{stderr}");
        let words = "lacks tensors that its config.json describes, and loads nowhere without them";
        assert_eq!(stderr.contains(words), is_said, "{gone}: {stderr}");
    }
}

#[test]
fn a_directory_of_another_model_is_refused_by_what_differs() {
    let scratch = tempfile::tempdir().unwrap();
    let out = scratch.path().join("out");
    let refused = |reference: &Path, source: &Path, more: &str, texts: &[&str]| {
        let (code, stderr) = export(reference, source, &out, more);
        assert_eq!(code, 1, "{stderr}");
        for text in texts {
            assert!(stderr.contains(text), "no {text} in {stderr}");
        }
        assert!(!out.exists());
    };
    let kv2 = golden("megatron/torch_dist_bridge/dense_vl_kv2");
    let texts = [
        "another model",
        "`num_query_groups` is 2 instead of 4",
        "--not-strict",
    ];
    refused(&model("dense_vl"), &kv2, "", &texts);
    // Its shapes are still not the reference's.
    let texts = [
        "does not fit",
        "has 256 rows, the reference's vocab_size is 1024",
    ];
    refused(&model("dense_vl"), &kv2, "--not-strict", &texts[1..]);

    let whole = scratch.path().join("whole");
    assert_eq!(import(&model("dense_vl"), &whole, "").0, 0);
    let changed = scratch.path().join("changed");
    let norm = "language_model.decoder.final_layernorm.weight";
    let other = TensorInfo {
        dtype: Dtype::F32,
        shape: vec![7],
    };
    filtered(
        &whole,
        &changed,
        |key| key != norm,
        &[(norm, other.clone())],
    );
    refused(
        &model("dense_vl"),
        &changed,
        "",
        &[norm, "has shape [7], the reference needs [64]"],
    );
    let numbers = TensorInfo {
        dtype: Dtype::I64,
        shape: vec![64],
    };
    filtered(&whole, &changed, |key| key != norm, &[(norm, numbers)]);
    refused(
        &model("dense_vl"),
        &changed,
        "",
        &[norm, "dtype I64, which holds no weights"],
    );
    filtered(
        &whole,
        &changed,
        |_| true,
        &[("language_model.adapter.weight", other)],
    );
    let texts = [
        "does not know",
        "language_model.adapter.weight",
        "--not-strict",
    ];
    refused(&model("dense_vl"), &changed, "", &texts);
    let (code, stderr) = export(&model("dense_vl"), &changed, &out, "--not-strict");
    assert_eq!(code, 0, "{stderr}");
    assert!(
        stderr.contains("does not know are left out, first `language_model.adapter.weight`"),
        "{stderr}"
    );
    assert_same_directory(&out, &model("dense_vl"));
}

#[test]
fn destinations_that_are_taken_or_hold_the_source_are_refused() {
    let scratch = tempfile::tempdir().unwrap();
    let reference = scratch.path().join("model");
    fs_err::create_dir(&reference).unwrap();
    for entry in fs_err::read_dir(model("dense_vl")).unwrap() {
        let entry = entry.unwrap();
        fs_err::copy(entry.path(), reference.join(entry.file_name())).unwrap();
    }
    let megatron = scratch.path().join("megatron");
    assert_eq!(import(&reference, &megatron, "").0, 0);
    let before = fs_err::read(megatron.join("iter_0000000/.metadata")).unwrap();
    let (code, stderr) = import(&reference, &megatron, "");
    assert_eq!(code, 1);
    assert!(stderr.contains("exists and is not empty"), "{stderr}");
    for (target, texts) in [
        (reference.clone(), "overlap"),
        (reference.join("inside"), "overlap"),
        (scratch.path().to_owned(), "overlap"),
    ] {
        let (code, stderr) = import(&reference, &target, "--overwrite");
        assert_eq!(code, 1, "{stderr}");
        assert!(stderr.contains(texts), "{stderr}");
    }
    let (code, stderr) = export(&reference, &megatron, &megatron, "--overwrite");
    assert_eq!(code, 1);
    assert!(stderr.contains("overlap"), "{stderr}");
    assert_eq!(
        fs_err::read(megatron.join("iter_0000000/.metadata")).unwrap(),
        before
    );
    assert_same_directory(&reference, &model("dense_vl"));
}
