//! Greedy generation against transformers, sampling against itself.

use std::ops::ControlFlow;

use bridge_torch::generate::{GenerateError, GenerateOptions, generate};
use bridge_torch::model::Qwen3VlModel;
use tch::{Kind, Tensor};

use crate::fixture::{Tensors, distance, model};

const PROMPTS: [&str; 3] = ["text", "image", "batch_left_padding"];

fn options(use_cache: bool) -> GenerateOptions {
    GenerateOptions {
        max_new_tokens: 32,
        use_cache,
        ..GenerateOptions::default()
    }
}

/// New ids `[batch, 32]`, and the logits of the first two steps `[batch, 2, vocabulary]`.
fn run(
    model: &Qwen3VlModel,
    file: &Tensors,
    prompt: &str,
    options: &GenerateOptions,
) -> (Tensor, Tensor) {
    let mut first = Vec::new();
    let batch = file.batch(&format!("{prompt}.in."));
    let ids = generate(model, &batch, options, &mut |step| {
        if step.index < 2 {
            first.push(step.logits.shallow_clone());
        }
        ControlFlow::Continue(())
    })
    .unwrap();
    let rows: Vec<Tensor> = ids.iter().map(|row| Tensor::from_slice(row)).collect();
    (Tensor::stack(&rows, 0), Tensor::stack(&first, 1))
}

fn check(name: &str, dtype: Kind) {
    let file = Tensors::golden(&format!("generate/{name}.safetensors"));
    let (_, model) = model(name, dtype, true);
    for prompt in PROMPTS {
        for use_cache in [true, false] {
            let (ids, first) = run(&model, &file, prompt, &options(use_cache));
            let what = format!("{name} {prompt} {dtype:?} cache {use_cache}");
            assert_eq!(ids, *file.at(&format!("{prompt}.out.new_ids")), "{what}");
            // The golden's own float32 noise: 1.6e-4 of the largest logit in the worst case of goldens/model.
            let apart = distance(&first, file.at(&format!("{prompt}.out.first_logits")));
            assert!(apart <= 1.6e-3, "{what}: {apart:e}");
        }
    }
}

#[test]
fn greedy_ids_equal_transformers_with_and_without_cache_in_float32() {
    check("dense_vl", Kind::Float);
    check("moe_vl", Kind::Float);
}

#[test]
fn greedy_ids_equal_transformers_with_and_without_cache_in_float64() {
    check("dense_vl", Kind::Double);
    check("moe_vl", Kind::Double);
}

#[test]
fn a_cached_step_gives_the_logits_of_the_whole_text() {
    let name = "dense_vl";
    let file = Tensors::golden(&format!("generate/{name}.safetensors"));
    let (_, model) = model(name, Kind::Double, true);
    for prompt in PROMPTS {
        let all = |use_cache| {
            let mut logits = Vec::new();
            let batch = file.batch(&format!("{prompt}.in."));
            generate(&model, &batch, &options(use_cache), &mut |step| {
                logits.push(step.logits.shallow_clone());
                ControlFlow::Continue(())
            })
            .unwrap();
            Tensor::stack(&logits, 1)
        };
        let apart = distance(&all(true), &all(false));
        assert!(apart <= 1e-9, "{prompt}: {apart:e}");
    }
}

#[test]
fn a_seed_repeats_its_draws_and_another_one_does_not() {
    let name = "dense_vl";
    let file = Tensors::golden(&format!("generate/{name}.safetensors"));
    let (_, model) = model(name, Kind::Float, true);
    let sampled = |seed, top_k| {
        let options = GenerateOptions {
            temperature: 1.0,
            top_p: 0.9,
            top_k,
            seed,
            ..options(true)
        };
        run(&model, &file, "batch_left_padding", &options).0
    };
    assert_eq!(sampled(1, 0), sampled(1, 0));
    assert_ne!(sampled(1, 0), sampled(2, 0));
    assert_eq!(sampled(3, 1), *file.at("batch_left_padding.out.new_ids"));
}

#[test]
fn a_sample_ends_behind_its_stop_token_and_the_others_go_on() {
    let name = "dense_vl";
    let file = Tensors::golden(&format!("generate/{name}.safetensors"));
    let (_, model) = model(name, Kind::Float, true);
    let expected = file.at("batch_left_padding.out.new_ids");
    let stop = expected.int64_value(&[0, 4]);
    let batch = file.batch("batch_left_padding.in.");
    let options = GenerateOptions {
        eos: vec![stop],
        ..options(true)
    };
    let ids = generate(&model, &batch, &options, &mut |_| ControlFlow::Continue(())).unwrap();
    let row = |sample| Vec::<i64>::try_from(expected.get(sample)).unwrap();
    assert_eq!(ids[0], row(0)[..5]);
    let other = row(1);
    let end = other
        .iter()
        .position(|&id| id == stop)
        .map_or(other.len(), |at| at + 1);
    assert_eq!(ids[1], other[..end]);
}

#[test]
fn prompts_padded_on_the_right_are_refused() {
    let (_, model) = model("dense_vl", Kind::Float, true);
    let file = Tensors::golden("model/dense_vl_text_right_padding.safetensors");
    let error = generate(&model, &file.batch("in."), &options(true), &mut |_| {
        ControlFlow::Continue(())
    })
    .unwrap_err();
    assert!(
        matches!(error, GenerateError::RightPadding { .. }),
        "{error}"
    );
    assert!(error.to_string().contains("padded on the left"), "{error}");
}
