//! What a run says at its start and at its end.

use std::time::Instant;

use super::config::RunConfig;
use super::run::Outcome;
use super::run_file::RunFile;
use super::step::LossWeights;
use crate::report::{clock, note};

/// Says at once what the run will do.
pub(super) fn announce(run: &RunFile, config: &RunConfig, weights: LossWeights) {
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
    note(format_args!(
        "{} threads; {memory}; denormal numbers count as zero",
        run.num_threads
    ));
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
pub(super) fn conclude(outcome: &Outcome, started: Instant) {
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
