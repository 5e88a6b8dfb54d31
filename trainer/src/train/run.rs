//! The run: everything it needs is opened, trained by the loop, and written down.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, bail};
use bridge_core::checkpoint::Overwrite;
use bridge_core::{AutoBridge, Dtype};
use bridge_torch::model::{ModelOptions, Qwen3VlModel, SaveOptions};
use bridge_torch::optim::{AdamW, OptimizedParam};
use tch::Kind;

use super::announce::{announce, conclude};
use super::checkpoint::{Checkpoint, DataState, StreamState, TrainerState};
use super::collate::Layout;
use super::config::{Resolved, RunConfig, RunDtype};
use super::evaluate::Evaluation;
use super::optimizer;
use super::order::{Order, Place, split};
use super::output::{Existing, Output, write_whole};
use super::prefetch::Prefetch;
use super::record::Record;
use super::run_file::{Parameters, RunFile};
use super::schedule::Schedule;
use super::signals::Signals;
use super::source::Source;
use super::step::LossWeights;
use super::trainable;
use super::training_loop::TrainingLoop;
use crate::data::Processor;
use crate::device;
use crate::hub::name_of;
use crate::report::note;

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
    let signals = Signals::listen().context("listen for signals")?;
    let bridge = AutoBridge::from_hf_pretrained(&config.model)
        .with_context(|| format!("open the model {}", config.model.display()))?;

    let dropout = bridge.config().text.attention_dropout;
    if dropout != 0.0 {
        bail!(
            "{} asks for attention_dropout {dropout}, but training here drops nothing; set it to 0.0 there",
            config.model.join("config.json").display()
        );
    }

    // What computes.
    let kind = match config.dtype {
        RunDtype::Float32 => Kind::Float,
        RunDtype::Bfloat16 => Kind::BFloat16,
        RunDtype::Auto if bridge.config().text.dtype == Some(Dtype::Bf16) => Kind::BFloat16,
        RunDtype::Auto => Kind::Float,
    };
    let model_options = ModelOptions {
        dtype: kind,
        device,
        kernels: config.kernels.policy.parse()?,
        mtp: config.mtp_loss_scaling_factor > 0.0,
    };
    let (chosen, implementations) = model_options.resolve_kernels(Some(&bridge.config().text))?;
    let adamw = optimizer::options(config, kind, chosen, &implementations)?;
    let kernels: BTreeMap<String, String> = implementations
        .into_iter()
        .map(|op| (op.op.to_owned(), op.by))
        .collect();

    let existing = match (&options.resume, options.overwrite) {
        (Some(_), _) => Existing::Resume,
        (None, true) => Existing::Overwrite,
        (None, false) => Existing::Refuse,
    };
    let output = Output::open(&config.output, &config.model, existing)?;

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
    let model = Qwen3VlModel::load(&bridge, &model_options)
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
        kernel_policy: model_options.kernels.to_string(),
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
    if existing == Existing::Overwrite {
        output.clear_run()?; // not earlier: whatever is refused above costs nothing
    }
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
    let mut run = TrainingLoop {
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
fn save_model(run: &TrainingLoop<'_>, bridge: &AutoBridge) -> anyhow::Result<()> {
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
