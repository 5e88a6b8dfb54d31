//! Packing and padding: what a sample computes never depends on what stands beside it.
//!
//! All in float64 on the golden checkpoints, losses and every gradient, dense and mixture of experts.

use bridge_torch::batch::Batch;
use bridge_torch::model::{ForwardOptions, LossOptions, Qwen3VlModel};
use tch::{Kind, Tensor};

use crate::fixture::{Tensors, distance, model, real_rows, value};

const MODELS: [&str; 2] = ["dense_vl", "moe_vl"];

/// Single samples with labels: text and images of different lengths, one beyond a chunk.
fn samples(name: &str) -> Vec<Batch> {
    let golden = |case: &str| Tensors::golden(&format!("model/{name}_{case}.safetensors"));
    let mut all: Vec<Batch> = ["image", "text", "length_65", "video"]
        .map(|case| golden(case).batch("in."))
        .into();
    all.push(short(&golden("text").batch("in."), 9));
    for sample in &all {
        // Nothing stands before a sample that could predict its first token, or (the head) its second.
        let first = sample.labels.as_ref().unwrap().narrow(1, 0, 2);
        let _ = first.shallow_clone().fill_(-100);
    }
    all
}

/// The first tokens of a text sample.
fn short(batch: &Batch, length: i64) -> Batch {
    let cut = |tensor: &Option<Tensor>| tensor.as_ref().map(|t| t.narrow(1, 0, length));
    Batch {
        labels: cut(&batch.labels),
        attention_mask: cut(&batch.attention_mask),
        mm_token_type_ids: cut(&batch.mm_token_type_ids),
        ..Batch::new(batch.input_ids.narrow(1, 0, length))
    }
}

/// Token fields side by side, pixels below each other.
fn packed(samples: &[Batch]) -> Batch {
    let columns = |field: fn(&Batch) -> Option<&Tensor>| {
        let all: Vec<&Tensor> = samples
            .iter()
            .map(|sample| field(sample).unwrap())
            .collect();
        Tensor::cat(&all, 1)
    };
    let rows = |field: fn(&Batch) -> Option<&Tensor>| {
        let all: Vec<&Tensor> = samples.iter().filter_map(field).collect();
        (!all.is_empty()).then(|| Tensor::cat(&all, 0))
    };
    let mut borders = vec![0];
    for sample in samples {
        borders.push(borders[borders.len() - 1] + sample.input_ids.size()[1]);
    }
    Batch {
        input_ids: columns(|sample| Some(&sample.input_ids)),
        attention_mask: None,
        labels: Some(columns(|sample| sample.labels.as_ref())),
        mm_token_type_ids: Some(columns(|sample| sample.mm_token_type_ids.as_ref())),
        pixel_values: rows(|sample| sample.pixel_values.as_ref()),
        image_grid_thw: samples
            .iter()
            .flat_map(|sample| sample.image_grid_thw.clone())
            .collect(),
        pixel_values_videos: rows(|sample| sample.pixel_values_videos.as_ref()),
        video_grid_thw: samples
            .iter()
            .flat_map(|sample| sample.video_grid_thw.clone())
            .collect(),
        cu_seqlens: Some(borders),
    }
}

#[derive(Clone, Copy)]
enum Side {
    Left,
    Right,
}

/// The sample with `count` tokens of padding.
fn padded(sample: &Batch, side: Side, count: i64) -> Batch {
    let extend = |tensor: &Tensor, fill: i64| {
        let extra = Tensor::full([1, count], fill, (tensor.kind(), tensor.device()));
        match side {
            Side::Left => Tensor::cat(&[&extra, tensor], 1),
            Side::Right => Tensor::cat(&[tensor, &extra], 1),
        }
    };
    let ones = sample.input_ids.ones_like();
    let share = |tensor: &Option<Tensor>| tensor.as_ref().map(Tensor::shallow_clone);
    Batch {
        input_ids: extend(&sample.input_ids, 960),
        attention_mask: Some(extend(&ones, 0)),
        labels: sample.labels.as_ref().map(|labels| extend(labels, -100)),
        mm_token_type_ids: sample
            .mm_token_type_ids
            .as_ref()
            .map(|types| extend(types, 0)),
        pixel_values: share(&sample.pixel_values),
        image_grid_thw: sample.image_grid_thw.clone(),
        pixel_values_videos: share(&sample.pixel_values_videos),
        video_grid_thw: sample.video_grid_thw.clone(),
        cu_seqlens: None,
    }
}

