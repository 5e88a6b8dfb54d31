//! Laws of plans, over random small configs, checkpoint forms and ranks.

use std::collections::BTreeMap;
use std::path::Path;

use bridge_core::checkpoint::{MemoryTensors, TensorInfo, TensorSource};
use bridge_core::config::{Architecture, HfConfig};
use bridge_core::convert::{ExecuteOptions, execute};
use bridge_core::models::{ExpertLayout, ExpertNames, Facts, registry_for};
use bridge_core::plan::{Copy, Cut, ModelPlan, PlanOptions, build};
use bridge_core::{AutoBridge, Dtype};
use proptest::prelude::*;
use serde_json::json;

/// A model whose sizes all divide by 4, so that it can be cut over 1, 2 or 4 ranks.
#[derive(Debug, Clone)]
pub(crate) struct Model {
    config: serde_json::Value,
    experts: ExpertLayout,
    mtp_experts: ExpertLayout,
    names: ExpertNames,
}

impl Model {
    pub(crate) fn config(&self) -> HfConfig {
        HfConfig::from_json(self.config.clone(), Path::new("config.json")).unwrap()
    }

    pub(crate) fn facts(&self) -> Facts {
        Facts {
            experts: self.experts,
            mtp_experts: self.mtp_experts,
            expert_names: self.names,
            ..Facts::published(&self.config())
        }
    }

    fn plan(&self, options: &PlanOptions) -> ModelPlan {
        let registry = registry_for(&self.config(), &self.facts()).unwrap();
        build(&registry, &|_| Dtype::F32, options).unwrap()
    }
}

fn any_experts() -> impl Strategy<Value = ExpertLayout> {
    prop_oneof![Just(ExpertLayout::Packed), Just(ExpertLayout::PerExpert)]
}

fn any_family() -> impl Strategy<Value = Architecture> {
    prop::sample::select(Architecture::ALL.to_vec())
}

pub(crate) fn any_model() -> impl Strategy<Value = Model> {
    let language = (
        1..5usize,
        1..4usize,
        1..3usize,
        1..3usize,
        1..4usize,
        1..3usize,
    );
    let switches = (any_family(), any::<bool>(), 0..2usize, 0..2usize);
    let forms = (any_experts(), any_experts(), any::<bool>());
    (language, switches, forms).prop_map(|(language, switches, forms)| {
        let (layers, interval, groups, queries, width, ratio) = language;
        let (family, tied, mtp, deepstack) = switches;
        let moe = family.is_moe();
        let mut text = json!({
            "vocab_size": 16, "hidden_size": 8, "num_hidden_layers": layers,
            "full_attention_interval": interval,
            "num_attention_heads": 4 * groups * queries, "num_key_value_heads": 2 * groups,
            "head_dim": 16, "linear_num_key_heads": 4, "linear_num_value_heads": 4 * ratio,
            "linear_key_head_dim": width, "linear_value_head_dim": width + 1,
            "rope_parameters": {"mrope_section": [1, 1, 0], "partial_rotary_factor": 0.25},
            "mtp_num_hidden_layers": mtp,
        });
        if moe {
            text["num_experts"] = 4.into();
            text["num_experts_per_tok"] = 2.into();
            text["moe_intermediate_size"] = (4 * width).into();
            text["shared_expert_intermediate_size"] = (4 * ratio).into();
        } else {
            text["intermediate_size"] = (4 * width).into();
        }
        let indexes: Vec<usize> = (0..deepstack).collect();
        let config = if family.is_text_only() {
            text["architectures"] = json!([family.hf_name()]);
            text["tie_word_embeddings"] = tied.into();
            text
        } else {
            json!({
                "architectures": [family.hf_name()],
                "tie_word_embeddings": tied,
                "num_labels": 1 + ratio,
                "text_config": text,
                "vision_config": {
                    "depth": 1, "hidden_size": 8, "num_heads": 2, "intermediate_size": 12,
                    "out_hidden_size": 8, "patch_size": 2, "num_position_embeddings": 4,
                    "deepstack_visual_indexes": indexes,
                },
            })
        };
        Model {
            config,
            experts: forms.0,
            mtp_experts: forms.1,
            names: if forms.2 {
                ExpertNames::Sequential
            } else {
                ExpertNames::Grouped
            },
        }
    })
}

