//! The run: it owns order and time, and calls the parts that do the work.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, bail};
use bridge_core::checkpoint::hf::Overwrite;
use bridge_core::{AutoBridge, Dtype};
use bridge_torch::model::{ModelOptions, Qwen3VlModel, SaveOptions};
use bridge_torch::ops::policy::KernelPolicy;
use bridge_torch::optim::{AdamW, AdamWOptions, OptimizedParam};
use tch::Kind;

use super::checkpoint::{self, Checkpoint, DataState, StreamState, TrainerState};
use super::collate::{Counts, Layout};
use super::config::{OnNonFinite, Resolved, RunConfig, RunDtype};
use super::evaluate::{Evaluation, evaluate};
use super::non_finite::{Location, locate_gradient, locate_loss};
use super::order::{Order, Place, split};
use super::output::{Existing, Output, write_whole};
use super::prefetch::{Prefetch, Ready};
use super::record::{Record, StepRecord};
use super::run_file::{Parameters, RunFile};
use super::schedule::Schedule;
use super::signals::Signals;
use super::source::Source;
use super::step::{LossWeights, StepResult, accumulated_step};
use super::{device, trainable};
use crate::data::{DataError, Processor, Sample};
use crate::report::{clock, note};

/// What is not part of the configuration.
#[derive(Debug, Clone, Default)]
pub struct RunOptions {
    /// The checkpoint to go on from.
    pub resume: Option<PathBuf>,
    /// Whether an earlier run or model in the output directory is replaced.
    pub overwrite: bool,
}

/// How a run ended.
#[derive(Debug, Clone)]
pub struct Outcome {
    /// Whether a signal stopped it; it can be resumed then.
    pub interrupted: bool,
    /// Steps done.
    pub steps: u64,
    /// Mean of the last eight recorded losses.
    pub final_loss: Option<f64>,
    /// The last evaluation.
    pub evaluation: Option<Evaluation>,
    /// The output directory.
    pub output: PathBuf,
    /// The drawn losses.
    pub plot: Option<PathBuf>,
    /// The last training checkpoint.
    pub checkpoint: Option<PathBuf>,
}

/// A model in training and everything around it.
struct Run<'a> {
    config: &'a RunConfig,
    output: &'a Output,
    model: Qwen3VlModel,
    optimizer: AdamW,
    layout: Layout,
    weights: LossWeights,
    schedule: Schedule,
    training: Source,
    evaluation: Option<(Source, Vec<usize>)>,
    order: Order,
    state: TrainerState,
    record: Record,
    signals: Signals,
    // Steps of the epoch that was asked for last.
    epoch_length: (u64, u64),
    last_evaluation: Option<(u64, Evaluation)>,
    last_checkpoint: Option<(u64, PathBuf)>,
}

