//! `shards.*.json` say what Megatron's own model classes built on each rank, stage by stage.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicUsize, Ordering};

use bridge_core::AutoBridge;
use bridge_core::checkpoint::{
    CheckpointError, MemoryTensors, TensorInfo, TensorSink, TensorSource,
};
use bridge_core::config::HfConfig;
use bridge_core::convert::{ExecuteOptions, Transforms, execute};
use bridge_core::layout::{
    Chunk, LayoutSpec, ModelFacts, ParallelLayout, ParallelSizes, PipelineOptions, World,
};
use bridge_core::plan::{ModelPlan, PlanOptions, Stage, gather};
use serde_json::{Map, Value};
use tests::golden;

use crate::checkpoint::directory;
use crate::mapping::{memory_for, sha256};

const FILES: [&str; 11] = [
    "dense_text",
    "dense_token_classification",
    "dense_vl",
    "dense_vl_deepstack",
    "dense_vl_kv2",
    "dense_vl_tied_bf16",
    "moe_text",
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

fn experts(stage: &Value, prefix: &str) -> usize {
    let layer = format!("{prefix}decoder.layers.0.mlp.experts.");
    let params = stage["params"].as_array().unwrap();
    let names = params.iter().map(|param| param[0].as_str().unwrap());
    names
        .filter(|name| name.starts_with(&layer) && name.contains("linear_fc2"))
        .count()
}

/// What stands before Megatron's names of the language model.
fn language_prefix(config: &HfConfig) -> &'static str {
    match config.vision {
        Some(_) => "language_model.",
        None => "",
    }
}

fn assert_stage(place: &str, chunk: &Chunk, stage: &Value, prefix: &str) {
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
    let norm = shape(stage, &format!("{prefix}decoder.final_layernorm.weight"));
    assert_eq!(chunk.final_layernorm, norm.is_some(), "{place} final norm");
}

#[test]
fn every_rank_has_megatrons_coordinates_and_every_stage_megatrons_parts() {
    let (mut layouts, mut ranks, mut stages) = (0, 0, 0);
    for checkpoint in FILES {
        let config = config(checkpoint);
        let prefix = language_prefix(&config);
        let embedding = format!("{prefix}embedding.word_embeddings.weight");
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
                    assert_stage(&place, chunk, stage, prefix);
                    let vpp = stage["vpp"].as_u64().unwrap_or(0);
                    assert_eq!(chunk.vp_stage as u64, vpp, "{place}");
                    if let Some(rows) = shape(stage, &embedding) {
                        let wanted = ours.padded_vocab_size() / ours.tp_size();
                        assert_eq!(rows[0], wanted as u64, "{place} vocabulary");
                    }
                    if !chunk.layers.is_empty() {
                        let wanted = ours.experts(coord.ep_rank).len();
                        assert_eq!(experts(stage, prefix), wanted, "{place} experts");
                    }
                }
            }
        }
    }
    assert_eq!((layouts, ranks), (91, 247), "{stages} stages");
}

/// What Megatron Bridge was told beside sizes: everything in the config's dtype, the names of experts, no head.
fn plan_options(config: &HfConfig, entry: &Map<String, Value>) -> PlanOptions {
    let overrides = entry["overrides"].as_object().unwrap();
    PlanOptions {
        dtype: config.text.dtype,
        sequential_experts: overrides.get("moe_grouped_gemm") == Some(&Value::Bool(false)),
        without_mtp: overrides.get("mtp_num_layers") == Some(&Value::Null),
        ..PlanOptions::default()
    }
}

/// Name to dtype, shape and hash of what a stage holds, from a golden.
fn theirs(stage: &Value) -> BTreeMap<String, Value> {
    let params = stage["params"].as_array().unwrap();
    let entry = |param: &Value| {
        let name = param[0].as_str().unwrap().to_owned();
        (name, serde_json::json!([param[1], param[2], param[3]]))
    };
    params.iter().map(entry).collect()
}

