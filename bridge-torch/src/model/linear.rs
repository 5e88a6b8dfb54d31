//! The linear layer: the place where adapters attach. Blocks call `forward` and know nothing else.

use tch::Tensor;

use super::ModelError;
use crate::params::ParamStore;

/// `y = x W^T (+ b)`, `W` stored `[out, in]`.
#[derive(Debug)]
pub(super) struct Linear {
    weight: Tensor,
    bias: Option<Tensor>,
}

impl Linear {
    /// Takes `{name}.weight`.
    pub(super) fn without_bias(params: &ParamStore, name: &str) -> Result<Self, ModelError> {
        Ok(Self::from_tensor(params.get(&format!("{name}.weight"))?))
    }

    /// Takes `{name}.weight` and `{name}.bias`.
    pub(super) fn with_bias(params: &ParamStore, name: &str) -> Result<Self, ModelError> {
        Ok(Self {
            weight: params.get(&format!("{name}.weight"))?,
            bias: Some(params.get(&format!("{name}.bias"))?),
        })
    }

    pub(super) fn from_tensor(weight: Tensor) -> Self {
        Self { weight, bias: None }
    }

    pub(super) fn forward(&self, x: &Tensor) -> Tensor {
        x.linear(&self.weight, self.bias.as_ref())
    }
}
