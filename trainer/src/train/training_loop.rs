//! The loop: it owns order and time, and calls the parts that do the work.

use std::path::PathBuf;

use anyhow::{Context, bail};
use bridge_torch::model::Qwen3VlModel;
use bridge_torch::optim::AdamW;

use super::checkpoint::{self, TrainerState};
use super::collate::{Counts, Layout};
use super::config::{OnNonFinite, RunConfig};
use super::evaluate::{Evaluation, evaluate};
use super::non_finite::{Location, locate_gradient, locate_loss};
use super::order::{Order, Place};
use super::output::Output;
use super::prefetch::{Prefetch, Ready};
use super::record::{Record, StepRecord};
use super::schedule::Schedule;
use super::signals::Signals;
use super::source::Source;
use super::step::{LossWeights, StepResult, accumulated_step};
use crate::data::{DataError, Sample};
use crate::report::note;

/// A model in training and everything around it.
pub(super) struct TrainingLoop<'a> {
    pub(super) config: &'a RunConfig,
    pub(super) output: &'a Output,
    pub(super) model: Qwen3VlModel,
    pub(super) optimizer: AdamW,
    pub(super) layout: Layout,
    pub(super) weights: LossWeights,
    pub(super) schedule: Schedule,
    pub(super) training: Source,
    pub(super) evaluation: Option<(Source, Vec<usize>)>,
    pub(super) order: Order,
    pub(super) state: TrainerState,
    pub(super) record: Record,
    pub(super) signals: Signals,
    // Steps of the epoch that was asked for last.
    pub(super) epoch_length: (u64, u64),
    pub(super) last_evaluation: Option<(u64, Evaluation)>,
    pub(super) last_checkpoint: Option<(u64, PathBuf)>,
}

