//! What makes a layout impossible.

use std::fmt;

use super::pipeline_layout::PipelineLayoutError;

/// The sizes or options do not fit the model or each other.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{}", join(problems))]
pub struct LayoutError {
    /// All that was found; never empty.
    pub problems: Vec<LayoutProblem>,
}

impl From<LayoutProblem> for LayoutError {
    fn from(problem: LayoutProblem) -> Self {
        Self {
            problems: vec![problem],
        }
    }
}

/// A number that a parallel size should divide and does not.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Indivisible {
    /// What is cut, in the word of the config: `linear_num_key_heads`.
    pub parameter: &'static str,
    /// Its value.
    pub size: usize,
    /// By what, in short: `TP`, `TP x CP`.
    pub by: &'static str,
    /// The sizes of `by`; their product should divide.
    pub sizes: Vec<usize>,
    /// Megatron's words for `by`.
    pub megatron: &'static str,
}

impl fmt::Display for Indivisible {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            parameter,
            size,
            by,
            megatron,
            ..
        } = self;
        let sizes: Vec<String> = self.sizes.iter().map(ToString::to_string).collect();
        write!(
            f,
            "{parameter} {size} is not divisible by {by} {} ({megatron})",
            sizes.join(" x ")
        )?;
        match divisors(*size).as_slice() {
            [] => Ok(()),
            allowed => write!(f, ", only by {}", allowed.join(", ")),
        }
    }
}

/// The first divisors of `size`; parallel sizes above 4096 are of no use.
fn divisors(size: usize) -> Vec<String> {
    let all = (1..=size.min(4096)).filter(|divisor| size.is_multiple_of(*divisor));
    let mut shown: Vec<String> = all.take(17).map(|divisor| divisor.to_string()).collect();
    if shown.len() > 16 {
        shown[16] = "...".to_owned();
    }
    shown
}

/// One reason why a layout is impossible.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum LayoutProblem {
    /// A size of zero.
    #[error("{parameter} is 0, it must be at least 1")]
    Zero {
        /// Megatron's word.
        parameter: &'static str,
    },
    /// A number that a parallel size does not divide.
    #[error("{0}")]
    Indivisible(Indivisible),
    /// More ranks or stages than can be counted or are sensible.
    #[error("{what} is more than {limit}")]
    TooLarge {
        /// What.
        what: &'static str,
        /// The most.
        limit: usize,
    },
    /// Virtual stages on a single pipeline rank.
    #[error(
        "virtual_pipeline_model_parallel_size is {vpp_size}, but pipeline_model_parallel_size is 1: it should be greater than 1 with the interleaved schedule"
    )]
    VirtualWithoutPipeline {
        /// Virtual stages a rank.
        vpp_size: usize,
    },
    /// Expert sizes for a model without experts.
    #[error("{parameter} is {size}, but the model has no experts; leave it at 1")]
    NoExperts {
        /// Megatron's word.
        parameter: &'static str,
        /// Its value.
        size: usize,
    },
    /// Two ways of splitting at once.
    #[error("{first} cannot be set together with {second}; choose one way to split the pipeline")]
    Conflict {
        /// One option.
        first: &'static str,
        /// The other.
        second: &'static str,
    },
    /// More layers at the ends than the model has, or too few pipeline ranks for both ends.
    #[error(
        "{parameters}: {layers} layers on {ends} pipeline ranks do not fit num_layers {num_layers} and pipeline_model_parallel_size {pp_size}"
    )]
    Ends {
        /// The options that were set.
        parameters: &'static str,
        /// Layers that they ask for.
        layers: usize,
        /// Ranks that they name.
        ends: usize,
        /// Decoder layers of the model.
        num_layers: usize,
        /// Pipeline ranks.
        pp_size: usize,
    },
    /// Layers without ranks between the ends, or ranks without layers.
    #[error(
        "{middle_layers} layers remain for {middle_stages} pipeline ranks between the first and the last stage; change num_layers_in_first_pipeline_stage, num_layers_in_last_pipeline_stage or pipeline_model_parallel_size"
    )]
    Middle {
        /// Layers that are left.
        middle_layers: usize,
        /// Ranks that are left.
        middle_stages: usize,
    },
    /// The layout string does not fit.
    #[error(transparent)]
    PipelineLayout(#[from] PipelineLayoutError),
    /// A rank that does not exist.
    #[error("{what} {rank} does not exist, there are {size}, numbered from 0")]
    Rank {
        /// The kind of rank.
        what: &'static str,
        /// Its number.
        rank: usize,
        /// How many there are.
        size: usize,
    },
    /// Coordinates that no rank has at once.
    #[error(
        "no rank has tp_rank {tp_rank}, ep_rank {ep_rank} and etp_rank {etp_rank} at once: ranks count tp_rank = rank % {tp_size}, etp_rank = rank % {etp_size}, ep_rank = rank / {etp_size} % {ep_size}"
    )]
    NoSuchRank {
        /// Rank among the tensor-parallel ranks.
        tp_rank: usize,
        /// Rank among the expert-parallel ranks.
        ep_rank: usize,
        /// Rank among the expert-tensor-parallel ranks.
        etp_rank: usize,
        /// Tensor-parallel size.
        tp_size: usize,
        /// Expert-parallel size.
        ep_size: usize,
        /// Expert-tensor-parallel size.
        etp_size: usize,
    },
    /// A vocabulary that is padded to nothing.
    #[error(
        "vocab_size {vocab_size} cannot be padded to a multiple of make_vocab_size_divisible_by {divisor} x TP {tp_size}"
    )]
    Vocabulary {
        /// Rows.
        vocab_size: usize,
        /// `make_vocab_size_divisible_by`.
        divisor: usize,
        /// Tensor-parallel size.
        tp_size: usize,
    },
}

fn join(problems: &[LayoutProblem]) -> String {
    let mut parts: Vec<String> = problems.iter().take(10).map(ToString::to_string).collect();
    let more = problems.len().saturating_sub(10);
    if more > 0 {
        parts.push(format!("and {more} more"));
    }
    parts.join("; ")
}
