//! The executor for memory: targets are filled where they stand, without a buffer in between.

use std::ops::{ControlFlow, Range};

use rayon::prelude::*;

use super::element::Rounding;
use super::execute::{Buffers, Job, in_pool};
use super::{ConvertError, ExecuteOptions};
use crate::checkpoint::TensorSource;
use crate::plan::TensorPlan;

/// Memory that elements of a planned tensor are to stand in.
#[derive(Debug)]
pub struct Target<'a> {
    /// How the tensor is made; the memory is in its dtype.
    pub tensor: &'a TensorPlan,
    /// The first of its elements that is wanted.
    pub first: usize,
    /// The elements from there on, in pieces of memory that follow each other; each holds whole elements.
    pub pieces: Vec<&'a mut [u8]>,
}

/// What was filled.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Filled {
    /// Bytes that were written.
    pub bytes: u64,
    /// Targets some of whose values would not come back exactly.
    pub rounded: usize,
}

/// Fills every target, and tells `watch` the bytes of each piece of work; when that breaks off, so does the work.
///
/// Values are made as by [`super::execute`]; where they are moved as bytes, the source reads straight into the target.
/// With one thread everything happens in the calling one.
///
/// # Errors
/// [`ConvertError`]; what the targets hold is undefined then. [`ConvertError::Stopped`] when `watch` broke off.
pub fn fill(
    targets: Vec<Target<'_>>,
    source: &dyn TensorSource,
    options: &ExecuteOptions,
    watch: &(dyn Fn(u64) -> ControlFlow<()> + Sync),
) -> Result<Filled, ConvertError> {
    let count = targets.len();
    let mut tasks = Vec::new();
    for (number, target) in targets.into_iter().enumerate() {
        let job = Job::new(target.tensor, source, options)?;
        tasks.extend(tasks_of(target, options.buffer_bytes, number, job)?);
    }
    let pool = Buffers::default();
    let run = |task: Task<'_>| -> Result<(usize, u64, bool), ConvertError> {
        let mut buffers = pool.take();
        let (number, done) = (
            task.number,
            task.run(source, options, &mut buffers.scratch)?,
        );
        pool.give(buffers);
        let (bytes, rounding) = done;
        match watch(bytes) {
            ControlFlow::Continue(()) => Ok((number, bytes, rounding.elements > 0)),
            ControlFlow::Break(()) => Err(ConvertError::Stopped),
        }
    };
    let done: Vec<(usize, u64, bool)> = if options.threads == 1 {
        tasks.into_iter().map(run).collect::<Result<_, _>>()?
    } else {
        in_pool(options.threads, || tasks.into_par_iter().map(run).collect())?
    };
    let mut rounded = vec![false; count];
    for (number, _, inexact) in &done {
        rounded[*number] |= inexact;
    }
    Ok(Filled {
        bytes: done.iter().map(|(_, bytes, _)| bytes).sum(),
        rounded: rounded.into_iter().filter(|one| *one).count(),
    })
}

/// What one thread does in a row: neighbouring pieces of a target, of about a buffer in all.
struct Task<'a> {
    number: usize,
    job: std::sync::Arc<Job<'a>>,
    first: usize,
    pieces: Vec<&'a mut [u8]>,
}

/// Long pieces are cut, short ones put together.
fn tasks_of<'a>(
    target: Target<'a>,
    buffer_bytes: usize,
    number: usize,
    job: Job<'a>,
) -> Result<Vec<Task<'a>>, ConvertError> {
    let size = target.tensor.dtype.size_bytes();
    let step = (buffer_bytes / size).max(1) * size;
    let job = std::sync::Arc::new(job);
    let task = |first, pieces| Task {
        number,
        job: std::sync::Arc::clone(&job),
        first,
        pieces,
    };
    let mut tasks = Vec::new();
    let (mut first, mut held, mut pieces) = (target.first, 0, Vec::new());
    for piece in target.pieces {
        for part in piece.chunks_mut(step) {
            held += part.len();
            pieces.push(part);
            if held >= step {
                tasks.push(task(first, std::mem::take(&mut pieces)));
                first += held / size;
                held = 0;
            }
        }
    }
    if held > 0 {
        tasks.push(task(first, pieces));
        first += held / size;
    }
    if first > target.tensor.numel() {
        return Err(ConvertError::Outside {
            name: target.tensor.name.clone(),
            end: first,
            numel: target.tensor.numel(),
        });
    }
    Ok(tasks)
}

