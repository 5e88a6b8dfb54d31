//! The mixture of experts: router, routed experts, and the shared expert under its gate.

use bridge_core::config::MoeConfig;
use tch::Tensor;

use super::ModelError;
use super::linear::Linear;
use super::mlp::Mlp;
use crate::ops::moe::{SharedExpert, experts, route};
use crate::ops::policy::Kernels;
use crate::params::ParamStore;

/// Experts of one layer; `fc1` `[experts, 2 I, hidden]`, `fc2` `[experts, hidden, I]`.
#[derive(Debug)]
pub(super) struct MixtureOfExperts {
    router: Linear,
    fc1: Tensor,
    fc2: Tensor,
    shared: Mlp,
    shared_gate: Linear,
    top_k: i64,
}

/// What a router decided.
#[derive(Debug)]
pub struct RouterOutput {
    /// `[tokens, experts]`, in the model's dtype.
    pub logits: Tensor,
    /// `[tokens, top_k]`, by falling probability.
    pub experts: Tensor,
    /// `[tokens, top_k]`, summing to 1.
    pub weights: Tensor,
}

impl MixtureOfExperts {
    pub(super) fn new(
        config: &MoeConfig,
        params: &ParamStore,
        name: &str,
    ) -> Result<Self, ModelError> {
        let shared = format!("{name}.shared_experts");
        Ok(Self {
            router: Linear::without_bias(params, &format!("{name}.router"))?,
            fc1: params.get(&format!("{name}.experts.linear_fc1.weight"))?,
            fc2: params.get(&format!("{name}.experts.linear_fc2.weight"))?,
            shared: Mlp::new(params, &shared)?,
            shared_gate: Linear::from_tensor(params.get(&format!("{shared}.gate_weight"))?),
            top_k: i64::try_from(config.num_experts_per_tok).unwrap_or(i64::MAX),
        })
    }

    /// `x`: `[batch, seq, hidden]`, normed; returns the same shape.
    pub(super) fn forward(&self, kernels: Kernels, x: &Tensor) -> (Tensor, RouterOutput) {
        let rows = x.reshape([-1, x.size()[2]]);
        let logits = self.router.forward(&rows);
        let routing = route(kernels, &logits, self.top_k);
        let shared = SharedExpert {
            output: self.shared.forward(kernels, &rows),
            gate: self.shared_gate.forward(&rows),
        };
        let weights = (&self.fc1, &self.fc2);
        let out = experts(kernels, &rows, &routing, weights, Some(&shared));
        let output = RouterOutput {
            logits,
            experts: routing.experts,
            weights: routing.weights,
        };
        (out.view_as(x), output)
    }
}
