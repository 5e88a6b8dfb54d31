//! Other dtypes and other forms of experts, norms and FP8.

use std::path::Path;

use bridge_core::Dtype;
use bridge_core::checkpoint::hf::{HfCheckpoint, HfLayout, HfWriter};
use bridge_core::checkpoint::torch_dist::TorchDistCheckpoint;
use bridge_core::checkpoint::{Overwrite, TensorInfo, TensorSink, TensorSource};
use tests::tensors::bytes;

use super::{comes_back, config, export, import, shown};
use crate::program::{model, trainer, two, two_json};
use crate::shard::words;
use crate::unshard::assert_same_directory;

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
