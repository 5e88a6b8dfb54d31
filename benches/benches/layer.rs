//! Criterion suite: one layer of each kind, forward and backward, at hidden 512 on 2 x 512 tokens.
//!
//! A layer is measured as a model of one layer without its output layer, so embedding and final norm are in the figure.

use benches::{batch, config, model};
use bridge_torch::model::ForwardOptions;
use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use tch::Kind;

fn layer(criterion: &mut Criterion) {
    bridge_torch::shim::keep_freed_memory();
    bridge_torch::shim::flush_denormals();
    let mut group = criterion.benchmark_group("layer");
    group.sample_size(10);
    let mut batch = batch(2, 512);
    batch.labels = None;
    group.throughput(Throughput::Elements(1024));
    let options = ForwardOptions {
        hidden_states: false,
        logits: false,
        mtp: false,
        ..ForwardOptions::default()
    };
    for (kind, moe, name) in [
        ("linear_attention", false, "gated_delta_net"),
        ("full_attention", false, "attention"),
        ("linear_attention", true, "gated_delta_net_moe"),
        ("full_attention", true, "attention_moe"),
    ] {
        for (dtype, dtype_name) in [(Kind::Float, "float32"), (Kind::BFloat16, "bfloat16")] {
            let model = model(config(moe, &[kind]), dtype);
            group.bench_function(format!("{name}_{dtype_name}_forward"), |bencher| {
                bencher.iter(|| tch::no_grad(|| model.forward(&batch, &options).expect("it fits")));
            });
            group.bench_function(format!("{name}_{dtype_name}_forward_backward"), |bencher| {
                bencher.iter(|| {
                    let output = model.forward(&batch, &options).expect("it fits");
                    output.hidden_norm.sum(Kind::Float).backward();
                    model.params().clear_grads();
                });
            });
        }
    }
    group.finish();
}

criterion_group!(suite, layer);
criterion_main!(suite);
