//! Our side of `peers/train.py`: trains a checkpoint on one batch and prints one JSON line.
//!
//! train_step --model DIR --batch FILE --dtype float32|bfloat16 [--steps 8] [--threads 2] [--profile 30]
//!
//! --profile N also prints the N operators on which the last step spent most, to stderr.

use std::collections::HashMap;
use std::io::Write;
use std::path::Path;
use std::time::Instant;

use benches::{EIGHT_LAYERS, Training, batch, config, model};
use bridge_core::AutoBridge;
use bridge_torch::batch::Batch;
use bridge_torch::model::{ModelOptions, Qwen3VlModel};
use bridge_torch::shim::OpTime;
use serde_json::json;
use tch::{Kind, Tensor};

fn main() {
    bridge_torch::shim::keep_freed_memory();
    bridge_torch::shim::flush_denormals();
    let args: Vec<String> = std::env::args().skip(1).collect();
    let flags: HashMap<&str, &str> = args
        .chunks(2)
        .map(|pair| (pair[0].trim_start_matches("--"), pair[1].as_str()))
        .collect();
    let number = |name: &str, default: usize| {
        flags
            .get(name)
            .map_or(default, |text| text.parse().expect("a number"))
    };
    let threads = number("threads", 2);
    tch::set_num_threads(i32::try_from(threads).expect("a few threads"));
    let dtype = match flags.get("dtype").copied() {
        Some("bfloat16") => Kind::BFloat16,
        _ => Kind::Float,
    };
    let (model, batch) = match flags.get("model") {
        Some(dir) => (load(dir, dtype), read(flags["batch"])),
        None => {
            // Without a checkpoint: random weights of the same model, to profile.
            let moe = flags.get("variant") == Some(&"moe");
            (model(config(moe, &EIGHT_LAYERS), dtype), batch(2, 512))
        }
    };
    let tokens = batch.input_ids.numel();
    let mut training = Training::new(model);
    let (mut times, mut losses) = (Vec::new(), Vec::new());
    let profiled = number("profile", 0);
    let steps = number("steps", 8);
    for step in 0..steps {
        let start = Instant::now();
        let loss = if profiled > 0 && step + 1 == steps {
            let (loss, ops) = bridge_torch::shim::profile(|| training.step(&batch));
            print_profile(&ops, profiled);
            loss
        } else {
            training.step(&batch)
        };
        times.push(start.elapsed().as_secs_f64());
        losses.push((loss * 1e5).round() / 1e5);
    }
    let mut counted = times.split_off(times.len().min(2));
    counted.sort_by(f64::total_cmp);
    let step = median(&counted);
    let line = json!({
        "threads": threads,
        "step_s": step,
        "tokens_per_s": tokens as f64 / step,
        "losses": losses,
        "peak_rss_mb": peak_rss_mb(),
    });
    writeln!(std::io::stdout(), "{line}").expect("somebody reads");
}

fn print_profile(ops: &[OpTime], most: usize) {
    let seconds = |ns: u64| ns as f64 / 1e9;
    let mut text = format!(
        "{:.3} s in operators\n",
        seconds(ops.iter().map(|op| op.own_ns).sum())
    );
    for op in ops.iter().take(most) {
        text += &format!(
            "{:8.4} s {:6} x {}\n",
            seconds(op.own_ns),
            op.calls,
            op.name
        );
    }
    std::io::stderr()
        .write_all(text.as_bytes())
        .expect("somebody reads");
}

/// The middle of sorted values, or the mean of the two in the middle.
fn median(sorted: &[f64]) -> f64 {
    let half = sorted.len() / 2;
    match sorted.len() % 2 {
        1 => sorted[half],
        _ if sorted.is_empty() => f64::NAN,
        _ => f64::midpoint(sorted[half - 1], sorted[half]),
    }
}

fn load(dir: &str, dtype: Kind) -> Qwen3VlModel {
    let bridge = AutoBridge::from_hf_pretrained(Path::new(dir)).expect("a checkpoint");
    let options = ModelOptions {
        dtype,
        ..ModelOptions::default()
    };
    Qwen3VlModel::load(&bridge, &options).expect("a model")
}

fn read(file: &str) -> Batch {
    let mut tensors: HashMap<String, Tensor> = Tensor::read_safetensors(file)
        .expect("a safetensors file")
        .into_iter()
        .collect();
    let mut take = |name: &str| tensors.remove(name);
    Batch {
        labels: take("labels"),
        ..Batch::new(take("input_ids").expect("input_ids"))
    }
}

/// The largest resident memory of this process so far.
fn peak_rss_mb() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let kilobytes = line.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok());
    kilobytes.unwrap_or(0) / 1024
}
