//! Which implementation of each op runs: decided once, when a model is built, and printed.
//!
//! A row of `ROWS` is an op: its libtorch implementation, the operator of the kernel library that serves it, and what a
//! model must be for its kernels to take it. An op whose kernels cannot take a model runs on libtorch, and the print says why.

use std::fmt;

use bridge_core::config::TextConfig;
use tch::{Device, Kind};

use crate::shim::{KERNEL_ARCHITECTURES, has_operator};

/// An op of a model or of its training.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Op {
    /// The optimizer's step.
    AdamW,
    /// Scores, mask and weighted sum of full attention.
    Attention,
    /// Everything of a gated delta net between its projections.
    Gdn,
    /// The output layer's cross entropy.
    LinearCrossEntropy,
    /// Router and routed experts.
    Moe,
    /// Zero-centred RMSNorm.
    Norm,
    /// Rotary embedding.
    Rotary,
    /// The gated activation.
    Swiglu,
}

/// What is asked of one op or of all.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Choice {
    /// The kernels where there are some for the device and the model, else libtorch.
    #[default]
    Auto,
    /// The kernels; refused where there are none.
    Cuda,
    /// libtorch.
    Reference,
}

/// Who computes the ops of a model: a choice for all, and others for single ones.
///
/// Written `auto`, `cuda`, `reference`, or with exceptions behind commas: `auto,gdn=reference`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct KernelPolicy {
    all: Choice,
    each: [Option<Choice>; ROWS.len()],
}

/// What decides whether kernels can take a model.
#[derive(Debug, Clone, Copy)]
pub struct KernelFacts<'a> {
    /// Sizes; `None` when no model is known, which no kernel refuses.
    pub config: Option<&'a TextConfig>,
    /// The dtype of activations.
    pub dtype: Kind,
    /// Where they live.
    pub device: Device,
}

/// Which ops run on kernels.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Kernels([bool; ROWS.len()]);

/// The implementation of one op.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct Implementation {
    /// The op's name, as policies write it.
    pub op: &'static str,
    /// How it is computed, and why not by kernels where they were asked for.
    pub by: String,
}

/// A kernel family of this build.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct Kernel {
    /// The op that it serves.
    pub op: &'static str,
    /// The family's name; `None` for an op without kernels.
    pub kernel: Option<&'static str>,
    /// What it was compiled for, such as `sm_90a`; empty without kernels.
    pub architectures: Vec<&'static str>,
}

/// Why a policy cannot be followed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PolicyError {
    /// CUDA kernels were demanded of a build that has none.
    #[error(
        "kernels `cuda` were asked for, but this build has no CUDA kernels: no nvcc was found when it was built (`make kernels` brings one); use `auto` or `reference`, which run on libtorch"
    )]
    NotBuilt,
    /// CUDA kernels were demanded where no GPU is.
    #[error(
        "kernels `cuda` were asked for, but the device is {device}; choose a GPU, or kernels `auto` or `reference`"
    )]
    Device {
        /// Where the model is to live.
        device: String,
    },
    /// The kernels of an op were demanded for a model that they do not take.
    #[error("kernels `{op}=cuda` were asked for, but {why}; use `{op}=auto` or `{op}=reference`")]
    Unfit {
        /// The op.
        op: &'static str,
        /// What does not fit.
        why: String,
    },
    /// Kernels that give something else than libtorch.
    #[error(
        "the kernels of `{op}` do not agree with libtorch on {device}: its {what} is {distance:.3} off; use kernels `auto,{op}=reference`, and tell us the card and the driver"
    )]
    Differs {
        /// The op.
        op: &'static str,
        /// Output or gradient.
        what: String,
        /// Where it ran.
        device: String,
        /// Relative, in the sense of the sum of squares.
        distance: f64,
    },
    /// Not a policy.
    #[error(
        "`{word}` names no kernels; write `auto`, `cuda` or `reference`, and exceptions as `auto,gdn=reference` (ops: {})",
        ROWS.map(|row| row.name).join(", ")
    )]
    Unknown {
        /// What was given.
        word: String,
    },
}

