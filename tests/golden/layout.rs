//! Golden tests: layout. `shards.*.json` say what Megatron's own model classes built on each rank.

use bridge_core::config::HfConfig;
use bridge_core::layout::{
    Chunk, ModelFacts, ParallelLayout, ParallelSizes, PipelineOptions, World,
};
use serde_json::{Map, Value};
use tests::golden;

const FILES: [&str; 8] = [
    "dense_vl",
    "dense_vl_deepstack",
    "dense_vl_kv2",
    "dense_vl_tied_bf16",
    "moe_vl",
    "moe_vl_bf16",
    "moe_vl_mtp_packed",
    "moe_vl_per_expert",
];

fn config(checkpoint: &str) -> HfConfig {
    let ours = golden("checkpoints").join(checkpoint);
    let derived = golden("megatron/checkpoints").join(checkpoint);
    let dir = if ours.exists() { ours } else { derived };
    HfConfig::from_dir(&dir).unwrap()
}

fn read(checkpoint: &str) -> Value {
    let file = golden(&format!("megatron/shards.{checkpoint}.json"));
    serde_json::from_slice(&fs_err::read(file).unwrap()).unwrap()
}

fn size(map: &Map<String, Value>, key: &str) -> Option<usize> {
    map.get(key)?.as_u64().map(|n| usize::try_from(n).unwrap())
}

/// A layout of a golden, made from the config of its checkpoint.
fn layout(config: &HfConfig, entry: &Map<String, Value>) -> ParallelLayout {
    let overrides = entry["overrides"].as_object().unwrap();
    let sizes = ParallelSizes {
        tp_size: size(entry, "tp").unwrap(),
        cp_size: size(entry, "cp").unwrap(),
        pp_size: size(entry, "pp").unwrap(),
        vpp_size: size(entry, "vpp"),
        ep_size: size(entry, "ep").unwrap(),
        etp_size: size(entry, "etp").unwrap(),
        world: World::Smallest,
    };
    let flag = |key: &str| overrides.get(key) == Some(&Value::Bool(true));
    let options = PipelineOptions {
        pipeline_model_parallel_layout: overrides
            .get("pipeline_model_parallel_layout")
            .map(|text| text.as_str().unwrap().parse().unwrap()),
        num_layers_in_first_pipeline_stage: size(overrides, "num_layers_in_first_pipeline_stage"),
        num_layers_in_last_pipeline_stage: size(overrides, "num_layers_in_last_pipeline_stage"),
        account_for_embedding_in_pipeline_split: flag("account_for_embedding_in_pipeline_split"),
        account_for_loss_in_pipeline_split: flag("account_for_loss_in_pipeline_split"),
    };
    let mut facts = ModelFacts::from_config(config);
    if overrides.get("mtp_num_layers") == Some(&Value::Null) {
        facts.mtp_num_layers = 0;
    }
    if flag("should_pad_vocab") {
        facts.make_vocab_size_divisible_by = size(overrides, "make_vocab_size_divisible_by");
    }
    ParallelLayout::new(&sizes, &options, &facts).unwrap()
}

/// The shape of a parameter of a stage.
fn shape(stage: &Value, name: &str) -> Option<Vec<u64>> {
    let params = stage["params"].as_array().unwrap();
    let found = params.iter().find(|param| param[0] == name)?;
    let dims = found[2].as_array().unwrap();
    Some(dims.iter().map(|dim| dim.as_u64().unwrap()).collect())
}

fn experts(stage: &Value) -> usize {
    let layer = "language_model.decoder.layers.0.mlp.experts.";
    let params = stage["params"].as_array().unwrap();
    let names = params.iter().map(|param| param[0].as_str().unwrap());
    names
        .filter(|name| name.starts_with(layer) && name.contains("linear_fc2"))
        .count()
}

fn assert_stage(place: &str, chunk: &Chunk, stage: &Value) {
    let flag = |key: &str| stage[key].as_bool().unwrap();
    let layers: Vec<u64> = chunk.layers.clone().map(|layer| layer as u64).collect();
    assert_eq!(serde_json::json!(layers), stage["layers"], "{place}");
    assert_eq!(chunk.pre_process, flag("pre_process"), "{place}");
    assert_eq!(chunk.post_process, flag("post_process"), "{place}");
    assert_eq!(chunk.vision, flag("vision"), "{place} vision");
    assert_eq!(chunk.embedding, flag("embedding"), "{place} embedding");
    assert_eq!(chunk.output_layer, flag("output"), "{place} output");
    assert_eq!(
        Some(chunk.mtp_num_layers as u64),
        stage["mtp"].as_u64(),
        "{place} mtp"
    );
    let norm = shape(stage, "language_model.decoder.final_layernorm.weight");
    assert_eq!(chunk.final_layernorm, norm.is_some(), "{place} final norm");
}

#[test]
fn every_rank_has_megatrons_coordinates_and_every_stage_megatrons_parts() {
    let (mut layouts, mut ranks, mut stages) = (0, 0, 0);
    for checkpoint in FILES {
        let config = config(checkpoint);
        let shards = read(checkpoint);
        for (name, entry) in shards["layouts"].as_object().unwrap() {
            layouts += 1;
            let ours = layout(&config, entry.as_object().unwrap());
            let theirs: Vec<&Value> = shards["ranks"]
                .as_array()
                .unwrap()
                .iter()
                .filter(|rank| rank["layout"] == name.as_str())
                .collect();
            assert_eq!(Some(ours.world_size() as u64), entry["world"].as_u64());
            assert_eq!(ours.world_size(), theirs.len(), "{checkpoint} {name}");
            for (coord, rank) in ours.ranks().zip(theirs) {
                ranks += 1;
                let place = format!("{checkpoint} {name} rank {}", coord.global_rank);
                for (key, value) in [
                    ("rank", coord.global_rank),
                    ("tp", coord.tp_rank),
                    ("cp", coord.cp_rank),
                    ("dp", coord.dp_rank),
                    ("pp", coord.pp_rank),
                    ("ep", coord.ep_rank),
                    ("etp", coord.etp_rank),
                    ("edp", coord.edp_rank),
                ] {
                    assert_eq!(Some(value as u64), rank[key].as_u64(), "{place} {key}");
                }
                let chunks: Vec<&Chunk> = ours.chunks_of(coord.pp_rank).collect();
                let their_stages = rank["stages"].as_array().unwrap();
                assert_eq!(chunks.len(), their_stages.len(), "{place}");
                for (chunk, stage) in chunks.into_iter().zip(their_stages) {
                    stages += 1;
                    assert_stage(&place, chunk, stage);
                    let vpp = stage["vpp"].as_u64().unwrap_or(0);
                    assert_eq!(chunk.vp_stage as u64, vpp, "{place}");
                    if let Some(rows) =
                        shape(stage, "language_model.embedding.word_embeddings.weight")
                    {
                        let wanted = ours.padded_vocab_size() / ours.tp_size();
                        assert_eq!(rows[0], wanted as u64, "{place} vocabulary");
                    }
                    if !chunk.layers.is_empty() {
                        let wanted = ours.experts(coord.ep_rank).len();
                        assert_eq!(experts(stage), wanted, "{place} experts");
                    }
                }
            }
        }
    }
    assert_eq!((layouts, ranks), (82, 228), "{stages} stages");
}