impl TrainingLoop<'_> {
    /// Steps until the end or a signal. Returns whether a signal ended it.
    pub(super) fn train(&mut self) -> anyhow::Result<bool> {
        let left = usize::try_from(self.state.total_steps.saturating_sub(self.state.step))?;
        let steps = self.order.clone().steps_from(self.state.step).take(left);
        let prefetch = Prefetch::start(
            steps,
            &self.training.encode(),
            self.config.dataloader_num_workers,
            self.config.dataloader_prefetch_factor,
        )?;
        for ready in prefetch {
            if self.signals.stop() {
                self.save()?;
                return Ok(true);
            }
            let ends_epoch = ready.ends_epoch;
            self.step(ready)?;
            let step = self.state.step;
            let ends_run = step == self.state.total_steps;
            let evaluate_now = match self.config.eval_steps {
                Some(every) => step.is_multiple_of(every),
                None => ends_epoch,
            };
            if evaluate_now || ends_run {
                self.evaluate()?;
            }
            let save_now = self
                .config
                .save_steps
                .is_some_and(|n| step.is_multiple_of(n) || ends_run);
            if save_now || self.signals.take_save() {
                self.save()?;
            }
        }
        let interrupted = self.signals.stop() && self.state.step < self.state.total_steps;
        if interrupted {
            self.save()?;
        }
        Ok(interrupted)
    }

    fn step(&mut self, ready: Ready<Sample, DataError>) -> anyhow::Result<()> {
        let place = ready.place;
        let mut passes = Vec::with_capacity(ready.passes.len());
        for pass in ready.passes {
            let samples = self.training.samples(pass, self.config.on_bad_row)?;
            if !samples.is_empty() {
                passes.push(samples);
            }
        }
        let index = self.state.step;
        let learning_rate = self.schedule.learning_rate(index);
        let counts: Counts = passes.iter().flatten().map(Counts::of).sum();
        let result = if passes.is_empty() {
            None
        } else {
            let result = accumulated_step(
                &self.model,
                &mut self.optimizer,
                &passes,
                self.layout,
                self.weights,
                learning_rate,
                self.config,
            );
            Some(result.with_context(|| format!("step {}", index + 1))?)
        };
        match result {
            None => self
                .record
                .left_out(index + 1, "none of its rows can be used")?,
            Some(StepResult::Stepped { losses, grad_norm }) => {
                self.advance(place, counts, learning_rate);
                self.state.optimizer_steps += 1;
                let step = self.state.step;
                if step.is_multiple_of(self.config.logging_steps) || step == self.state.total_steps
                {
                    let record = StepRecord {
                        step,
                        epoch: self.epochs_done(place),
                        losses,
                        grad_norm,
                        learning_rate,
                        tokens: self.state.tokens,
                        supervised_tokens: self.state.supervised_tokens,
                    };
                    self.record.step(&record)?;
                }
                return Ok(());
            }
            Some(StepResult::LossNotFinite { losses, pass }) => {
                let location = locate_loss(&self.model, &passes[pass], self.layout)?;
                let what = format!(
                    "the loss is {} (mtp {:?}, aux {:?})",
                    losses.lm, losses.mtp, losses.aux
                );
                self.not_finite(index + 1, &what, &location)?;
            }
            Some(StepResult::GradientNotFinite { grad_norm, .. }) => {
                let optimizer = &mut self.optimizer;
                let mut clear = || optimizer.zero_grad();
                let location =
                    locate_gradient(&self.model, &passes, self.layout, self.weights, &mut clear)?;
                let what = format!("the gradient's norm is {grad_norm}");
                self.not_finite(index + 1, &what, &location)?;
            }
        }
        self.advance(place, counts, learning_rate);
        Ok(())
    }

    /// Stops the run or leaves the step out, as configured.
    fn not_finite(&mut self, step: u64, what: &str, location: &Location) -> anyhow::Result<()> {
        match self.config.on_non_finite {
            OnNonFinite::Stop => bail!(
                "step {step}: {what}, and the step was not applied; {location} (rows of {}); \
                 on_non_finite=skip leaves such steps out",
                self.config.data.display()
            ),
            OnNonFinite::Skip => self.record.left_out(step, &format!("{what}; {location}"))?,
        }
        Ok(())
    }

    fn advance(&mut self, place: Place, counts: Counts, learning_rate: f64) {
        let state = &mut self.state;
        state.step += 1;
        state.learning_rate = learning_rate;
        state.tokens += counts.tokens;
        state.supervised_tokens += counts.targets;
        let next = if place.step_in_epoch + 1 >= self.epoch_length_of(place.epoch) {
            Place {
                epoch: place.epoch + 1,
                step_in_epoch: 0,
            }
        } else {
            Place {
                step_in_epoch: place.step_in_epoch + 1,
                ..place
            }
        };
        let state = &mut self.state;
        (state.data.epoch, state.data.step_in_epoch) = (next.epoch, next.step_in_epoch);
        state.streams.shuffle_stream = 1 + next.epoch;
    }

    #[expect(clippy::cast_precision_loss, reason = "step counts are far below 2^52")]
    fn epochs_done(&mut self, place: Place) -> f64 {
        let length = self.epoch_length_of(place.epoch);
        place.epoch as f64 + (place.step_in_epoch + 1) as f64 / length as f64
    }

    fn epoch_length_of(&mut self, epoch: u64) -> u64 {
        if self.epoch_length.0 != epoch {
            self.epoch_length = (epoch, self.order.epoch(epoch).len() as u64);
        }
        self.epoch_length.1
    }

    fn evaluate(&mut self) -> anyhow::Result<()> {
        let Some((source, rows)) = &self.evaluation else {
            return Ok(());
        };
        let step = self.state.step;
        if self.last_evaluation.is_some_and(|(at, _)| at == step) {
            return Ok(());
        }
        let passes: Vec<_> = rows
            .chunks(self.config.per_device_eval_batch_size)
            .map(|rows| {
                (
                    Place {
                        epoch: 0,
                        step_in_epoch: 0,
                    },
                    false,
                    vec![rows.to_vec()],
                )
            })
            .collect();
        let prefetch = Prefetch::start(
            passes.into_iter(),
            &source.encode(),
            self.config.dataloader_num_workers,
            self.config.dataloader_prefetch_factor,
        )?;
        let passes = prefetch.map(|ready| {
            let encoded = ready.passes.into_iter().flatten().collect();
            source.samples(encoded, self.config.on_bad_row)
        });
        let result = evaluate(&self.model, passes, self.layout, self.weights.mtp)
            .with_context(|| format!("evaluation after step {step}"))?;
        if let Some(result) = result {
            self.record.evaluation(step, &result)?;
            self.last_evaluation = Some((step, result));
        }
        Ok(())
    }

    fn save(&mut self) -> anyhow::Result<()> {
        let step = self.state.step;
        if self
            .last_checkpoint
            .as_ref()
            .is_some_and(|(at, _)| *at == step)
        {
            return Ok(());
        }
        let dir = self.output.checkpoint_dir(step);
        let weights: Vec<_> = self
            .model
            .params()
            .iter()
            .map(|(name, tensor)| (name.to_owned(), tensor.shallow_clone()))
            .collect();
        checkpoint::save(&dir, &weights, &self.optimizer.state()?, &mut self.state)
            .with_context(|| format!("save {}", dir.display()))?;
        if let Some(limit) = self.config.save_total_limit {
            self.output.keep_newest(limit)?;
        }
        note(format_args!("saved {}", dir.display()));
        self.last_checkpoint = Some((step, dir));
        Ok(())
    }
}
