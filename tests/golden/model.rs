//! The whole model against transformers: every output and gradient of `goldens/model`.
//!
//! Bars are those of goldens/README.md: 1e-6 in float64, ten times the noise of transformers' own float32 run in
//! float32, and a rounding budget in bfloat16.

use bridge_core::checkpoint::Overwrite;
use bridge_torch::model::vision_tables::VisionTables;
use bridge_torch::model::{ForwardOptions, ModelOptions, ModelOutput, Qwen3VlModel, SaveOptions};
use serde_json::Value;
use tch::{Kind, Tensor};
use tests::golden;

use crate::fixture::{Tensors, distance, model, real_rows, triples, value};

const CASES: [&str; 15] = [
    "text",
    "text_left_padding",
    "text_right_padding",
    "image",
    "images_and_none",
    "none_and_images_right",
    "video",
    "image_and_video",
    "length_1",
    "length_63",
    "length_64",
    "length_65",
    "length_130",
    "length_200",
    "image_batch",
];

fn noise() -> Value {
    let text = fs_err::read_to_string(golden("model/noise.json")).unwrap();
    serde_json::from_str(&text).unwrap()
}

/// Bars of one case: of a tensor by its noise key, and of a scalar loss.
struct Bars {
    float64: bool,
    noise: Value,
}

impl Bars {
    fn new(noise: &Value, case: &str, dtype: Kind) -> Self {
        Self {
            float64: dtype == Kind::Double,
            noise: noise[case].clone(),
        }
    }

    fn tensor(&self, key: &str) -> f64 {
        if self.float64 {
            return 1e-6;
        }
        10.0 * self.noise[key]
            .as_f64()
            .unwrap_or_else(|| panic!("no noise for {key}"))
    }

    fn loss(&self) -> f64 {
        if self.float64 {
            return 1e-6;
        }
        (10.0 * self.noise["loss"].as_f64().unwrap()).max(2e-6)
    }
}

fn check_case(model: &Qwen3VlModel, name: &str, case: &str, bars: &Bars) {
    let file = Tensors::golden(&format!("model/{name}_{case}.safetensors"));
    let batch = file.batch("in.");
    let mask = batch.attention_mask.as_ref().unwrap().shallow_clone();
    let out = tch::no_grad(|| model.forward(&batch, &ForwardOptions::default())).unwrap();
    let what = |key: &str| format!("{name} {case}: {key}");
    let near = |key: &str, found: &Tensor, noise: &str, masked: bool| {
        let Some(expected) = file.get(&format!("out.{key}")) else {
            panic!("{}", what(key));
        };
        let apart = if masked {
            distance(&real_rows(found, &mask), &real_rows(expected, &mask))
        } else {
            distance(found, expected)
        };
        let bar = bars.tensor(noise);
        assert!(apart <= bar, "{}: {apart:e} > {bar:e}", what(key));
    };

    assert_eq!(
        out.position_ids,
        *file.at("out.position_ids"),
        "{}",
        what("position_ids")
    );
    let deltas = file
        .get("out.rope_deltas")
        .map(|deltas| Vec::<i64>::try_from(deltas.view([-1])).unwrap());
    assert_eq!(out.rope_deltas, deltas, "{}", what("rope_deltas"));
    for (key, found) in [
        ("visual", &out.visual),
        ("visual_videos", &out.visual_videos),
    ] {
        assert_eq!(
            found.is_some(),
            file.get(&format!("out.{key}")).is_some(),
            "{}",
            what(key)
        );
        if let Some(found) = found {
            near(key, found, key, false);
        }
    }
    for (index, hidden) in out.hidden_states.iter().enumerate() {
        near(&format!("hidden.{index}"), hidden, "hidden", true);
    }
    near("hidden.norm", &out.hidden_norm, "hidden", true);
    if file.get("out.logits").is_some() {
        near("logits", out.logits.as_ref().unwrap(), "logits", true);
    }
    check_routers(&out, &file, &mask, bars, &what);
    for (key, found) in [("loss", &out.loss), ("aux_loss", &out.aux_loss)] {
        let expected = file.get(&format!("out.{key}"));
        assert_eq!(found.is_some(), expected.is_some(), "{}", what(key));
        if let (Some(found), Some(expected)) = (found, expected) {
            let apart = (value(found) - value(expected)).abs() / value(expected).abs();
            assert!(apart <= bars.loss(), "{}: {apart:e}", what(key));
        }
    }
}