/// Trains as configured and leaves the trained model in the output directory.
///
/// # Errors
/// Whatever stops a run; checkpoints written before it stay.
pub fn run(resolved: &Resolved, options: &RunOptions) -> anyhow::Result<Outcome> {
    let config = &resolved.config;
    let started = Instant::now();
    if config.keep_freed_memory {
        bridge_torch::shim::keep_freed_memory();
    }
    if let Some(threads) = config.num_threads {
        tch::set_num_threads(threads);
    }
    let device = device::resolve(&config.device)?;
    let policy: KernelPolicy = config.kernels.policy.parse()?;
    let kernels: BTreeMap<String, String> = policy
        .describe()?
        .into_iter()
        .map(|op| (op.op.to_owned(), op.by.to_owned()))
        .collect();
    let signals = Signals::listen().context("listen for signals")?;

    let existing = match (&options.resume, options.overwrite) {
        (Some(_), _) => Existing::Resume,
        (None, true) => Existing::Overwrite,
        (None, false) => Existing::Refuse,
    };
    let output = Output::open(&config.output, &config.model, existing)?;
    let bridge = AutoBridge::from_hf_pretrained(&config.model)
        .with_context(|| format!("open the model {}", config.model.display()))?;

    // Data.
    let processor = Arc::new(Processor::from_dir(&config.model)?);
    let training = Source::open(&config.data, &processor, config)?;
    let (rows, held_out) = split(training.rows(), config.eval_split, config.seed);
    let evaluation = match &config.eval_data {
        Some(file) => {
            let source = Source::open(file, &processor, config)?;
            let rows = (0..source.rows()).collect();
            Some((source, rows))
        }
        None => (!held_out.is_empty()).then(|| (training.clone(), held_out)),
    };
    if rows.is_empty() {
        bail!("{} has no row to train on", config.data.display());
    }
    let (rows, lengths) = match config.packing {
        true => measure(&training, rows, config)?,
        false => (rows, None),
    };
    let training_rows = rows.len();
    let order = Order::new(config, rows, lengths);
    let total_steps = match config.max_steps {
        Some(steps) => steps,
        None => order.steps_of_epochs(config.num_train_epochs),
    };
    let data = DataState {
        rows: training.rows(),
        sha256: training.sha256()?,
        ..DataState::default()
    };

    // Where the run stands.
    let resumed = options
        .resume
        .as_deref()
        .map(Checkpoint::open)
        .transpose()?;
    let mut state = match &resumed {
        Some(checkpoint) => {
            checkpoint
                .state
                .check_continues(&checkpoint.dir, config, total_steps, &data)?;
            checkpoint.state.clone()
        }
        None => TrainerState {
            data,
            ..TrainerState::default()
        },
    };
    state.config = config.clone();
    state.total_steps = total_steps;
    state.kernels = kernels.clone();
    state.streams = StreamState {
        seed: config.seed,
        shuffle_stream: 1 + state.data.epoch,
        ..state.streams
    };
    let threads = tch::get_num_threads();
    if resumed.is_some() && state.num_threads != threads {
        let was = state.num_threads;
        note(format_args!(
            "warning: this run had {was} threads and has {threads} now; sums may differ in their last bits"
        ));
    }
    state.num_threads = threads;

    // Model and optimizer.
    let kind = match config.dtype {
        RunDtype::Float32 => Kind::Float,
        RunDtype::Bfloat16 => Kind::BFloat16,
        RunDtype::Auto if bridge.config().text.dtype == Some(Dtype::Bf16) => Kind::BFloat16,
        RunDtype::Auto => Kind::Float,
    };
    let mtp = config.mtp_loss_scaling_factor > 0.0;
    let model = Qwen3VlModel::load(
        &bridge,
        &ModelOptions {
            dtype: kind,
            device,
            kernels: policy,
            mtp,
        },
    )
    .with_context(|| format!("load the model {}", config.model.display()))?;
    let groups = trainable::groups(config, model.params());
    let params: Vec<OptimizedParam> = groups
        .iter()
        .flat_map(|group| {
            group.params.iter().map(|(name, tensor)| OptimizedParam {
                name: name.clone(),
                tensor: tensor.shallow_clone(),
                weight_decay: group.weight_decay,
            })
        })
        .collect();
    let counts = trainable::counts(config, model.params());
    if params.is_empty() {
        bail!("every part of the model is frozen; take one out of `freeze`");
    }
    let adamw = AdamWOptions {
        betas: (config.adam_beta1, config.adam_beta2),
        eps: config.adam_epsilon,
        masters: config.master_weights,
    };
    let mut optimizer = AdamW::new(&params, &adamw)?;
    if let Some(checkpoint) = &resumed {
        restore(checkpoint, &model, &mut optimizer)?;
    }

    // What it will do.
    let dtype = if kind == Kind::BFloat16 {
        "bfloat16"
    } else {
        "float32"
    };
    let config_aux = bridge
        .config()
        .text
        .moe
        .as_ref()
        .map_or(0.0, |moe| moe.router_aux_loss_coef);
    let weights = LossWeights {
        mtp: if model.has_mtp() {
            config.mtp_loss_scaling_factor
        } else {
            0.0
        },
        aux: match bridge.config().text.moe {
            Some(_) => config.router_aux_loss_coef.unwrap_or(config_aux),
            None => 0.0,
        },
    };
    let evaluation_rows = evaluation.as_ref().map_or(0, |(_, rows)| rows.len());
    let mut run_file = RunFile {
        schema_version: 1,
        status: "running",
        trainer_version: env!("CARGO_PKG_VERSION"),
        started: SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default()
            .as_secs(),
        model: config.model.clone(),
        architecture: bridge.config().architecture.hf_name().to_owned(),
        parameters: counts.iter().map(Parameters::from).collect(),
        device: device::name(device),
        dtype,
        kernel_policy: policy.to_string(),
        kernels,
        num_threads: threads,
        keep_freed_memory: config.keep_freed_memory,
        training_rows,
        evaluation_rows,
        total_steps,
        resumed_from: resumed
            .as_ref()
            .map(|checkpoint| (state.step, checkpoint.dir.clone())),
        final_loss: None,
    };
    announce(&run_file, config, weights);
    write_whole(&output.run_dir().join("config.toml"), &resolved.to_toml())?;
    run_file.write(&output.run_dir())?;

    let pad_id = processor.tokenizer().pad_token_id().unwrap_or(0);
    let layout = match config.packing {
        true => Layout::Packed,
        false => Layout::Padded {
            pad_id,
            side: config.padding_side,
        },
    };
    let record = Record::open(
        &output.run_dir(),
        &config.report_to,
        state.step,
        total_steps,
        state.tokens,
    )?;
    let mut run = Run {
        config,
        output: &output,
        model,
        optimizer,
        layout,
        weights,
        schedule: Schedule::new(config, total_steps),
        training,
        evaluation,
        order,
        last_checkpoint: resumed.map(|checkpoint| (state.step, checkpoint.dir)),
        state,
        record,
        signals,
        epoch_length: (u64::MAX, 0),
        last_evaluation: None,
    };

    let trained = run.train();
    run.record.finish();
    let interrupted = match trained {
        Ok(interrupted) => interrupted,
        Err(error) => {
            run_file.status = "failed";
            run_file.write(&output.run_dir())?;
            return Err(error);
        }
    };
    let plot = output.run_dir().join("loss.svg");
    let plotted = config.report_to.iter().any(|name| name == "plot");
    if plotted {
        run.record.plot(
            &plot,
            &format!("{} on {}", name_of(&config.model), name_of(&config.data)),
        )?;
    }
    if !interrupted {
        save_model(&run, &bridge)?;
    }
    run_file.final_loss = run.record.final_loss()?;
    run_file.status = if interrupted { "interrupted" } else { "done" };
    run_file.write(&output.run_dir())?;
    let outcome = Outcome {
        interrupted,
        steps: run.state.step,
        final_loss: run_file.final_loss,
        evaluation: run.last_evaluation.map(|(_, evaluation)| evaluation),
        output: config.output.clone(),
        plot: plotted.then_some(plot),
        checkpoint: run.last_checkpoint.map(|(_, dir)| dir),
    };
    conclude(&outcome, started);
    Ok(outcome)
}

