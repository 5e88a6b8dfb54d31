//! A plan carried out backwards for some of its targets: each gives its bytes to the sources that it was planned from.

use std::ops::{ControlFlow, Range};

use rayon::prelude::*;

use super::element::{first_non_finite, load};
use super::execute::in_pool;
use super::fill::Filled;
use super::values::convert_values;
use super::{ConvertError, ExecuteOptions, NonFinite, Transforms};
use crate::Dtype;
use crate::checkpoint::TensorSink;
use crate::mapping::Transform;
use crate::plan::{Copy, TensorPlan};

/// Memory that holds a planned tensor.
#[derive(Debug, Clone)]
pub struct Given<'a> {
    /// How the tensor is made; what is given goes the other way.
    pub tensor: &'a TensorPlan,
    /// The dtype of the memory.
    pub dtype: Dtype,
    /// Bytes of each piece but the last, whole elements.
    pub piece_bytes: usize,
    /// All elements, in pieces of memory that follow each other.
    pub pieces: Vec<&'a [u8]>,
}

/// Writes what is given into ranges of the sources of its plan, in the dtypes that those have there; padding is dropped.
///
/// The counterpart of [`super::execute`] of [`crate::plan::ModelPlan::inverted`] for a part of a model: other ranges of the
/// same sources belong to others. `watch` is told the bytes of each piece of work that is done; when it breaks off, so does
/// the work.
///
/// # Errors
/// [`ConvertError`]; what was written by then is incomplete. [`ConvertError::Stopped`] when `watch` broke off.
pub fn scatter(
    given: &[Given<'_>],
    sink: &dyn TensorSink,
    options: &ExecuteOptions,
    watch: &(dyn Fn(u64) -> ControlFlow<()> + Sync),
) -> Result<Filled, ConvertError> {
    let mut tasks = Vec::new();
    for (number, one) in given.iter().enumerate() {
        if !one.dtype.is_float() {
            return Err(ConvertError::Dtype {
                name: one.tensor.name.clone(),
                dtype: one.dtype,
            });
        }
        let transforms: Vec<Transform> = match options.transforms {
            Transforms::Apply => one
                .tensor
                .transforms
                .iter()
                .rev()
                .map(|t| t.inverse())
                .collect(),
            Transforms::LayoutOnly => Vec::new(),
        };
        let elements = (options.buffer_bytes / one.dtype.size_bytes()).max(1);
        let transforms = std::sync::Arc::new(transforms);
        for copy in &one.tensor.copies {
            for runs in batches(copy, elements) {
                tasks.push(Task {
                    number,
                    given: one,
                    copy,
                    transforms: std::sync::Arc::clone(&transforms),
                    runs,
                });
            }
        }
    }
    let run = |task: &Task<'_>| -> Result<(usize, u64, bool), ConvertError> {
        let (bytes, inexact) = task.run(sink, options)?;
        match watch(bytes) {
            ControlFlow::Continue(()) => Ok((task.number, bytes, inexact)),
            ControlFlow::Break(()) => Err(ConvertError::Stopped),
        }
    };
    let done: Vec<(usize, u64, bool)> = if options.threads == 1 {
        tasks.iter().map(run).collect::<Result<_, _>>()?
    } else {
        in_pool(options.threads, || tasks.par_iter().map(run).collect())?
    };
    let mut rounded = vec![false; given.len()];
    for (number, _, inexact) in &done {
        rounded[*number] |= inexact;
    }
    Ok(Filled {
        bytes: done.iter().map(|(_, bytes, _)| bytes).sum(),
        rounded: rounded.into_iter().filter(|one| *one).count(),
    })
}

/// Elements of a copy, counted run after run, in batches of about `elements`.
fn batches(copy: &Copy, elements: usize) -> impl Iterator<Item = Range<usize>> + use<> {
    let all = copy.rows * copy.row_elements;
    (0..all.div_ceil(elements)).map(move |batch| batch * elements..all.min((batch + 1) * elements))
}

/// A batch of one copy.
struct Task<'a> {
    number: usize,
    given: &'a Given<'a>,
    copy: &'a Copy,
    transforms: std::sync::Arc<Vec<Transform>>,
    runs: Range<usize>,
}

impl Task<'_> {
    fn run(
        &self,
        sink: &dyn TensorSink,
        options: &ExecuteOptions,
    ) -> Result<(u64, bool), ConvertError> {
        let (copy, size) = (self.copy, self.given.dtype.size_bytes());
        let (mut at, mut inexact, mut buffer) = (self.runs.start, false, Vec::new());
        while at < self.runs.end {
            let (row, within) = (at / copy.row_elements, at % copy.row_elements);
            let local = copy.target_start + row * copy.target_stride + within;
            let left = (copy.row_elements - within).min(self.runs.end - at);
            let values = self.given.slice(local, left)?;
            let source = copy.source_start + row * copy.source_stride + within;
            inexact |= self.put(source, local, values, &mut buffer, sink, options)?;
            at += values.len() / size;
        }
        Ok(((self.runs.len() * size) as u64, inexact))
    }

    /// Writes `values`, which begin at element `local` of the tensor, at element `source` of where they belong.
    fn put(
        &self,
        source: usize,
        local: usize,
        values: &[u8],
        buffer: &mut Vec<u8>,
        sink: &dyn TensorSink,
        options: &ExecuteOptions,
    ) -> Result<bool, ConvertError> {
        let (tensor, from) = (self.given.tensor, self.given.dtype);
        if options.non_finite == NonFinite::Refuse
            && let Some(index) = first_non_finite(from, values)
        {
            return Err(ConvertError::NonFinite {
                source_name: tensor.name.clone(),
                index: local + index,
                value: load(from, values, index),
            });
        }
        let target = &tensor.sources[self.copy.source];
        let to = target.dtype;
        let (bytes, inexact): (&[u8], bool) = if from == to && self.transforms.is_empty() {
            (values, false)
        } else {
            buffer.resize(values.len() / from.size_bytes() * to.size_bytes(), 0);
            let rounding = convert_values((from, to), &self.transforms, values, buffer);
            (buffer, rounding.elements > 0)
        };
        let offset = source as u64 * to.size_bytes() as u64;
        sink.write(&target.name, offset, bytes)
            .map_err(|source| ConvertError::Checkpoint {
                target: target.name.clone(),
                source,
            })?;
        Ok(inexact)
    }
}

