//! Keys, global shapes and bytes of `torch_dist` directories, planned from a config and its tensors.

use std::collections::{BTreeMap, BTreeSet};

use bridge_core::checkpoint::TensorSource;
use bridge_core::checkpoint::torch_dist::TorchDistCheckpoint;
use bridge_core::convert::{ExecuteOptions, execute};
use bridge_core::plan::{KeyStyle, ModelPlan, PlanOptions};
use bridge_core::{AutoBridge, Dtype};
use serde_json::Value;
use tests::golden;

use crate::checkpoint::directory;
use crate::mapping::{memory_for, sha256};

fn json(name: &str) -> Value {
    serde_json::from_slice(&fs_err::read(golden(name)).unwrap()).unwrap()
}

fn bridge(checkpoint: &str) -> AutoBridge {
    let scratch = tempfile::tempdir().unwrap();
    AutoBridge::from_hf_pretrained(&directory(checkpoint, scratch.path())).unwrap()
}

fn written(bridge: &AutoBridge, options: &PlanOptions) -> ModelPlan {
    bridge.plan_stored(options, KeyStyle::Written).unwrap()
}

fn shapes(plan: &ModelPlan) -> BTreeMap<String, Value> {
    let entry = |tensor: &bridge_core::plan::TensorPlan| {
        (tensor.name.clone(), serde_json::json!(tensor.shape))
    };
    plan.tensors.iter().map(entry).collect()
}

#[test]
fn keys_and_global_shapes_are_megatron_cores() {
    for (checkpoint, file) in [("dense_vl", "model_dense"), ("moe_vl", "model_moe")] {
        let table = json(&format!("torch_dist/{file}.keys.json"));
        let bridge = bridge(checkpoint);
        let ours = shapes(&written(&bridge, &PlanOptions::default()));
        let states: BTreeSet<String> = bridge
            .extra_states(&PlanOptions::default())
            .unwrap()
            .into_iter()
            .collect();
        let mut theirs = BTreeMap::new();
        for (key, entry) in table["keys"].as_object().unwrap() {
            if entry.get("object").is_some() {
                assert!(states.contains(key), "{checkpoint}: no object {key}");
            } else {
                theirs.insert(key.clone(), entry["shape"].clone());
            }
        }
        assert!(theirs.len() > 60);
        assert_eq!(ours, theirs, "{checkpoint}");
    }
}

#[test]
fn a_tied_output_layer_has_no_key() {
    let table = json("torch_dist/model_dense.keys.json");
    let variants = table["variants_against_tp1"].as_object().unwrap();
    let (_, tied) = variants
        .iter()
        .find(|(name, _)| name.contains("tied"))
        .unwrap();
    let missing: BTreeSet<&str> = tied["keys_missing"]
        .as_array()
        .unwrap()
        .iter()
        .map(|key| key.as_str().unwrap())
        .collect();
    let untied = shapes(&written(&bridge("dense_vl"), &PlanOptions::default()));
    let tied = shapes(&written(
        &bridge("dense_vl_tied_bf16"),
        &PlanOptions::default(),
    ));
    let lost: BTreeSet<&str> = untied
        .keys()
        .filter(|key| !tied.contains_key(*key))
        .map(String::as_str)
        .collect();
    assert_eq!(lost, missing);
    assert!(tied.keys().all(|key| untied.contains_key(key)));
}

/// What the real model classes say of themselves, states of norms included.
#[test]
fn every_entry_of_the_models_own_sharded_state_dict_is_planned() {
    for (checkpoint, whole) in [("dense_vl_kv2", true), ("moe_vl", false)] {
        let sharded = json(&format!("megatron/sharded.{checkpoint}.json"));
        let bridge = bridge(checkpoint);
        let options = PlanOptions::default();
        let ours = shapes(&written(&bridge, &options));
        let states: BTreeSet<String> = bridge.extra_states(&options).unwrap().into_iter().collect();
        let (mut tensors, mut objects) = (BTreeSet::new(), BTreeSet::new());
        for rank in sharded["ranks"].as_array().unwrap() {
            for entry in rank["entries"].as_array().unwrap() {
                let key = entry[2].as_str().unwrap();
                if entry[3] == "object" {
                    let numbers = |value: &Value| {
                        let numbers = value.as_array().unwrap().iter();
                        numbers.map(Value::to_string).collect::<Vec<_>>().join(".")
                    };
                    let shard =
                        format!("{key}/shard_{}_{}", numbers(&entry[5]), numbers(&entry[4]));
                    assert!(states.contains(&shard), "{checkpoint}: no object {shard}");
                    objects.insert(shard);
                } else {
                    assert_eq!(ours.get(key), Some(&entry[4]), "{checkpoint}: {key}");
                    tensors.insert(key.to_owned());
                }
            }
        }
        assert!(tensors.len() > 60 && objects.len() > 30);
        if whole {
            assert_eq!(tensors, ours.into_keys().collect());
            assert_eq!(objects, states);
        }
    }
}