fn any_size() -> impl Strategy<Value = usize> {
    prop_oneof![Just(1usize), Just(2), Just(4)]
}

/// A set of copies without the grouping into strides: (source, source run, target element), run by run.
fn runs(plan: &ModelPlan) -> BTreeMap<(String, String), Vec<(usize, usize)>> {
    let mut all: BTreeMap<(String, String), Vec<(usize, usize)>> = BTreeMap::new();
    for tensor in &plan.tensors {
        for copy in &tensor.copies {
            let source = &tensor.sources[copy.source].name;
            let list = all
                .entry((source.clone(), tensor.name.clone()))
                .or_default();
            for row in 0..copy.rows {
                for element in 0..copy.row_elements {
                    list.push((
                        copy.source_start + row * copy.source_stride + element,
                        copy.target_start + row * copy.target_stride + element,
                    ));
                }
            }
        }
    }
    for list in all.values_mut() {
        list.sort_unstable();
    }
    all
}

/// A source whose elements are all different.
struct Numbered(BTreeMap<String, TensorInfo>);

impl Numbered {
    fn of(plan: &ModelPlan) -> Self {
        let mut infos = BTreeMap::new();
        for source in plan.tensors.iter().flat_map(|tensor| &tensor.sources) {
            let (dtype, shape) = (source.dtype, source.shape.clone());
            infos.insert(source.name.clone(), TensorInfo { dtype, shape });
        }
        Self(infos)
    }

    fn value(&self, name: &str, element: usize) -> f32 {
        let number = self.0.keys().position(|known| known == name).unwrap();
        1.0 + ((number * 7919 + element) % 8_000_000) as f32 / 8_388_608.0
    }
}

impl TensorSource for Numbered {
    fn info(&self, name: &str) -> Option<TensorInfo> {
        self.0.get(name).cloned()
    }

    fn read(
        &self,
        name: &str,
        offset_bytes: u64,
        into: &mut [u8],
    ) -> Result<(), bridge_core::checkpoint::CheckpointError> {
        let first = usize::try_from(offset_bytes).unwrap() / 4;
        for (element, bytes) in into.chunks_exact_mut(4).enumerate() {
            bytes.copy_from_slice(&self.value(name, first + element).to_le_bytes());
        }
        Ok(())
    }
}

