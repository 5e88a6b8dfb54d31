//! Where Megatron Bridge fails or surprises: each case works here, or is refused with a sentence that says what to do.

use std::path::Path;

use bridge_core::checkpoint::shard::{ShardFile, ShardWriter};
use bridge_core::checkpoint::torch_dist::{TorchDistCheckpoint, TorchDistLayout, TorchDistWriter};
use bridge_core::checkpoint::{Overwrite, Staging, TensorInfo, TensorSink};
use bridge_core::config::HfConfig;
use bridge_core::layout::{LayoutSpec, ParallelSizes, PipelineOptions};
use bridge_core::plan::{KeyStyle, ModelPlan, PlanOptions, Stage};
use bridge_core::shards::ShardSet;
use bridge_core::{AutoBridge, Dtype, ExportOptions, ImportOptions};
use serde_json::{Value, json};
use tests::golden;
use tests::tensors::{Tensors, bytes};

use crate::checkpoint::{assert_says, changed, refusal, text};

fn bridge(checkpoint: &str) -> AutoBridge {
    AutoBridge::from_hf_pretrained(&golden("checkpoints").join(checkpoint)).unwrap()
}

/// A config of a golden checkpoint, changed, without weights.
fn config(checkpoint: &str, change: impl FnOnce(&mut Value)) -> HfConfig {
    let file = golden("checkpoints").join(checkpoint).join("config.json");
    let mut value = serde_json::from_slice(&fs_err::read(&file).unwrap()).unwrap();
    change(&mut value);
    HfConfig::from_json(value, &file).unwrap()
}

/// Writes the model to `target/whole`, and to `target/changed` with its tensors as `change` leaves them.
fn directory(bridge: &AutoBridge, target: &Path, change: impl FnOnce(&mut Tensors)) {
    let whole = target.join("whole");
    let options = ImportOptions::default();
    bridge
        .import_ckpt(&whole, &options, &Staging::default())
        .unwrap();
    let source = TorchDistCheckpoint::open(&whole).unwrap();
    let mut tensors: Tensors = source
        .tensors()
        .map(|(key, info)| (key.to_owned(), info.clone(), bytes(&source, key)))
        .collect();
    change(&mut tensors);
    let layout = TorchDistLayout {
        tensors: tensors
            .iter()
            .map(|(key, info, _)| (key.clone(), info.clone()))
            .collect(),
        ..TorchDistLayout::default()
    };
    let target = target.join("changed");
    let writer = TorchDistWriter::create(&layout, &target, Overwrite::Yes).unwrap();
    for (key, _, bytes) in &tensors {
        writer.write(key, 0, bytes).unwrap();
    }
    writer.finish().unwrap();
}

/// What exporting `target/changed` says, where it is refused.
fn export(bridge: &AutoBridge, target: &Path) -> Result<(), String> {
    let out = target.join("out");
    let options = ExportOptions::default();
    bridge
        .export_ckpt(&target.join("changed"), &out, &options, &Staging::default())
        .map(drop)
        .map_err(|error| {
            assert!(!out.exists(), "nothing is written");
            text(&error)
        })
}

/// The name of a norm that stands apart.
fn separate(key: &str) -> String {
    key.replace("self_attention.linear_qkv.layer_norm_", "input_layernorm.")
        .replace("self_attention.in_proj.layer_norm_", "input_layernorm.")
        .replace("mlp.linear_fc1.layer_norm_", "pre_mlp_layernorm.")
}