fn targets(batch: &Batch, shift: i64) -> f64 {
    let labels = batch.labels.as_ref().unwrap();
    let width = labels.size()[1];
    if width <= shift {
        return 0.0;
    }
    let kept = labels.narrow(1, shift, width - shift).ne(-100);
    value(&kept.sum(Kind::Double))
}

/// Gradients by name; zeros where none arrived.
fn gradients(model: &Qwen3VlModel) -> Vec<(String, Tensor)> {
    let all = model.params().iter().map(|(name, param)| {
        let grad = param.grad();
        let grad = if grad.defined() {
            grad.copy()
        } else {
            param.zeros_like()
        };
        (name.to_owned(), grad.detach())
    });
    let all = all.collect();
    model.params().clear_grads();
    all
}

fn assert_same_gradients(found: &[(String, Tensor)], expected: &[(String, Tensor)], what: &str) {
    for ((name, found), (_, expected)) in found.iter().zip(expected) {
        let apart = distance(found, expected);
        assert!(apart <= 1e-6, "{what} {name}: {apart:e}");
    }
}

/// Sums the losses of `batches` (each divided by the same numbers of targets) and their gradients.
fn total(
    model: &Qwen3VlModel,
    batches: &[Batch],
    normalizer: f64,
    mtp_normalizer: f64,
) -> (f64, Vec<(String, Tensor)>) {
    let options = LossOptions {
        router_aux_loss_coef: 0.0,
        mtp_loss_scaling_factor: 0.1,
        normalizer: Some(normalizer),
        mtp_normalizer: Some(mtp_normalizer),
    };
    let mut sum = 0.0;
    for batch in batches {
        let losses = model.loss(batch, &options).unwrap();
        assert!(losses.mtp.is_some());
        sum += value(&losses.total);
        losses.total.backward();
    }
    (sum, gradients(model))
}

/// fla and transformers let state, convolution and the head's shift run across the samples of a packed batch.
#[test]
fn packed_samples_do_not_leak_through_state_convolution_attention_or_mtp_shift() {
    for name in MODELS {
        let (_, model) = model(name, Kind::Double, true);
        let samples = samples(name);
        let normalizer = samples.iter().map(|sample| targets(sample, 1)).sum();
        let mtp_normalizer = samples.iter().map(|sample| targets(sample, 2)).sum();
        let one = packed(&samples);
        let (expected, separate) = total(&model, &samples, normalizer, mtp_normalizer);
        let (found, together) = total(
            &model,
            std::slice::from_ref(&one),
            normalizer,
            mtp_normalizer,
        );
        assert!(
            (found - expected).abs() <= 1e-6 * expected,
            "{name}: {found}, {expected}"
        );
        assert_same_gradients(&together, &separate, name);
        // Without normalizers the packed batch's loss is the mean over all its targets.
        let options = LossOptions::default();
        let mean = value(&model.loss(&one, &options).unwrap().total);
        assert!((mean - found).abs() <= 1e-9, "{name}: {mean}, {found}");
    }
}

/// Empty samples and the borders of a chunk.
#[test]
fn packed_samples_of_length_zero_and_one_change_nothing() {
    let name = "dense_vl";
    let (_, model) = model(name, Kind::Double, true);
    let text = Tensors::golden(&format!("model/{name}_length_65.safetensors")).batch("in.");
    let one = short(&text, 1);
    let mut batch = packed(&[one, text]);
    batch.cu_seqlens = Some(vec![0, 0, 1, 1, 66, 66]);
    let file = Tensors::golden(&format!("model/{name}_length_65.safetensors"));
    let out = tch::no_grad(|| model.forward(&batch, &ForwardOptions::default())).unwrap();
    let found = out.hidden_norm.narrow(1, 1, 65);
    let apart = distance(&found, file.at("out.hidden.norm"));
    assert!(apart <= 1e-6, "{apart:e}");
}

