//! One optimizer step over several forward passes.

use bridge_torch::batch::Batch;
use bridge_torch::model::{LossOptions, ModelError, Qwen3VlModel};
use bridge_torch::optim::{AdamW, AdamWError};

use super::collate::{Counts, Layout, collate};
use super::config::RunConfig;
use crate::data::Sample;

/// Weights of the losses.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct LossWeights {
    /// Of the prediction head's loss.
    pub mtp: f64,
    /// Of the router's auxiliary loss.
    pub aux: f64,
}

/// The losses of a step: means over all its targets.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(crate) struct StepLosses {
    /// Of the language model.
    pub lm: f64,
    /// Of the prediction head.
    pub mtp: Option<f64>,
    /// Of the routers, a mean over passes by their tokens.
    pub aux: Option<f64>,
    /// The weighted sum that gradients are of.
    pub total: f64,
}

/// What a step did.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum StepResult {
    /// The weights moved.
    Stepped {
        /// The losses before the step.
        losses: StepLosses,
        /// Global norm of the gradient before clipping.
        grad_norm: f64,
    },
    /// A loss was not finite; nothing changed.
    LossNotFinite {
        /// The losses, the bad one included.
        losses: StepLosses,
        /// The pass that gave it.
        pass: usize,
    },
    /// A gradient was not finite; nothing changed.
    GradientNotFinite {
        /// The losses.
        losses: StepLosses,
        /// The norm.
        grad_norm: f64,
    },
}

/// Why a step could not be made.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub(crate) enum StepError {
    /// The model refused a batch.
    #[error("forward or backward pass over rows {}", list(rows))]
    Model {
        /// Rows of the batch.
        rows: Vec<usize>,
        /// Why.
        #[source]
        source: ModelError,
    },
    /// No token of the step is a target.
    #[error(
        "rows {} have no target that a token before it could predict",
        list(rows)
    )]
    NoTarget {
        /// Rows of the step.
        rows: Vec<usize>,
    },
    /// libtorch failed in the optimizer.
    #[error(transparent)]
    Optimizer(#[from] AdamWError),
}

pub(crate) fn list(rows: &[usize]) -> String {
    rows.iter()
        .map(usize::to_string)
        .collect::<Vec<_>>()
        .join(", ")
}

/// Computes losses and gradients of all `passes` and, when they are finite, steps the optimizer.
///
/// The loss is the mean over all targets of the step, however they are spread over passes: targets are counted first, and
/// each pass's sum is divided by the count of the step. The auxiliary loss of a pass counts by its share of the tokens.
///
/// # Errors
/// [`StepError`]; the weights are unchanged then.
pub(crate) fn accumulated_step(
    model: &Qwen3VlModel,
    optimizer: &mut AdamW,
    passes: &[Vec<Sample>],
    layout: Layout,
    weights: LossWeights,
    learning_rate: f64,
    config: &RunConfig,
) -> Result<StepResult, StepError> {
    let total = passes.iter().flatten().map(Counts::of).sum::<Counts>();
    let mut losses = StepLosses::default();
    for (pass, samples) in passes.iter().enumerate() {
        let computed = pass_losses(model, samples, layout, weights, total)?;
        losses.lm += computed.lm.double_value(&[]);
        let add = |sum: &mut Option<f64>, part: Option<f64>| {
            if let Some(part) = part {
                *sum = Some(sum.unwrap_or(0.0) + part);
            }
        };
        add(
            &mut losses.mtp,
            computed.mtp.as_ref().map(|loss| loss.double_value(&[])),
        );
        let share = share(samples, total);
        add(
            &mut losses.aux,
            computed
                .aux
                .as_ref()
                .map(|loss| share * loss.double_value(&[])),
        );
        losses.total += computed.total.double_value(&[]);
        if !losses.total.is_finite() {
            optimizer.zero_grad();
            return Ok(StepResult::LossNotFinite { losses, pass });
        }
        backward(samples, &computed.total)?;
    }
    let clip = (config.max_grad_norm > 0.0).then_some(config.max_grad_norm);
    let grad_norm = optimizer.step(learning_rate, clip)?;
    if !grad_norm.is_finite() {
        // The gradients stay for whoever looks for the reason.
        return Ok(StepResult::GradientNotFinite { losses, grad_norm });
    }
    optimizer.zero_grad();
    Ok(StepResult::Stepped { losses, grad_norm })
}

/// The losses of one pass as parts of a step with these counts.
pub(crate) fn pass_losses(
    model: &Qwen3VlModel,
    samples: &[Sample],
    layout: Layout,
    weights: LossWeights,
    total: Counts,
) -> Result<bridge_torch::model::Losses, StepError> {
    let rows = || samples.iter().map(|sample| sample.row).collect();
    if total.targets == 0 {
        return Err(StepError::NoTarget { rows: rows() });
    }
    let failed = |source| StepError::Model {
        rows: rows(),
        source,
    };
    let batch = batch(samples, layout).map_err(failed)?;
    #[expect(
        clippy::cast_precision_loss,
        reason = "token counts are far below 2^52"
    )]
    let options = LossOptions {
        router_aux_loss_coef: weights.aux * share(samples, total),
        mtp_loss_scaling_factor: weights.mtp,
        normalizer: Some(total.targets as f64),
        mtp_normalizer: Some(total.mtp_targets.max(1) as f64),
    };
    model.loss(&batch, &options).map_err(failed)
}

pub(crate) fn batch(samples: &[Sample], layout: Layout) -> Result<Batch, ModelError> {
    Ok(collate(&samples.iter().collect::<Vec<_>>(), layout)?)
}

pub(crate) fn backward(samples: &[Sample], loss: &tch::Tensor) -> Result<(), StepError> {
    // With everything that the loss depends on frozen there is nothing to do.
    if !loss.requires_grad() {
        return Ok(());
    }
    loss.f_backward().map_err(|source| StepError::Model {
        rows: samples.iter().map(|sample| sample.row).collect(),
        source: source.into(),
    })
}

#[expect(
    clippy::cast_precision_loss,
    reason = "token counts are far below 2^52"
)]
fn share(samples: &[Sample], total: Counts) -> f64 {
    let tokens = samples.iter().map(Counts::of).sum::<Counts>().tokens;
    tokens as f64 / total.tokens.max(1) as f64
}
