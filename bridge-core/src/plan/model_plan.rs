//! The plan of one tensor and of a whole model.

use std::collections::HashMap;

use super::copy::Copy;
use super::error::PlanError;
use crate::Dtype;
use crate::checkpoint::TensorInfo;
use crate::mapping::{Split, Transform};

/// A tensor that a plan reads.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SourceTensor {
    /// Its name.
    pub name: String,
    /// Its dtype when the plan was made; a source may offer another one, values are cast on the way.
    pub dtype: Dtype,
    /// Its shape.
    pub shape: Vec<usize>,
}

/// Whether other ranks hold the same bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Role {
    /// The copy that an export reads.
    Primary,
    /// The same bytes as this parameter of rank 0 of its group.
    ReplicaOf(String),
}

/// What stands in target elements that no copy writes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fill {
    /// Zeros, from this element to the end: rows that pad the vocabulary.
    ZerosFrom(usize),
}

/// One target tensor as copies out of its sources.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorPlan {
    /// The target's name: Megatron's when importing, Hugging Face's when exporting.
    pub name: String,
    /// The target's dtype. A cast to it is the last step.
    pub dtype: Dtype,
    /// The target's shape.
    pub shape: Vec<usize>,
    /// Whether other ranks hold the same bytes.
    pub role: Role,
    /// The dimension that tensor parallelism cuts.
    pub split: Split,
    /// The global number of the expert, for an expert's parameter.
    pub expert: Option<usize>,
    /// What it reads.
    pub sources: Vec<SourceTensor>,
    /// The copies.
    pub copies: Vec<Copy>,
    /// What stands where no copy writes.
    pub fill: Option<Fill>,
    /// Arithmetic on each value before the cast, in this order.
    pub transforms: Vec<Transform>,
}

impl TensorPlan {
    /// `name` with everything that the tensor `source` of this dtype and shape has, cast to `dtype`.
    #[must_use]
    pub fn whole(name: String, dtype: Dtype, source: String, info: TensorInfo) -> Self {
        Self {
            name,
            dtype,
            shape: info.shape.clone(),
            role: Role::Primary,
            split: Split::Replicated,
            expert: None,
            copies: vec![Copy::run(0, 0, 0, info.numel())],
            sources: vec![SourceTensor {
                name: source,
                dtype: info.dtype,
                shape: info.shape,
            }],
            fill: None,
            transforms: Vec::new(),
        }
    }

    /// Elements of the target.
    #[must_use]
    pub fn numel(&self) -> usize {
        self.shape.iter().product()
    }

    /// Bytes of the target.
    #[must_use]
    pub fn num_bytes(&self) -> u64 {
        self.numel() as u64 * self.dtype.size_bytes() as u64
    }
}

/// All tensors of one rank (or, inverted, of one checkpoint).
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ModelPlan {
    /// The tensors.
    pub tensors: Vec<TensorPlan>,
    /// Source tensors that are left out on purpose (an MTP head that is switched off).
    pub left_out: Vec<String>,
}

impl ModelPlan {
    /// The plan of one target.
    #[must_use]
    pub fn tensor(&self, name: &str) -> Option<&TensorPlan> {
        self.tensors.iter().find(|tensor| tensor.name == name)
    }

    /// Names, dtypes and shapes of all targets, in the plan's order.
    #[must_use]
    pub fn targets(&self) -> Vec<(String, TensorInfo)> {
        let target = |tensor: &TensorPlan| {
            let (dtype, shape) = (tensor.dtype, tensor.shape.clone());
            (tensor.name.clone(), TensorInfo { dtype, shape })
        };
        self.tensors.iter().map(target).collect()
    }

    /// Bytes of all targets.
    #[must_use]
    pub fn num_bytes(&self) -> u64 {
        self.tensors.iter().map(TensorPlan::num_bytes).sum()
    }

    /// The same copies the other way: one [`TensorPlan`] a source tensor, in the order in which sources appear.
    ///
    /// Each target has the dtype that its tensor had as a source. The inverse of an inverse is the plan itself, up to
    /// order (property test `inverting_twice_gives_the_same_copies`).
    #[must_use]
    pub fn inverted(&self) -> ModelPlan {
        let mut tensors: Vec<TensorPlan> = Vec::new();
        let mut at: HashMap<&str, usize> = HashMap::new();
        for plan in &self.tensors {
            let mut inverse_of = Vec::with_capacity(plan.sources.len());
            for source in &plan.sources {
                let index = *at.entry(&source.name).or_insert_with(|| {
                    tensors.push(TensorPlan {
                        name: source.name.clone(),
                        dtype: source.dtype,
                        shape: source.shape.clone(),
                        role: Role::Primary,
                        split: Split::Replicated,
                        expert: None,
                        sources: Vec::new(),
                        copies: Vec::new(),
                        fill: None,
                        transforms: inverse(&plan.transforms),
                    });
                    tensors.len() - 1
                });
                tensors[index].sources.push(SourceTensor {
                    name: plan.name.clone(),
                    dtype: plan.dtype,
                    shape: plan.shape.clone(),
                });
                inverse_of.push((index, tensors[index].sources.len() - 1));
            }
            for copy in &plan.copies {
                let (index, source) = inverse_of[copy.source];
                tensors[index].copies.push(copy.inverted(source));
            }
        }
        for tensor in &mut tensors {
            tensor.copies.sort_by_key(|copy| copy.target_start);
        }
        ModelPlan {
            tensors,
            left_out: Vec::new(),
        }
    }

    /// The plan with every target in `dtype`.
    #[must_use]
    pub fn with_dtype(mut self, dtype: Dtype) -> ModelPlan {
        for tensor in &mut self.tensors {
            tensor.dtype = dtype;
        }
        self
    }

    /// The plan of the targets that `keep` answers true for.
    #[must_use]
    pub fn only(mut self, keep: impl Fn(&TensorPlan) -> bool) -> ModelPlan {
        self.tensors.retain(|tensor| keep(tensor));
        self
    }

    /// Checks conservation on the target side: bounds, and every target element written exactly once.
    ///
    /// # Errors
    /// The first violation, by name.
    pub fn validate(&self) -> Result<(), PlanError> {
        super::coverage::targets(self)
    }

    /// Checks conservation on both sides: as [`ModelPlan::validate`], and every source element is read exactly once.
    /// Holds for plans of a whole model on one rank.
    ///
    /// # Errors
    /// The first violation, by name.
    pub fn validate_whole_model(&self) -> Result<(), PlanError> {
        super::coverage::targets(self)?;
        super::coverage::sources(self)
    }
}

fn inverse(transforms: &[Transform]) -> Vec<Transform> {
    transforms.iter().rev().map(|one| one.inverse()).collect()
}
