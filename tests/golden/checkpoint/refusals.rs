//! Directories that do not fit their config: each error names file, tensor and numbers.

use super::*;

const UP: &str = "model.language_model.layers.0.mlp.up_proj.weight";

#[test]
fn a_missing_tensor_is_named_and_nothing_is_planned() {
    let dir = changed(
        "dense_vl",
        |tensors| tensors.retain(|(name, ..)| name != UP),
        |_| {},
    );
    assert_says(
        &refusal(&dir.path().join("model")),
        &[UP, "missing", "[96, 64]"],
    );
}

#[test]
fn an_unknown_tensor_is_named_with_its_file_and_the_nearest_name() {
    let dir = changed(
        "dense_vl",
        |tensors| {
            let mut extra = tensors[3].clone();
            extra.0 = UP.replace("up_proj", "upp_proj");
            tensors.push(extra);
        },
        |_| {},
    );
    let message = refusal(&dir.path().join("model"));
    assert_says(
        &message,
        &["upp_proj", "safetensors", "claimed by no row", UP],
    );
}

#[test]
fn a_layer_beyond_the_config_is_named_with_the_reason() {
    let dir = changed(
        "dense_vl",
        |_| {},
        |config| {
            config["text_config"]["num_hidden_layers"] = 3.into();
            config["text_config"]
                .as_object_mut()
                .unwrap()
                .remove("layer_types");
        },
    );
    let message = refusal(&dir.path().join("model"));
    assert_says(
        &message,
        &[
            "model.language_model.layers.3.",
            "beyond those of config.json",
        ],
    );
}

#[test]
fn a_wrong_shape_and_a_wrong_dtype_are_named_with_found_and_expected() {
    let dir = changed(
        "dense_vl",
        |tensors| {
            for (name, info, _) in tensors {
                if name == UP {
                    info.shape.reverse();
                }
                if name.ends_with("layers.1.input_layernorm.weight") {
                    info.dtype = Dtype::I32;
                }
            }
        },
        |_| {},
    );
    let message = refusal(&dir.path().join("model"));
    assert_says(
        &message,
        &[UP, "[64, 96]", "[96, 64]", "transposed", "safetensors"],
    );
    assert_says(
        &message,
        &["layers.1.input_layernorm.weight", "I32", "2 problems"],
    );
}

#[test]
fn a_weight_that_is_not_a_number_is_named_with_its_place() {
    let dir = changed(
        "dense_vl",
        |tensors| {
            let (.., bytes) = tensors.iter_mut().find(|(name, ..)| name == UP).unwrap();
            bytes[40..44].copy_from_slice(&f32::NAN.to_le_bytes());
        },
        |_| {},
    );
    let bridge = AutoBridge::from_hf_pretrained(&dir.path().join("model")).unwrap();
    let plan = bridge.plan(&PlanOptions::default()).unwrap();
    let target = dir.path().join("out");
    let writer = HfWriter::like(bridge.checkpoint().unwrap(), &target, Overwrite::No).unwrap();
    let memory = memory_for(&plan);
    let error = execute(
        &plan,
        bridge.checkpoint().unwrap(),
        &memory,
        &ExecuteOptions::default(),
    )
    .unwrap_err();
    assert_says(&text(&error), &[UP, "element 10", "NaN"]);
    drop(writer);
    assert!(!target.exists(), "nothing is written");
    assert_eq!(leftovers(dir.path()), Vec::<String>::new());
}

#[test]
fn an_unsupported_architecture_is_refused_with_the_supported_ones() {
    let dir = changed(
        "dense_vl",
        |_| {},
        |config| config["architectures"][0] = "LlamaForCausalLM".into(),
    );
    assert_says(
        &refusal(&dir.path().join("model")),
        &[
            "LlamaForCausalLM",
            "Qwen3_5ForConditionalGeneration",
            "Qwen3_5MoeForConditionalGeneration",
            "Qwen3_5ForCausalLM",
            "Qwen3_5MoeForCausalLM",
            "Qwen3_5ForTokenClassification",
        ],
    );
}

#[test]
fn config_values_of_other_models_are_refused_together() {
    let dir = changed(
        "dense_vl",
        |_| {},
        |config| {
            let text = &mut config["text_config"];
            text["attn_output_gate"] = false.into();
            text["mamba_ssm_dtype"] = "bfloat16".into();
            text["hidden_act"] = "gelu".into();
            text["rope_parameters"]["rope_type"] = "yarn".into();
            text["num_key_value_heads"] = 3.into();
            text["vocab_sise"] = 1024.into();
            text.as_object_mut().unwrap().remove("vocab_size");
            text["a_key_of_tomorrow"] = 1.into();
        },
    );
    let message = refusal(&dir.path().join("model"));
    assert_says(
        &message,
        &[
            "attn_output_gate",
            "mamba_ssm_dtype",
            "hidden_act",
            "rope_type",
            "num_key_value_heads (3)",
            "did you mean `vocab_size`",
        ],
    );
    assert!(!message.contains("tomorrow"), "{message}");
}