/// transformers leaves left padding unmasked at batch 1, so that pads enter convolution and state.
#[test]
fn left_and_right_padding_never_change_real_tokens_at_batch_1() {
    for name in MODELS {
        let (_, model) = model(name, Kind::Double, true);
        for (case, sample) in samples(name).into_iter().enumerate() {
            let normalizers = (targets(&sample, 1), targets(&sample, 2).max(1.0));
            let (expected, plain) = total(
                &model,
                std::slice::from_ref(&sample),
                normalizers.0,
                normalizers.1,
            );
            for side in [Side::Left, Side::Right] {
                let longer = padded(&sample, side, 7);
                let (found, grads) = total(
                    &model,
                    std::slice::from_ref(&longer),
                    normalizers.0,
                    normalizers.1,
                );
                assert!(
                    (found - expected).abs() <= 1e-6 * expected,
                    "{name} {case}: {found}, {expected}"
                );
                assert_same_gradients(&grads, &plain, &format!("{name} {case}"));
                let finite = grads
                    .iter()
                    .all(|(_, grad)| bool::try_from(grad.isfinite().all()).unwrap());
                assert!(finite, "a gradient at zero rows is not finite");
            }
        }
    }
}

#[test]
fn the_same_padding_twice_is_bit_equal() {
    for name in MODELS {
        let (_, model) = model(name, Kind::Float, true);
        let sample = Tensors::golden(&format!("model/{name}_image.safetensors")).batch("in.");
        let longer = padded(&sample, Side::Left, 5);
        let run = || total(&model, std::slice::from_ref(&longer), 3.0, 3.0);
        let (first, second) = (run(), run());
        assert_eq!(first.0.to_bits(), second.0.to_bits());
        for ((name, a), (_, b)) in first.1.iter().zip(&second.1) {
            assert_eq!(a, b, "{name}");
        }
    }
}

/// Megatron counted padding in the auxiliary loss and applied softmax twice.
#[test]
fn aux_loss_counts_real_tokens_only() {
    let name = "moe_vl";
    let (_, model) = model(name, Kind::Double, false);
    let aux = |batch: &Batch| {
        let out = tch::no_grad(|| model.forward(batch, &ForwardOptions::default())).unwrap();
        value(&out.aux_loss.unwrap())
    };
    for case in ["text", "image"] {
        let file = Tensors::golden(&format!("model/{name}_{case}.safetensors"));
        let sample = file.batch("in.");
        let expected = value(file.at("out.aux_loss"));
        for batch in [
            padded(&sample, Side::Left, 9),
            padded(&sample, Side::Right, 9),
            sample,
        ] {
            let found = aux(&batch);
            assert!(
                (found - expected).abs() <= 1e-6 * expected,
                "{case}: {found}, {expected}"
            );
        }
    }
}

/// Others share the rope index of another family, or ignore frames: positions of mixed batches, packed too.
#[test]
fn video_and_image_positions_of_packed_samples_equal_those_of_single_ones() {
    let name = "dense_vl";
    let (_, model) = model(name, Kind::Float, false);
    let samples = samples(name);
    let options = ForwardOptions {
        hidden_states: false,
        logits: false,
        ..ForwardOptions::default()
    };
    let positions = |batch: &Batch| {
        tch::no_grad(|| model.forward(batch, &options))
            .unwrap()
            .position_ids
    };
    let single: Vec<Tensor> = samples.iter().map(&positions).collect();
    assert_eq!(positions(&packed(&samples)), Tensor::cat(&single, 2));
}