impl Task<'_> {
    fn run(
        self,
        source: &dyn TensorSource,
        options: &ExecuteOptions,
        scratch: &mut Vec<u8>,
    ) -> Result<(u64, Rounding), ConvertError> {
        let size = self.job.tensor.dtype.size_bytes();
        let (mut at, mut bytes, mut rounding) = (self.first, 0, Rounding::default());
        for piece in self.pieces {
            let elements: Range<usize> = at..at + piece.len() / size;
            at = elements.end;
            bytes += piece.len() as u64;
            rounding.add(self.job.make(elements, source, options, piece, scratch)?);
        }
        Ok((bytes, rounding))
    }
}

#[cfg(test)]
mod tests {
    use super::super::{NonFinite, execute};
    use super::*;
    use crate::Dtype;
    use crate::checkpoint::{MemoryTensors, TensorInfo};
    use crate::mapping::{Split, Transform};
    use crate::plan::{Copy, Fill, ModelPlan, Role, SourceTensor};

    /// Two sources of 6 and 4 values, interleaved in threes and twos, two values of padding behind them.
    fn plan(dtype: Dtype, transforms: Vec<Transform>) -> (ModelPlan, MemoryTensors) {
        let mut source = MemoryTensors::default();
        let mut sources = Vec::new();
        for (name, count) in [("a", 6usize), ("b", 4)] {
            let values = (0..count).flat_map(|i| (i as f32 * 1.37 - 2.0).to_le_bytes());
            let info = TensorInfo {
                dtype: Dtype::F32,
                shape: vec![count],
            };
            source.insert_bytes(name, info.clone(), values.collect());
            sources.push(SourceTensor {
                name: name.to_owned(),
                dtype: info.dtype,
                shape: info.shape,
            });
        }
        let copy = |source, target_start, row_elements| Copy {
            source,
            source_start: 0,
            source_stride: row_elements,
            target_start,
            target_stride: 5,
            row_elements,
            rows: 2,
        };
        let tensor = TensorPlan {
            name: "fused".to_owned(),
            dtype,
            shape: vec![12],
            role: Role::Primary,
            split: Split::Replicated,
            expert: None,
            sources,
            copies: vec![copy(0, 0, 3), copy(1, 3, 2)],
            fill: Some(Fill::ZerosFrom(10)),
            transforms,
        };
        let plan = ModelPlan {
            tensors: vec![tensor],
            left_out: Vec::new(),
        };
        (plan, source)
    }

    /// The bytes that the other executor makes.
    fn expected(plan: &ModelPlan, source: &MemoryTensors) -> Vec<u8> {
        let mut sink = MemoryTensors::default();
        let (dtype, shape) = (plan.tensors[0].dtype, plan.tensors[0].shape.clone());
        sink.insert("fused", TensorInfo { dtype, shape });
        execute(plan, source, &sink, &ExecuteOptions::default()).unwrap();
        sink.bytes("fused").unwrap()
    }

    fn go_on(_: u64) -> ControlFlow<()> {
        ControlFlow::Continue(())
    }

