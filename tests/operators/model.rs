//! Whole models on kernels.

use std::error::Error;
use std::ops::ControlFlow;
use std::path::Path;
use std::process::ExitCode;

use bridge_core::AutoBridge;
use bridge_torch::batch::Batch;
use bridge_torch::generate::{GenerateOptions, generate};
use bridge_torch::model::{ForwardOptions, LossOptions, ModelOptions, Qwen3VlModel};
use bridge_torch::ops::policy::KernelPolicy;
use serde_json::{Value, json};
use tch::{Device, Kind, Tensor};
use tests::seeded;

use super::{distance, kernels};

/// A model that the kernels take: a golden's config with the sizes that they are made for; random weights.
fn checkpoint(folder: &Path, golden: &str) {
    let text = fs_err::read_to_string(tests::golden(golden).join("config.json")).unwrap();
    let mut config: Value = serde_json::from_str(&text).unwrap();
    config["vision_config"]["out_hidden_size"] = json!(128);
    let text = config["text_config"].as_object_mut().unwrap();
    let sizes = json!({
        "hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 128,
        "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 128, "linear_value_head_dim": 128,
        "num_hidden_layers": 3, "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        "initializer_range": 0.05,
    });
    text.extend(sizes.as_object().unwrap().clone());
    // Every token goes to every expert: a choice that flips with a rounding would drown what is compared here.
    if let Some(experts) = text.get("num_experts").cloned() {
        text["num_experts_per_tok"] = experts;
    }
    let rope = text["rope_parameters"].as_object_mut().unwrap();
    rope["partial_rotary_factor"] = json!(0.5);
    rope["mrope_section"] = json!([11, 11, 10]);
    let file = folder.join("of.json");
    fs_err::write(&file, config.to_string()).unwrap();
    let out = folder.join("model");
    let args = ["trainer", "init", "--config"].map(Into::into).into_iter();
    let args = args
        .chain([
            file.into_os_string(),
            "--output".into(),
            out.into_os_string(),
        ])
        .chain(["--seed", "3", "--dtype", "bfloat16"].map(Into::into));
    assert_eq!(trainer::run(args), ExitCode::SUCCESS);
}

fn model(folder: &Path, kernels: &str, dtype: Kind) -> Qwen3VlModel {
    let bridge = AutoBridge::from_hf_pretrained(&folder.join("model")).unwrap();
    let options = ModelOptions {
        dtype,
        device: Device::Cpu,
        kernels: kernels.parse::<KernelPolicy>().unwrap(),
        ..ModelOptions::default()
    };
    Qwen3VlModel::load(&bridge, &options).unwrap()
}

/// Loss and the gradients of all parameters that it reaches, by name; texts do not reach the vision tower.
fn step(model: &Qwen3VlModel, batch: &Batch) -> (f64, Vec<(String, Tensor)>) {
    let losses = model.loss(batch, &LossOptions::default()).unwrap();
    losses.total.backward();
    let grads = model.params().iter().filter_map(|(name, param)| {
        let grad = param.grad();
        let copy = grad.defined().then(|| grad.to_kind(Kind::Double).copy())?;
        Some((name.to_owned(), copy))
    });
    (losses.total.double_value(&[]), grads.collect())
}

/// Padding on both sides, or a pack.
fn batches() -> [Batch; 2] {
    let ids = |shape: [i64; 2]| Tensor::randint(960, shape, (Kind::Int64, Device::Cpu));
    let column = Tensor::arange(75, (Kind::Int64, Device::Cpu));
    let mask = Tensor::stack(&[column.ge(4), column.lt(70)], 0).to_kind(Kind::Int64);
    let mut padded = Batch::new(ids([2, 75]));
    padded.labels = Some(
        padded
            .input_ids
            .where_scalarother(&mask.to_kind(Kind::Bool), -100),
    );
    padded.attention_mask = Some(mask);
    let mut packed = Batch::new(ids([1, 90]));
    packed.labels = Some(packed.input_ids.shallow_clone());
    packed.cu_seqlens = Some(vec![0, 20, 90]);
    [padded, packed]
}