/// The same from a plan that is carried out.
fn ours(plan: &ModelPlan, source: &dyn TensorSource) -> BTreeMap<String, Value> {
    let memory = memory_for(plan);
    execute(plan, source, &memory, &ExecuteOptions::default()).unwrap();
    let entry = |name: &str| {
        let info = memory.info(name).unwrap();
        let hash = sha256(&memory.bytes(name).unwrap());
        let word = info.dtype.safetensors_word();
        (name.to_owned(), serde_json::json!([word, info.shape, hash]))
    };
    memory.names().map(entry).collect()
}

#[test]
fn every_stage_of_every_rank_has_megatrons_bytes() {
    let mut shards = 0;
    for checkpoint in FILES {
        let scratch = tempfile::tempdir().unwrap();
        let bridge =
            AutoBridge::from_hf_pretrained(&directory(checkpoint, scratch.path())).unwrap();
        let golden = read(checkpoint);
        for (name, entry) in golden["layouts"].as_object().unwrap() {
            let entry = entry.as_object().unwrap();
            let layout = layout(bridge.config(), entry);
            let options = plan_options(bridge.config(), entry);
            let stages: Vec<Stage<'_>> = Stage::all(&layout).collect();
            let plans = bridge.plan_stages(&options, &stages).unwrap();
            let ranks = golden["ranks"].as_array().unwrap();
            let ranks = ranks.iter().filter(|rank| rank["layout"] == name.as_str());
            let expected: Vec<&Value> = ranks
                .flat_map(|rank| rank["stages"].as_array().unwrap())
                .collect();
            assert_eq!(plans.len(), expected.len(), "{checkpoint} {name}");
            for ((stage, plan), expected) in stages.iter().zip(&plans).zip(expected) {
                let place = format!("{checkpoint} {name} {:?}", stage.rank());
                let ours = ours(plan, bridge.checkpoint().unwrap());
                shards += ours.len();
                let theirs = theirs(expected);
                for (name, value) in &theirs {
                    assert_eq!(ours.get(name), Some(value), "{place} {name}");
                }
                assert_eq!(ours.len(), theirs.len(), "{place}");
            }
        }
    }
    assert_eq!(shards, 26_855);
}

/// Shards written for a layout and gathered again are the source, byte for byte (arithmetic aside, which may round).
#[test]
fn any_layout_gathers_to_the_bytes_of_the_source() {
    for checkpoint in FILES {
        let scratch = tempfile::tempdir().unwrap();
        let bridge =
            AutoBridge::from_hf_pretrained(&directory(checkpoint, scratch.path())).unwrap();
        let source = bridge.checkpoint().unwrap();
        let moving = ExecuteOptions {
            transforms: Transforms::LayoutOnly,
            ..ExecuteOptions::default()
        };
        for (name, entry) in read(checkpoint)["layouts"].as_object().unwrap() {
            let entry = entry.as_object().unwrap();
            let layout = layout(bridge.config(), entry);
            let options = PlanOptions {
                dtype: None,
                ..plan_options(bridge.config(), entry)
            };
            let stages: Vec<Stage<'_>> = Stage::all(&layout).collect();
            let plans = bridge.plan_stages(&options, &stages).unwrap();
            let left_out = plans[0].left_out.len();
            let mut whole = ModelPlan::default();
            let mut labelled = Vec::new();
            for (number, plan) in plans.into_iter().enumerate() {
                let label = format!("{number}/");
                let renamed = plan.tensors.iter().cloned().map(|mut tensor| {
                    tensor.name = format!("{label}{}", tensor.name);
                    tensor
                });
                whole.tensors.extend(renamed);
                labelled.push((label, plan));
            }
            let shards = memory_for(&whole);
            execute(&whole, source, &shards, &moving).unwrap();
            let gathered = gather(labelled).unwrap();
            let back = memory_for(&gathered);
            execute(&gathered, &shards, &back, &moving).unwrap();
            assert_eq!(
                gathered.tensors.len() + left_out,
                source.names().count(),
                "{checkpoint} {name}"
            );
            for tensor in &gathered.tensors {
                let info = source.info(&tensor.name).unwrap();
                let mut bytes = vec![0; usize::try_from(info.num_bytes()).unwrap()];
                source.read(&tensor.name, 0, &mut bytes).unwrap();
                assert_eq!(back.info(&tensor.name), Some(info), "{}", tensor.name);
                assert!(
                    back.bytes(&tensor.name) == Some(bytes),
                    "{checkpoint} {name} {}",
                    tensor.name
                );
            }
        }
    }
}