    #[test]
    fn memory_in_any_pieces_gets_what_files_get() {
        for dtype in [Dtype::F32, Dtype::Bf16, Dtype::F64] {
            for transforms in [vec![], vec![Transform::MinusOne]] {
                let (plan, source) = plan(dtype, transforms);
                let wanted = expected(&plan, &source);
                let size = dtype.size_bytes();
                for (first, count, piece, threads) in [
                    (0, 12, 12, 1),
                    (0, 12, 5, 2),
                    (3, 7, 2, 1),
                    (9, 3, 1, 3),
                    (12, 0, 1, 1),
                ] {
                    let mut memory = vec![0xaa; count * size];
                    let options = ExecuteOptions {
                        buffer_bytes: 4 * size,
                        threads,
                        ..ExecuteOptions::default()
                    };
                    let target = Target {
                        tensor: &plan.tensors[0],
                        first,
                        pieces: memory.chunks_mut(piece * size).collect(),
                    };
                    let filled = fill(vec![target], &source, &options, &go_on).unwrap();
                    assert_eq!(filled.bytes, (count * size) as u64);
                    assert_eq!(memory, wanted[first * size..(first + count) * size]);
                }
            }
        }
    }

    /// Rows that touch in the source are read together, and spread.
    #[test]
    fn rows_that_touch_in_the_source_stand_where_the_plan_says() {
        let (plan, source) = plan(Dtype::F32, vec![]);
        let value = |i: usize| (i as f32 * 1.37 - 2.0).to_le_bytes();
        // Elements of `a` and, from 10 on, of `b`.
        let order = [0, 1, 2, 10, 11, 3, 4, 5, 12, 13];
        let mut wanted: Vec<u8> = order.into_iter().flat_map(|i| value(i % 10)).collect();
        wanted.extend([0; 8]);
        assert_eq!(expected(&plan, &source), wanted);
    }

    #[test]
    fn an_infinity_among_rows_that_are_read_together_is_named_by_its_place() {
        for (name, index) in [("a", 4), ("b", 1)] {
            for transforms in [vec![], vec![Transform::MinusOne]] {
                let (plan, mut source) = plan(Dtype::F32, transforms);
                let info = source.info(name).unwrap();
                let mut bytes = source.bytes(name).unwrap();
                bytes[4 * index..][..4].copy_from_slice(&f32::NEG_INFINITY.to_le_bytes());
                source.insert_bytes(name, info, bytes);
                let mut memory = vec![0; 12 * 4];
                let target = Target {
                    tensor: &plan.tensors[0],
                    first: 0,
                    pieces: vec![&mut memory],
                };
                let options = ExecuteOptions::default();
                let error = fill(vec![target], &source, &options, &go_on).unwrap_err();
                let ConvertError::NonFinite {
                    source_name,
                    index: found,
                    value,
                } = &error
                else {
                    panic!("{error}");
                };
                assert_eq!((source_name.as_str(), *found), (name, index), "{error}");
                assert!(value.is_infinite(), "{error}");
            }
        }
    }

    #[test]
    fn more_memory_than_elements_is_refused() {
        let (plan, source) = plan(Dtype::F32, vec![]);
        let mut memory = vec![0; 4 * 4];
        let target = Target {
            tensor: &plan.tensors[0],
            first: 9,
            pieces: vec![&mut memory],
        };
        let error = fill(vec![target], &source, &ExecuteOptions::default(), &go_on).unwrap_err();
        assert_eq!(
            error.to_string(),
            "memory for elements up to 13 of `fused` was given, it has 12"
        );
    }

    #[test]
    fn work_stops_when_it_is_told_to() {
        let (plan, source) = plan(Dtype::F32, vec![]);
        let mut memory = vec![0; 12 * 4];
        let options = ExecuteOptions {
            buffer_bytes: 4,
            threads: 1,
            non_finite: NonFinite::Allow,
            ..ExecuteOptions::default()
        };
        let target = Target {
            tensor: &plan.tensors[0],
            first: 0,
            pieces: vec![&mut memory],
        };
        let calls = std::sync::atomic::AtomicUsize::new(0);
        let stop = |_| match calls.fetch_add(1, std::sync::atomic::Ordering::Relaxed) {
            2 => ControlFlow::Break(()),
            _ => ControlFlow::Continue(()),
        };
        let error = fill(vec![target], &source, &options, &stop).unwrap_err();
        assert!(matches!(error, ConvertError::Stopped), "{error}");
        assert_eq!(calls.into_inner(), 3);
    }
}