/// A classifier is a plain linear layer: an object for a module of Transformer Engine would stop a strict load.
#[test]
fn a_classifier_has_no_extra_state() {
    let bridge = bridge("dense_token_classification");
    let options = PlanOptions::default();
    assert!(shapes(&written(&bridge, &options)).contains_key("language_model.output_layer.bias"));
    let states = bridge.extra_states(&options).unwrap();
    assert!(
        states
            .iter()
            .any(|key| key.contains("final_layernorm._extra_state"))
    );
    let of_classifier: Vec<&String> = states
        .iter()
        .filter(|key| key.contains("output_layer"))
        .collect();
    assert_eq!(of_classifier, Vec::<&String>::new());
}

/// `params_dtype` is bfloat16 for every parameter there, A_log and out_norm too.
#[test]
fn stored_tensors_have_the_bytes_that_megatron_core_saved() {
    for (checkpoint, saved, dtype) in [
        ("dense_vl", "mcore_dense_tp2pp2", None),
        (
            "dense_vl_tied_bf16",
            "mcore_dense_tied_bf16_tp1",
            Some(Dtype::Bf16),
        ),
        ("moe_vl_bf16", "mcore_moe_bf16_tp2pp2ep2", Some(Dtype::Bf16)),
    ] {
        let bridge = bridge(checkpoint);
        let options = PlanOptions {
            dtype,
            ..PlanOptions::default()
        };
        let plan = written(&bridge, &options);
        let expected = json(&format!("torch_dist/{saved}/iter_0000007/expected.json"));
        let expected = expected["tensors"].as_object().unwrap();
        assert_eq!(plan.tensors.len(), expected.len(), "{checkpoint}");
        let memory = memory_for(&plan);
        let source = bridge.checkpoint().unwrap();
        execute(&plan, source, &memory, &ExecuteOptions::default()).unwrap();
        for tensor in &plan.tensors {
            let theirs = &expected[&tensor.name];
            assert_eq!(
                tensor.dtype.torch_word(),
                theirs["dtype"],
                "{}",
                tensor.name
            );
            let ours = sha256(&memory.bytes(&tensor.name).unwrap());
            assert_eq!(ours, theirs["sha256"], "{checkpoint}: {}", tensor.name);
        }
    }
}

#[test]
fn a_directory_of_megatron_bridge_holds_the_planned_bytes() {
    let bridge = bridge("dense_vl_kv2");
    let dir = golden("megatron/torch_dist_bridge/dense_vl_kv2");
    let theirs = TorchDistCheckpoint::open(&dir).unwrap();
    let options = PlanOptions {
        dtype: Some(Dtype::Bf16),
        ..PlanOptions::default()
    };
    let plan = written(&bridge, &options);
    assert_eq!(plan.tensors.len(), theirs.tensors().len());
    let memory = memory_for(&plan);
    execute(
        &plan,
        bridge.checkpoint().unwrap(),
        &memory,
        &ExecuteOptions::default(),
    )
    .unwrap();
    for tensor in &plan.tensors {
        let info = theirs.info(&tensor.name).unwrap();
        assert_eq!((info.dtype, &info.shape), (tensor.dtype, &tensor.shape));
        let mut bytes = vec![0; usize::try_from(info.num_bytes()).unwrap()];
        theirs.read(&tensor.name, 0, &mut bytes).unwrap();
        assert!(
            memory.bytes(&tensor.name).unwrap() == bytes,
            "{}",
            tensor.name
        );
    }
}

/// Vime 380: a loader that knows one style only finds nothing under the other.
#[test]
fn layers_numbered_and_stacked_and_both_words_of_the_head_are_read() {
    let bridge = bridge("moe_vl");
    let options = PlanOptions::default();
    let stacked = "vision_model.decoder.layers.mlp.linear_fc1.weight";
    let numbered = "vision_model.decoder.layers.1.mlp.linear_fc1.weight";
    let newer = "language_model.mtp.layers.0.mtp_model_layer.mlp.experts.experts.linear_fc1.weight";
    let older =
        "language_model.mtp.layers.0.transformer_layer.mlp.experts.experts.linear_fc1.weight";
    let written = written(&bridge, &options);
    assert!(written.tensor(stacked).is_some() && written.tensor(older).is_some());

    let is_numbered = |key: &str| {
        key.contains("decoder.layers.") && key.split('.').any(|part| part == "0" || part == "1")
    };
    let exists = |key: &str| is_numbered(key) || key.contains("mtp_model_layer");
    let found = bridge
        .plan_stored(&options, KeyStyle::Found(&exists))
        .unwrap();
    assert!(found.tensor(stacked).is_none() && found.tensor(older).is_none());
    assert_eq!(found.tensor(numbered).unwrap().shape.len(), 2);
    assert_eq!(found.tensor(newer).unwrap().shape.len(), 3);
    // Whichever style a directory has, the same Hugging Face tensors come out of it.
    let source = bridge.checkpoint().unwrap();
    for plan in [found, written] {
        let stored = memory_for(&plan);
        execute(&plan, source, &stored, &ExecuteOptions::default()).unwrap();
        let back = plan.inverted();
        let tensors = memory_for(&back);
        execute(&back, &stored, &tensors, &ExecuteOptions::default()).unwrap();
        assert_eq!(back.tensors.len(), source.tensors().len());
        for (name, info) in source.tensors() {
            let mut bytes = vec![0; usize::try_from(info.num_bytes()).unwrap()];
            source.read(name, 0, &mut bytes).unwrap();
            assert!(tensors.bytes(name).unwrap() == bytes, "{name}");
        }
    }
}