fn check_routers(
    out: &ModelOutput,
    file: &Tensors,
    mask: &Tensor,
    bars: &Bars,
    what: &dyn Fn(&str) -> String,
) {
    for (layer, router) in out.routers.iter().enumerate() {
        let key = |part: &str| format!("out.router.{layer}.{part}");
        assert_eq!(
            real_rows(&router.experts, mask),
            real_rows(file.at(&key("experts")), mask),
            "{}",
            what(&key("experts"))
        );
        for (part, found) in [("logits", &router.logits), ("weights", &router.weights)] {
            let expected = file.at(&key(part));
            let apart = distance(&real_rows(found, mask), &real_rows(expected, mask));
            // A router reads a normed hidden state, so its noise is at most that of the hidden states' own kind.
            let bar = bars
                .tensor("hidden")
                .max(if bars.float64 { 0.0 } else { 1e-4 });
            assert!(apart <= bar, "{}: {apart:e} > {bar:e}", what(&key(part)));
        }
    }
}

fn check_all(name: &str, dtype: Kind) {
    let noise = noise();
    let (_, model) = model(name, dtype, true);
    for case in CASES {
        let bars = Bars::new(&noise, &format!("{name}_{case}"), dtype);
        check_case(&model, name, case, &bars);
    }
}

#[test]
fn dense_outputs_equal_transformers_in_float64() {
    check_all("dense_vl", Kind::Double);
}

#[test]
fn moe_outputs_equal_transformers_in_float64() {
    check_all("moe_vl", Kind::Double);
}

#[test]
fn dense_outputs_stay_within_the_noise_in_float32() {
    check_all("dense_vl", Kind::Float);
}

#[test]
fn moe_outputs_stay_within_the_noise_in_float32() {
    check_all("moe_vl", Kind::Float);
}

/// Runs `image_batch` with the head, and checks the losses and the gradients of `loss` and of `total_loss`.
fn check_gradients(name: &str, dtype: Kind, grads: &[&str]) {
    let noise = noise();
    let (bridge, model) = model(name, dtype, true);
    let batch = Tensors::golden(&format!("model/{name}_image_batch.safetensors")).batch("in.");
    let mask = batch.attention_mask.as_ref().unwrap().shallow_clone();
    let mtp = Tensors::golden(&format!("model/{name}_image_batch_mtp.safetensors"));
    let bars = Bars::new(&noise, &format!("{name}_image_batch_mtp"), dtype);
    let float64 = dtype == Kind::Double;

    let out = model.forward(&batch, &ForwardOptions::default()).unwrap();
    let logits = out.mtp_logits.as_ref().unwrap();
    let apart = distance(
        &real_rows(logits, &mask),
        &real_rows(mtp.at("out.mtp_logits"), &mask),
    );
    assert!(
        apart <= bars.tensor("logits"),
        "{name} mtp_logits: {apart:e}"
    );
    for (key, found) in [
        ("loss", &out.loss),
        ("mtp_loss", &out.mtp_loss),
        ("total_loss", &out.total_loss),
    ] {
        let (found, expected) = (
            value(found.as_ref().unwrap()),
            value(mtp.at(&format!("out.{key}"))),
        );
        let apart = (found - expected).abs() / expected;
        assert!(apart <= bars.loss(), "{name} {key}: {apart:e}");
    }

    // The float32 noise of gradients is stated as a whole: worst 2.5e-5 (dense), 2.5e-4 (MoE).
    let worst = if name.starts_with("moe") {
        2.5e-4
    } else {
        2.5e-5
    };
    let bar = if float64 { 1e-6 } else { 10.0 * worst };
    let compare = |files: &[String], complete: bool| {
        let found = Tensors(model.hf_gradients(&bridge).unwrap().into_iter().collect());
        let mut seen = 0;
        for file in files {
            for (key, expected) in Tensors::golden(&format!("model/{file}.safetensors")).0 {
                let key = key.strip_prefix("grad.").unwrap();
                let apart = distance(found.at(key), &expected);
                assert!(apart <= bar, "{name} {file} {key}: {apart:e} > {bar:e}");
                seen += 1;
            }
        }
        if complete {
            assert_eq!(
                seen,
                found.0.len(),
                "{name}: gradients that no golden holds"
            );
        }
    };
    out.loss.unwrap().backward();
    let files: Vec<String> = grads
        .iter()
        .map(|part| format!("{name}_image_batch_grads{part}"))
        .collect();
    compare(&files, true);

    model.params().clear_grads();
    let out = model.forward(&batch, &ForwardOptions::default()).unwrap();
    out.total_loss.unwrap().backward();
    compare(&[format!("{name}_image_batch_mtp_grads")], false);
}

