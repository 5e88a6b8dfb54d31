//! The executor.

use std::ops::Range;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use rayon::prelude::*;

use super::ConvertError;
use super::element::Rounding;
use super::values::{BLOCK_BYTES, Values};
use crate::checkpoint::{CheckpointError, TensorInfo, TensorSink, TensorSource};
use crate::mapping::Transform;
use crate::plan::{Copy, ModelPlan, TensorPlan};

/// Whether a plan's arithmetic is carried out.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Transforms {
    /// As planned: weights.
    #[default]
    Apply,
    /// Only the copies (and casts): gradients and optimizer states.
    LayoutOnly,
}

/// What happens to infinities and NaN.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum NonFinite {
    /// An error that names the first one.
    #[default]
    Refuse,
    /// They are carried like any other value.
    Allow,
}

/// How a plan is carried out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExecuteOptions {
    /// The plan's arithmetic.
    pub transforms: Transforms,
    /// Infinities and NaN.
    pub non_finite: NonFinite,
    /// Threads; 0: as many as rayon sees fit.
    pub threads: usize,
    /// Bytes that one thread holds of a target at a time.
    pub buffer_bytes: usize,
}

impl Default for ExecuteOptions {
    fn default() -> Self {
        Self {
            transforms: Transforms::Apply,
            non_finite: NonFinite::Refuse,
            threads: 0,
            // Small enough to stay in a core's cache between reading and writing.
            buffer_bytes: 512 << 10,
        }
    }
}

/// A target some of whose values do not come back exactly when the plan is inverted.
#[derive(Debug, Clone, PartialEq)]
pub struct Rounded {
    /// The target.
    pub name: String,
    /// How many of its values.
    pub elements: usize,
    /// The largest distance between a value and what comes back.
    pub max_error: f64,
}

/// What a conversion did.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Report {
    /// Targets written.
    pub tensors: usize,
    /// Bytes written.
    pub bytes: u64,
    /// Targets that rounded, by name.
    pub rounded: Vec<Rounded>,
    /// Time it took.
    pub elapsed: Duration,
}

/// Carries out `plan`: reads `source`, writes every target to `sink` in full, each byte once.
///
/// A source may offer another dtype than the one in the plan; its values are cast. Shapes must be the plan's.
/// Everything is checked before the first byte moves. Arithmetic runs in the wider of the source's and the target's
/// dtype, then the result is cast; values without arithmetic or cast are moved as bytes.
/// The result does not depend on the number of threads.
///
/// # Errors
/// [`ConvertError`]; what was written by then is incomplete.
pub fn execute(
    plan: &ModelPlan,
    source: &dyn TensorSource,
    sink: &dyn TensorSink,
    options: &ExecuteOptions,
) -> Result<Report, ConvertError> {
    let started = Instant::now();
    plan.validate()?;
    let tensors: Vec<&TensorPlan> = plan.tensors.iter().collect();
    let run = || carry_out(&tensors, source, sink, options);
    let rounded = in_pool(options.threads, run)?;
    Ok(Report {
        tensors: plan.tensors.len(),
        bytes: plan.num_bytes(),
        rounded,
        elapsed: started.elapsed(),
    })
}

/// Runs `work` on so many threads; 0: on those that are there.
pub(super) fn in_pool<T: Send>(
    threads: usize,
    work: impl FnOnce() -> Result<T, ConvertError> + Send,
) -> Result<T, ConvertError> {
    match threads {
        0 => work(),
        threads => rayon::ThreadPoolBuilder::new()
            .num_threads(threads)
            .build()
            .map_err(|source| ConvertError::Threads { threads, source })?
            .install(work),
    }
}