/// Megatron Bridge knows these names in attention layers of the decoder only, not in delta-net layers and not in the head.
#[test]
fn norms_that_stand_apart_are_read_in_every_layer_in_the_head_and_in_the_tower() {
    for checkpoint in ["dense_vl", "moe_vl_bf16"] {
        let scratch = tempfile::tempdir().unwrap();
        let bridge = bridge(checkpoint);
        let mut renamed = Vec::new();
        directory(&bridge, scratch.path(), |tensors| {
            for (key, ..) in tensors {
                if separate(key) != *key {
                    *key = separate(key);
                    renamed.push(key.clone());
                }
            }
        });
        for key in [
            "language_model.decoder.layers.0.input_layernorm.weight",
            "language_model.decoder.layers.3.input_layernorm.weight",
            "language_model.mtp.layers.0.transformer_layer.input_layernorm.weight",
            "vision_model.decoder.layers.pre_mlp_layernorm.bias",
        ] {
            assert!(renamed.iter().any(|one| one == key), "{key}: {renamed:?}");
        }
        export(&bridge, scratch.path()).unwrap();
        let reference = golden("checkpoints").join(checkpoint);
        for entry in fs_err::read_dir(&reference).unwrap() {
            let entry = entry.unwrap();
            let ours = fs_err::read(scratch.path().join("out").join(entry.file_name())).unwrap();
            assert!(ours == fs_err::read(entry.path()).unwrap(), "{entry:?}");
        }
    }
}

#[test]
fn a_norm_under_both_names_is_refused_and_not_chosen_from() {
    let scratch = tempfile::tempdir().unwrap();
    let bridge = bridge("dense_vl");
    let fused = "language_model.decoder.layers.3.self_attention.linear_qkv.layer_norm_weight";
    directory(&bridge, scratch.path(), |tensors| {
        let norm = tensors.iter().find(|(key, ..)| key == fused).unwrap();
        let (_, info, bytes) = norm.clone();
        tensors.push((separate(fused), info, bytes));
    });
    assert_says(
        &export(&bridge, scratch.path()).unwrap_err(),
        &[
            "holds 1 tensors that the reference does not know",
            &separate(fused),
        ],
    );
}

/// Layers of both types have a norm of this name: stacked, it would be a tensor of two rows of the table.
#[test]
fn a_norm_that_stands_apart_and_is_stacked_over_both_types_of_layers_is_refused_by_its_key() {
    let scratch = tempfile::tempdir().unwrap();
    let bridge = bridge("dense_vl");
    let stacked = "language_model.decoder.layers.input_layernorm.weight";
    directory(&bridge, scratch.path(), |tensors| {
        tensors.retain(|(key, ..)| !separate(key).ends_with(".input_layernorm.weight"));
        let (dtype, shape) = (Dtype::F32, vec![4, 64]);
        tensors.push((
            stacked.to_owned(),
            TensorInfo { dtype, shape },
            vec![0; 1024],
        ));
    });
    assert_says(
        &export(&bridge, scratch.path()).unwrap_err(),
        &["holds 1 tensors that the reference does not know", stacked],
    );
}

/// Elsewhere a warning, then an AttributeError; here each key is named, and nothing is left out in silence.
#[test]
fn a_parameter_without_a_row_is_refused_by_its_key() {
    let scratch = tempfile::tempdir().unwrap();
    let bridge = bridge("dense_vl");
    let prefix = "language_model.decoder.layers.";
    let keys = [
        // A bias that Qwen3.5 has not, a layer too many, an adapter, layers of the two types stacked as one.
        format!("{prefix}3.self_attention.linear_qkv.bias"),
        format!("{prefix}4.mlp.linear_fc2.weight"),
        format!("{prefix}0.mlp.linear_fc1.adapter.linear_in.weight"),
        format!("{prefix}input_layernorm.weight"),
    ];
    directory(&bridge, scratch.path(), |tensors| {
        let (_, info, bytes) = tensors[0].clone();
        tensors.extend(keys.clone().map(|key| (key, info.clone(), bytes.clone())));
    });
    let message = export(&bridge, scratch.path()).unwrap_err();
    assert_says(
        &message,
        &[
            "holds 4 tensors that the reference does not know",
            "--not-strict",
        ],
    );
    for key in &keys {
        assert_says(&message, &[key]);
    }
}

