//! The command line: diff.

use std::path::Path;

use bridge_core::checkpoint::hf::{HfCheckpoint, HfLayout, HfWriter};
use bridge_core::checkpoint::{Overwrite, TensorSink, TensorSource};
use serde_json::Value;
use tests::golden;

use crate::program::{model, trainer, two, two_json};

fn diff(a: &Path, b: &Path, more: &str) -> (i32, String, String) {
    two("diff", a, b, more)
}

fn measured(a: &Path, b: &Path, more: &str) -> Value {
    two_json("diff", a, b, more)
}

/// `dense_vl` with some tensors changed value by value.
fn tuned(target: &Path, change: impl Fn(&str, usize, f32) -> f32) {
    let source = HfCheckpoint::open(&model("dense_vl")).unwrap();
    let writer = HfWriter::like(&source, target, Overwrite::Yes).unwrap();
    for (name, info) in source.tensors() {
        let mut bytes = vec![0; usize::try_from(info.num_bytes()).unwrap()];
        source.read(name, 0, &mut bytes).unwrap();
        for (index, word) in bytes.chunks_exact_mut(4).enumerate() {
            let value = f32::from_le_bytes((&*word).try_into().unwrap());
            word.copy_from_slice(&change(name, index, value).to_le_bytes());
        }
        writer.write(name, 0, &bytes).unwrap();
    }
    writer.finish().unwrap();
}

const DOWN: &str = "model.language_model.layers.2.mlp.down_proj.weight";
const EMBEDDING: &str = "model.language_model.embed_tokens.weight";
const VISION: &str = "model.visual.blocks.1.mlp.linear_fc1.weight";

#[test]
fn distances_are_those_that_were_made() {
    let scratch = tempfile::tempdir().unwrap();
    let ours = scratch.path().join("tuned");
    tuned(&ours, |name, index, value| match name {
        DOWN => value * 1.5,
        EMBEDDING if index == 7 => value + 0.25,
        VISION => -value,
        _ => value,
    });
    let found = measured(&model("dense_vl"), &ours, "");
    let tensors = found["tensors"].as_array().unwrap();
    assert_eq!(tensors.len(), 104);
    let names: Vec<&str> = tensors
        .iter()
        .map(|one| one["name"].as_str().unwrap())
        .collect();
    assert_eq!(&names[..3], &[VISION, DOWN, EMBEDDING]);
    let number = |row: usize, key: &str| tensors[row][key].as_f64().unwrap();
    let near = |found: f64, wanted: f64| assert!((found - wanted).abs() < 1e-6, "{found} {wanted}");
    near(number(0, "relative"), 2.0);
    near(number(0, "cosine"), -1.0);
    near(number(1, "relative"), 0.5);
    near(number(1, "cosine"), 1.0);
    near(number(2, "max_abs"), 0.25);
    near(number(2, "relative") * number(2, "norm_a"), 0.25);
    assert_eq!(
        (number(2, "changed"), number(2, "elements")),
        (1.0, 65536.0)
    );
    assert!(
        tensors[3..]
            .iter()
            .all(|one| one["relative"] == 0.0 && one["changed"] == 0)
    );
    assert_eq!(
        (&tensors[1]["part"], &tensors[1]["layer"]),
        (&"language".into(), &2.into())
    );
    assert_eq!(
        (&tensors[0]["part"], &tensors[0]["layer"]),
        (&"vision".into(), &1.into())
    );
    assert_eq!(tensors[2]["layer"], Value::Null);
    let groups = found["groups"].as_array().unwrap();
    let changed: Vec<_> = groups.iter().filter(|one| one["relative"] != 0.0).collect();
    assert_eq!(changed.len(), 3);
    let counted: u64 = groups
        .iter()
        .map(|one| one["tensors"].as_u64().unwrap())
        .sum();
    assert_eq!(counted, 104);

    let plot = scratch.path().join("diff.svg");
    let more = format!("--limit 2 --plot {}", plot.display());
    let (code, stdout, stderr) = diff(&model("dense_vl"), &ours, &more);
    assert_eq!((code, stderr.as_str()), (1, ""));
    for text in [
        VISION,
        DOWN,
        "5.000e-1",
        "-1.000000",
        "and 1 more",
        "3 of 104 tensors differ",
    ] {
        assert!(stdout.contains(text), "no `{text}` in {stdout}");
    }
    assert!(!stdout.contains(EMBEDDING), "{stdout}");
    let svg = fs_err::read_to_string(&plot).unwrap();
    for text in ["<svg", "vision", "language", "layer"] {
        assert!(svg.contains(text), "no `{text}`");
    }
}

