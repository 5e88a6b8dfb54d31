//! The optimizer that a configuration asks for.

use anyhow::bail;
use bridge_torch::ops::policy::{Implementation, Kernels, Op};
use bridge_torch::optim::AdamWOptions;
use tch::Kind;

use super::config::{Optim, RunConfig};

/// Options of the optimizer of weights in `dtype`; `kernels` and `implementations` are what the run's policy gave.
///
/// # Errors
/// What only the kernels compute, and they do not run; random rounding of what is not rounded.
pub(super) fn options(
    config: &RunConfig,
    dtype: Kind,
    kernels: Kernels,
    implementations: &[Implementation],
) -> anyhow::Result<AdamWOptions> {
    let on_kernels = kernels.run(Op::AdamW);
    let eight_bit = config.optim == Optim::AdamW8Bit;
    for (asked, what, instead) in [
        (eight_bit, "optim=adamw_8bit", "optim=adamw"),
        (
            config.stochastic_rounding,
            "stochastic_rounding=true",
            "master_weights=true",
        ),
    ] {
        if asked && !on_kernels {
            let name = Op::AdamW.name();
            let by = implementations
                .iter()
                .find(|one| one.op == name)
                .map_or("", |one| one.by.as_str());
            bail!(
                "`{what}` needs the CUDA kernels of `{name}`, but here it is computed by {by}; run on a GPU with kernels \
                 `auto`, or set {instead}"
            );
        }
    }
    if config.stochastic_rounding && dtype != Kind::BFloat16 {
        bail!(
            "`stochastic_rounding=true` rounds bfloat16 weights, but the run's are float32; leave it out, or set dtype=bfloat16"
        );
    }
    Ok(AdamWOptions {
        betas: (config.adam_beta1, config.adam_beta2),
        eps: config.adam_epsilon,
        masters: config.master_weights,
        kernels: on_kernels,
        eight_bit,
        stochastic_rounding: config.stochastic_rounding,
        seed: config.seed,
    })
}
