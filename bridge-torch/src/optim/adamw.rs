//! AdamW, fused, with clipping inside the step and float32 masters for bfloat16 parameters: libtorch's, or the kernels, which
//! also know moments of 8 bits and random rounding.

use cxx::UniquePtr;
use tch::{Kind, Tensor};

use crate::shim::{at, bridge, own};

/// Settings of [`AdamW`].
#[derive(Debug, Clone, Copy)]
pub struct AdamWOptions {
    /// Decay rates of the two moments.
    pub betas: (f64, f64),
    /// Added to the root of the second moment.
    pub eps: f64,
    /// Whether bfloat16 parameters are stepped as float32 masters (their moments are float32 then too).
    pub masters: bool,
    /// Whether the kernels step, as [`Op::AdamW`](crate::ops::policy::Op::AdamW) of a policy decides. Their moments are float32
    /// for every parameter.
    pub kernels: bool,
    /// Whether moments are codes of 8 bits, with a float32 scale for each 256 of them; rounded at random, without bias. With
    /// kernels only.
    pub eight_bit: bool,
    /// Whether bfloat16 parameters without masters are rounded at random, without bias, so that small steps are not lost. With
    /// kernels only.
    pub stochastic_rounding: bool,
    /// Seed of the roundings. With the steps made, which a saved state holds, it fixes every bit.
    pub seed: u64,
}

impl Default for AdamWOptions {
    fn default() -> Self {
        Self {
            betas: (0.9, 0.95),
            eps: 1e-8,
            masters: true,
            kernels: false,
            eight_bit: false,
            stochastic_rounding: false,
            seed: 0,
        }
    }
}

/// A tensor to train.
#[derive(Debug)]
pub struct OptimizedParam {
    /// Its name in saved states.
    pub name: String,
    /// A leaf that requires a gradient.
    pub tensor: Tensor,
    /// Decoupled decay: a step subtracts `lr * weight_decay * parameter`.
    pub weight_decay: f64,
}

/// What went wrong with the optimizer.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AdamWError {
    /// libtorch refused.
    #[error("libtorch failed in the optimizer: {}", first_line(.0.what()))]
    Torch(#[from] cxx::Exception),
    /// Something that libtorch's step does not know.
    #[error("{what} are computed by the kernels of `adamw` only, which do not run here")]
    NeedsKernels {
        /// What was asked for.
        what: &'static str,
    },
    /// libtorch refused a copy.
    #[error("`{name}` cannot be restored: {}", first_line(&source.to_string()))]
    Copy {
        /// State tensor.
        name: String,
        /// libtorch's reason.
        #[source]
        source: tch::TchError,
    },
    /// A saved state lacks a tensor.
    #[error(
        "the optimizer state has no `{name}`; was it saved by a run of another model or other frozen parts?"
    )]
    Missing {
        /// The tensor's name.
        name: String,
    },
    /// Moments of 8 bits where others are needed, or the reverse.
    #[error(
        "`{name}` of the optimizer state is {found}, expected {expected}; was it saved by a run with moments of other bits?"
    )]
    Moments {
        /// The tensor's name.
        name: String,
        /// In the state.
        found: &'static str,
        /// Here.
        expected: &'static str,
    },
    /// A saved state has another shape.
    #[error(
        "`{name}` of the optimizer state has shape {found:?}, expected {expected:?}; was it saved by a run of another model?"
    )]
    Shape {
        /// The tensor's name.
        name: String,
        /// In the state.
        found: Vec<i64>,
        /// Here.
        expected: Vec<i64>,
    },
}

fn first_line(text: &str) -> &str {
    text.lines().next().unwrap_or_default()
}

/// What a saved state holds of a parameter, before its name.
const PARTS: [&str; 6] = [
    "exp_avg",
    "exp_avg_scale",
    "exp_avg_sq",
    "exp_avg_sq_scale",
    "step",
    "master",
];

/// Whether a moment is codes or numbers, in words.
fn form(moment: &Tensor) -> &'static str {
    match moment.kind() {
        Kind::Uint8 => "codes of 8 bits",
        _ => "floats",
    }
}