pub(crate) fn memory_for(plan: &ModelPlan) -> MemoryTensors {
    let mut memory = MemoryTensors::default();
    for tensor in &plan.tensors {
        let (dtype, shape) = (tensor.dtype, tensor.shape.clone());
        memory.insert(&tensor.name, TensorInfo { dtype, shape });
    }
    memory
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    /// Every source element is read once and every target element written once, in both directions.
    #[test]
    fn whole_model_plans_conserve_elements(model in any_model()) {
        let plan = model.plan(&PlanOptions::default());
        prop_assert!(plan.validate_whole_model().is_ok());
        prop_assert!(plan.inverted().validate_whole_model().is_ok());
    }

    /// The inverse of the inverse moves every element as the plan does.
    #[test]
    fn inverting_twice_gives_the_same_copies(model in any_model()) {
        let plan = model.plan(&PlanOptions::default());
        let twice = plan.inverted().inverted();
        prop_assert_eq!(runs(&plan), runs(&twice));
        let names = |plan: &ModelPlan| {
            let mut names: Vec<_> = plan
                .tensors
                .iter()
                .map(|t| (t.name.clone(), t.shape.clone(), t.transforms.clone()))
                .collect();
            names.sort_by(|a, b| a.0.cmp(&b.0));
            names
        };
        prop_assert_eq!(names(&plan), names(&twice));
    }

    /// Carried out and carried back, every value is where and what it was, whatever the buffer and the threads.
    #[test]
    fn there_and_back_is_the_identity(
        model in any_model(),
        buffer_bytes in 1usize..5000,
        threads in 1usize..4,
    ) {
        let plan = model.plan(&PlanOptions::default());
        let source = Numbered::of(&plan);
        let options = ExecuteOptions { buffer_bytes, threads, ..ExecuteOptions::default() };
        let megatron = memory_for(&plan);
        execute(&plan, &source, &megatron, &options).unwrap();
        let back = plan.inverted();
        let hf = memory_for(&back);
        execute(&back, &megatron, &hf, &options).unwrap();
        for (name, info) in &source.0 {
            let mut wanted = vec![0; usize::try_from(info.num_bytes()).unwrap()];
            source.read(name, 0, &mut wanted).unwrap();
            prop_assert_eq!(hf.bytes(name).unwrap(), wanted, "{}", name);
        }
    }

    /// Over all ranks of any cut, each source element is held exactly as often as its parameter is replicated, and
    /// every rank's targets are written exactly once.
    #[test]
    fn ranks_share_every_element_evenly(
        model in any_model(),
        tp_size in any_size(),
        etp_size in any_size(),
        ep_size in any_size(),
    ) {
        let mut held: BTreeMap<(String, usize), usize> = BTreeMap::new();
        let mut wanted: BTreeMap<(String, usize), usize> = BTreeMap::new();
        // Dense parameters over the tensor-parallel ranks, experts over their own grid.
        let mut count = |cut: Cut, experts: bool| {
            let plan = model.plan(&PlanOptions { cut, ..PlanOptions::default() });
            plan.validate().unwrap();
            for tensor in plan.tensors.iter().filter(|t| t.expert.is_some() == experts) {
                let split = tensor.split.word();
                let is_whole = split == "replicated" || (split == "row" && tensor.shape.len() == 1);
                for copy in &tensor.copies {
                    let Copy { rows, row_elements, .. } = *copy;
                    for row in 0..rows {
                        for element in 0..row_elements {
                            let at = copy.source_start + row * copy.source_stride + element;
                            let key = (tensor.sources[copy.source].name.clone(), at);
                            wanted.insert(key.clone(), if is_whole { tp_size } else { 1 });
                            *held.entry(key).or_default() += 1;
                        }
                    }
                }
            }
        };
        for tp_rank in 0..tp_size {
            count(Cut { tp_rank, tp_size, ..Cut::default() }, false);
        }
        for ep_rank in 0..ep_size {
            for etp_rank in 0..etp_size {
                count(Cut { etp_rank, etp_size, ep_rank, ep_size, ..Cut::default() }, true);
            }
        }
        prop_assert_eq!(&held, &wanted);
        let total: usize = Numbered::of(&model.plan(&PlanOptions::default()))
            .0
            .values()
            .map(TensorInfo::numel)
            .sum();
        prop_assert_eq!(held.len(), total, "nothing is lost");
    }

    /// A bridge without weights plans the published form of any config.
    #[test]
    fn every_config_has_a_plan(model in any_model()) {
        let bridge = AutoBridge::from_hf_config(model.config());
        let plan = bridge.plan(&PlanOptions::default()).unwrap();
        prop_assert!(!plan.tensors.is_empty());
    }

    /// No text makes the reader of configs panic.
    #[test]
    fn any_text_is_a_config_or_an_error(text in "\\PC{0,200}", value in 0u64..u64::MAX) {
        let file = Path::new("config.json");
        if let Ok(json) = serde_json::from_str(&text) {
            let _ = HfConfig::from_json(json, file);
        }
        let config = json!({
            "architectures": ["Qwen3_5ForConditionalGeneration"],
            "text_config": {"hidden_size": value, "num_hidden_layers": value, "vocab_size": value},
        });
        let _ = HfConfig::from_json(config, file);
    }
}
