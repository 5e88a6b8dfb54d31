//! Generation: greedy or sampled, one token of every sample a step.
//!
//! Randomness is a stream of ours for each sample, seeded by the caller: what a sample draws depends neither on the
//! other samples of its batch nor on libtorch.

use std::ops::ControlFlow;

use rand_chacha::ChaCha12Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};
use tch::{Kind, Tensor};

use crate::batch::Batch;
use crate::model::{Cache, ModelError, ModelInput, Qwen3VlModel, TextPositions, grown_mask};
use crate::ops::sequences::Sequences;

/// How tokens are chosen and when generation ends.
#[derive(Debug, Clone)]
pub struct GenerateOptions {
    /// At most so many tokens a sample.
    pub max_new_tokens: usize,
    /// 0: the most probable token (greedy). Otherwise logits are divided by it.
    pub temperature: f64,
    /// Keeps the fewest tokens whose probabilities reach this sum.
    pub top_p: f64,
    /// Keeps so many of the most probable tokens; 0: all.
    pub top_k: usize,
    /// Seed of the streams.
    pub seed: u64,
    /// A sample ends behind one of these tokens; it is part of the result.
    pub eos: Vec<i64>,
    /// Keeps keys, values and states between steps. Without it every step runs over the whole text.
    pub use_cache: bool,
}

impl Default for GenerateOptions {
    fn default() -> Self {
        Self {
            max_new_tokens: 256,
            temperature: 0.0,
            top_p: 1.0,
            top_k: 0,
            seed: 0,
            eos: Vec::new(),
            use_cache: true,
        }
    }
}

/// Why nothing can be generated.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum GenerateError {
    /// The options contradict themselves.
    #[error("{name} is {found}, {allowed}")]
    Option {
        /// The option.
        name: &'static str,
        /// Its value.
        found: f64,
        /// What would do.
        allowed: &'static str,
    },
    /// A packed batch.
    #[error("a packed batch cannot be generated from; pad the prompts on the left")]
    Packed,
    /// Padding where the next token should come.
    #[error("sample {sample} ends in padding; prompts of different lengths are padded on the left")]
    RightPadding {
        /// Row of the batch.
        sample: usize,
    },
    /// Logits that are no numbers.
    #[error(
        "the logits of sample {sample} at step {step} are not finite; are the weights damaged?"
    )]
    NotFinite {
        /// Row of the batch.
        sample: usize,
        /// Tokens generated before.
        step: usize,
    },
    /// The model refused the prompt.
    #[error(transparent)]
    Model(#[from] ModelError),
}

/// One step, shown to the caller.
#[derive(Debug)]
pub struct Step<'a> {
    /// Tokens generated before.
    pub index: usize,
    /// The new token of each sample; `None` where a sample has ended.
    pub tokens: &'a [Option<i64>],
    /// `[batch, vocabulary]`, float32 (float64 in a float64 model): what the tokens were chosen from.
    pub logits: &'a Tensor,
}

/// Continues every prompt of `batch` and returns the new tokens of each.
///
/// `on_step` sees each step as it comes; with [`ControlFlow::Break`] it ends generation.
///
/// # Errors
/// [`GenerateError`].
pub fn generate(
    model: &Qwen3VlModel,
    batch: &Batch,
    options: &GenerateOptions,
    on_step: &mut dyn FnMut(&Step<'_>) -> ControlFlow<()>,
) -> Result<Vec<Vec<i64>>, GenerateError> {
    check(options)?;
    if batch.cu_seqlens.is_some() {
        return Err(GenerateError::Packed);
    }
    tch::no_grad(|| {
        let mut run = Run::new(model, batch, options)?;
        let samples = run.samples.len();
        let mut new: Vec<Vec<i64>> = vec![Vec::new(); samples];
        let mut ended = vec![false; samples];
        for index in 0..options.max_new_tokens {
            let logits = run.logits()?;
            let picked = run.pick(&logits, index)?;
            let tokens: Vec<Option<i64>> = picked
                .iter()
                .zip(&ended)
                .map(|(&token, &ended)| (!ended).then_some(token))
                .collect();
            for (sample, token) in tokens.iter().enumerate() {
                if let Some(token) = *token {
                    new[sample].push(token);
                    ended[sample] = options.eos.contains(&token);
                }
            }
            let step = Step {
                index,
                tokens: &tokens,
                logits: &logits,
            };
            let stop = on_step(&step).is_break();
            if stop || ended.iter().all(|&ended| ended) {
                break;
            }
            if index + 1 < options.max_new_tokens {
                run.append(&picked)?;
            }
        }
        Ok(new)
    })
}

fn check(options: &GenerateOptions) -> Result<(), GenerateError> {
    let wrong = |name, found, allowed| {
        Err(GenerateError::Option {
            name,
            found,
            allowed,
        })
    };
    if !options.temperature.is_finite() || options.temperature < 0.0 {
        return wrong(
            "temperature",
            options.temperature,
            "it is 0 (greedy) or more",
        );
    }
    if !(options.top_p > 0.0 && options.top_p <= 1.0) {
        return wrong("top_p", options.top_p, "it is above 0 and at most 1");
    }
    Ok(())
}

/// A batch that grows by a token a step.
struct Run<'a> {
    model: &'a Qwen3VlModel,
    options: &'a GenerateOptions,
    /// The next input: the prompt, then (with a cache) one token a sample.
    input: ModelInput,
    cache: Option<Cache>,
    /// The whole text so far, for runs without a cache.
    text: Batch,
    samples: Vec<ChaCha12Rng>,
    /// Real tokens of each sample, and what its images save in positions.
    lengths: Vec<i64>,
    rope_deltas: Vec<i64>,
    /// `[batch, tokens so far]`, true at real tokens; `None` without padding.
    mask: Option<Tensor>,
}