/// Decoupled weight decay with Adam's moments (Loshchilov and Hutter 2019), as `torch.optim.AdamW` computes it.
pub struct AdamW {
    inner: UniquePtr<bridge::AdamW>,
    names: Vec<String>,
}

impl std::fmt::Debug for AdamW {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("AdamW")
            .field("names", &self.names)
            .finish_non_exhaustive()
    }
}

impl AdamW {
    /// An optimizer with empty moments.
    ///
    /// # Errors
    /// [`AdamWError::NeedsKernels`], and when libtorch cannot make the moments.
    pub fn new(params: &[OptimizedParam], options: &AdamWOptions) -> Result<Self, AdamWError> {
        for (asked, what) in [
            (options.eight_bit, "moments of 8 bits"),
            (options.stochastic_rounding, "random roundings"),
        ] {
            if asked && !options.kernels {
                return Err(AdamWError::NeedsKernels { what });
            }
        }
        let (beta1, beta2) = options.betas;
        let mut inner = bridge::new_adamw(&bridge::AdamWSettings {
            beta1,
            beta2,
            eps: options.eps,
            masters: options.masters,
            kernels: options.kernels,
            eight_bit: options.eight_bit,
            stochastic: options.stochastic_rounding,
            seed: options.seed,
        });
        for param in params {
            inner.pin_mut().add(at(&param.tensor), param.weight_decay)?;
        }
        let names = params.iter().map(|param| param.name.clone()).collect();
        Ok(Self { inner, names })
    }

    /// Steps every parameter that has a gradient and returns the gradients' global L2 norm before clipping.
    ///
    /// Gradients longer than `max_norm` together are scaled to it. When the norm is not finite, nothing is changed: the
    /// caller decides what a step without an update means.
    ///
    /// # Errors
    /// When libtorch or a kernel refuses the step.
    pub fn step(&mut self, lr: f64, max_norm: Option<f64>) -> Result<f64, AdamWError> {
        Ok(self.inner.pin_mut().step(lr, max_norm.unwrap_or(0.0))?)
    }

    /// Drops all gradients.
    pub fn zero_grad(&mut self) {
        self.inner.zero_grad();
    }

    /// The moments, step counts and masters: `exp_avg.NAME`, `exp_avg_sq.NAME`, `step.NAME`, `master.NAME`, and
    /// `exp_avg_scale.NAME` and `exp_avg_sq_scale.NAME` of 8-bit moments. They share memory with the optimizer.
    ///
    /// # Errors
    /// Never for an optimizer that [`AdamW::new`] made.
    pub fn state(&self) -> Result<Vec<(String, Tensor)>, AdamWError> {
        let mut tensors = Vec::new();
        for (index, name) in self.names.iter().enumerate() {
            for part in PARTS {
                let found = self.inner.state(index, part)?;
                if !found.is_null() {
                    tensors.push((format!("{part}.{name}"), own(found)));
                }
            }
        }
        Ok(tensors)
    }

    /// Restores what [`AdamW::state`] gave; `find` looks a tensor up by name. Parameters with masters get their values.
    ///
    /// # Errors
    /// [`AdamWError::Missing`] and [`AdamWError::Shape`] for a state of another model, [`AdamWError::Moments`] for one with
    /// moments of other bits.
    pub fn load_state(&mut self, find: impl Fn(&str) -> Option<Tensor>) -> Result<(), AdamWError> {
        for (name, mut target) in self.state()? {
            let Some(saved) = find(&name) else {
                return Err(AdamWError::Missing { name });
            };
            if saved.size() != target.size() {
                return Err(AdamWError::Shape {
                    name,
                    found: saved.size(),
                    expected: target.size(),
                });
            }
            if form(&saved) != form(&target) {
                return Err(AdamWError::Moments {
                    name,
                    found: form(&saved),
                    expected: form(&target),
                });
            }
            tch::no_grad(|| target.f_copy_(&saved))
                .map_err(|source| AdamWError::Copy { name, source })?;
        }
        self.inner.publish()?;
        Ok(())
    }
}
