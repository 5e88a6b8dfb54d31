//! Nothing is left out and nothing is left uninitialised: what was lost elsewhere, model by model.

use std::collections::HashMap;
use std::sync::Mutex;

use bridge_core::checkpoint::{
    CheckpointError, MemoryTensors, TensorInfo, TensorSink, TensorSource,
};
use bridge_core::config::HfConfig;
use bridge_core::convert::{Difference, ExecuteOptions, VerifyOptions, execute, verify};
use bridge_core::plan::{KeyStyle, ModelPlan, PlanOptions};
use bridge_core::{AutoBridge, Dtype};
use serde_json::Value;
use tests::golden;

use crate::checkpoint::directory;
use crate::mapping::memory_for;

const GOLDENS: [&str; 7] = [
    "dense_vl",
    "dense_vl_tied_bf16",
    "dense_vl_kv2",
    "moe_vl",
    "moe_vl_bf16",
    "moe_vl_mtp_packed",
    "moe_vl_per_expert",
];

/// Megatron-Bridge 2789: an export of Qwen3.5-35B lacked 1733 of its source's tensors, its MTP head among them.
#[test]
fn an_export_has_every_tensor_of_its_model() {
    let counts = fs_err::read(golden("configs/parameter_counts.json")).unwrap();
    let counts: Value = serde_json::from_slice(&counts).unwrap();
    for (model, count) in counts.as_object().unwrap() {
        let config = HfConfig::from_file(&golden(&format!("configs/{model}.json"))).unwrap();
        let bridge = AutoBridge::from_hf_config(config);
        let stored = bridge
            .plan_stored(&PlanOptions::default(), KeyStyle::Written)
            .unwrap();
        let mut exported = stored.inverted().targets();
        let elements: usize = exported.iter().map(|(_, info)| info.numel()).sum();
        assert_eq!(elements as u64, count["total"].as_u64().unwrap(), "{model}");
        exported.sort_by(|a, b| a.0.cmp(&b.0));
        let registry = bridge.registry().unwrap();
        let mut wanted: Vec<_> = registry.hf_parameters().collect();
        wanted.sort_by_key(|(name, _)| *name);
        assert_eq!(exported.len(), wanted.len(), "{model}");
        for ((found, info), (name, parameter)) in exported.iter().zip(wanted) {
            assert_eq!(
                (found.as_str(), &info.shape),
                (name, &parameter.shape),
                "{model}"
            );
        }
    }
    let scratch = tempfile::tempdir().unwrap();
    for name in GOLDENS {
        let bridge = AutoBridge::from_hf_pretrained(&directory(name, scratch.path())).unwrap();
        let stored = bridge
            .plan_stored(&PlanOptions::default(), KeyStyle::Written)
            .unwrap();
        let source = bridge.checkpoint().unwrap();
        let mut exported = stored.inverted().targets();
        exported.sort_by(|a, b| a.0.cmp(&b.0));
        let mut wanted: Vec<(String, TensorInfo)> = source
            .tensors()
            .map(|(name, info)| (name.to_owned(), info.clone()))
            .collect();
        wanted.sort_by(|a, b| a.0.cmp(&b.0));
        assert_eq!(exported, wanted, "{name}");
    }
}

/// Counts how often each byte is written.
struct Counting(HashMap<String, Mutex<Vec<u8>>>);

impl Counting {
    fn new(plan: &ModelPlan) -> Self {
        let zeros = |info: &TensorInfo| vec![0; usize::try_from(info.num_bytes()).unwrap()];
        let targets = plan.targets().into_iter();
        Self(
            targets
                .map(|(name, info)| (name, Mutex::new(zeros(&info))))
                .collect(),
        )
    }
}

impl TensorSink for Counting {
    fn write(&self, name: &str, offset_bytes: u64, bytes: &[u8]) -> Result<(), CheckpointError> {
        let start = usize::try_from(offset_bytes).unwrap();
        let mut counts = self.0[name].lock().unwrap();
        for count in &mut counts[start..start + bytes.len()] {
            *count += 1;
        }
        Ok(())
    }
}

/// Megatron-LM 5844: a converter left all experts uninitialised and reported success.
#[test]
fn every_byte_of_every_target_is_written_once_experts_too() {
    let scratch = tempfile::tempdir().unwrap();
    for name in GOLDENS {
        let bridge = AutoBridge::from_hf_pretrained(&directory(name, scratch.path())).unwrap();
        let source = bridge.checkpoint().unwrap();
        let options = PlanOptions::default();
        let stored = bridge.plan_stored(&options, KeyStyle::Written).unwrap();
        let rank = bridge.plan(&options).unwrap();
        for plan in [&stored, &rank] {
            let counting = Counting::new(plan);
            let execute_options = ExecuteOptions {
                buffer_bytes: 1 << 12,
                ..ExecuteOptions::default()
            };
            execute(plan, source, &counting, &execute_options).unwrap();
            for (tensor, counts) in &counting.0 {
                let counts = counts.lock().unwrap();
                assert!(counts.iter().all(|count| *count == 1), "{name}: {tensor}");
            }
            assert_eq!(counting.0.len(), plan.tensors.len());
        }
    }
}

/// The same, as `verify` sees it: one expert of a layer is zeros.
#[test]
fn an_expert_that_was_left_uninitialised_is_named_with_its_number() {
    let scratch = tempfile::tempdir().unwrap();
    let bridge = AutoBridge::from_hf_pretrained(&directory("moe_vl", scratch.path())).unwrap();
    let source = bridge.checkpoint().unwrap();
    let plan = bridge
        .plan_stored(&PlanOptions::default(), KeyStyle::Written)
        .unwrap();
    let memory = memory_for(&plan);
    execute(&plan, source, &memory, &ExecuteOptions::default()).unwrap();
    let key = "language_model.decoder.layers.2.mlp.experts.experts.linear_fc2.weight";
    let shape = memory.info(key).unwrap().shape;
    assert_eq!((shape.len(), shape[0]), (3, 8));
    let mut other = MemoryTensors::default();
    for name in memory.names() {
        let mut bytes = memory.bytes(name).unwrap();
        if name == key {
            let expert = bytes.len() / 8;
            bytes[5 * expert..6 * expert].fill(0);
        }
        other.insert_bytes(name, memory.info(name).unwrap(), bytes);
    }
    let found = verify(&plan, source, &other, &VerifyOptions::default()).unwrap();
    let [
        Difference::Values {
            name,
            elements,
            index,
            other,
            ..
        },
    ] = found.differences.as_slice()
    else {
        panic!("{:?}", found.differences);
    };
    assert_eq!(
        (name.as_str(), index.as_slice()),
        (key, [5, 0, 0].as_slice())
    );
    assert_eq!(*elements, (shape[1] * shape[2]) as u64);
    assert_eq!((other.bits, other.dtype), (0, Dtype::F32));
}
