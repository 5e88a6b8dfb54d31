//! Criterion suite: planning and mapping a checkpoint of Qwen3.5-0.8B's size.

use std::hint::black_box;
use std::path::Path;

use bridge_core::AutoBridge;
use bridge_core::checkpoint::{CheckpointError, TensorInfo, TensorSink, TensorSource};
use bridge_core::config::HfConfig;
use bridge_core::convert::{ExecuteOptions, NonFinite, execute};
use bridge_core::plan::{ModelPlan, PlanOptions};
use criterion::{Criterion, Throughput, criterion_group, criterion_main};

/// Tensors out of one block of bytes: the cost of a disk is not what is measured.
struct Ones<'a>(&'a ModelPlan);

impl TensorSource for Ones<'_> {
    fn info(&self, name: &str) -> Option<TensorInfo> {
        let mut sources = self.0.tensors.iter().flat_map(|tensor| &tensor.sources);
        let source = sources.find(|source| source.name == name)?;
        Some(TensorInfo {
            dtype: source.dtype,
            shape: source.shape.clone(),
        })
    }

    fn read(&self, _: &str, _: u64, into: &mut [u8]) -> Result<(), CheckpointError> {
        into.fill(0x3f);
        Ok(())
    }
}

/// Takes bytes and forgets them.
struct Sink;

impl TensorSink for Sink {
    fn write(&self, _: &str, _: u64, bytes: &[u8]) -> Result<(), CheckpointError> {
        black_box(bytes);
        Ok(())
    }
}

fn mapping(c: &mut Criterion) {
    let file =
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/goldens/configs/Qwen3.5-0.8B.json");
    let config = HfConfig::from_file(&file).expect("a golden config");
    let bridge = AutoBridge::from_hf_config(config);
    let mut group = c.benchmark_group("mapping_0.8B");
    group.sample_size(10);
    group.bench_function("plan", |b| {
        b.iter(|| black_box(bridge.plan(&PlanOptions::default()).expect("a plan")));
    });
    let plan = bridge.plan(&PlanOptions::default()).expect("a plan");
    group.bench_function("invert", |b| b.iter(|| black_box(plan.inverted())));

    group.throughput(Throughput::Bytes(plan.num_bytes()));
    let run = |plan: &ModelPlan, options: &ExecuteOptions| {
        execute(plan, &Ones(plan), &Sink, options).expect("a conversion")
    };
    let default = ExecuteOptions::default();
    group.bench_function("import", |b| b.iter(|| run(&plan, &default)));
    let unchecked = ExecuteOptions {
        non_finite: NonFinite::Allow,
        ..ExecuteOptions::default()
    };
    group.bench_function("import_without_finite_check", |b| {
        b.iter(|| run(&plan, &unchecked));
    });
    let back = plan.inverted();
    group.bench_function("export", |b| b.iter(|| run(&back, &default)));
    let float32 = plan.clone().with_dtype(bridge_core::Dtype::F32);
    group.bench_function("import_as_float32", |b| b.iter(|| run(&float32, &default)));
    let half = back.clone().with_dtype(bridge_core::Dtype::F16);
    group.bench_function("export_rounding_to_float16", |b| {
        b.iter(|| run(&half, &default))
    });
    group.finish();
}

criterion_group!(benches, mapping);
criterion_main!(benches);