/// Records the longest range that was asked for or given.
struct Longest<T> {
    inner: T,
    bytes: AtomicUsize,
}

impl<T> Longest<T> {
    fn new(inner: T) -> Self {
        let bytes = AtomicUsize::new(0);
        Self { inner, bytes }
    }

    fn see(&self, bytes: usize) {
        self.bytes.fetch_max(bytes, Ordering::Relaxed);
    }
}

impl TensorSource for Longest<&dyn TensorSource> {
    fn info(&self, name: &str) -> Option<TensorInfo> {
        self.inner.info(name)
    }

    fn read(&self, name: &str, offset_bytes: u64, into: &mut [u8]) -> Result<(), CheckpointError> {
        self.see(into.len());
        self.inner.read(name, offset_bytes, into)
    }
}

impl TensorSink for Longest<&MemoryTensors> {
    fn write(&self, name: &str, offset_bytes: u64, bytes: &[u8]) -> Result<(), CheckpointError> {
        self.see(bytes.len());
        self.inner.write(name, offset_bytes, bytes)
    }
}

/// Elsewhere the export of a fused expert tensor (8.6 GiB) ran out of memory: it was built in one piece.
#[test]
fn a_fused_expert_tensor_moves_in_slices_of_the_buffer() {
    let bridge = AutoBridge::from_hf_pretrained(&golden("checkpoints/moe_vl")).unwrap();
    let source = bridge.checkpoint().unwrap();
    let spec = LayoutSpec {
        sizes: ParallelSizes {
            tp_size: 2,
            ep_size: 4,
            ..ParallelSizes::default()
        },
        ..LayoutSpec::default()
    };
    let (options, layout) = bridge.lay_out(&spec).unwrap();
    let stages: Vec<Stage<'_>> = Stage::all(&layout).collect();
    let plans = bridge.plan_stages(&options, &stages).unwrap();
    let mut whole = ModelPlan::default();
    let mut labelled = Vec::new();
    for (number, plan) in plans.into_iter().enumerate() {
        let label = format!("{number}/");
        for mut tensor in plan.tensors.iter().cloned() {
            tensor.name = format!("{label}{}", tensor.name);
            whole.tensors.push(tensor);
        }
        labelled.push((label, plan));
    }
    let small = ExecuteOptions {
        buffer_bytes: 1000,
        ..ExecuteOptions::default()
    };
    let shards = memory_for(&whole);
    execute(&whole, source, &shards, &small).unwrap();
    let gathered = gather(labelled).unwrap();
    let fused = "model.language_model.layers.0.mlp.experts.gate_up_proj";
    assert!(gathered.tensor(fused).unwrap().num_bytes() > 50_000);
    let back = memory_for(&gathered);
    let (from, to) = (
        Longest::new(&shards as &dyn TensorSource),
        Longest::new(&back),
    );
    execute(&gathered, &from, &to, &small).unwrap();
    for longest in [from.bytes.into_inner(), to.bytes.into_inner()] {
        assert!((1..=1000).contains(&longest), "{longest}");
    }
    let mut bytes = vec![0; usize::try_from(source.info(fused).unwrap().num_bytes()).unwrap()];
    source.read(fused, 0, &mut bytes).unwrap();
    assert!(back.bytes(fused) == Some(bytes));
}
