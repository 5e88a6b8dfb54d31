//! Ranges and contradictions of a configuration.

use std::collections::BTreeMap;

use bridge_torch::ops::policy::KernelPolicy;

use super::layers::{Origin, Problem, nearest};
use super::{FREEZE_PARTS, RunConfig};
use crate::device;

/// Adds everything that is wrong with `config` to `problems`.
pub(super) fn check(
    config: &RunConfig,
    origins: &BTreeMap<String, Origin>,
    problems: &mut Vec<Problem>,
) {
    for (key, path) in [
        ("model", &config.model),
        ("data", &config.data),
        ("output", &config.output),
    ] {
        if path.as_os_str().is_empty() {
            problems.push(Problem::Missing {
                key: key.to_owned(),
            });
        }
    }
    let mut wrong = |key: &str, message: String| {
        let origin = origins.get(key).map_or_else(String::new, Origin::to_string);
        problems.push(Problem::Value {
            key: key.to_owned(),
            origin,
            message,
        });
    };

    let fraction = "must be between 0 and 1";
    for (key, value) in [
        ("eval_split", config.eval_split),
        ("adam_beta1", config.adam_beta1),
        ("adam_beta2", config.adam_beta2),
    ] {
        if !(0.0..1.0).contains(&value) {
            wrong(key, format!("{value} {fraction} (1 excluded)"));
        }
    }
    for (key, value) in [
        ("warmup_ratio", config.warmup_ratio),
        ("min_lr_ratio", config.min_lr_ratio),
    ] {
        if !(0.0..=1.0).contains(&value) {
            wrong(key, format!("{value} {fraction}"));
        }
    }
    for (key, value) in [
        ("num_train_epochs", config.num_train_epochs),
        ("learning_rate", config.learning_rate),
        ("adam_epsilon", config.adam_epsilon),
    ] {
        if !(value.is_finite() && value > 0.0) {
            wrong(key, format!("{value} must be a number above 0"));
        }
    }
    for (key, value) in [
        ("weight_decay", config.weight_decay),
        ("max_grad_norm", config.max_grad_norm),
        ("mtp_loss_scaling_factor", config.mtp_loss_scaling_factor),
        (
            "router_aux_loss_coef",
            config.router_aux_loss_coef.unwrap_or(0.0),
        ),
    ] {
        if !(value.is_finite() && value >= 0.0) {
            wrong(key, format!("{value} must be a number, 0 or above"));
        }
    }
    for (key, value) in [
        (
            "per_device_train_batch_size",
            Some(config.per_device_train_batch_size),
        ),
        (
            "per_device_eval_batch_size",
            Some(config.per_device_eval_batch_size),
        ),
        (
            "gradient_accumulation_steps",
            Some(config.gradient_accumulation_steps),
        ),
        (
            "dataloader_prefetch_factor",
            Some(config.dataloader_prefetch_factor),
        ),
        (
            "dataloader_num_workers",
            Some(config.dataloader_num_workers),
        ),
        ("max_length", config.max_length),
        ("save_total_limit", config.save_total_limit),
    ] {
        if value == Some(0) {
            wrong(key, "0 must be at least 1".to_owned());
        }
    }
    for (key, value) in [
        ("max_steps", config.max_steps),
        ("logging_steps", Some(config.logging_steps)),
        ("eval_steps", config.eval_steps),
        ("save_steps", config.save_steps),
    ] {
        if value == Some(0) {
            wrong(key, "0 must be at least 1; null for none".to_owned());
        }
    }
    if config.num_threads.is_some_and(|threads| threads < 1) {
        wrong("num_threads", "must be at least 1".to_owned());
    }

    if config.warmup_steps > 0 && config.warmup_ratio > 0.0 {
        wrong(
            "warmup_ratio",
            "contradicts warmup_steps; set one of them".to_owned(),
        );
    }
    if config.eval_data.is_some() && config.eval_split > 0.0 {
        wrong(
            "eval_split",
            "contradicts eval_data; set one of them".to_owned(),
        );
    }
    if config.packing && config.max_length.is_none() {
        wrong(
            "packing",
            "needs max_length, the tokens of a pack".to_owned(),
        );
    }
    if config.stochastic_rounding && config.master_weights {
        wrong(
            "stochastic_rounding",
            "rounds weights that have no float32 masters; set master_weights=false, too".to_owned(),
        );
    }
    words(&config.freeze, &FREEZE_PARTS, |message| {
        wrong("freeze", message)
    });
    words(&config.report_to, &["tensorboard", "plot"], |message| {
        wrong("report_to", message)
    });
    if let Err(error) = config.kernels.policy.parse::<KernelPolicy>() {
        wrong("kernels.policy", error.to_string());
    }
    if device::checked(&config.device).is_err() {
        let device = std::slice::from_ref(&config.device);
        words(device, &device::WORDS, |message| wrong("device", message));
    }
}

fn words(given: &[String], allowed: &[&str], mut wrong: impl FnMut(String)) {
    for word in given
        .iter()
        .filter(|word| !allowed.contains(&word.as_str()))
    {
        let hint = nearest(word, allowed.iter().copied())
            .map(|name| format!("; did you mean `{name}`?"))
            .unwrap_or_default();
        wrong(format!("`{word}` is none of {}{hint}", allowed.join(", ")));
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Override, resolve};

    #[test]
    fn contradictions_and_ranges_are_reported_together() {
        let settings = [
            "model=m",
            "data=d",
            "output=o",
            "warmup_steps=3",
            "warmup_ratio=0.1",
            "eval_data=e",
            "eval_split=0.1",
            "packing=true",
            "freeze=vison",
            "stochastic_rounding=true",
            "device=gpu",
            "adam_beta1=1.0",
            "learning_rate=0.0",
            "gradient_accumulation_steps=0",
        ];
        let overrides: Vec<_> = settings
            .iter()
            .map(|s| Override::parse(s).unwrap())
            .collect();
        let text = resolve(None, None, &overrides).unwrap_err().to_string();
        for part in [
            "contradicts warmup_steps",
            "contradicts eval_data",
            "rounds weights that have no float32 masters; set master_weights=false",
            "needs max_length",
            "`vison` is none of vision, projector, language, mtp; did you mean `vision`?",
            "`gpu` is none of auto, cpu, cuda",
            "`adam_beta1`",
            "`learning_rate` (command line, learning_rate=0.0): 0 must be a number above 0",
            "`gradient_accumulation_steps`",
        ] {
            assert!(text.contains(part), "{part:?} is not in {text}");
        }
    }
}
