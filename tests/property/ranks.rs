//! Laws of the bytes that ranks hold, over random small models, checkpoint forms and layouts: every rank's shard is made of
//! random bytes, and put together again.

use std::sync::atomic::{AtomicU64, Ordering};

use bridge_core::Dtype;
use bridge_core::checkpoint::{CheckpointError, MemoryTensors, TensorInfo, TensorSource};
use bridge_core::convert::{ExecuteOptions, NonFinite, Planned, Transforms, execute};
use bridge_core::layout::{
    LayerWord, ModelFacts, ParallelLayout, ParallelSizes, PipelineLayout, PipelineOptions, World,
};
use bridge_core::mapping::Registry;
use bridge_core::models::registry_for;
use bridge_core::plan::{
    KeyStyle, ModelPlan, PlanOptions, Stage, build_stage, build_stored, gather,
};
use proptest::prelude::*;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::plans::{Model, any_model, memory_for};

/// Bytes are moved, whatever values they would be.
fn moving() -> ExecuteOptions {
    ExecuteOptions {
        transforms: Transforms::LayoutOnly,
        non_finite: NonFinite::Allow,
        ..ExecuteOptions::default()
    }
}

/// A model, and Hugging Face tensors of random bytes for it.
struct Checkpoint {
    model: Model,
    registry: Registry,
    dtype: Dtype,
    tensors: MemoryTensors,
}

impl Checkpoint {
    fn new(model: Model, dtype: Dtype, seed: u64) -> Self {
        let registry = registry_for(&model.config(), &model.facts()).unwrap();
        let mut random = ChaCha8Rng::seed_from_u64(seed);
        let mut tensors = MemoryTensors::default();
        for (name, parameter) in registry.hf_parameters() {
            let info = TensorInfo {
                dtype: dtype_of(name, dtype),
                shape: parameter.shape.clone(),
            };
            let bytes = (0..info.num_bytes()).map(|_| random.random::<u8>());
            tensors.insert_bytes(name, info.clone(), bytes.collect());
        }
        Self {
            model,
            registry,
            dtype,
            tensors,
        }
    }

    /// What each stage of each rank holds, with a label before it.
    fn plans(&self, layout: &ParallelLayout) -> Vec<(String, ModelPlan)> {
        let dtype_of = |name: &str| dtype_of(name, self.dtype);
        let plan = |stage| {
            build_stage(&self.registry, &dtype_of, &PlanOptions::default(), &stage).unwrap()
        };
        let labels = (0..).map(|number| format!("{number}/"));
        labels.zip(Stage::all(layout).map(plan)).collect()
    }

    fn layout(&self, shape: &Shape) -> Option<ParallelLayout> {
        let mut facts = ModelFacts::from_config(&self.model.config());
        facts.make_vocab_size_divisible_by = shape.padding;
        let sizes = ParallelSizes {
            ep_size: facts.num_experts.map_or(1, |_| shape.sizes.ep_size),
            ..shape.sizes
        };
        ParallelLayout::new(&sizes, &shape.pipeline(&facts), &facts).ok()
    }

    /// The tensors that differ from those of the checkpoint, or are not there.
    fn lost(&self, found: &MemoryTensors) -> Vec<String> {
        let lost = |name: &&str| found.bytes(name) != self.tensors.bytes(name);
        let names = self.tensors.names().filter(lost);
        names.map(str::to_owned).collect()
    }
}

/// A_log is in float32 beside weights of 16 bits.
fn dtype_of(name: &str, dtype: Dtype) -> Dtype {
    if name.ends_with("A_log") {
        Dtype::F32
    } else {
        dtype
    }
}

/// A layout before it meets a model.
#[derive(Debug, Clone)]
struct Shape {
    sizes: ParallelSizes,
    /// The stage of each decoder layer, as a part of all stages.
    stages: Vec<prop::sample::Index>,
    virtual_stages: usize,
    padding: Option<usize>,
}