#[test]
fn models_on_kernels_have_the_losses_and_gradients_of_the_reference() {
    let _generator = seeded(41);
    kernels();
    for golden in ["checkpoints/dense_vl", "checkpoints/moe_vl"] {
        let dir = tempfile::tempdir().unwrap();
        checkpoint(dir.path(), golden);
        let ours = model(dir.path(), "cuda", Kind::BFloat16);
        for one in ours.implementations() {
            let on_kernels = one.by.starts_with("kernels ");
            assert_eq!(on_kernels, one.op != "attention", "{}: {}", one.op, one.by);
        }
        // Kernels may not be further from float64 than libtorch in bfloat16 is, but for the order of sums.
        let plain = model(dir.path(), "reference", Kind::BFloat16);
        let truth = model(dir.path(), "reference", Kind::Double);
        for batch in batches() {
            let (loss, grads) = step(&ours, &batch);
            let (plain_loss, plain_grads) = step(&plain, &batch);
            let (true_loss, true_grads) = step(&truth, &batch);
            let bound = 5e-4 * true_loss;
            assert!(
                (loss - true_loss).abs() <= bound,
                "{loss} {plain_loss} {true_loss}"
            );
            assert_eq!(grads.len(), true_grads.len());
            for (((name, grad), (_, plain)), (_, truth)) in
                grads.iter().zip(&plain_grads).zip(&true_grads)
            {
                let (far, usual) = (distance(grad, truth), distance(plain, truth));
                // Those of the decay are sums over tokens that nearly cancel.
                let more = if name.ends_with("A_log") || name.ends_with("dt_bias") {
                    0.1
                } else {
                    5e-3
                };
                assert!(
                    far <= 1.5 * usual + more,
                    "{name}: {far} off, libtorch {usual}"
                );
            }
            for model in [&ours, &plain, &truth] {
                model.params().clear_grads();
            }
        }
    }
}

#[test]
fn padding_between_real_tokens_is_refused_by_kernels_with_its_place() {
    let _generator = seeded(42);
    kernels();
    let dir = tempfile::tempdir().unwrap();
    checkpoint(dir.path(), "checkpoints/dense_vl");
    let [mut batch, _] = batches();
    let mask = batch.attention_mask.as_mut().unwrap();
    let _ = mask.get(1).narrow(0, 33, 1).fill_(0);
    let ours = model(dir.path(), "cuda", Kind::BFloat16);
    let error = ours.loss(&batch, &LossOptions::default()).unwrap_err();
    let text = error.source().unwrap().to_string();
    assert!(
        text.contains("is 0 in sample 1 at position 33, between real tokens"),
        "{text}"
    );
    assert!(text.contains("use kernels `gdn=reference`"), "{text}");
    let other = model(dir.path(), "cuda,gdn=reference", Kind::BFloat16);
    let losses = other.loss(&batch, &LossOptions::default()).unwrap();
    assert!(losses.total.double_value(&[]).is_finite());
}

#[test]
fn generation_on_kernels_goes_on_from_its_states() {
    let _generator = seeded(43);
    kernels();
    let dir = tempfile::tempdir().unwrap();
    checkpoint(dir.path(), "checkpoints/moe_vl");
    let [padded, _] = batches();
    // The second prompt is longer than a chunk, the first is padded on the left.
    let mut prompt = Batch::new(padded.input_ids.narrow(1, 0, 66));
    prompt.attention_mask = Some(padded.attention_mask.unwrap().narrow(1, 0, 66));
    let ours = model(dir.path(), "cuda", Kind::BFloat16);
    let options = GenerateOptions {
        max_new_tokens: 5,
        ..GenerateOptions::default()
    };
    let mut steps = Vec::new();
    let new = generate(&ours, &prompt, &options, &mut |step| {
        steps.push(step.logits.copy());
        ControlFlow::Continue(())
    })
    .unwrap();

    // All of that text at once, without states.
    let rows: Vec<Tensor> = new.iter().map(|ids| Tensor::from_slice(ids)).collect();
    let new = Tensor::stack(&rows, 0);
    let mut whole = Batch::new(Tensor::cat(&[&prompt.input_ids, &new], 1));
    let mask = prompt.attention_mask.unwrap();
    whole.attention_mask = Some(Tensor::cat(&[&mask, &new.ones_like()], 1));
    let logits = |dtype| {
        let model = model(dir.path(), "reference", dtype);
        let output = tch::no_grad(|| model.forward(&whole, &ForwardOptions::default())).unwrap();
        output.logits.unwrap().narrow(1, 65, 5)
    };
    let truth = logits(Kind::Double);
    let found = Tensor::stack(&steps, 1);
    let (far, usual) = (
        distance(&found, &truth),
        distance(&logits(Kind::BFloat16), &truth),
    );
    assert!(far <= 1.5 * usual + 5e-3, "{far} off, libtorch {usual}");
}