#[test]
fn a_checkpoint_is_no_distance_from_itself_in_any_form() {
    let (code, stdout, _) = diff(&model("moe_vl_bf16"), &model("moe_vl_bf16"), "");
    assert_eq!(code, 0);
    let tensors = HfCheckpoint::open(&model("moe_vl_bf16"))
        .unwrap()
        .names()
        .len();
    assert!(
        stdout.contains(&format!("equal: {tensors} tensors")),
        "{stdout}"
    );
    let saved = golden("torch_dist/mcore_dense_tp2pp2");
    let reference = format!("--hf-model {}/config.json", model("dense_vl").display());
    let own = measured(&saved, &saved, "");
    assert_eq!(
        (&own["equal"], own["groups"].as_array().unwrap().len()),
        (&true.into(), 0)
    );
    let own = measured(&saved, &saved, &reference);
    assert_eq!(own["equal"], true);
    assert!(own["groups"].as_array().unwrap().len() > 4);
    // float32 norms minus one and plus one again round by an ulp.
    for (a, b) in [(&saved, &model("dense_vl")), (&model("dense_vl"), &saved)] {
        let found = measured(a, b, "");
        assert_eq!(found["tensors"].as_array().unwrap().len(), 104);
        assert!(
            found["total"]["relative"].as_f64().unwrap() < 1e-8,
            "{}",
            found["total"]
        );
        assert!(found["missing_in_a"].as_array().unwrap().is_empty());
    }
}

#[test]
fn dtypes_may_differ_and_what_has_no_counterpart_is_listed() {
    let saved = golden("torch_dist/mcore_dense_tied_bf16_tp1");
    let found = measured(&model("dense_vl_tied_bf16"), &saved, "");
    let rounded: Vec<&Value> = found["tensors"]
        .as_array()
        .unwrap()
        .iter()
        .filter(|one| one["changed"] != 0)
        .collect();
    assert!(
        rounded
            .iter()
            .all(|one| one["dtype_a"] == "F32" && one["dtype_b"] == "BF16")
    );
    assert_eq!(rounded.len(), 6);
    let largest = found["tensors"][0]["relative"].as_f64().unwrap();
    assert!(largest > 1e-5 && largest < 1.0 / 128.0, "{largest}");

    let (code, stdout, _) = diff(
        &model("dense_vl"),
        &model("dense_vl_tied_bf16"),
        "--limit 1",
    );
    assert_eq!(code, 1);
    assert!(
        stdout.contains("`lm_head.weight`: missing in B"),
        "{stdout}"
    );
    let kv2 = golden("megatron/checkpoints/dense_vl_kv2");
    let found = measured(&kv2, &model("dense_vl"), "");
    assert_eq!(found["equal"], false);
    assert!(
        found["misshapen"]
            .as_array()
            .unwrap()
            .iter()
            .any(|one| one["name"] == EMBEDDING && one["a"][0] == 256 && one["b"][0] == 1024)
    );
}

#[test]
fn a_tensor_that_one_side_lacks_is_a_difference_by_itself() {
    let scratch = tempfile::tempdir().unwrap();
    let less = scratch.path().join("less");
    let source = HfCheckpoint::open(&model("dense_vl")).unwrap();
    let kept = source.tensors().filter(|(name, _)| *name != DOWN);
    let kept = kept.map(|(name, info)| (name.to_owned(), info.clone()));
    let layout = HfLayout::sharded(kept.collect(), u64::MAX);
    let writer = HfWriter::create(&layout, &less, Overwrite::No).unwrap();
    for (name, info) in layout.tensors() {
        let mut bytes = vec![0; usize::try_from(info.num_bytes()).unwrap()];
        source.read(name, 0, &mut bytes).unwrap();
        writer.write(name, 0, &bytes).unwrap();
    }
    writer.finish().unwrap();
    for (a, b, key) in [
        (model("dense_vl"), less.clone(), "missing_in_b"),
        (less, model("dense_vl"), "missing_in_a"),
    ] {
        let found = measured(&a, &b, "");
        assert_eq!(found["equal"], false);
        assert_eq!(found["total"]["changed"], 0);
        assert_eq!(found[key], serde_json::json!([DOWN]));
    }
}

#[test]
fn a_plot_of_another_kind_is_wrong_use_and_shards_are_for_verify() {
    let (code, _, stderr) = diff(&model("dense_vl"), &model("dense_vl"), "--plot diff.png");
    assert_eq!(code, 2);
    assert!(stderr.contains("ends in .svg"), "{stderr}");
    let scratch = tempfile::tempdir().unwrap();
    let file = scratch.path().join("rank.safetensors");
    let name = file.to_string_lossy().into_owned();
    let from = model("dense_vl").to_string_lossy().into_owned();
    let shard = [
        "convert",
        "shard",
        "--hf-model",
        &from,
        "--tp",
        "2",
        "--output",
        &name,
    ];
    assert_eq!(trainer(shard).0, 0);
    assert_eq!(measured(&file, &file, "")["equal"], true);
    let (code, _, stderr) = diff(&model("dense_vl"), &file, "");
    assert_eq!(code, 1);
    assert!(stderr.contains("trainer verify"), "{stderr}");
}
