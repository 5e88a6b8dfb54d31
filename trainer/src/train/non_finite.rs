//! Finds where a value that is not finite first appeared: parameter, layer, sample.
//!
//! Called only when a step has failed; it repeats forward passes of the step, one sample at a time, on the unchanged weights.

use std::fmt;

use bridge_torch::model::{ForwardOptions, Qwen3VlModel};
use bridge_torch::params::ParamStore;
use tch::Tensor;

use super::collate::{Counts, Layout};
use super::step::{self, LossWeights, StepError, list};
use crate::data::Sample;

/// Where it went wrong.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Location {
    /// Parameters with values that are not finite.
    pub parameters: Vec<String>,
    /// The first activation, in the order of computation, that is not finite.
    pub activation: Option<String>,
    /// Parameters whose gradients are not finite, in the model's order.
    pub gradients: Vec<String>,
    /// Data rows whose own loss or gradient is not finite.
    pub rows: Vec<usize>,
}

impl fmt::Display for Location {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut parts = Vec::new();
        let names = |names: &[String]| {
            let first = names
                .iter()
                .take(3)
                .map(|name| format!("`{name}`"))
                .collect::<Vec<_>>();
            let more = names.len().saturating_sub(3);
            let rest = if more > 0 {
                format!(" and {more} more")
            } else {
                String::new()
            };
            first.join(", ") + &rest
        };
        if !self.parameters.is_empty() {
            parts.push(format!(
                "the parameter {} is not finite itself",
                names(&self.parameters)
            ));
        }
        if let Some(activation) = &self.activation {
            parts.push(format!(
                "the first value that is not finite is in {activation}"
            ));
        }
        if !self.gradients.is_empty() {
            parts.push(format!(
                "the gradient of {} has no finite norm",
                names(&self.gradients)
            ));
        }
        parts.push(match self.rows.as_slice() {
            [] => "no single row shows it, only the step as a whole".to_owned(),
            [row] => format!("data row {row} causes it"),
            rows => format!("data rows {} cause it", list(rows)),
        });
        f.write_str(&parts.join("; "))
    }
}

/// Looks for the place of a loss that is not finite, in the samples of its pass.
///
/// # Errors
/// When a pass over one sample fails otherwise.
pub(crate) fn locate_loss(
    model: &Qwen3VlModel,
    samples: &[Sample],
    layout: Layout,
) -> Result<Location, StepError> {
    let mut location = Location {
        parameters: bad_parameters(model.params()),
        ..Location::default()
    };
    let options = ForwardOptions {
        hidden_states: true,
        ..ForwardOptions::default()
    };
    for sample in samples {
        let failed = |source| StepError::Model {
            rows: vec![sample.row],
            source,
        };
        let one = std::slice::from_ref(sample);
        let output = tch::no_grad(|| {
            let batch = step::batch(one, layout)?;
            model.forward(&batch, &options)
        })
        .map_err(failed)?;
        let visual = output
            .visual
            .iter()
            .map(|t| ("the output of the vision tower (images)", t));
        let videos = output
            .visual_videos
            .iter()
            .map(|t| ("the output of the vision tower (videos)", t));
        let mut activation = visual
            .chain(videos)
            .find(|(_, t)| !is_finite(t))
            .map(|(name, _)| name.to_owned());
        if activation.is_none() {
            let bad = output
                .hidden_states
                .iter()
                .position(|hidden| !is_finite(hidden));
            activation = bad.map(|index| match index {
                0 => "the embeddings (`hidden.0`)".to_owned(),
                index => format!(
                    "the output of decoder layer {} (`hidden.{index}`)",
                    index - 1
                ),
            });
        }
        let last = [
            ("the final norm (`hidden.norm`)", Some(&output.hidden_norm)),
            ("the logits", output.logits.as_ref()),
            ("the router's auxiliary loss", output.aux_loss.as_ref()),
            ("the loss", output.loss.as_ref()),
            (
                "the logits of the prediction head",
                output.mtp_logits.as_ref(),
            ),
            ("the loss of the prediction head", output.mtp_loss.as_ref()),
        ];
        let activation = activation.or_else(|| {
            let bad = last.iter().find(|(_, t)| t.is_some_and(|t| !is_finite(t)));
            bad.map(|(name, _)| (*name).to_owned())
        });
        if activation.is_some() {
            location.rows.push(sample.row);
        }
        location.activation = location.activation.or(activation);
    }
    Ok(location)
}

/// Looks for the place of a gradient that is not finite, in the gradients that the step left and then sample by sample. All
/// gradients are gone afterwards.
///
/// # Errors
/// When a pass over one sample fails otherwise.
pub(crate) fn locate_gradient(
    model: &Qwen3VlModel,
    passes: &[Vec<Sample>],
    layout: Layout,
    weights: LossWeights,
    clear: &mut dyn FnMut(),
) -> Result<Location, StepError> {
    let mut location = Location {
        parameters: bad_parameters(model.params()),
        gradients: bad_gradients(model.params()),
        ..Location::default()
    };
    clear();
    for sample in passes.iter().flatten() {
        let one = std::slice::from_ref(sample);
        let losses = step::pass_losses(model, one, layout, weights, Counts::of(sample))?;
        step::backward(one, &losses.total)?;
        if !bad_gradients(model.params()).is_empty() {
            location.rows.push(sample.row);
        }
        clear();
    }
    Ok(location)
}

fn bad_parameters(params: &ParamStore) -> Vec<String> {
    let bad = params.iter().filter(|(_, tensor)| !is_finite(tensor));
    bad.map(|(name, _)| name.to_owned()).collect()
}

fn bad_gradients(params: &ParamStore) -> Vec<String> {
    let bad = params.iter().filter(|(_, tensor)| {
        let gradient = tensor.grad();
        // The norm, since squares can overflow where each value is finite.
        gradient.defined() && !is_finite(&gradient.norm())
    });
    bad.map(|(name, _)| name.to_owned()).collect()
}

/// Whether all values are finite; a tensor that libtorch cannot judge counts as not finite.
fn is_finite(tensor: &Tensor) -> bool {
    tch::no_grad(|| {
        let finite = tensor.f_isfinite().and_then(|finite| finite.f_all());
        finite.is_ok_and(|all| all.int64_value(&[]) != 0)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_location_names_layer_parameters_and_rows() {
        let location = Location {
            activation: Some("the output of decoder layer 2 (`hidden.3`)".to_owned()),
            gradients: (0..5).map(|n| format!("w{n}")).collect(),
            rows: vec![4, 9],
            ..Location::default()
        };
        assert_eq!(
            location.to_string(),
            "the first value that is not finite is in the output of decoder layer 2 (`hidden.3`); \
             the gradient of `w0`, `w1`, `w2` and 2 more has no finite norm; data rows 4, 9 cause it"
        );
    }
}