#[test]
fn dense_gradients_equal_transformers_in_float64() {
    check_gradients("dense_vl", Kind::Double, &[""]);
}

#[test]
fn moe_gradients_equal_transformers_in_float64() {
    check_gradients("moe_vl", Kind::Double, &["-0", "-1"]);
}

#[test]
fn dense_gradients_stay_within_the_noise_in_float32() {
    check_gradients("dense_vl", Kind::Float, &[""]);
}

#[test]
fn moe_gradients_stay_within_the_noise_in_float32() {
    check_gradients("moe_vl", Kind::Float, &["-0", "-1"]);
}

/// rms(a - b) / rms(b).
fn rms_ratio(found: &Tensor, expected: &Tensor) -> f64 {
    let wide = |t: &Tensor| t.to_kind(Kind::Double);
    let rms = |t: Tensor| (&t * &t).mean(Kind::Double).double_value(&[]).sqrt();
    rms(wide(found) - wide(expected)) / rms(wide(expected))
}

#[test]
fn bfloat16_costs_no_more_than_in_transformers() {
    let name = "dense_vl_tied_bf16";
    let (_, model) = model(name, Kind::BFloat16, true);
    for case in ["text", "text_right_padding", "image"] {
        let file = Tensors::golden(&format!("model/{name}_{case}.safetensors"));
        let batch = file.batch("in.");
        let mask = batch.attention_mask.as_ref().unwrap().shallow_clone();
        let out = tch::no_grad(|| model.forward(&batch, &ForwardOptions::default())).unwrap();
        assert_eq!(out.logits.as_ref().unwrap().kind(), Kind::BFloat16);
        let exact = real_rows(file.at("f32.logits"), &mask);
        let ours = rms_ratio(&real_rows(out.logits.as_ref().unwrap(), &mask), &exact);
        let theirs = rms_ratio(&real_rows(file.at("out.logits"), &mask), &exact);
        assert!(ours <= 1.5 * theirs, "{case}: {ours} against {theirs}");
        let (found, expected) = (
            value(out.loss.as_ref().unwrap()),
            value(file.at("f32.loss")),
        );
        assert!(
            (found / expected - 1.0).abs() <= 0.005,
            "{case}: loss {found}, {expected}"
        );
    }
}

#[test]
fn position_tables_of_the_vision_tower_equal_transformers() {
    let file = Tensors::golden("ops.safetensors");
    for side in [8, 48] {
        let case = |part: &str| format!("vision_interpolation_side{side}.{part}");
        let tables = VisionTables::new(&triples(file.at(&case("in.grid_thw"))), side, 2);
        let taps = Tensor::from_slice(&tables.taps).view([-1, 4]);
        assert_eq!(taps, *file.at(&case("out.indices")), "side {side}");
        let weights = Tensor::from_slice(&tables.weights).view([-1, 4]);
        let apart = distance(&weights, file.at(&case("out.weights")));
        assert!(apart <= 1e-6, "side {side}: {apart:e}");
    }
    let grids = triples(file.at("vision_rope_d16.in.grid_thw"));
    let tables = VisionTables::new(&grids, 8, 2);
    let positions = Tensor::from_slice(&tables.positions).view([-1, 2]);
    assert_eq!(positions, *file.at("vision_rope_d16.out.positions_hw"));
    let mut borders = vec![0];
    for frame in &tables.frames {
        borders.push(borders[borders.len() - 1] + frame);
    }
    let expected: Vec<i64> = Vec::try_from(
        file.at("vision_rope_d16.out.cu_seqlens")
            .to_kind(Kind::Int64),
    )
    .unwrap();
    assert_eq!(borders, expected);
}