impl<'a> Run<'a> {
    fn new(
        model: &'a Qwen3VlModel,
        batch: &Batch,
        options: &'a GenerateOptions,
    ) -> Result<Self, GenerateError> {
        let input = model.input(batch, TextPositions::RealTokens)?;
        if let Some(mask) = &input.mask {
            let last: Vec<i64> =
                Vec::try_from(mask.select(1, -1).to_kind(Kind::Int64)).map_err(ModelError::from)?;
            if let Some(sample) = last.iter().position(|&real| real == 0) {
                return Err(GenerateError::RightPadding { sample });
            }
        }
        let stream = |sample: u64| {
            let mut stream = ChaCha12Rng::seed_from_u64(options.seed);
            stream.set_stream(sample);
            stream
        };
        Ok(Self {
            model,
            options,
            cache: options.use_cache.then(|| model.cache()),
            text: copy_of(batch),
            samples: (0..)
                .zip(&input.lengths)
                .map(|(sample, _)| stream(sample))
                .collect(),
            lengths: input.lengths.clone(),
            rope_deltas: input.rope_deltas.clone(),
            mask: input.mask.as_ref().map(Tensor::shallow_clone),
            input,
        })
    }

    fn logits(&mut self) -> Result<Tensor, ModelError> {
        Ok(self.model.next_logits(&self.input, self.cache.as_mut()))
    }

    /// The next token of each sample.
    fn pick(&mut self, logits: &Tensor, step: usize) -> Result<Vec<i64>, GenerateError> {
        let failed = |sample| GenerateError::NotFinite { sample, step };
        if self.options.temperature == 0.0 {
            let best = logits.argmax(-1, false);
            let value = logits
                .gather(-1, &best.unsqueeze(-1), false)
                .to_kind(Kind::Double);
            let values: Vec<f64> = Vec::try_from(value.view([-1])).map_err(ModelError::from)?;
            if let Some(sample) = values.iter().position(|value| !value.is_finite()) {
                return Err(failed(sample));
            }
            return Ok(Vec::try_from(best).map_err(ModelError::from)?);
        }
        let rows = logits.to_kind(Kind::Double).to_device(tch::Device::Cpu);
        (0..)
            .zip(&mut self.samples)
            .map(|(row, stream)| {
                let row_logits: Vec<f64> =
                    Vec::try_from(rows.get(row)).map_err(ModelError::from)?;
                let sample = usize::try_from(row).unwrap_or(0);
                let token = draw(&row_logits, self.options, uniform(stream))
                    .ok_or_else(|| failed(sample))?;
                Ok(i64::try_from(token).unwrap_or(i64::MAX))
            })
            .collect()
    }

    /// Makes the new tokens the next input.
    fn append(&mut self, tokens: &[i64]) -> Result<(), GenerateError> {
        let device = self.model.device();
        let rows = self.input.batch;
        let column = Tensor::from_slice(tokens).view([rows, 1]);
        let positions: Vec<i64> = self
            .lengths
            .iter()
            .zip(&self.rope_deltas)
            .map(|(length, delta)| length + delta)
            .collect();
        for length in &mut self.lengths {
            *length += 1;
        }
        self.mask = self.mask.as_ref().map(grown_mask);
        if self.cache.is_none() {
            let text = &mut self.text;
            let grown = |old: &Tensor, new: &Tensor| {
                Tensor::cat(&[old, &new.to_kind(old.kind()).to_device(old.device())], 1)
            };
            text.input_ids = grown(&text.input_ids, &column);
            let ones = column.ones_like();
            text.attention_mask = text.attention_mask.as_ref().map(|mask| grown(mask, &ones));
            let zeros = column.zeros_like();
            text.mm_token_type_ids = text
                .mm_token_type_ids
                .as_ref()
                .map(|types| grown(types, &zeros));
            self.input = self.model.input(text, TextPositions::RealTokens)?;
            return Ok(());
        }
        let column = column.to_device(device);
        let positions = Tensor::from_slice(&positions)
            .view([1, rows, 1])
            .to_device(device);
        self.input = ModelInput {
            batch: rows,
            seq: 1,
            next_ids: column.shallow_clone(),
            ids: column,
            sequences: Sequences::Padded {
                batch: rows,
                seq: 1,
                mask: self.mask.as_ref().map(Tensor::shallow_clone),
            },
            mask: None,
            hole: None,
            position_ids: positions.repeat([3, 1, 1]),
            rope_deltas: self.rope_deltas.clone(),
            lengths: self.lengths.clone(),
            has_grids: false,
            images: None,
            videos: None,
            targets: None,
            mtp_targets: None,
        };
        Ok(())
    }
}

