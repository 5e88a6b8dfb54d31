//! The loss on held-out rows.

use bridge_torch::model::Qwen3VlModel;

use super::collate::{Counts, Layout};
use super::step::{LossWeights, StepError, pass_losses};
use crate::data::Sample;

/// Losses over all targets of the evaluation rows.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Evaluation {
    /// Of the language model.
    pub loss: f64,
    /// Of the prediction head.
    pub mtp_loss: Option<f64>,
    /// What was counted.
    pub counts: Counts,
}

/// Means over all targets of `passes`, without gradients. `None` without a target.
///
/// # Errors
/// The error of a pass, from its data or from the model.
pub(crate) fn evaluate<E: From<StepError>>(
    model: &Qwen3VlModel,
    passes: impl Iterator<Item = Result<Vec<Sample>, E>>,
    layout: Layout,
    mtp_weight: f64,
) -> Result<Option<Evaluation>, E> {
    let weights = LossWeights {
        mtp: mtp_weight,
        aux: 0.0,
    };
    // A sum is a mean over one target.
    let sums = Counts {
        targets: 1,
        mtp_targets: 1,
        ..Counts::default()
    };
    let mut result = Evaluation::default();
    for samples in passes {
        let samples = samples?;
        if samples.is_empty() {
            continue;
        }
        let losses = tch::no_grad(|| pass_losses(model, &samples, layout, weights, sums))?;
        result.loss += losses.lm.double_value(&[]);
        if let Some(mtp) = losses.mtp {
            *result.mtp_loss.get_or_insert(0.0) += mtp.double_value(&[]);
        }
        result.counts = result.counts + samples.iter().map(Counts::of).sum();
    }
    if result.counts.targets == 0 {
        return Ok(None);
    }
    #[expect(
        clippy::cast_precision_loss,
        reason = "token counts are far below 2^52"
    )]
    {
        result.loss /= result.counts.targets as f64;
        let mtp_targets = result.counts.mtp_targets.max(1) as f64;
        result.mtp_loss = result.mtp_loss.map(|sum| sum / mtp_targets);
    }
    Ok(Some(result))
}