/// The mean over the tokens of an accumulated batch, not a mean of means.
#[test]
fn normalizers_make_two_small_batches_equal_one_large_one() {
    let name = "dense_vl";
    let (_, model) = model(name, Kind::Double, true);
    let file = Tensors::golden(&format!("model/{name}_text_right_padding.safetensors"));
    let both = file.batch("in.");
    let row = |index: i64| {
        let cut = |tensor: &Option<Tensor>| tensor.as_ref().map(|t| t.narrow(0, index, 1));
        Batch {
            labels: cut(&both.labels),
            attention_mask: cut(&both.attention_mask),
            mm_token_type_ids: cut(&both.mm_token_type_ids),
            ..Batch::new(both.input_ids.narrow(0, index, 1))
        }
    };
    let losses = model.loss(&both, &LossOptions::default()).unwrap();
    let expected = value(&losses.total);
    losses.total.backward();
    let whole = gradients(&model);
    let (lm, mtp) = (losses.supervised_tokens as f64, losses.mtp_tokens as f64);
    let (found, grads) = total(&model, &[row(0), row(1)], lm, mtp);
    assert!(
        (found - expected).abs() <= 1e-9 * expected,
        "{found}, {expected}"
    );
    assert_same_gradients(&grads, &whole, "accumulated");
}

#[test]
fn batches_that_do_not_fit_are_errors_that_name_the_numbers() {
    let name = "dense_vl";
    let (_, model) = model(name, Kind::Float, false);
    let image = || Tensors::golden(&format!("model/{name}_image.safetensors")).batch("in.");
    let message = |batch: &Batch| {
        let error = model
            .forward(batch, &ForwardOptions::default())
            .unwrap_err();
        std::error::Error::source(&error).unwrap().to_string()
    };
    let mut batch = image();
    batch.pixel_values = None;
    batch.image_grid_thw.clear();
    assert!(
        message(&batch).contains("image placeholders (id 972)"),
        "{}",
        message(&batch)
    );
    let mut batch = image();
    batch.image_grid_thw = vec![[1, 4, 4]];
    assert!(
        message(&batch).contains("16 patches, but the pixel values have 24"),
        "{}",
        message(&batch)
    );
    let mut batch = image();
    let _ = batch.input_ids.fill_(5);
    assert!(
        message(&batch).contains("0 image placeholders"),
        "{}",
        message(&batch)
    );
    let out_of_range = Batch::new(Tensor::from_slice(&[1i64, 1024]).view([1, 2]));
    assert!(
        message(&out_of_range).contains(
            "`input_ids` holds 1024 in sample 0 at position 1; token ids go from 0 to 1023"
        )
    );
    let mut labels = Batch::new(Tensor::from_slice(&[1i64, 2]).view([1, 2]));
    labels.labels = Some(Tensor::from_slice(&[1i64, -7]).view([1, 2]));
    assert!(
        message(&labels).contains("`labels` holds -7"),
        "{}",
        message(&labels)
    );
    let mut borders = Batch::new(Tensor::from_slice(&[1i64, 2]).view([1, 2]));
    borders.cu_seqlens = Some(vec![0, 1]);
    assert!(
        message(&borders).contains("end at 2"),
        "{}",
        message(&borders)
    );
    let empty = Batch::new(Tensor::zeros([1, 0], (Kind::Int64, tch::Device::Cpu)));
    assert!(
        message(&empty).contains("at least one token"),
        "{}",
        message(&empty)
    );
}

/// Hidden states of real tokens of a left-padded batch equal those of each sample alone.
#[test]
fn samples_of_a_padded_batch_do_not_see_each_other() {
    for name in MODELS {
        let (_, model) = model(name, Kind::Double, false);
        let file = Tensors::golden(&format!("model/{name}_text_left_padding.safetensors"));
        let both = file.batch("in.");
        let options = ForwardOptions {
            logits: false,
            ..ForwardOptions::default()
        };
        let mask = both.attention_mask.as_ref().unwrap();
        let together = tch::no_grad(|| model.forward(&both, &options))
            .unwrap()
            .hidden_norm;
        for row in 0..2 {
            let real = mask.get(row);
            let ids = real_rows(&both.input_ids.get(row).unsqueeze(-1), &real).view([1, -1]);
            let alone = tch::no_grad(|| model.forward(&Batch::new(ids), &options)).unwrap();
            let apart = distance(
                &real_rows(&together.get(row), &real),
                &alone.hidden_norm.squeeze_dim(0),
            );
            assert!(apart <= 1e-6, "{name} {row}: {apart:e}");
        }
    }
}