/// A directory's tensors and small files, by name.
fn contents(dir: &std::path::Path) -> std::collections::BTreeMap<String, Vec<u8>> {
    let files = fs_err::read_dir(dir).unwrap().map(|entry| entry.unwrap());
    files
        .map(|file| {
            let name = file.file_name().into_string().unwrap();
            (name, fs_err::read(file.path()).unwrap())
        })
        .collect()
}

/// A_log and out_norm are float32 in the checkpoints and were cast to bfloat16 elsewhere; MTP heads were lost.
#[test]
fn a_saved_model_is_the_loaded_checkpoint_byte_for_byte() {
    let dir = tempfile::tempdir().unwrap();
    for (name, dtype) in [
        ("dense_vl", Kind::Float),
        ("dense_vl", Kind::Double),
        ("moe_vl", Kind::Float),
        ("dense_vl_tied_bf16", Kind::BFloat16),
        ("moe_vl_bf16", Kind::BFloat16),
        ("moe_vl_bf16", Kind::Float),
    ] {
        for (mtp, unchanged) in [(true, false), (false, false), (true, true)] {
            let (bridge, model) = model(name, dtype, mtp);
            let target = dir
                .path()
                .join(format!("{name}_{dtype:?}_{mtp}_{unchanged}"));
            let options = SaveOptions {
                unchanged: &|_| unchanged,
                overwrite: Overwrite::No,
            };
            model.save_hf(&bridge, &target, &options).unwrap();
            let (found, expected) = (
                contents(&target),
                contents(&golden("checkpoints").join(name)),
            );
            assert_eq!(
                found.keys().collect::<Vec<_>>(),
                expected.keys().collect::<Vec<_>>()
            );
            for (file, expected) in &expected {
                assert!(
                    found[file] == *expected,
                    "{name} {dtype:?} mtp {mtp}: {file} differs"
                );
            }
            assert!(
                model.save_hf(&bridge, &target, &options).is_err(),
                "it was overwritten"
            );
        }
    }
}

/// bfloat16 initialisation drew zeros elsewhere, and A_log became -inf: a head that is dead without a word.
#[test]
fn a_log_that_is_not_finite_is_refused_by_name_at_load() {
    let dir = tempfile::tempdir().unwrap();
    let source = golden("checkpoints/dense_vl");
    for (file, bytes) in contents(&source) {
        fs_err::write(dir.path().join(file), bytes).unwrap();
    }
    let weights = dir.path().join("model.safetensors");
    let mut bytes = fs_err::read(&weights).unwrap();
    let name = "model.language_model.layers.1.linear_attn.A_log";
    let (start, _) = {
        let (header, metadata) = safetensors::SafeTensors::read_metadata(&bytes).unwrap();
        let (begin, end) = metadata.info(name).unwrap().data_offsets;
        (8 + header + begin, end)
    };
    bytes[start + 8..start + 12].copy_from_slice(&f32::NEG_INFINITY.to_le_bytes());
    fs_err::write(&weights, bytes).unwrap();
    let bridge = bridge_core::AutoBridge::from_hf_pretrained(dir.path()).unwrap();
    let error = Qwen3VlModel::load(&bridge, &ModelOptions::default()).unwrap_err();
    let cause = std::error::Error::source(&error).unwrap().to_string();
    assert!(
        cause.contains(name) && cause.contains("element 2"),
        "{cause}"
    );
}