impl Shape {
    /// Layers in order over the stages, some of which may be empty; embedding, head and loss where they must be.
    fn pipeline(&self, facts: &ModelFacts) -> PipelineOptions {
        let count = match self.sizes.pp_size {
            1 => 1,
            pp_size => pp_size * self.virtual_stages,
        };
        let mut stages = vec![Vec::new(); count];
        stages[0].push(LayerWord::Embedding);
        let mut places: Vec<usize> = (0..facts.num_layers)
            .map(|layer| self.stages[layer % self.stages.len()].index(count))
            .collect();
        places.sort_unstable();
        for stage in places {
            stages[stage].push(LayerWord::Decoder);
        }
        let last = stages.last_mut().unwrap();
        last.extend(std::iter::repeat_n(LayerWord::Mtp, facts.mtp_num_layers));
        last.push(LayerWord::Loss);
        PipelineOptions {
            pipeline_model_parallel_layout: Some(PipelineLayout::new(stages)),
            ..PipelineOptions::default()
        }
    }
}

fn any_shape() -> impl Strategy<Value = Shape> {
    let power = || prop::sample::select(vec![1usize, 2, 4]);
    let world = prop_oneof![Just(World::Smallest), Just(World::DataParallel(2))];
    (
        (power(), power(), power(), 1..4usize, 1..3usize, world),
        prop::collection::vec(any::<prop::sample::Index>(), 1..6),
        1..4usize,
        prop::option::of(1..20usize),
    )
        .prop_map(|(sizes, stages, virtual_stages, padding)| {
            let (tp_size, ep_size, etp_size, pp_size, cp_size, world) = sizes;
            Shape {
                sizes: ParallelSizes {
                    tp_size,
                    cp_size,
                    pp_size,
                    vpp_size: None,
                    ep_size,
                    etp_size,
                    world,
                },
                stages,
                virtual_stages,
                padding,
            }
        })
}

fn any_checkpoint() -> impl Strategy<Value = (Model, Dtype, u64)> {
    let dtype = prop::sample::select(vec![Dtype::F32, Dtype::Bf16, Dtype::F16]);
    (any_model(), dtype, any::<u64>())
}

/// Every rank's shard, made by its own plan, as one source under the labels of the plans.
fn shards(plans: &[(String, ModelPlan)], source: &dyn TensorSource) -> MemoryTensors {
    let mut all = MemoryTensors::default();
    for (label, plan) in plans {
        let shard = memory_for(plan);
        execute(plan, source, &shard, &moving()).unwrap();
        for (name, info) in plan.targets() {
            all.insert_bytes(&format!("{label}{name}"), info, shard.bytes(&name).unwrap());
        }
    }
    all
}

/// All of a plan's targets.
fn carried_out(plan: &ModelPlan, source: &dyn TensorSource) -> MemoryTensors {
    let memory = memory_for(plan);
    execute(plan, source, &memory, &moving()).unwrap();
    memory
}

/// Counts the bytes that are asked for.
struct Counting<'a> {
    inner: &'a MemoryTensors,
    bytes: AtomicU64,
}

