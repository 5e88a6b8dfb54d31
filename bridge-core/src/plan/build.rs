//! From rows to copies: one rank's cut of every parameter.

use std::ops::Range;

use super::copy::{Copy, merge};
use super::coverage::checked_numel;
use super::error::PlanError;
use super::model_plan::{Fill, ModelPlan, Role, SourceTensor, TensorPlan};
use crate::Dtype;
use crate::mapping::{Block, Group, Parameter, Registry, Rule, Split};

/// Which part of every parameter a rank holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cut {
    /// Rank among the tensor-parallel ranks.
    pub tp_rank: usize,
    /// Tensor-parallel size.
    pub tp_size: usize,
    /// Rank among the expert-tensor-parallel ranks.
    pub etp_rank: usize,
    /// Expert-tensor-parallel size.
    pub etp_size: usize,
    /// Rank among the expert-parallel ranks; it holds an equal part of the experts, under local numbers.
    pub ep_rank: usize,
    /// Expert-parallel size.
    pub ep_size: usize,
}

impl Default for Cut {
    fn default() -> Self {
        Self {
            tp_rank: 0,
            tp_size: 1,
            etp_rank: 0,
            etp_size: 1,
            ep_rank: 0,
            ep_size: 1,
        }
    }
}

impl Cut {
    fn of(&self, group: Group) -> (usize, usize) {
        match group {
            Group::Tensor => (self.tp_rank, self.tp_size),
            Group::ExpertTensor => (self.etp_rank, self.etp_size),
        }
    }

    fn check(&self) -> Result<(), PlanError> {
        let groups = [
            self.of(Group::Tensor),
            self.of(Group::ExpertTensor),
            (self.ep_rank, self.ep_size),
        ];
        for (rank, size) in groups {
            if rank >= size {
                return Err(PlanError::Rank { rank, size });
            }
        }
        Ok(())
    }
}

/// What a plan should give.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct PlanOptions {
    /// The dtype of every parameter; `None`: each keeps its own (the widest of its sources).
    pub dtype: Option<Dtype>,
    /// Dtypes of single parameters, by the end of the Megatron name; they win over `dtype`, the first match counts.
    pub overrides: Vec<(String, Dtype)>,
    /// Megatron names of experts as with `moe_grouped_gemm` false (`local_experts.{x}.linear_fc1.weight`).
    pub sequential_experts: bool,
    /// Leaves the multi-token-prediction head out.
    pub without_mtp: bool,
    /// Rows of the vocabulary with padding; `None`: no padding.
    pub padded_vocab_size: Option<usize>,
    /// The rank's part.
    pub cut: Cut,
}

impl PlanOptions {
    pub(super) fn dtype_of(&self, name: &str, own: Dtype) -> Dtype {
        self.overrides
            .iter()
            .find(|(suffix, _)| name.ends_with(suffix.as_str()))
            .map(|(_, dtype)| *dtype)
            .or(self.dtype)
            .unwrap_or(own)
    }
}

/// Plans every parameter of `registry`. `dtype_of` gives the dtype of a Hugging Face tensor; shapes come from the rows.
///
/// # Errors
/// [`PlanError`] when a parameter cannot be cut or padded as asked, or breaks conservation.
pub fn build(
    registry: &Registry,
    dtype_of: &dyn Fn(&str) -> Dtype,
    options: &PlanOptions,
) -> Result<ModelPlan, PlanError> {
    options.cut.check()?;
    let mut tensors = Vec::with_capacity(registry.parameters().len());
    for parameter in registry.parameters() {
        if let Some(name) = local_name(parameter, parameter.layer, &options.cut)? {
            tensors.push(build_tensor(parameter, name, dtype_of, options)?);
        }
    }
    let plan = ModelPlan {
        tensors,
        left_out: Vec::new(),
    };
    if options.cut == Cut::default() {
        plan.validate_whole_model()?;
    } else {
        plan.validate()?;
    }
    Ok(plan)
}

/// The name on this rank, with this number of its layer; `None` for another rank's expert.
pub(super) fn local_name(
    parameter: &Parameter,
    layer: Option<usize>,
    rank: &Cut,
) -> Result<Option<String>, PlanError> {
    let name = &parameter.megatron_name;
    let Some(expert) = parameter.expert.filter(|_| rank.ep_size > 1) else {
        return Ok(Some(parameter.pattern.name(layer, parameter.expert)));
    };
    let experts = cut(
        name,
        "experts",
        parameter.num_experts,
        rank.ep_rank,
        rank.ep_size,
    )?;
    let local = experts
        .contains(&expert)
        .then(|| expert - experts.start)
        .map(|local| parameter.pattern.name(layer, Some(local)));
    Ok(local)
}

