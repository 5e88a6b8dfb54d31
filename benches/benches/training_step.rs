//! Criterion suite: whole training steps of the work that `peers/train.py` compares with transformers.

use benches::{EIGHT_LAYERS, Training, batch, config, model};
use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use tch::Kind;

fn training_step(criterion: &mut Criterion) {
    bridge_torch::shim::keep_freed_memory();
    bridge_torch::shim::flush_denormals();
    let mut group = criterion.benchmark_group("training_step");
    group.sample_size(10);
    let batch = batch(2, 512);
    group.throughput(Throughput::Elements(1024));
    for (moe, variant) in [(false, "dense"), (true, "moe")] {
        for (dtype, name) in [(Kind::Float, "float32"), (Kind::BFloat16, "bfloat16")] {
            let mut training = Training::new(model(config(moe, &EIGHT_LAYERS), dtype));
            group.bench_function(format!("{variant}_{name}"), |bencher| {
                bencher.iter(|| training.step(&batch));
            });
        }
    }
    group.finish();
}

criterion_group!(suite, training_step);
criterion_main!(suite);