/// The batch without labels; tensors are shared.
fn copy_of(batch: &Batch) -> Batch {
    let share = |tensor: &Option<Tensor>| tensor.as_ref().map(Tensor::shallow_clone);
    Batch {
        input_ids: batch.input_ids.shallow_clone(),
        attention_mask: share(&batch.attention_mask),
        labels: None,
        mm_token_type_ids: share(&batch.mm_token_type_ids),
        pixel_values: share(&batch.pixel_values),
        image_grid_thw: batch.image_grid_thw.clone(),
        pixel_values_videos: share(&batch.pixel_values_videos),
        video_grid_thw: batch.video_grid_thw.clone(),
        cu_seqlens: None,
    }
}

/// A number in [0, 1) from the upper 53 bits.
fn uniform(stream: &mut ChaCha12Rng) -> f64 {
    let bits = stream.next_u64() >> 11;
    bits as f64 / (1u64 << 53) as f64
}

/// Draws a token: temperature, then the top k, then the top p, then one of the rest by its probability.
/// `None` when the best logit is not finite.
fn draw(logits: &[f64], options: &GenerateOptions, uniform: f64) -> Option<usize> {
    let mut order: Vec<usize> = (0..logits.len()).collect();
    // By falling logit, lower ids first among equals, so that a result never depends on the sort.
    let by_logit = |&a: &usize, &b: &usize| logits[b].total_cmp(&logits[a]).then(a.cmp(&b));
    if options.top_k > 0 && options.top_k < order.len() {
        order.select_nth_unstable_by(options.top_k, by_logit);
        order.truncate(options.top_k);
    }
    order.sort_unstable_by(by_logit);
    let best = logits[*order.first()?];
    if !best.is_finite() {
        return None;
    }
    let weights: Vec<f64> = order
        .iter()
        .map(|&token| ((logits[token] - best) / options.temperature).exp())
        .collect();
    let all: f64 = weights.iter().sum();
    let mut kept = 0;
    let mut sum = 0.0;
    for weight in &weights {
        sum += weight;
        kept += 1;
        if sum >= options.top_p * all {
            break;
        }
    }
    let mut left = uniform * sum;
    for (&token, weight) in order.iter().zip(&weights).take(kept) {
        left -= weight;
        if left < 0.0 {
            return Some(token);
        }
    }
    order.get(kept.saturating_sub(1)).copied()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options(temperature: f64, top_p: f64, top_k: usize) -> GenerateOptions {
        GenerateOptions {
            temperature,
            top_p,
            top_k,
            ..GenerateOptions::default()
        }
    }

    #[test]
    fn top_k_and_top_p_keep_the_most_probable_tokens_only() {
        let logits = [0.0, 3.0, 2.0, 1.0];
        for step in 0..100 {
            let uniform = f64::from(step) / 100.0;
            assert_eq!(draw(&logits, &options(1.0, 1.0, 1), uniform), Some(1));
            let two = draw(&logits, &options(1.0, 1.0, 2), uniform).unwrap();
            assert!([1, 2].contains(&two));
            // 0.644 + 0.237 of the probability lies on tokens 1 and 2.
            let nucleus = draw(&logits, &options(1.0, 0.8, 0), uniform).unwrap();
            assert!([1, 2].contains(&nucleus));
            assert_eq!(draw(&logits, &options(1.0, 0.6, 0), uniform), Some(1));
        }
    }

    #[test]
    fn draws_follow_the_probabilities() {
        let logits = [1.0_f64.ln(), 3.0_f64.ln()];
        let mut stream = ChaCha12Rng::seed_from_u64(7);
        let mut counts = [0; 2];
        for _ in 0..4000 {
            counts[draw(&logits, &options(1.0, 1.0, 0), uniform(&mut stream)).unwrap()] += 1;
        }
        assert!((2900..3100).contains(&counts[1]), "{counts:?}");
    }

    #[test]
    fn a_logit_that_is_not_finite_draws_nothing() {
        assert_eq!(draw(&[f64::NAN, 1.0], &options(1.0, 1.0, 0), 0.5), None);
        assert_eq!(draw(&[], &options(1.0, 1.0, 0), 0.5), None);
    }
}