/// The same in the file of a rank.
#[test]
fn a_parameter_without_a_row_in_a_rank_file_is_refused_by_its_name() {
    let scratch = tempfile::tempdir().unwrap();
    let bridge = bridge("dense_vl");
    let spec = LayoutSpec::default();
    let (options, layout) = bridge.lay_out(&spec).unwrap();
    let stage = Stage::all(&layout).next().unwrap();
    let plan = &bridge.plan_stages(&options, &[stage]).unwrap()[0];
    let bias = "language_model.decoder.layers.3.self_attention.linear_qkv.bias";
    let mut tensors = plan.targets();
    let (dtype, shape) = (tensors[0].1.dtype, vec![4]);
    tensors.push((bias.to_owned(), TensorInfo { dtype, shape }));
    let info = bridge_core::checkpoint::shard::ShardInfo {
        architecture: bridge.config().architecture.hf_name().to_owned(),
        spec,
        padded_vocab_size: layout.padded_vocab_size(),
        rank: stage.rank(),
        vp_stage: 0,
    };
    let file = scratch.path().join("rank.safetensors");
    let writer = ShardWriter::create(&info, &tensors, &file, Overwrite::No).unwrap();
    for (name, info) in &tensors {
        let zeros = vec![0; usize::try_from(info.num_bytes()).unwrap()];
        writer.write(name, 0, &zeros).unwrap();
    }
    writer.finish().unwrap();
    assert!(ShardFile::open(&file).is_ok());
    let error = ShardSet::open(&[file], &bridge).unwrap_err();
    assert_says(
        &text(&error),
        &[
            "rank.safetensors",
            bias,
            "is not part of it and would be lost",
        ],
    );
}

/// Elsewhere ignored in silence on import; the strict export then finds it missing.
#[test]
fn a_hugging_face_tensor_without_a_row_is_refused_before_anything_is_written() {
    let bias = "model.language_model.layers.3.self_attn.q_proj.bias";
    let dir = changed(
        "dense_vl",
        |tensors| {
            let (_, info, bytes) = tensors[0].clone();
            tensors.push((bias.to_owned(), info, bytes));
        },
        |_| {},
    );
    let model = dir.path().join("model");
    let bridge = AutoBridge::from_hf_pretrained(&model).unwrap();
    let target = dir.path().join("megatron");
    let options = ImportOptions::default();
    let error = bridge
        .import_ckpt(&target, &options, &Staging::default())
        .unwrap_err();
    assert_says(
        &text(&error),
        &[
            bias,
            ".safetensors",
            "claimed by no row of the mapping and would be lost",
        ],
    );
    assert!(!target.exists());
}

/// Elsewhere a row-parallel weight whose second axis fits where its first should is transposed in silence.
#[test]
fn a_row_parallel_weight_that_is_transposed_is_refused_and_not_turned() {
    for name in [
        "model.language_model.layers.0.mlp.down_proj.weight",
        "model.language_model.layers.3.self_attn.o_proj.weight",
        "model.language_model.layers.0.linear_attn.out_proj.weight",
    ] {
        let dir = changed(
            "dense_vl",
            |tensors| {
                let (_, info, _) = tensors.iter_mut().find(|(one, ..)| one == name).unwrap();
                info.shape.reverse();
            },
            |_| {},
        );
        assert_says(
            &refusal(&dir.path().join("model")),
            &[name, "1 problems", "it looks transposed"],
        );
    }
}

/// The tensors of the head in a plan, by name and shape.
fn head(plan: &ModelPlan) -> Vec<(String, Vec<usize>)> {
    let head = plan.tensors.iter().filter(|one| one.name.contains("mtp."));
    head.map(|one| (one.name.clone(), one.shape.clone()))
        .collect()
}