impl TensorSource for Counting<'_> {
    fn info(&self, name: &str) -> Option<TensorInfo> {
        self.inner.info(name)
    }

    fn read(&self, name: &str, offset_bytes: u64, into: &mut [u8]) -> Result<(), CheckpointError> {
        self.bytes.fetch_add(into.len() as u64, Ordering::Relaxed);
        self.inner.read(name, offset_bytes, into)
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// The shards of all ranks, gathered by the plans read the other way, are the checkpoint, byte for byte.
    #[test]
    fn what_all_ranks_hold_gathers_to_the_checkpoint(
        (model, dtype, seed) in any_checkpoint(),
        shape in any_shape(),
    ) {
        let checkpoint = Checkpoint::new(model, dtype, seed);
        let Some(layout) = checkpoint.layout(&shape) else {
            return Ok(());
        };
        let plans = checkpoint.plans(&layout);
        let shards = shards(&plans, &checkpoint.tensors);
        let gathered = gather(plans).unwrap();
        prop_assert_eq!(checkpoint.lost(&carried_out(&gathered, &shards)), Vec::<String>::new());
    }

    /// From the shards of one layout to those of another, with no checkpoint stored in between: each rank gets the bytes
    /// that it would get from the checkpoint, and they gather to it.
    #[test]
    fn one_layout_becomes_another_and_then_the_checkpoint(
        (model, dtype, seed) in any_checkpoint(),
        from in any_shape(),
        to in any_shape(),
    ) {
        let checkpoint = Checkpoint::new(model, dtype, seed);
        let (Some(from), Some(to)) = (checkpoint.layout(&from), checkpoint.layout(&to)) else {
            return Ok(());
        };
        let before = checkpoint.plans(&from);
        let shards_before = shards(&before, &checkpoint.tensors);
        let gathered = gather(before).unwrap();
        let between = Planned::new(&gathered, &shards_before, &moving()).unwrap();
        let after = checkpoint.plans(&to);
        let shards_after = shards(&after, &between);
        let direct = shards(&after, &checkpoint.tensors);
        for name in direct.names() {
            prop_assert_eq!(shards_after.bytes(name), direct.bytes(name), "{}", name);
        }
        let gathered = gather(after).unwrap();
        prop_assert_eq!(checkpoint.lost(&carried_out(&gathered, &shards_after)), Vec::<String>::new());
    }

    /// The same by way of the global tensors of a `torch_dist` directory, which any layout loads.
    #[test]
    fn stored_tensors_come_back_as_the_checkpoint((model, dtype, seed) in any_checkpoint()) {
        let checkpoint = Checkpoint::new(model, dtype, seed);
        let dtype_of = |name: &str| dtype_of(name, checkpoint.dtype);
        let options = PlanOptions::default();
        let plan = build_stored(&checkpoint.registry, &dtype_of, &options, KeyStyle::Written).unwrap();
        let stored = carried_out(&plan, &checkpoint.tensors);
        prop_assert_eq!(checkpoint.lost(&carried_out(&plan.inverted(), &stored)), Vec::<String>::new());
    }

    /// Making a rank's shard reads no more than that shard, packed experts included: the bytes asked of the source, counted
    /// as they are asked for, are those of the shard without its padding. The promise is 1.02 times the shard; the executor
    /// reads ahead of nothing and merges no ranges over a gap, so that small tensors need no slack.
    #[test]
    fn a_rank_reads_no_more_than_it_holds(
        (model, dtype, seed) in any_checkpoint(),
        shape in any_shape(),
        buffer_bytes in 8usize..5000,
    ) {
        let checkpoint = Checkpoint::new(model, dtype, seed);
        let Some(layout) = checkpoint.layout(&shape) else {
            return Ok(());
        };
        for (label, plan) in checkpoint.plans(&layout) {
            let counting = Counting { inner: &checkpoint.tensors, bytes: AtomicU64::new(0) };
            let options = ExecuteOptions { buffer_bytes, ..moving() };
            execute(&plan, &counting, &memory_for(&plan), &options).unwrap();
            let copied: u64 = plan
                .tensors
                .iter()
                .flat_map(|tensor| tensor.copies.iter().map(move |copy| (tensor, copy)))
                .map(|(tensor, copy)| {
                    let elements = (copy.rows * copy.row_elements) as u64;
                    elements * tensor.sources[copy.source].dtype.size_bytes() as u64
                })
                .sum();
            let read = counting.bytes.into_inner();
            prop_assert_eq!(read, copied, "{} of {:?}", label, layout.table());
            prop_assert!(read <= plan.num_bytes(), "{} > {}", read, plan.num_bytes());
        }
    }
}
