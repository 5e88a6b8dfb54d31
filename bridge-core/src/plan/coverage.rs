//! Conservation: arithmetic on the list of copies.

use std::collections::{HashMap, HashSet};
use std::ops::Range;

use super::error::PlanError;
use super::model_plan::{Fill, ModelPlan, TensorPlan};

/// Every target element of every tensor is written exactly once, and no copy leaves its tensors.
pub(super) fn targets(plan: &ModelPlan) -> Result<(), PlanError> {
    let mut names = HashSet::with_capacity(plan.tensors.len());
    for tensor in &plan.tensors {
        if !names.insert(tensor.name.as_str()) {
            return Err(PlanError::Duplicate {
                name: tensor.name.clone(),
            });
        }
        check_target(tensor)?;
    }
    Ok(())
}

fn check_target(tensor: &TensorPlan) -> Result<(), PlanError> {
    let numel = checked_numel(&tensor.name, &tensor.shape)?;
    for copy in &tensor.copies {
        let source = &tensor.sources[copy.source];
        let source_numel = checked_numel(&source.name, &source.shape)?;
        let ends = [
            (copy.source_start, copy.source_stride, source_numel, true),
            (copy.target_start, copy.target_stride, numel, false),
        ];
        for (start, stride, numel, is_source) in ends {
            let end = copy
                .rows
                .saturating_sub(1)
                .checked_mul(stride)
                .and_then(|last| last.checked_add(start)?.checked_add(copy.row_elements));
            if end.is_none_or(|end| end > numel) {
                return Err(PlanError::OutOfBounds {
                    name: tensor.name.clone(),
                    side: if is_source {
                        format!("its source `{}`", source.name)
                    } else {
                        "the target".to_owned()
                    },
                    end: end.unwrap_or(usize::MAX),
                    numel,
                });
            }
        }
    }
    let written = tensor
        .copies
        .iter()
        .flat_map(super::Copy::target_runs)
        .collect();
    let end = match tensor.fill {
        Some(Fill::ZerosFrom(start)) => start,
        None => numel,
    };
    partition(written, end).map_err(|fault| match fault {
        Fault::Gap(gap) => PlanError::Gap {
            name: tensor.name.clone(),
            start: gap.start,
            end: gap.end,
        },
        Fault::Twice(start) => PlanError::Overlap {
            name: tensor.name.clone(),
            start,
        },
    })
}

/// Every source element is read exactly once over the whole plan.
pub(super) fn sources(plan: &ModelPlan) -> Result<(), PlanError> {
    let mut read: HashMap<&str, (usize, Vec<Range<usize>>)> = HashMap::new();
    for tensor in &plan.tensors {
        for (index, source) in tensor.sources.iter().enumerate() {
            let numel = checked_numel(&source.name, &source.shape)?;
            let (_, runs) = read
                .entry(&source.name)
                .or_insert_with(|| (numel, Vec::new()));
            for copy in tensor.copies.iter().filter(|copy| copy.source == index) {
                runs.extend(copy.source_runs());
            }
        }
    }
    let mut read: Vec<_> = read.into_iter().collect();
    read.sort_by_key(|(name, _)| *name);
    for (name, (numel, runs)) in read {
        partition(runs, numel).map_err(|fault| match fault {
            Fault::Gap(gap) => PlanError::Unread {
                name: name.to_owned(),
                start: gap.start,
                end: gap.end,
            },
            Fault::Twice(start) => PlanError::ReadTwice {
                name: name.to_owned(),
                start,
            },
        })?;
    }
    Ok(())
}

enum Fault {
    Gap(Range<usize>),
    Twice(usize),
}

/// Whether `runs` cover `0..end` exactly once.
fn partition(mut runs: Vec<Range<usize>>, end: usize) -> Result<(), Fault> {
    runs.retain(|run| !run.is_empty());
    runs.sort_by_key(|run| run.start);
    let mut next = 0;
    for run in runs {
        if run.start > next {
            return Err(Fault::Gap(next..run.start));
        }
        if run.start < next {
            return Err(Fault::Twice(run.start));
        }
        next = run.end;
    }
    match next.cmp(&end) {
        std::cmp::Ordering::Less => Err(Fault::Gap(next..end)),
        std::cmp::Ordering::Greater => Err(Fault::Twice(end)),
        std::cmp::Ordering::Equal => Ok(()),
    }
}

/// Elements of a shape.
pub(super) fn checked_numel(name: &str, shape: &[usize]) -> Result<usize, PlanError> {
    shape
        .iter()
        .try_fold(1usize, |numel, dim| numel.checked_mul(*dim))
        // Bytes of eight an element must be countable too.
        .filter(|numel| *numel <= usize::MAX / 16)
        .ok_or_else(|| PlanError::TooLarge {
            name: name.to_owned(),
            shape: shape.to_vec(),
        })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Dtype;
    use crate::mapping::Split;
    use crate::plan::{Copy, Role, SourceTensor};

    fn plan(copies: Vec<Copy>) -> ModelPlan {
        ModelPlan {
            tensors: vec![TensorPlan {
                name: "target".into(),
                dtype: Dtype::F32,
                shape: vec![8],
                role: Role::Primary,
                split: Split::Replicated,
                expert: None,
                sources: vec![SourceTensor {
                    name: "source".into(),
                    dtype: Dtype::F32,
                    shape: vec![8],
                }],
                copies,
                fill: None,
                transforms: Vec::new(),
            }],
            left_out: Vec::new(),
        }
    }

    #[test]
    fn a_gap_an_overlap_and_a_lost_source_are_named() {
        assert!(
            plan(vec![Copy::run(0, 0, 0, 8)])
                .validate_whole_model()
                .is_ok()
        );
        let gap = plan(vec![Copy::run(0, 0, 0, 7)]).validate().unwrap_err();
        assert!(
            matches!(
                gap,
                PlanError::Gap {
                    start: 7,
                    end: 8,
                    ..
                }
            ),
            "{gap}"
        );
        let twice = plan(vec![Copy::run(0, 0, 0, 8), Copy::run(0, 0, 4, 2)])
            .validate()
            .unwrap_err();
        assert!(
            matches!(twice, PlanError::Overlap { start: 4, .. }),
            "{twice}"
        );
        let lost = plan(vec![Copy::run(0, 0, 0, 4), Copy::run(0, 0, 4, 4)])
            .validate_whole_model()
            .unwrap_err();
        assert!(matches!(lost, PlanError::ReadTwice { .. }), "{lost}");
        let outside = plan(vec![Copy::run(0, 4, 0, 8)]).validate().unwrap_err();
        assert!(
            matches!(outside, PlanError::OutOfBounds { end: 12, .. }),
            "{outside}"
        );
    }
}