/// Elsewhere the head's layer is of the type of the last decoder layer of its stage: behind a delta-net layer, a delta net.
#[test]
fn the_mtp_head_is_attention_also_behind_a_delta_net_layer_of_its_stage() {
    let (full, linear) = ("full_attention", "linear_attention");
    for checkpoint in ["dense_vl", "moe_vl"] {
        let usual = AutoBridge::from_hf_config(config(checkpoint, |_| {}));
        let ending_in_gdn = AutoBridge::from_hf_config(config(checkpoint, |config| {
            let text = &mut config["text_config"];
            let layers = text["layer_types"].as_array_mut().unwrap();
            layers.fill(json!(linear));
            layers[1] = json!(full);
        }));
        let layers = usual.config().text.num_hidden_layers;
        let all_but_2 = layers - 2;
        for (pp_size, vpp_size, written) in [
            (1, None, None),
            (2, None, None),
            (2, Some(2), None),
            (2, None, Some(format!("Et*{all_but_2}|ttmL"))),
            (3, None, Some(format!("Et*{all_but_2}|t|tmL"))),
            (3, None, Some(format!("Et*{layers}|m|L"))),
        ] {
            let spec = LayoutSpec {
                sizes: ParallelSizes {
                    tp_size: 2,
                    pp_size,
                    vpp_size,
                    ..ParallelSizes::default()
                },
                pipeline: PipelineOptions {
                    pipeline_model_parallel_layout: written
                        .as_ref()
                        .map(|text| text.parse().unwrap()),
                    ..PipelineOptions::default()
                },
                ..LayoutSpec::default()
            };
            let heads = |bridge: &AutoBridge| -> Vec<_> {
                let (options, layout) = match bridge.lay_out(&spec) {
                    Ok(found) => found,
                    Err(error) => panic!("{written:?}: {error}"),
                };
                let stages: Vec<Stage<'_>> = Stage::all(&layout).collect();
                let plans = bridge.plan_stages(&options, &stages).unwrap();
                plans.iter().map(head).collect()
            };
            let found = heads(&ending_in_gdn);
            assert_eq!(found, heads(&usual), "{pp_size} {vpp_size:?} {written:?}");
            let with_head: Vec<_> = found.iter().filter(|head| !head.is_empty()).collect();
            assert_eq!(with_head.len(), 2, "one stage of each of two tensor ranks");
            let layer = "language_model.mtp.layers.0.mtp_model_layer.self_attention.";
            for head in with_head {
                let shape = |name: &str| {
                    let wanted = format!("{layer}{name}");
                    let found = head.iter().find(|(name, _)| *name == wanted);
                    &found.unwrap_or_else(|| panic!("no {wanted}")).1
                };
                // Queries with their gates, keys and values, of half the groups.
                let text = &usual.config().text;
                let rows = (2 * text.num_attention_heads + 2 * text.num_key_value_heads)
                    * text.head_dim
                    / 2;
                assert_eq!(*shape("linear_qkv.weight"), [rows, text.hidden_size]);
                assert_eq!(*shape("q_layernorm.weight"), [text.head_dim]);
                assert!(head.iter().all(|(name, _)| !name.contains("in_proj")));
            }
        }
        let stored = |bridge: &AutoBridge| {
            let options = PlanOptions::default();
            head(&bridge.plan_stored(&options, KeyStyle::Written).unwrap())
        };
        assert_eq!(stored(&ending_in_gdn), stored(&usual));
    }
}

/// The classes of the original have defaults of their own (248044, and 248046 for experts), for a config object without
/// the attribute. transformers' configs always have it, as null where the file says nothing; and null stays null.
#[test]
fn an_absent_end_of_text_is_null_in_both_families_and_no_guess() {
    for checkpoint in ["dense_vl", "moe_vl"] {
        let absent = AutoBridge::from_hf_config(config(checkpoint, |config| {
            let text = config["text_config"].as_object_mut().unwrap();
            text.remove("eos_token_id").unwrap();
            text.remove("bos_token_id").unwrap();
        }));
        let provider = serde_json::to_value(absent.to_megatron_provider()).unwrap();
        assert_eq!(provider["eos_token_id"], Value::Null, "{checkpoint}");
        assert_eq!(provider["bos_token_id"], Value::Null, "{checkpoint}");
        let named = AutoBridge::from_hf_config(config(checkpoint, |_| {}));
        let provider = serde_json::to_value(named.to_megatron_provider()).unwrap();
        assert_eq!(provider["eos_token_id"], 960);
    }
    // The original agrees: no published config says which token begins a text, where its classes say 248045.
    for name in ["Qwen3.5-27B", "Qwen3.5-35B-A3B"] {
        let file = golden(&format!("configs/{name}.json"));
        let published: Value = serde_json::from_slice(&fs_err::read(&file).unwrap()).unwrap();
        assert!(published["text_config"].get("bos_token_id").is_none());
        let file = golden(&format!("megatron/provider.{name}.json"));
        let theirs: Value = serde_json::from_slice(&fs_err::read(&file).unwrap()).unwrap();
        assert_eq!(theirs["fields"]["bos_token_id"], Value::Null, "{name}");
    }
}