pub(super) fn build_tensor(
    parameter: &Parameter,
    name: String,
    dtype_of: &dyn Fn(&str) -> Dtype,
    options: &PlanOptions,
) -> Result<TensorPlan, PlanError> {
    let rule = parameter.row.rule;
    let name = &name;
    let sources: Vec<SourceTensor> = parameter
        .sources
        .iter()
        .map(|(name, shape)| SourceTensor {
            name: name.clone(),
            dtype: dtype_of(name),
            shape: shape.clone(),
        })
        .collect();
    for source in &sources {
        checked_numel(&source.name, &source.shape)?;
    }
    checked_numel(name, &parameter.shape)?;

    let skip = usize::from(rule.is_packed());
    let source_rows: Vec<usize> = sources.iter().map(|source| source.shape[skip]).collect();
    let row_elements: usize = sources[0].shape[skip + 1..].iter().product();
    let blocks = rule.blocks(&source_rows, parameter.expert);

    let padded = padded_shape(parameter, options)?;
    let (rank, size) = options.cut.of(parameter.row.group());
    let split = split_of(parameter);
    let copies = match split {
        Split::Replicated => whole(&blocks, row_elements),
        Split::Column => {
            let kept = cut_sections(name, &rule.sections(padded[0]), rank, size)?;
            column(&blocks, row_elements, &kept)
        }
        Split::Row => {
            let columns = cut(name, "columns", row_elements, rank, size)?;
            row(&blocks, row_elements, &columns)
        }
    };
    let shape = local_shape(parameter, options)?;
    let padded_rows = shape[0];
    let filled = copies
        .iter()
        .map(|copy| copy.rows * copy.row_elements)
        .sum::<usize>();
    let fill = (rule == Rule::Vocabulary && filled < padded_rows * row_elements)
        .then_some(Fill::ZerosFrom(filled));
    Ok(TensorPlan {
        name: name.clone(),
        dtype: options.dtype_of(name, own_dtype(parameter, dtype_of)),
        shape,
        role: if split == Split::Replicated && rank > 0 {
            Role::ReplicaOf(name.clone())
        } else {
            Role::Primary
        },
        split: rule.split(),
        expert: parameter.expert,
        sources,
        copies: merge(copies),
        fill,
        transforms: parameter.row.transform.into_iter().collect(),
    })
}

/// The dtype of a parameter for which none is asked: the widest of its sources.
pub(super) fn own_dtype(parameter: &Parameter, dtype_of: &dyn Fn(&str) -> Dtype) -> Dtype {
    let dtypes = parameter.sources.iter().map(|(name, _)| dtype_of(name));
    dtypes
        .reduce(Dtype::widest)
        .expect("every rule has at least one source")
}

/// The full shape, with the rows that pad a vocabulary.
fn padded_shape(parameter: &Parameter, options: &PlanOptions) -> Result<Vec<usize>, PlanError> {
    let mut shape = parameter.shape.clone();
    if let (Rule::Vocabulary, Some(padded)) = (parameter.row.rule, options.padded_vocab_size) {
        if padded < shape[0] {
            return Err(PlanError::Padding {
                name: parameter.megatron_name.clone(),
                rows: shape[0],
                padded,
            });
        }
        shape[0] = padded;
    }
    Ok(shape)
}

/// Biases of row-parallel layers are replicated.
fn split_of(parameter: &Parameter) -> Split {
    match parameter.row.rule.split() {
        Split::Row if parameter.shape.len() == 1 => Split::Replicated,
        split => split,
    }
}

/// The shape of a rank's part, padding included.
pub(super) fn local_shape(
    parameter: &Parameter,
    options: &PlanOptions,
) -> Result<Vec<usize>, PlanError> {
    let name = &parameter.megatron_name;
    let mut shape = padded_shape(parameter, options)?;
    let (rank, size) = options.cut.of(parameter.row.group());
    match split_of(parameter) {
        Split::Replicated => {}
        Split::Column => {
            let sections = parameter.row.rule.sections(shape[0]);
            let kept = cut_sections(name, &sections, rank, size)?;
            shape[0] = kept.iter().map(|(rows, _)| rows.len()).sum();
        }
        Split::Row => {
            let last = shape.len() - 1;
            shape[last] = cut(name, "columns", shape[last], rank, size)?.len();
        }
    }
    Ok(shape)
}

/// Part `rank` of `len` things cut into `size` equal parts.
fn cut(
    name: &str,
    what: &'static str,
    len: usize,
    rank: usize,
    size: usize,
) -> Result<Range<usize>, PlanError> {
    if !len.is_multiple_of(size) {
        return Err(PlanError::Indivisible {
            name: name.to_owned(),
            what,
            len,
            size,
        });
    }
    let part = len / size;
    Ok(rank * part..(rank + 1) * part)
}

/// The rows that a rank keeps of each section, and where they come to stand.
fn cut_sections(
    name: &str,
    sections: &[usize],
    rank: usize,
    size: usize,
) -> Result<Vec<(Range<usize>, usize)>, PlanError> {
    let (mut start, mut target) = (0, 0);
    let mut kept = Vec::with_capacity(sections.len());
    for len in sections {
        let part = cut(name, "rows", *len, rank, size)?;
        let rows = part.len();
        kept.push((start + part.start..start + part.end, target));
        start += len;
        target += rows;
    }
    Ok(kept)
}

fn whole(blocks: &[Block], row_elements: usize) -> Vec<Copy> {
    let copy = |block: &Block| {
        Copy::run(
            block.source,
            block.source_row * row_elements,
            block.target_row * row_elements,
            block.rows * row_elements,
        )
    };
    blocks.iter().map(copy).collect()
}

fn column(blocks: &[Block], row_elements: usize, kept: &[(Range<usize>, usize)]) -> Vec<Copy> {
    let mut copies = Vec::new();
    for (rows, target) in kept {
        for block in blocks {
            let start = rows.start.max(block.target_row);
            let end = rows.end.min(block.target_row + block.rows);
            if start < end {
                copies.push(Copy::run(
                    block.source,
                    (block.source_row + start - block.target_row) * row_elements,
                    (target + start - rows.start) * row_elements,
                    (end - start) * row_elements,
                ));
            }
        }
    }
    copies
}

fn row(blocks: &[Block], row_elements: usize, columns: &Range<usize>) -> Vec<Copy> {
    if columns.len() == row_elements {
        return whole(blocks, row_elements);
    }
    let copy = |block: &Block| Copy {
        source: block.source,
        source_start: block.source_row * row_elements + columns.start,
        source_stride: row_elements,
        target_start: block.target_row * columns.len(),
        target_stride: columns.len(),
        row_elements: columns.len(),
        rows: block.rows,
    };
    blocks.iter().map(copy).collect()
}
