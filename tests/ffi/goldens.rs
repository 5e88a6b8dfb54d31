//! What C++ loads, held against what Megatron's own model classes built on each rank.

use std::collections::BTreeMap;
use std::ffi::CString;
use std::path::Path;

use bridge_core::checkpoint::Staging;
use bridge_core::config::HfConfig;
use bridge_core::{AutoBridge, Dtype, ImportOptions};
use bridge_ffi::c_api::CParallelLayout;
use serde_json::{Map, Value};
use sha2::{Digest, Sha256};
use tests::golden;

use crate::cases::{load, model};

fn read(checkpoint: &str) -> Value {
    let file = golden(&format!("megatron/shards.{checkpoint}.json"));
    serde_json::from_slice(&fs_err::read(file).unwrap()).unwrap()
}

fn size(map: &Map<String, Value>, key: &str) -> usize {
    let number = map.get(key).and_then(Value::as_u64).unwrap_or(0);
    usize::try_from(number).unwrap()
}

/// The number of the header.
fn number(dtype: Dtype) -> i32 {
    match dtype {
        Dtype::Bf16 => 9,
        Dtype::F32 => 12,
        other => panic!("no golden is in {other}"),
    }
}

/// A layout of a golden as the C header has it; the text lives as long as the second part.
fn layout(config: &HfConfig, entry: &Map<String, Value>) -> (CParallelLayout, Option<CString>) {
    let overrides = entry["overrides"].as_object().unwrap();
    let flag = |key: &str| i32::from(overrides.get(key) == Some(&Value::Bool(true)));
    let stages = overrides.get("pipeline_model_parallel_layout");
    let stages = stages.map(|text| CString::new(text.as_str().unwrap()).unwrap());
    let padded = flag("should_pad_vocab") == 1;
    let layout = CParallelLayout {
        struct_size: size_of::<CParallelLayout>(),
        tensor_model_parallel_size: size(entry, "tp"),
        pipeline_model_parallel_size: size(entry, "pp"),
        virtual_pipeline_model_parallel_size: size(entry, "vpp"),
        context_parallel_size: size(entry, "cp"),
        expert_model_parallel_size: size(entry, "ep"),
        expert_tensor_parallel_size: size(entry, "etp"),
        data_parallel_size: 0,
        world_size: 0,
        pipeline_model_parallel_layout: stages
            .as_ref()
            .map_or(std::ptr::null(), |text| text.as_ptr()),
        num_layers_in_first_pipeline_stage: size(overrides, "num_layers_in_first_pipeline_stage"),
        num_layers_in_last_pipeline_stage: size(overrides, "num_layers_in_last_pipeline_stage"),
        account_for_embedding_in_pipeline_split: flag("account_for_embedding_in_pipeline_split"),
        account_for_loss_in_pipeline_split: flag("account_for_loss_in_pipeline_split"),
        make_vocab_size_divisible_by: match padded {
            true => size(overrides, "make_vocab_size_divisible_by"),
            false => 0,
        },
        sequential_experts: i32::from(
            overrides.get("moe_grouped_gemm") == Some(&Value::Bool(false)),
        ),
        without_mtp: i32::from(overrides.get("mtp_num_layers") == Some(&Value::Null)),
        // Megatron Bridge was told to have everything in the config's dtype.
        params_dtype: config.text.dtype.map_or(0, number),
    };
    (layout, stages)
}

/// Loads every stage of every rank of every layout that `wanted` says, and compares; gives the number of tensors.
fn compare(checkpoint: &str, dir: &Path, reference: &str, wanted: impl Fn(&str) -> bool) -> usize {
    let config = HfConfig::from_dir(&model(checkpoint)).unwrap();
    let golden = read(checkpoint);
    let mut tensors = 0;
    let layouts = golden["layouts"].as_object().unwrap();
    for (name, entry) in layouts.iter().filter(|(name, _)| wanted(name)) {
        let (layout, _stages) = layout(&config, entry.as_object().unwrap());
        let ranks = golden["ranks"].as_array().unwrap();
        for rank in ranks.iter().filter(|rank| rank["layout"] == name.as_str()) {
            let number = size(rank.as_object().unwrap(), "rank");
            for (stage, expected) in rank["stages"].as_array().unwrap().iter().enumerate() {
                let found: BTreeMap<String, Value> = load(dir, reference, &layout, number, stage)
                    .into_iter()
                    .map(|one| {
                        let hash = Sha256::digest(&one.bytes);
                        let hash: String = hash.iter().map(|b| format!("{b:02x}")).collect();
                        let dtype = if one.dtype == 9 { "BF16" } else { "F32" };
                        (one.name, serde_json::json!([dtype, one.shape, hash]))
                    })
                    .collect();
                let params = expected["params"].as_array().unwrap();
                for param in params {
                    let tensor = param[0].as_str().unwrap();
                    let theirs = serde_json::json!([param[1], param[2], param[3]]);
                    let place = format!("{checkpoint} {name} rank {number} stage {stage} {tensor}");
                    assert_eq!(found.get(tensor), Some(&theirs), "{place}");
                }
                assert_eq!(
                    found.len(),
                    params.len(),
                    "{checkpoint} {name} rank {number}"
                );
                tensors += found.len();
            }
        }
    }
    tensors
}

#[test]
fn every_rank_of_every_layout_is_megatrons_bytes() {
    let mut tensors = 0;
    for checkpoint in ["dense_vl", "dense_vl_tied_bf16", "moe_vl", "moe_vl_bf16"] {
        tensors += compare(checkpoint, &model(checkpoint), "", |_| true);
    }
    assert!(tensors > 10_000, "{tensors}");
}

#[test]
fn a_torch_dist_directory_fills_ranks_of_any_layout_like_its_source() {
    let layouts = [
        "tp1",
        "tp2_pp2",
        "pp2_vpp2",
        "pad96_tp2",
        "tp2_pp2_ep2_etp2",
        "seq_nomtp_tp2_ep2_etp2",
    ];
    for checkpoint in ["dense_vl_tied_bf16", "moe_vl", "moe_vl_bf16"] {
        let scratch = tempfile::tempdir().unwrap();
        let stored = scratch.path().join("megatron");
        let bridge = AutoBridge::from_hf_pretrained(&model(checkpoint)).unwrap();
        // In the layout's own padding, which differs from that of most ranks.
        let options = ImportOptions {
            make_vocab_size_divisible_by: Some(160),
            ..ImportOptions::default()
        };
        bridge
            .import_ckpt(&stored, &options, &Staging::default())
            .unwrap();
        let reference = model(checkpoint).display().to_string();
        let wanted = |name: &str| layouts.contains(&name);
        let tensors = compare(checkpoint, &stored, &reference, wanted);
        assert!(tensors > 500, "{checkpoint} {tensors}");
    }
}
