//! Block-wise FP8 against an independent computation, and each way in which scales can be wrong.

use tests::fp8::{self, Form, Fp8};

use super::*;

fn made(scratch: &Path, form: Form) -> Fp8 {
    fp8::directories(&golden("checkpoints/dense_vl"), scratch, form)
}

/// Every parameter of a directory, imported.
fn imported(dir: &Path, options: &PlanOptions, run: &ExecuteOptions) -> Tensors {
    let bridge = AutoBridge::from_hf_pretrained(dir).unwrap();
    let plan = bridge.plan(options).unwrap();
    let memory = memory_for(&plan);
    execute(&plan, bridge.checkpoint().unwrap(), &memory, run).unwrap();
    plan.tensors
        .iter()
        .map(|tensor| {
            let info = memory.info(&tensor.name).unwrap();
            (
                tensor.name.clone(),
                info,
                memory.bytes(&tensor.name).unwrap(),
            )
        })
        .collect()
}

fn assert_same(found: &Tensors, wanted: &Tensors) {
    assert_eq!(found.len(), wanted.len());
    for (found, wanted) in found.iter().zip(wanted) {
        assert_eq!((&found.0, &found.1), (&wanted.0, &wanted.1));
        assert!(found.2 == wanted.2, "{} differs", found.0);
    }
}

/// Blocks that matrices are multiples of, that they are smaller than, and that divide neither rows nor columns.
const BLOCKS: [[usize; 2]; 3] = [[128, 128], [16, 32], [48, 40]];

#[test]
fn a_matrix_in_fp8_becomes_value_times_scale_in_bfloat16_whatever_the_cut_and_the_buffer() {
    for block in BLOCKS {
        for scales in [Dtype::F32, Dtype::Bf16] {
            let scratch = tempfile::tempdir().unwrap();
            let form = Form {
                block,
                scales,
                ..Form::default()
            };
            let made = made(scratch.path(), form);
            for tp_rank in 0..2 {
                let cut = bridge_core::plan::Cut {
                    tp_rank,
                    tp_size: 2,
                    ..Default::default()
                };
                for options in [
                    PlanOptions::default(),
                    PlanOptions {
                        cut,
                        ..Default::default()
                    },
                ] {
                    for buffer_bytes in [30, 1000, 512 << 10] {
                        let run = ExecuteOptions {
                            buffer_bytes,
                            ..ExecuteOptions::default()
                        };
                        assert_same(
                            &imported(&made.quantised, &options, &run),
                            &imported(&made.bfloat16, &options, &run),
                        );
                    }
                }
            }
        }
    }
}

/// Through bfloat16 first, a value of float16 or float32 would have lost bits.
#[test]
fn another_dtype_is_rounded_to_once() {
    let scratch = tempfile::tempdir().unwrap();
    let made = made(scratch.path(), Form::default());
    for dtype in [Dtype::F32, Dtype::F16] {
        let options = PlanOptions {
            dtype: Some(dtype),
            ..PlanOptions::default()
        };
        let run = ExecuteOptions::default();
        let wanted = imported(&made.float32, &options, &run);
        assert_same(&imported(&made.quantised, &options, &run), &wanted);
        assert!(wanted != imported(&made.bfloat16, &options, &run));
    }
}

#[test]
fn any_range_of_bytes_is_read_as_the_whole_is() {
    let scratch = tempfile::tempdir().unwrap();
    let made = made(
        scratch.path(),
        Form {
            block: [48, 40],
            ..Form::default()
        },
    );
    let bridge = AutoBridge::from_hf_pretrained(&made.quantised).unwrap();
    let files = bridge.checkpoint().unwrap();
    let written = files.as_written();
    let wide = HfCheckpoint::open(&made.float32).unwrap();
    let narrow = HfCheckpoint::open(&made.bfloat16).unwrap();
    let name = "model.language_model.layers.0.mlp.down_proj.weight";
    let cases: [(&dyn TensorSource, &HfCheckpoint); 2] = [(files, &wide), (&written, &narrow)];
    for (source, wanted) in cases {
        assert_eq!(source.info(name), wanted.info(name));
        let len = source.info(name).unwrap().num_bytes();
        for (offset, count) in [(0, 1), (1, 2), (3, 1000), (158, 7), (len - 5, 5), (len, 0)] {
            let mut found = vec![0; count];
            source.read(name, offset, &mut found).unwrap();
            let mut expected = vec![0; count];
            wanted.read(name, offset, &mut expected).unwrap();
            assert_eq!(found, expected, "{offset} {count}");
        }
        let beyond = source.read(name, len - 1, &mut [0; 2]).unwrap_err();
        assert_says(&text(&beyond), &[name, "it has"]);
    }
}