impl Run<'_> {
    /// Steps until the end or a signal. Returns whether a signal ended it.
    fn train(&mut self) -> anyhow::Result<bool> {
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

/// The rows that can be used with their lengths in tokens, which packing needs before the first step.
fn measure(
    source: &Source,
    rows: Vec<usize>,
    config: &RunConfig,
) -> anyhow::Result<(Vec<usize>, Option<Vec<usize>>)> {
    note(format_args!(
        "measuring {} samples to pack them",
        rows.len()
    ));
    let encode = source.encode();
    let steps: Vec<_> = rows
        .into_iter()
        .map(|row| {
            (
                Place {
                    epoch: 0,
                    step_in_epoch: 0,
                },
                false,
                vec![vec![row]],
            )
        })
        .collect();
    let (workers, ahead) = (
        config.dataloader_num_workers,
        4 * config.dataloader_num_workers,
    );
    let mut kept = (Vec::new(), Vec::new());
    for ready in Prefetch::start(steps.into_iter(), &encode, workers, ahead)? {
        let encoded = ready.passes.into_iter().flatten().collect();
        for sample in source.samples(encoded, config.on_bad_row)? {
            kept.0.push(sample.row);
            kept.1.push(sample.input_ids.len());
        }
    }
    if kept.0.is_empty() {
        bail!("{} has no row that can be used", config.data.display());
    }
    Ok((kept.0, Some(kept.1)))
}

fn restore(
    checkpoint: &Checkpoint,
    model: &Qwen3VlModel,
    optimizer: &mut AdamW,
) -> anyhow::Result<()> {
    let resume = || format!("resume from {}", checkpoint.dir.display());
    let weights = checkpoint.weights()?;
    for (name, tensor) in model.params().iter() {
        weights.read_into(name, tensor).with_context(resume)?;
    }
    let known = |name: &str| model.params().get(name).is_ok();
    if let Some(name) = weights.names().find(|name| !known(name)) {
        bail!(
            "{}: `{name}` is no parameter of this model",
            checkpoint.dir.display()
        );
    }
    let saved = checkpoint.optimizer()?;
    optimizer
        .load_state(|name| saved.read(name).ok())
        .with_context(resume)?;
    Ok(())
}

/// The trained model as a Hugging Face directory: staged, then moved into the output directory.
fn save_model(run: &Run<'_>, bridge: &AutoBridge) -> anyhow::Result<()> {
    let config = run.config;
    let frozen = |name: &str| !trainable::trains(config, name);
    let options = SaveOptions {
        unchanged: &frozen,
        overwrite: Overwrite::Yes,
    };
    let job = || format!("write the trained model to {}", config.output.display());
    run.model
        .save_hf(bridge, &run.output.staging(), &options)
        .with_context(job)?;
    run.output.publish_model().with_context(job)
}

fn name_of(path: &std::path::Path) -> String {
    let name = path.file_name().unwrap_or(path.as_os_str());
    name.to_string_lossy().into_owned()
}

/// Says at once what the run will do.
fn announce(run: &RunFile, config: &RunConfig, weights: LossWeights) {
    note(format_args!(
        "{} ({}), {} on {}",
        config.model.display(),
        run.architecture,
        run.dtype,
        run.device
    ));
    let grouped = |n: usize| {
        let digits = n.to_string();
        let groups: Vec<&str> = digits
            .as_bytes()
            .rchunks(3)
            .rev()
            .filter_map(|group| std::str::from_utf8(group).ok())
            .collect();
        groups.join(",")
    };
    for part in &run.parameters {
        let trains = match part.trainable {
            0 => "frozen",
            _ => "trains",
        };
        note(format_args!(
            "  {:<10} {:>15} parameters, {trains}",
            part.part,
            grouped(part.total)
        ));
    }
    let kernels: Vec<String> = run
        .kernels
        .iter()
        .map(|(op, by)| format!("{op}: {by}"))
        .collect();
    note(format_args!(
        "kernels ({}): {}",
        run.kernel_policy,
        kernels.join("; ")
    ));
    let memory = match run.keep_freed_memory {
        true => "freed memory is kept (keep_freed_memory=false returns it to the system)",
        false => "freed memory returns to the system",
    };
    note(format_args!("{} threads; {memory}", run.num_threads));
    let samples = config.per_device_train_batch_size * config.gradient_accumulation_steps;
    let what = if config.packing { "packs" } else { "samples" };
    note(format_args!(
        "{} training rows, {} evaluation rows; {} steps of {samples} {what}; loss weights: mtp {}, aux {}",
        run.training_rows, run.evaluation_rows, run.total_steps, weights.mtp, weights.aux
    ));
    if let Some((step, dir)) = &run.resumed_from {
        note(format_args!(
            "resuming behind step {step} from {}",
            dir.display()
        ));
    }
}

/// Says at the end what was done.
fn conclude(outcome: &Outcome, started: Instant) {
    let time = clock(started.elapsed().as_secs_f64());
    let output = outcome.output.display();
    if outcome.interrupted {
        note(format_args!(
            "interrupted after step {}; go on with --resume --output {output}",
            outcome.steps
        ));
    } else {
        note(format_args!(
            "done in {time}: {} steps, trained model in {output}",
            outcome.steps
        ));
    }
}
