//! Criterion suite: checkpoints converted from disk to disk, beside a synced copy of the same bytes.

use std::fs::File;
use std::hint::black_box;
use std::path::Path;

use bridge_core::checkpoint::shard::{ShardInfo, ShardWriter};
use bridge_core::checkpoint::{Overwrite, ReadBack, Staging};
use bridge_core::config::HfConfig;
use bridge_core::convert::{ExecuteOptions, execute};
use bridge_core::layout::{LayoutSpec, ParallelSizes};
use bridge_core::plan::{PlanOptions, Stage};
use bridge_core::{AutoBridge, ExportOptions, ImportOptions};
use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use serde_json::{Value, json};

const GOLDENS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/goldens");

/// On the disk of the build, not in /tmp, which may be memory.
fn scratch() -> tempfile::TempDir {
    tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a writable target directory")
}

/// Opens, validates and plans; the bar is 50 ms for 1,000 tensors.
fn opening(criterion: &mut Criterion) {
    let file = Path::new(GOLDENS).join("checkpoints/dense_vl/config.json");
    let text = std::fs::read_to_string(file).expect("a golden config");
    let mut config: Value = serde_json::from_str(&text).expect("a golden config");
    let types = [
        "linear_attention",
        "linear_attention",
        "linear_attention",
        "full_attention",
    ];
    config["text_config"]["num_hidden_layers"] = json!(72);
    config["text_config"]["layer_types"] = json!(types.repeat(18));
    let config = HfConfig::from_json(config, Path::new("config.json")).expect("a sound config");
    let dir = scratch();
    let model = dir.path().join("model");
    benches::write_checkpoint(&config, &model);

    let open = || AutoBridge::from_hf_pretrained(&model).expect("a checkpoint");
    let tensors = open().checkpoint().map_or(0, |files| files.names().len());
    assert!(tensors >= 1000, "{tensors} tensors");
    let mut group = criterion.benchmark_group("open_1000_tensors");
    group.throughput(Throughput::Elements(tensors as u64));
    group.bench_function("open", |b| b.iter(|| black_box(open())));
    group.bench_function("open_validate_plan", |b| {
        b.iter(|| black_box(open().plan(&PlanOptions::default()).expect("a plan")));
    });
    group.bench_function("open_validate_import", |b| {
        b.iter(|| {
            let bridge = open();
            let import = bridge.import(&ImportOptions::default()).expect("an import");
            black_box(import.plan().num_bytes())
        });
    });
    group.finish();
}

/// Writes one rank of a layout, as `trainer convert shard` does.
fn shard(bridge: &AutoBridge, tp: usize, output: &Path) {
    let spec = LayoutSpec {
        sizes: ParallelSizes {
            tp_size: tp,
            ..ParallelSizes::default()
        },
        ..LayoutSpec::default()
    };
    let (options, layout) = bridge.lay_out(&spec).expect("a layout");
    let rank = layout.coord(0).expect("rank 0");
    let chunk = layout.chunk(0, 0).expect("one stage");
    let planner = bridge.planner(&options).expect("a planner");
    let plan = planner
        .plan(&Stage::new(&layout, rank, chunk))
        .expect("a plan");
    let info = ShardInfo {
        architecture: bridge.config().architecture.hf_name().to_owned(),
        padded_vocab_size: layout.padded_vocab_size(),
        spec,
        rank,
        vp_stage: 0,
    };
    let source = bridge.checkpoint().expect("weights");
    let writer =
        ShardWriter::create(&info, &plan.targets(), output, Overwrite::Yes).expect("a file");
    execute(&plan, source, &writer, &ExecuteOptions::default()).expect("a shard");
    writer.finish().expect("a whole file");
}

fn copy_and_sync(from: &Path, to: &Path) {
    std::fs::copy(from, to).expect("room on the disk");
    File::open(to)
        .and_then(|file| file.sync_all())
        .expect("a synced file");
}

/// A checkpoint of 0.8B, page cache warm, every result synced.
fn conversion(criterion: &mut Criterion) {
    let config = HfConfig::from_file(&Path::new(GOLDENS).join("configs/Qwen3.5-0.8B.json"));
    let dir = scratch();
    let at = |name: &str| dir.path().join(name);
    benches::write_checkpoint(&config.expect("a golden config"), &at("model"));
    let bridge = AutoBridge::from_hf_pretrained(&at("model")).expect("a checkpoint");
    let staging = |read_back| Staging {
        overwrite: Overwrite::Yes,
        read_back,
        ..Staging::default()
    };
    let import = |to: &str, read_back| {
        bridge
            .import_ckpt(&at(to), &ImportOptions::default(), &staging(read_back))
            .expect("an import")
    };
    let export = |read_back| {
        bridge
            .export_ckpt(
                &at("megatron"),
                &at("out"),
                &ExportOptions::default(),
                &staging(read_back),
            )
            .expect("an export")
    };
    let bytes = import("megatron", ReadBack::No).bytes;

    let mut group = criterion.benchmark_group("conversion_0.8B");
    group.sample_size(10);
    group.throughput(Throughput::Bytes(bytes));
    group.bench_function("copy_and_sync", |b| {
        b.iter(|| copy_and_sync(&at("model").join("model.safetensors"), &at("copy")));
    });
    group.bench_function("import", |b| b.iter(|| import("out", ReadBack::Yes)));
    group.bench_function("import_without_reading_back", |b| {
        b.iter(|| import("out", ReadBack::No))
    });
    group.bench_function("export", |b| b.iter(|| export(ReadBack::Yes)));
    group.bench_function("export_without_reading_back", |b| {
        b.iter(|| export(ReadBack::No))
    });
    group.bench_function("shard", |b| b.iter(|| shard(&bridge, 1, &at("rank"))));
    group.throughput(Throughput::Bytes(bytes / 4));
    group.bench_function("shard_one_rank_of_tp4", |b| {
        b.iter(|| shard(&bridge, 4, &at("rank")))
    });
    group.finish();
}

criterion_group!(benches, opening, conversion);
criterion_main!(benches);