/// The way back is closed: what is written is bfloat16, without scales and without the word of them.
#[test]
fn a_directory_like_one_in_fp8_is_the_unquantised_one() {
    let scratch = tempfile::tempdir().unwrap();
    let made = made(
        scratch.path(),
        Form {
            max_shard_bytes: 20_000,
            ..Form::default()
        },
    );
    let bridge = AutoBridge::from_hf_pretrained(&made.quantised).unwrap();
    let files = bridge.checkpoint().unwrap();
    assert!(files.quantised().count() > 20);
    let plan = bridge.plan(&PlanOptions::default()).unwrap();
    let memory = memory_for(&plan);
    let run = ExecuteOptions::default();
    execute(&plan, files, &memory, &run).unwrap();
    let target = scratch.path().join("back");
    let writer = HfWriter::like(files, &target, Overwrite::No).unwrap();
    execute(&plan.inverted(), &memory, &writer, &run).unwrap();
    writer.finish().unwrap();

    let sorted = |dir: &Path| {
        let mut tensors = read_all(&HfCheckpoint::open(dir).unwrap());
        tensors.sort_by(|a, b| a.0.cmp(&b.0));
        tensors
    };
    assert_same(&sorted(&target), &sorted(&made.bfloat16));
    let json = |dir: &Path, file: &str| -> serde_json::Value {
        serde_json::from_slice(&fs_err::read(dir.join(file)).unwrap()).unwrap()
    };
    let config = json(&target, "config.json");
    assert_eq!(config, json(&made.bfloat16, "config.json"));
    assert!(
        json(&made.quantised, "config.json")
            .get("quantization_config")
            .is_some()
    );
    let index = "model.safetensors.index.json";
    let total = |dir: &Path| json(dir, index)["metadata"]["total_size"].clone();
    assert_eq!(total(&target), total(&made.bfloat16));
    let again = AutoBridge::from_hf_pretrained(&target).unwrap();
    assert_eq!(again.checkpoint().unwrap().quantised().count(), 0);

    // Carried over without a plan, as tensors are that a run left alone.
    let copied = scratch.path().join("copied");
    let names: Vec<&str> = files.names().collect();
    let writer = HfWriter::like(files, &copied, Overwrite::No).unwrap();
    copy_tensors(&names, &files.as_written(), &writer, &run).unwrap();
    writer.finish().unwrap();
    assert_same(&sorted(&copied), &sorted(&target));
}

/// The hub's mixture-of-experts models in FP8 store experts one by one.
#[test]
fn experts_in_fp8_are_matrices_one_by_one() {
    let scratch = tempfile::tempdir().unwrap();
    let source = derived("moe_vl_per_expert", scratch.path());
    let made = fp8::directories(&source, scratch.path(), Form::default());
    let run = ExecuteOptions::default();
    let options = PlanOptions::default();
    let found = imported(&made.quantised, &options, &run);
    assert_same(&found, &imported(&made.bfloat16, &options, &run));
    let expert = found
        .iter()
        .find(|(name, ..)| name.ends_with("layers.7.mlp.experts.linear_fc1.weight7"))
        .unwrap();
    assert_eq!(expert.1.dtype, Dtype::Bf16);
}

const NAME: &str = "model.language_model.layers.0.mlp.up_proj.weight";
const SCALES: &str = "model.language_model.layers.0.mlp.up_proj.weight_scale_inv";

/// A checkpoint in FP8 changed by `change`, and its `quantization_config` by `config`.
fn damaged(
    change: impl FnOnce(&mut Tensors),
    config: impl FnOnce(&mut serde_json::Value),
) -> (tempfile::TempDir, PathBuf) {
    let scratch = tempfile::tempdir().unwrap();
    let made = made(scratch.path(), Form::default());
    let mut tensors = read_all(&HfCheckpoint::open(&made.quantised).unwrap());
    change(&mut tensors);
    let text = fs_err::read(made.quantised.join("config.json")).unwrap();
    let mut value: serde_json::Value = serde_json::from_slice(&text).unwrap();
    config(&mut value["quantization_config"]);
    let target = scratch.path().join("damaged");
    fp8::write(&tensors, &value, &target, 1 << 20);
    (scratch, target)
}

fn find<'a>(tensors: &'a mut Tensors, name: &str) -> &'a mut (String, TensorInfo, Vec<u8>) {
    tensors
        .iter_mut()
        .find(|(known, ..)| known == name)
        .unwrap()
}

#[test]
fn a_matrix_in_fp8_without_scales_is_refused() {
    let (_scratch, dir) = damaged(
        |tensors| tensors.retain(|(name, ..)| name != SCALES),
        |_| {},
    );
    assert_says(&refusal(&dir), &[NAME, SCALES, "is missing"]);
}