impl Given<'_> {
    /// As many of `count` elements from `first` on as stand together in memory; one at least.
    fn slice(&self, first: usize, count: usize) -> Result<&[u8], ConvertError> {
        let size = self.dtype.size_bytes();
        let (start, bytes) = (first * size, count * size);
        let piece = start.checked_div(self.piece_bytes).unwrap_or(0);
        let within = start - piece * self.piece_bytes;
        let found = self
            .pieces
            .get(piece)
            .and_then(|piece| piece.get(within..piece.len().min(within + bytes)));
        found
            .filter(|found| !found.is_empty())
            .ok_or_else(|| ConvertError::Outside {
                name: self.tensor.name.clone(),
                end: first + count,
                numel: self.pieces.iter().map(|piece| piece.len()).sum::<usize>() / size,
            })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpoint::{MemoryTensors, TensorInfo};
    use crate::mapping::Split;
    use crate::plan::{Fill, Role, SourceTensor};

    /// Rows of two sources of 4 x 2 take turns; two elements of padding stand behind.
    fn interleaved(dtype: Dtype, transforms: Vec<Transform>) -> TensorPlan {
        let source = |name: &str| SourceTensor {
            name: name.to_owned(),
            dtype,
            shape: vec![4, 2],
        };
        let copy = |source, target_start| Copy {
            source,
            source_start: 0,
            source_stride: 2,
            target_start,
            target_stride: 4,
            row_elements: 2,
            rows: 4,
        };
        TensorPlan {
            name: "fused".to_owned(),
            dtype,
            shape: vec![9, 2],
            role: Role::Primary,
            split: Split::Replicated,
            expert: None,
            sources: vec![source("a"), source("b")],
            copies: vec![copy(0, 0), copy(1, 2)],
            fill: Some(Fill::ZerosFrom(16)),
            transforms,
        }
    }

    fn f32s(values: impl IntoIterator<Item = f32>) -> Vec<u8> {
        values.into_iter().flat_map(f32::to_le_bytes).collect()
    }

    #[test]
    fn what_a_plan_put_together_is_taken_apart_again() {
        for (transforms, add) in [(vec![], 0.0), (vec![Transform::MinusOne], 1.0)] {
            let tensor = interleaved(Dtype::F32, transforms);
            let memory = f32s((0..18).map(|i| i as f32));
            for (piece, buffer, threads) in [(18, 100, 1), (2, 100, 2), (5, 3, 1), (1, 1, 2)] {
                let mut sink = MemoryTensors::default();
                for source in &tensor.sources {
                    let (dtype, shape) = (source.dtype, source.shape.clone());
                    sink.insert(&source.name, TensorInfo { dtype, shape });
                }
                let given = Given {
                    tensor: &tensor,
                    dtype: Dtype::F32,
                    piece_bytes: piece * 4,
                    pieces: memory.chunks(piece * 4).collect(),
                };
                let options = ExecuteOptions {
                    buffer_bytes: buffer * 4,
                    threads,
                    ..ExecuteOptions::default()
                };
                let watch = |_| ControlFlow::Continue(());
                let done = scatter(&[given], &sink, &options, &watch).unwrap();
                assert_eq!(done.bytes, 16 * 4);
                let rows = |first: usize| {
                    let rows = (0..4).map(move |row| (first + 4 * row) as f32 + add);
                    f32s(rows.flat_map(|value| [value, value + 1.0]))
                };
                assert_eq!(sink.bytes("a").unwrap(), rows(0));
                assert_eq!(sink.bytes("b").unwrap(), rows(2));
            }
        }
    }

    #[test]
    fn a_value_that_is_no_number_is_named_by_its_place_in_what_was_given() {
        let tensor = interleaved(Dtype::F32, vec![]);
        let mut memory = f32s((0..18).map(|i| i as f32));
        memory[7 * 4..8 * 4].copy_from_slice(&f32::NAN.to_le_bytes());
        let mut sink = MemoryTensors::default();
        for source in &tensor.sources {
            let (dtype, shape) = (source.dtype, source.shape.clone());
            sink.insert(&source.name, TensorInfo { dtype, shape });
        }
        let given = Given {
            tensor: &tensor,
            dtype: Dtype::F32,
            piece_bytes: memory.len(),
            pieces: vec![&memory],
        };
        let watch = |_| ControlFlow::Continue(());
        let error = scatter(&[given], &sink, &ExecuteOptions::default(), &watch).unwrap_err();
        let error = error.to_string();
        assert!(error.starts_with("element 7 of `fused` is NaN"), "{error}");
    }
}