/// Carries out plans that were validated, and gives the targets that rounded.
pub(super) fn carry_out(
    tensors: &[&TensorPlan],
    source: &dyn TensorSource,
    sink: &dyn TensorSink,
    options: &ExecuteOptions,
) -> Result<Vec<Rounded>, ConvertError> {
    let jobs = tensors
        .iter()
        .map(|tensor| Job::new(tensor, source, options))
        .collect::<Result<Vec<_>, _>>()?;
    let pieces: Vec<(&Job<'_>, Range<usize>)> = jobs
        .iter()
        .flat_map(|job| {
            job.pieces(options.buffer_bytes)
                .map(move |piece| (job, piece))
        })
        .collect();
    let pool = Buffers::default();
    let roundings = pieces
        .par_iter()
        .map(|(job, piece)| {
            let mut buffers = pool.take();
            let rounding = job.run(piece.clone(), source, sink, options, &mut buffers)?;
            pool.give(buffers);
            Ok(rounding)
        })
        .collect::<Result<Vec<Rounding>, ConvertError>>()?;
    let mut rounded: Vec<Rounded> = Vec::new();
    for ((job, _), rounding) in pieces.iter().zip(roundings) {
        if rounding.elements == 0 {
            continue;
        }
        match rounded.last_mut() {
            Some(last) if last.name == job.tensor.name => {
                last.elements += rounding.elements;
                last.max_error = last.max_error.max(rounding.max_error);
            }
            _ => rounded.push(Rounded {
                name: job.tensor.name.clone(),
                elements: rounding.elements,
                max_error: rounding.max_error,
            }),
        }
    }
    Ok(rounded)
}

/// Buffers that pieces take and give back: fresh memory would cost a page fault every 4 KiB.
#[derive(Debug, Default)]
pub(super) struct Buffers(Mutex<Vec<Pair>>);

/// What a piece becomes, and what is read where that is something else.
#[derive(Debug, Default)]
pub(super) struct Pair {
    pub(super) target: Vec<u8>,
    pub(super) scratch: Vec<u8>,
}

impl Buffers {
    pub(super) fn take(&self) -> Pair {
        self.lock().pop().unwrap_or_default()
    }

    pub(super) fn give(&self, pair: Pair) {
        self.lock().push(pair);
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Vec<Pair>> {
        self.0
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

/// Copies whole tensors byte for byte, under their own names.
///
/// # Errors
/// [`ConvertError`] when the source lacks one, or reading or writing fails.
pub fn copy_tensors<S: AsRef<str> + Sync>(
    names: &[S],
    source: &dyn TensorSource,
    sink: &dyn TensorSink,
    options: &ExecuteOptions,
) -> Result<u64, ConvertError> {
    let step = options.buffer_bytes.max(1) as u64;
    let mut pieces: Vec<(&str, u64, u64)> = Vec::new();
    for name in names {
        let name = name.as_ref();
        let info = source.info(name).ok_or_else(|| ConvertError::Missing {
            target: name.to_owned(),
            source_name: name.to_owned(),
        })?;
        let total = info.num_bytes();
        let starts = (0..total.div_ceil(step)).map(|piece| piece * step);
        pieces.extend(starts.map(|start| (name, start, step.min(total - start))));
    }
    let pool = Buffers::default();
    pieces
        .par_iter()
        .try_for_each(|(name, start, len)| -> Result<(), ConvertError> {
            let mut buffers = pool.take();
            let buffer = &mut buffers.target;
            buffer.resize(usize::try_from(*len).unwrap_or(usize::MAX), 0);
            source
                .read(name, *start, buffer)
                .and_then(|()| sink.write(name, *start, buffer))
                .map_err(|source| ConvertError::Checkpoint {
                    target: (*name).to_owned(),
                    source,
                })?;
            pool.give(buffers);
            Ok(())
        })?;
    Ok(pieces.iter().map(|(_, _, len)| len).sum())
}

/// One target and the sources as they are.
#[derive(Debug)]
pub(super) struct Job<'a> {
    pub(super) tensor: &'a TensorPlan,
    sources: Vec<TensorInfo>,
    transforms: &'a [Transform],
}

impl<'a> Job<'a> {
    pub(super) fn new(
        tensor: &'a TensorPlan,
        source: &dyn TensorSource,
        options: &ExecuteOptions,
    ) -> Result<Self, ConvertError> {
        let mut sources = Vec::with_capacity(tensor.sources.len());
        for planned in &tensor.sources {
            let info = source
                .info(&planned.name)
                .ok_or_else(|| ConvertError::Missing {
                    target: tensor.name.clone(),
                    source_name: planned.name.clone(),
                })?;
            if info.shape != planned.shape {
                return Err(ConvertError::Shape {
                    target: tensor.name.clone(),
                    source_name: planned.name.clone(),
                    found: info.shape,
                    expected: planned.shape.clone(),
                });
            }
            if !info.dtype.is_float() {
                return Err(ConvertError::Dtype {
                    name: planned.name.clone(),
                    dtype: info.dtype,
                });
            }
            sources.push(info);
        }
        if !tensor.dtype.is_float() {
            return Err(ConvertError::Dtype {
                name: tensor.name.clone(),
                dtype: tensor.dtype,
            });
        }
        let transforms = match options.transforms {
            Transforms::Apply => tensor.transforms.as_slice(),
            Transforms::LayoutOnly => &[],
        };
        Ok(Self {
            tensor,
            sources,
            transforms,
        })
    }

    /// The target in pieces of at most `buffer_bytes`.
    fn pieces(&self, buffer_bytes: usize) -> impl Iterator<Item = Range<usize>> + use<> {
        let numel = self.tensor.numel();
        let step = (buffer_bytes / self.tensor.dtype.size_bytes()).max(1);
        (0..numel.div_ceil(step)).map(move |piece| piece * step..numel.min((piece + 1) * step))
    }

    fn run(
        &self,
        piece: Range<usize>,
        source: &dyn TensorSource,
        sink: &dyn TensorSink,
        options: &ExecuteOptions,
        Pair { target, scratch }: &mut Pair,
    ) -> Result<Rounding, ConvertError> {
        let size = self.tensor.dtype.size_bytes();
        target.resize(piece.len() * size, 0);
        let rounding = self.make(piece.clone(), source, options, target, scratch)?;
        let offset = piece.start as u64 * size as u64;
        sink.write(&self.tensor.name, offset, target)
            .map_err(|source| self.failed(source))?;
        Ok(rounding)
    }

    /// Makes the elements `piece` of the target.
    pub(super) fn make(
        &self,
        piece: Range<usize>,
        source: &dyn TensorSource,
        options: &ExecuteOptions,
        target: &mut [u8],
        scratch: &mut Vec<u8>,
    ) -> Result<Rounding, ConvertError> {
        if self.tensor.fill.is_some() {
            // Where no copy writes, the plan says zeros.
            target.fill(0);
        }
        let mut rounding = Rounding::default();
        for copy in &self.tensor.copies {
            let rows = copy.rows_within(&piece);
            if rows.is_empty() {
                continue;
            }
            let values = self.values(copy, source, options)?;
            // Short rows that touch in the source, but not in the target, are read together.
            let together = match copy.source_stride == copy.row_elements {
                true => (BLOCK_BYTES / (copy.row_elements * values.from.size_bytes())).max(1),
                false => 1,
            };
            for first in rows.clone().step_by(together) {
                let group = first..rows.end.min(first + together);
                let part = self.make_rows(copy, group, &piece, &values, target, scratch)?;
                rounding.add(part);
            }
        }
        Ok(rounding)
    }

    /// Makes those elements of some rows of a copy that are in `piece`; several rows touch in the source.
    fn make_rows(
        &self,
        copy: &Copy,
        rows: Range<usize>,
        piece: &Range<usize>,
        values: &Values<'_>,
        target: &mut [u8],
        scratch: &mut Vec<u8>,
    ) -> Result<Rounding, ConvertError> {
        let size = self.tensor.dtype.size_bytes();
        // The elements of a row that are in the piece, and where the first of them is in the source.
        let part = |row: usize| {
            let start = copy.target_start + row * copy.target_stride;
            let from = piece.start.max(start);
            let to = piece.end.min(start + copy.row_elements);
            let source_from = copy.source_start + row * copy.source_stride + from - start;
            (source_from, from - piece.start..to - piece.start)
        };
        let (first, elements) = part(rows.start);
        if rows.len() == 1 {
            let into = &mut target[elements.start * size..elements.end * size];
            return values.make(first, into, scratch);
        }
        let (last, last_elements) = part(rows.end - 1);
        let count = last + last_elements.len() - first;
        values.read(first, count, scratch)?;
        let mut rounding = Rounding::default();
        for row in rows {
            let (source_from, elements) = part(row);
            let from = (source_from - first) * values.from.size_bytes();
            let bytes = &scratch[from..from + elements.len() * values.from.size_bytes()];
            let into = &mut target[elements.start * size..elements.end * size];
            rounding.add(values.convert(bytes, into));
        }
        Ok(rounding)
    }

    fn failed(&self, source: CheckpointError) -> ConvertError {
        ConvertError::Checkpoint {
            target: self.tensor.name.clone(),
            source,
        }
    }

    /// The values of a copy's source.
    fn values<'s>(
        &'s self,
        copy: &Copy,
        source: &'s dyn TensorSource,
        options: &ExecuteOptions,
    ) -> Result<Values<'s>, ConvertError> {
        let name = &self.tensor.sources[copy.source].name;
        Ok(Values {
            target: &self.tensor.name,
            name,
            reader: source.reader(name).map_err(|error| self.failed(error))?,
            from: self.sources[copy.source].dtype,
            to: self.tensor.dtype,
            transforms: self.transforms,
            non_finite: options.non_finite,
        })
    }
}