struct Row {
    op: Op,
    name: &'static str,
    /// How libtorch computes it.
    libtorch: &'static str,
    /// Of the kernel library; empty where there is none.
    operator: &'static str,
    /// The kernel families behind the operator.
    kernels: &'static [&'static str],
    /// What a model lacks for the kernels.
    misfit: fn(&KernelFacts<'_>) -> Option<String>,
}

const ROWS: [Row; 8] = [
    Row {
        op: Op::AdamW,
        name: "adamw",
        libtorch: "libtorch, fused",
        operator: "adamw_step",
        kernels: &["adamw"],
        misfit: not_double,
    },
    Row {
        op: Op::Attention,
        name: "attention",
        libtorch: "libtorch",
        operator: "",
        kernels: &[],
        misfit: |_| None,
    },
    Row {
        op: Op::Gdn,
        name: "gdn",
        libtorch: "libtorch, one autograd node, gradient by hand",
        operator: "gdn_core",
        kernels: &[
            "chunks",
            "conv1d_silu",
            "gdn_forward",
            "gdn_backward",
            "gated_rms_norm",
        ],
        misfit: |facts| {
            only_bf16(facts).or_else(|| {
                let config = facts.config?;
                let (keys, values) = (config.linear_num_key_heads, config.linear_num_value_heads);
                let is = |what: &str, found: usize, wanted: usize| {
                    (found != wanted).then(|| format!("they need {what} {wanted}, not {found}"))
                };
                is("linear_key_head_dim", config.linear_key_head_dim, 128)
                    .or_else(|| is("linear_value_head_dim", config.linear_value_head_dim, 128))
                    .or_else(|| is("linear_conv_kernel_dim", config.linear_conv_kernel_dim, 4))
                    .or_else(|| whole("twice linear_num_value_heads", 2 * values, 8))
                    .or_else(|| whole("linear_num_value_heads", values, keys))
            })
        },
    },
    Row {
        op: Op::LinearCrossEntropy,
        name: "linear_cross_entropy",
        libtorch: "libtorch, row blocks",
        operator: "linear_cross_entropy",
        kernels: &["cross_entropy"],
        misfit: not_double,
    },
    Row {
        op: Op::Moe,
        name: "moe",
        libtorch: "libtorch, one product an expert",
        operator: "routed_experts",
        kernels: &["router", "dispatch", "expert_activation", "swiglu"],
        misfit: |facts| {
            only_bf16(facts).or_else(|| {
                let config = facts.config?;
                let moe = config.moe.as_ref()?;
                let most = |what: &str, found: usize, limit: usize| {
                    (found > limit).then(|| format!("they take {what} up to {limit}, not {found}"))
                };
                most("num_experts", moe.num_experts, 512)
                    .or_else(|| most("num_experts_per_tok", moe.num_experts_per_tok, 32))
                    .or_else(|| whole("hidden_size", config.hidden_size, 8))
                    .or_else(|| whole("moe_intermediate_size", moe.moe_intermediate_size, 8))
            })
        },
    },
    Row {
        op: Op::Norm,
        name: "norm",
        libtorch: "libtorch, gradient by hand",
        operator: "rms_norm",
        kernels: &["rms_norm"],
        misfit: |facts| {
            not_double(facts).or_else(|| {
                let config = facts.config?;
                let hidden = config.hidden_size;
                whole("hidden_size", hidden, 8)
                    .or_else(|| whole("head_dim", config.head_dim, 8))
                    .or_else(|| {
                        (hidden > 8192)
                            .then(|| format!("they take hidden_size up to 8192, not {hidden}"))
                    })
            })
        },
    },
    Row {
        op: Op::Rotary,
        name: "rotary",
        libtorch: "libtorch",
        operator: "mrope_",
        kernels: &["mrope"],
        misfit: |facts| {
            not_double(facts).or_else(|| {
                let dims = facts.config?.rotary_dim();
                (dims != 64).then(|| format!("they turn 64 dimensions of a head, not {dims}"))
            })
        },
    },
    Row {
        op: Op::Swiglu,
        name: "swiglu",
        libtorch: "libtorch, gradient by hand",
        operator: "swiglu",
        kernels: &["swiglu"],
        misfit: |facts| {
            not_double(facts).or_else(|| {
                let config = facts.config?;
                let shared = config.moe.as_ref();
                whole(
                    "intermediate_size",
                    config.intermediate_size.unwrap_or(0),
                    8,
                )
                .or_else(|| {
                    whole(
                        "shared_expert_intermediate_size",
                        shared?.shared_expert_intermediate_size,
                        8,
                    )
                })
            })
        },
    },
];

