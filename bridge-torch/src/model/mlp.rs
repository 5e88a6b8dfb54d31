//! The dense MLP: gate and up in one product, SwiGLU, down.

use tch::Tensor;

use super::ModelError;
use super::linear::Linear;
use crate::ops::policy::Kernels;
use crate::ops::swiglu::swiglu;
use crate::params::ParamStore;

/// `linear_fc1` (rows gate, then up) and `linear_fc2`.
#[derive(Debug)]
pub(super) struct Mlp {
    fc1: Linear,
    fc2: Linear,
}

impl Mlp {
    pub(super) fn new(params: &ParamStore, name: &str) -> Result<Self, ModelError> {
        Ok(Self {
            fc1: Linear::without_bias(params, &format!("{name}.linear_fc1"))?,
            fc2: Linear::without_bias(params, &format!("{name}.linear_fc2"))?,
        })
    }

    pub(super) fn forward(&self, kernels: Kernels, x: &Tensor) -> Tensor {
        self.fc2.forward(&swiglu(kernels, &self.fc1.forward(x)))
    }
}
