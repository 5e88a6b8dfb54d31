//! The command line: convert import and export.

use std::collections::BTreeSet;
use std::path::Path;

use bridge_core::Dtype;
use bridge_core::checkpoint::hf::{HfCheckpoint, HfLayout, HfWriter};
use bridge_core::checkpoint::torch_dist::{TorchDistCheckpoint, TorchDistLayout, TorchDistWriter};
use bridge_core::checkpoint::{Overwrite, TensorInfo, TensorSink, TensorSource};
use serde_json::Value;
use tests::golden;

use crate::program::{model, trainer, two, two_json};
use crate::shard::words;
use crate::unshard::assert_same_directory;

fn shown(path: &Path) -> String {
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

fn bytes(source: &dyn TensorSource, name: &str) -> Vec<u8> {
    let info = source.info(name).unwrap();
    let mut bytes = vec![0; usize::try_from(info.num_bytes()).unwrap()];
    source.read(name, 0, &mut bytes).unwrap();
    bytes
}

fn config(dir: &Path) -> Value {
    serde_json::from_slice(&fs_err::read(dir.join("config.json")).unwrap()).unwrap()
}

/// Imports `reference`, exports it with `more`, and asserts that nothing at all changed.
fn comes_back(reference: &Path, import_flags: &str, export_flags: &str) {
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

/// A `torch_dist` directory with the tensors of another one that `keep` answers true for, and `more`.
fn filtered(
    source: &Path,
    target: &Path,
    keep: impl Fn(&str) -> bool,
    more: &[(&str, TensorInfo)],
) {
    let source = TorchDistCheckpoint::open(source).unwrap();
    let kept = source.tensors().filter(|(key, _)| keep(key));
    let mut layout = TorchDistLayout {
        tensors: kept
            .map(|(key, info)| (key.to_owned(), info.clone()))
            .collect(),
        ..TorchDistLayout::default()
    };
    let more = more
        .iter()
        .map(|(key, info)| ((*key).to_owned(), info.clone()));
    layout.tensors.extend(more);
    let writer = TorchDistWriter::create(&layout, target, Overwrite::Yes).unwrap();
    for (key, info) in &layout.tensors {
        let zeros = || vec![0; usize::try_from(info.num_bytes()).unwrap()];
        let same = source.info(key).filter(|theirs| theirs == info);
        let content = same.map_or_else(zeros, |_| bytes(&source, key));
        writer.write(key, 0, &content).unwrap();
    }
    writer.finish().unwrap();
}

/// Whatever is missing, it alone is missing.
#[test]
fn any_part_of_the_head_may_be_missing_and_nothing_else_is_touched() {
    let scratch = tempfile::tempdir().unwrap();
    let reference = model("dense_vl");
    let whole = scratch.path().join("whole");
    assert_eq!(import(&reference, &whole, "").0, 0);
    let opened = TorchDistCheckpoint::open(&whole).unwrap();
    let head: Vec<String> = opened
        .tensors()
        .map(|(key, _)| key.to_owned())
        .filter(|key| key.contains(".mtp."))
        .collect();
    assert!(head.len() > 8);
    for number in 0..head.len() + 4 {
        // Each alone, then halves and thirds of the head.
        let gone = |key: &str| {
            head.iter().position(|one| one == key).is_some_and(|at| {
                match number.checked_sub(head.len()) {
                    None => at == number,
                    Some(more) => at % (2 + more / 2) == more % 2,
                }
            })
        };
        let part = scratch.path().join("part");
        filtered(&whole, &part, |key| !gone(key), &[]);
        let out = scratch.path().join("out");
        let (code, stderr) = export(&reference, &part, &out, "--overwrite");
        assert_eq!(code, 1);
        let first = head.iter().find(|key| gone(key)).unwrap();
        assert!(
            stderr.contains(first.as_str()) || head.iter().filter(|key| gone(key)).count() > 1,
            "{stderr}"
        );
        let (code, stderr) = export(&reference, &part, &out, "--missing copy --overwrite");
        assert_eq!(code, 0, "{stderr}");
        assert_same_directory(&out, &reference);
        let (code, stderr) = export(&reference, &part, &out, "--missing skip --overwrite");
        assert_eq!(code, 0, "{stderr}");
        let (ours, theirs) = (
            HfCheckpoint::open(&out).unwrap(),
            HfCheckpoint::open(&reference).unwrap(),
        );
        for (tensor, _) in theirs.tensors() {
            assert!(
                ours.info(tensor).is_some() || tensor.starts_with("mtp."),
                "{tensor}"
            );
        }
        assert!(ours.names().len() < theirs.names().len());
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

/// slime 1702: one form of the head's experts was read as the other.
#[test]
fn experts_change_their_form_and_come_back_in_the_old_one() {
    let scratch = tempfile::tempdir().unwrap();
    let reference = model("moe_vl");
    let between = scratch.path().join("megatron");
    assert_eq!(import(&reference, &between, "").0, 0);
    for form in ["packed", "per-expert"] {
        let out = scratch.path().join(form);
        let (code, stderr) = export(
            &reference,
            &between,
            &out,
            &format!("--expert-layout {form}"),
        );
        assert_eq!(code, 0, "{stderr}");
        let ours = HfCheckpoint::open(&out).unwrap();
        let one_by_one =
            |name: &str| name.ends_with(".down_proj.weight") && name.contains(".experts.");
        assert_eq!(ours.names().any(one_by_one), form == "per-expert");
        let packed = |name: &str| name.ends_with(".experts.down_proj");
        assert_eq!(ours.names().any(packed), form == "packed");
        assert_eq!(config(&out), config(&reference));
        // Experts stand in the files in which the reference has them.
        let theirs = HfCheckpoint::open(&reference).unwrap();
        assert_eq!(ours.paths().len(), theirs.paths().len());
        for (ours, theirs) in ours.paths().zip(theirs.paths()) {
            let (ours, theirs) = (
                fs_err::metadata(ours).unwrap(),
                fs_err::metadata(theirs).unwrap(),
            );
            assert!(ours.len().abs_diff(theirs.len()) < 64 << 10);
        }
        let again = scratch.path().join("again");
        assert_eq!(import(&out, &again, "--overwrite").0, 0);
        let back = scratch.path().join("back");
        let (code, stderr) = export(&reference, &again, &back, "--overwrite");
        assert_eq!(code, 0, "{stderr}");
        assert_same_directory(&back, &reference);
    }
}

#[test]
fn another_dtype_is_written_and_said_in_the_config() {
    let scratch = tempfile::tempdir().unwrap();
    let between = scratch.path().join("megatron");
    let (code, stderr) = import(&model("dense_vl"), &between, "--torch-dtype bfloat16");
    assert_eq!(code, 0, "{stderr}");
    assert!(stderr.contains("tensors were rounded"), "{stderr}");
    let stored = TorchDistCheckpoint::open(&between).unwrap();
    assert!(stored.tensors().all(|(_, info)| info.dtype == Dtype::Bf16));
    let run_config = fs_err::read_to_string(stored.run_config().unwrap()).unwrap();
    assert!(
        run_config.contains("_target_: torch.bfloat16"),
        "{run_config}"
    );
    let out = scratch.path().join("out");
    let (code, stderr) = export(&model("dense_vl"), &between, &out, "--torch-dtype float16");
    assert_eq!(code, 0, "{stderr}");
    let ours = HfCheckpoint::open(&out).unwrap();
    assert!(ours.tensors().all(|(_, info)| info.dtype == Dtype::F16));
    assert_eq!(config(&out)["dtype"], "float16");
    assert_eq!(config(&out)["text_config"]["dtype"], "float16");
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

/// A copy of `model` whose norms of gated delta nets are bfloat16, with values under 0.5 among them.
fn with_small_norms(model: &Path, target: &Path) -> usize {
    let source = HfCheckpoint::open(model).unwrap();
    let is_norm = |name: &str| name.ends_with(".linear_attn.norm.weight");
    let tensors = source.tensors().map(|(name, info)| {
        let dtype = if is_norm(name) {
            Dtype::Bf16
        } else {
            info.dtype
        };
        let shape = info.shape.clone();
        (name.to_owned(), TensorInfo { dtype, shape })
    });
    let layout = HfLayout::sharded(tensors.collect(), u64::MAX);
    let writer = HfWriter::create(&layout, target, Overwrite::No).unwrap();
    let mut norms = 0;
    for (name, info) in layout.tensors() {
        let content = if is_norm(name) {
            norms += 1;
            let values = (0..info.numel()).map(|at| 0.3 + 0.001 * at as f32);
            values
                .flat_map(|value| half::bf16::from_f32(value).to_le_bytes())
                .collect()
        } else {
            bytes(&source, name)
        };
        writer.write(name, 0, &content).unwrap();
    }
    writer.copy_file(&model.join("config.json")).unwrap();
    writer.finish().unwrap();
    norms
}

/// Megatron Bridge loses bits there and says nothing.
#[test]
fn norms_that_minus_one_would_round_are_named_and_can_be_kept() {
    let scratch = tempfile::tempdir().unwrap();
    let reference = scratch.path().join("model");
    let norms = with_small_norms(&model("dense_vl_tied_bf16"), &reference);
    let between = scratch.path().join("megatron");
    let (code, stderr) = import(&reference, &between, "");
    assert_eq!(code, 0, "{stderr}");
    assert!(
        stderr.contains(&format!("WARN {norms} norms (")),
        "{stderr}"
    );
    assert!(stderr.contains("out_norm.weight`"), "{stderr}");
    assert!(stderr.contains("--exact-norms"), "{stderr}");
    let out = scratch.path().join("out");
    assert_eq!(export(&reference, &between, &out, "").0, 0);
    let (ours, theirs) = (
        HfCheckpoint::open(&out).unwrap(),
        HfCheckpoint::open(&reference).unwrap(),
    );
    for (name, _) in theirs.tensors() {
        let same = bytes(&ours, name) == bytes(&theirs, name);
        assert_eq!(same, !name.ends_with(".linear_attn.norm.weight"), "{name}");
    }
    comes_back(&reference, "--exact-norms", "");
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

/// `trainer convert roundtrip`, with the Megatron side in a directory that is empty before and after: exit code and output.
fn roundtrip(model: &Path, more: &str) -> (i32, String, String) {
    let scratch = tempfile::tempdir().unwrap();
    let args = format!(
        "--hf-model {} --work-dir {}",
        shown(model),
        shown(scratch.path())
    );
    let done = trainer(words(&format!("convert roundtrip {args} {more}")));
    assert_eq!(fs_err::read_dir(scratch.path()).unwrap().count(), 0);
    done
}

/// Megatron Bridge's comparison passes whatever differs by less than 0.1, and what is missing.
#[test]
fn a_round_trip_is_compared_to_the_last_bit() {
    for name in ["dense_vl_tied_bf16", "moe_vl"] {
        let (code, stdout, stderr) = roundtrip(&model(name), "--make-vocab-size-divisible-by 96");
        assert_eq!(code, 0, "{stderr}");
        assert!(stdout.starts_with("equal: "), "{stdout}");
    }
    let scratch = tempfile::tempdir().unwrap();
    let reference = scratch.path().join("model");
    let norms = with_small_norms(&model("dense_vl_tied_bf16"), &reference);
    let (code, stdout, _) = roundtrip(&reference, "");
    assert_eq!(code, 1);
    let lines: Vec<&str> = stdout.lines().collect();
    let (verdict, differences) = lines.split_last().unwrap();
    assert!(
        verdict.starts_with(&format!("{norms} differences: ")),
        "{stdout}"
    );
    assert!(
        differences.len() == norms
            && differences
                .iter()
                .all(|line| line.contains("linear_attn.norm.weight`"))
    );
    let (code, stdout, _) = roundtrip(&reference, "--exact-norms");
    assert_eq!(code, 0, "{stdout}");
}

/// The way back from FP8 is closed: it is said, and the result is whole without it.
#[test]
fn a_model_in_fp8_is_imported_and_comes_back_unquantised() {
    let scratch = tempfile::tempdir().unwrap();
    let made = tests::fp8::directories(&model("dense_vl"), scratch.path(), Default::default());
    let (megatron, out) = (scratch.path().join("megatron"), scratch.path().join("out"));
    let (code, stderr) = import(&made.quantised, &megatron, "");
    assert_eq!(code, 0, "{stderr}");
    assert!(
        stderr.contains("cannot be written in FP8 again"),
        "{stderr}"
    );
    let (code, stderr) = export(&made.quantised, &megatron, &out, "");
    assert_eq!(code, 0, "{stderr}");
    assert!(stderr.contains("are written in bfloat16"), "{stderr}");
    assert_eq!(config(&out), config(&made.bfloat16));
    let (ours, theirs) = (
        HfCheckpoint::open(&out).unwrap(),
        HfCheckpoint::open(&made.bfloat16).unwrap(),
    );
    assert_eq!(ours.names().len(), theirs.names().len());
    for (name, info) in theirs.tensors() {
        assert_eq!(ours.info(name).as_ref(), Some(info), "{name}");
        assert!(bytes(&ours, name) == bytes(&theirs, name), "{name}");
    }
    let (code, stdout, stderr) = roundtrip(&made.quantised, "");
    assert_eq!(code, 0, "{stdout}{stderr}");
    // Codes are held against codes, and against another form as the values that they stand for.
    for (a, b) in [
        (&made.quantised, &made.quantised),
        (&made.quantised, &out),
        (&out, &made.quantised),
    ] {
        let (code, stdout, stderr) = two("verify", a, b, "");
        assert_eq!(code, 0, "{stdout}{stderr}");
    }
    let (code, stdout, _) = two("diff", &made.quantised, &made.float32, "");
    assert_eq!(code, 0, "{stdout}");
    let measured = two_json("diff", &made.quantised, &out, "");
    for tensor in measured["tensors"].as_array().unwrap() {
        assert!(tensor["relative"].as_f64().unwrap() < 0.01, "{tensor}");
    }
    // In float32 nothing is rounded at all.
    let (code, stderr) = import(
        &made.quantised,
        &megatron,
        "--torch-dtype float32 --overwrite",
    );
    assert_eq!(code, 0, "{stderr}");
    let (code, stderr) = export(&made.float32, &megatron, &out, "--overwrite");
    assert_eq!(code, 0, "{stderr}");
    assert_same_directory(&out, &made.float32);
}