#[test]
fn scales_without_a_matrix_are_refused() {
    let (_scratch, dir) = damaged(|tensors| tensors.retain(|(name, ..)| name != NAME), |_| {});
    assert_says(&refusal(&dir), &[SCALES, "a tensor that is not there"]);
}

#[test]
fn scales_beside_a_matrix_that_was_replaced_by_an_unquantised_one_are_refused() {
    let (_scratch, dir) = damaged(
        |tensors| {
            let (_, info, bytes) = find(tensors, NAME);
            info.dtype = Dtype::Bf16;
            bytes.resize(2 * bytes.len(), 0);
        },
        |_| {},
    );
    assert_says(
        &refusal(&dir),
        &[SCALES, NAME, "dtype BF16 and not F8_E4M3"],
    );
}

#[test]
fn scales_of_other_blocks_are_refused_with_both_shapes() {
    let (_scratch, dir) = damaged(
        |_| {},
        |config| config["weight_block_size"] = [32, 32].into(),
    );
    assert_says(
        &refusal(&dir),
        &[
            SCALES,
            "[1, 1]",
            "[3, 2]",
            "[96, 64]",
            "[32, 32]",
            "weight_block_size",
        ],
    );
}

#[test]
fn blocks_are_128_by_128_where_the_config_does_not_say() {
    for key in ["weight_block_size", "modules_to_not_convert"] {
        let (_scratch, dir) = damaged(
            |_| {},
            |config| {
                config.as_object_mut().unwrap().remove(key);
            },
        );
        let bridge = AutoBridge::from_hf_pretrained(&dir).unwrap();
        bridge.plan(&PlanOptions::default()).unwrap();
    }
}

#[test]
fn a_scale_that_is_not_a_number_is_named_with_its_place() {
    for bad in [f32::NAN, f32::INFINITY] {
        let (_scratch, dir) = damaged(
            |tensors| {
                let name = "mtp.layers.0.self_attn.q_proj.weight_scale_inv";
                find(tensors, name).2[8..12].copy_from_slice(&bad.to_le_bytes());
            },
            |_| {},
        );
        let bridge = AutoBridge::from_hf_pretrained(&dir).unwrap();
        let plan = bridge.plan(&PlanOptions::default()).unwrap();
        let run = ExecuteOptions::default();
        let files = bridge.checkpoint().unwrap();
        let error = execute(&plan, files, &memory_for(&plan), &run).unwrap_err();
        let words = [
            "element 2 of `mtp.layers.0.self_attn.q_proj.weight_scale_inv`",
            "damaged",
        ];
        assert_says(&text(&error), &words);
    }
}

#[test]
fn a_value_in_fp8_that_is_not_a_number_is_named_with_its_place() {
    let (_scratch, dir) = damaged(|tensors| find(tensors, NAME).2[70] = 0xff, |_| {});
    let bridge = AutoBridge::from_hf_pretrained(&dir).unwrap();
    let plan = bridge.plan(&PlanOptions::default()).unwrap();
    let run = ExecuteOptions::default();
    let files = bridge.checkpoint().unwrap();
    let error = execute(&plan, files, &memory_for(&plan), &run).unwrap_err();
    assert_says(&text(&error), &[NAME, "element 70", "NaN"]);
}

#[test]
fn fp8_that_is_no_matrix_scales_of_a_wrong_type_and_other_formats_are_refused() {
    let norm = "model.language_model.layers.0.input_layernorm.weight";
    let (_scratch, dir) = damaged(
        |tensors| {
            let (_, info, bytes) = find(tensors, norm);
            info.dtype = Dtype::F8E4M3;
            bytes.truncate(64);
            let mut scales = find(tensors, SCALES).clone();
            scales.0 = format!("{norm}_scale_inv");
            tensors.push(scales);
            let (_, info, bytes) = find(tensors, SCALES);
            info.dtype = Dtype::I32;
            bytes.truncate(4);
        },
        |_| {},
    );
    assert_says(
        &refusal(&dir),
        &[
            norm,
            "only matrices",
            SCALES,
            "I32, scales are F32, BF16 or F16",
        ],
    );
    let (_scratch, dir) = damaged(
        |_| {},
        |config| {
            config["quant_method"] = "gptq".into();
            config["fmt"] = "e5m2".into();
            config["weight_block_size"] = serde_json::json!([0, 128]);
        },
    );
    assert_says(
        &refusal(&dir),
        &[
            "`quantization_config.quant_method` is \"gptq\", but only \"fp8\"",
            "`quantization_config.fmt`",
            "`quantization_config.weight_block_size` is [0,128]",
        ],
    );
}