fn only_bf16(facts: &KernelFacts<'_>) -> Option<String> {
    (facts.dtype != Kind::BFloat16)
        .then(|| format!("they take bfloat16, not {}", word(facts.dtype)))
}

fn not_double(facts: &KernelFacts<'_>) -> Option<String> {
    let takes = matches!(facts.dtype, Kind::BFloat16 | Kind::Float);
    (!takes).then(|| format!("they take bfloat16 and float32, not {}", word(facts.dtype)))
}

fn whole(what: &str, found: usize, of: usize) -> Option<String> {
    let fits = of != 0 && found.is_multiple_of(of);
    (!fits).then(|| format!("they need {what} in whole multiples of {of}, not {found}"))
}

fn word(kind: Kind) -> &'static str {
    match kind {
        Kind::BFloat16 => "bfloat16",
        Kind::Float => "float32",
        Kind::Double => "float64",
        _ => "this dtype",
    }
}

impl Op {
    /// As policies write it.
    #[must_use]
    pub fn name(self) -> &'static str {
        ROWS[self.index()].name
    }

    fn index(self) -> usize {
        ROWS.iter()
            .position(|row| row.op == self)
            .expect("every op has a row")
    }
}

impl Kernels {
    /// libtorch for every op.
    pub const REFERENCE: Self = Self([false; ROWS.len()]);

    /// Whether `op` runs on kernels.
    #[must_use]
    pub fn run(self, op: Op) -> bool {
        self.0[op.index()]
    }
}

impl KernelPolicy {
    /// The same choice for every op.
    #[must_use]
    pub const fn all(choice: Choice) -> Self {
        Self {
            all: choice,
            each: [None; ROWS.len()],
        }
    }

    /// Which ops run on kernels for a model, and how each is computed, in words.
    ///
    /// # Errors
    /// [`PolicyError::NotBuilt`], [`PolicyError::Device`] or [`PolicyError::Unfit`] when `cuda` is demanded and there are no
    /// kernels. `cuda` for all ops leaves those to libtorch whose kernels do not take the model; `op=cuda` does not.
    pub fn resolve(
        self,
        facts: &KernelFacts<'_>,
    ) -> Result<(Kernels, Vec<Implementation>), PolicyError> {
        let on_gpu = matches!(facts.device, Device::Cuda(_));
        let here = |row: &Row| !row.operator.is_empty() && has_operator(row.operator, on_gpu);
        let demanded = self.all == Choice::Cuda || self.each.contains(&Some(Choice::Cuda));
        if demanded && !ROWS.iter().any(here) {
            return Err(match KERNEL_ARCHITECTURES.is_empty() {
                true => PolicyError::NotBuilt,
                false => PolicyError::Device {
                    device: match facts.device {
                        Device::Cpu => "the CPU".to_owned(),
                        other => format!("{other:?}"),
                    },
                },
            });
        }
        let mut kernels = Kernels::REFERENCE;
        let mut implementations = Vec::with_capacity(ROWS.len());
        for ((row, chosen), runs) in ROWS.iter().zip(self.each).zip(&mut kernels.0) {
            let choice = chosen.unwrap_or(self.all);
            let why = match (row.operator, here(row)) {
                ("", _) => Some("it has no kernels".to_owned()),
                (_, false) => Some("this build has no kernels for the device".to_owned()),
                (_, true) => (row.misfit)(facts),
            };
            if let (Some(Choice::Cuda), Some(why)) = (chosen, &why) {
                return Err(PolicyError::Unfit {
                    op: row.name,
                    why: why.clone(),
                });
            }
            *runs = choice != Choice::Reference && why.is_none();
            let by = match (*runs, why) {
                (true, _) => format!("kernels {}", row.kernels.join(", ")),
                // Kernels are there and stay unused: whoever reads the log must see why.
                (false, Some(why)) if choice != Choice::Reference && here(row) => {
                    format!("{} (there are kernels, but {why})", row.libtorch)
                }
                (false, _) => row.libtorch.to_owned(),
            };
            implementations.push(Implementation { op: row.name, by });
        }
        Ok((kernels, implementations))
    }
}

/// The kernels of this build, by op; ops without kernels are there too.
#[must_use]
pub fn kernels_built() -> Vec<Kernel> {
    let compiled = !KERNEL_ARCHITECTURES.is_empty();
    ROWS.iter()
        .flat_map(|row| {
            let families: Vec<Option<&str>> = match row.kernels {
                kernels if compiled && !kernels.is_empty() => {
                    kernels.iter().copied().map(Some).collect()
                }
                _ => vec![None],
            };
            families.into_iter().map(|kernel| Kernel {
                op: row.name,
                kernel,
                architectures: match kernel {
                    Some(_) => KERNEL_ARCHITECTURES.split(' ').collect(),
                    None => Vec::new(),
                },
            })
        })
        .collect()
}

impl std::str::FromStr for Choice {
    type Err = PolicyError;

    fn from_str(word: &str) -> Result<Self, PolicyError> {
        match word {
            "auto" => Ok(Self::Auto),
            "cuda" => Ok(Self::Cuda),
            "reference" => Ok(Self::Reference),
            _ => Err(PolicyError::Unknown {
                word: word.to_owned(),
            }),
        }
    }
}

impl std::str::FromStr for KernelPolicy {
    type Err = PolicyError;

    fn from_str(text: &str) -> Result<Self, PolicyError> {
        let mut policy = Self::default();
        for (place, part) in text.split(',').map(str::trim).enumerate() {
            match part.split_once('=') {
                Some((name, choice)) => {
                    let index = ROWS.iter().position(|row| row.name == name.trim());
                    let index = index.ok_or_else(|| PolicyError::Unknown {
                        word: part.to_owned(),
                    })?;
                    policy.each[index] = Some(choice.trim().parse()?);
                }
                None if place == 0 => policy.all = part.parse()?,
                None => {
                    return Err(PolicyError::Unknown {
                        word: part.to_owned(),
                    });
                }
            }
        }
        Ok(policy)
    }
}

impl fmt::Display for Choice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Auto => "auto",
            Self::Cuda => "cuda",
            Self::Reference => "reference",
        })
    }
}

impl fmt::Display for KernelPolicy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.all)?;
        for (row, choice) in ROWS.iter().zip(self.each) {
            if let Some(choice) = choice {
                write!(f, ",{}={choice}", row.name)?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_policy_reads_as_it_is_written() {
        for text in [
            "auto",
            "reference",
            "cuda,gdn=reference",
            "auto,moe=cuda,norm=auto",
        ] {
            assert_eq!(text.parse::<KernelPolicy>().unwrap().to_string(), text);
        }
        assert_eq!(
            "gdn=reference".parse::<KernelPolicy>().unwrap().to_string(),
            "auto,gdn=reference"
        );
        for wrong in [
            "",
            "fast",
            "auto,cuda",
            "auto,gnd=cuda",
            "auto,gdn=",
            "auto,",
        ] {
            let error = wrong.parse::<KernelPolicy>().unwrap_err().to_string();
            assert!(error.contains("names no kernels"), "{wrong}: {error}");
        }
    }

    #[test]
    fn the_cpu_has_no_kernels_and_a_demand_for_them_says_so() {
        let facts = KernelFacts {
            config: None,
            dtype: Kind::BFloat16,
            device: Device::Cpu,
        };
        let (kernels, implementations) = KernelPolicy::default().resolve(&facts).unwrap();
        assert_eq!(kernels, Kernels::REFERENCE);
        assert!(
            implementations
                .iter()
                .all(|one| one.by.starts_with("libtorch"))
        );
        for policy in ["cuda", "auto,norm=cuda"] {
            let policy: KernelPolicy = policy.parse().unwrap();
            let error = policy.resolve(&facts).unwrap_err().to_string();
            assert!(error.contains("kernels `cuda` were asked for"), "{error}");
        }
    }
}
