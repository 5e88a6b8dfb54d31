//! What a plan gives, compared with what another side holds.

use std::collections::HashMap;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use super::difference::{Difference, Element, Side, index_of};
use super::element::cast_any;
use super::execute::{Buffers, carry_out, in_pool};
use super::{ConvertError, ExecuteOptions, NonFinite, copy_tensors};
use crate::Dtype;
use crate::checkpoint::{CheckpointError, TensorInfo, TensorSink, TensorSource};
use crate::plan::{Fill, ModelPlan, SourceTensor, TensorPlan};

/// Whether rows that pad the vocabulary are compared.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Padding {
    /// They must be zeros, as a plan says.
    #[default]
    Compare,
    /// Nobody reads them: a training job leaves anything there.
    Ignore,
}

/// How two sides are compared.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VerifyOptions {
    /// Both sides are cast to it first and dtypes play no part; `None`: each tensor in the plan's dtype, which the other
    /// side must have.
    pub dtype: Option<Dtype>,
    /// Rows that pad the vocabulary.
    pub padding: Padding,
    /// How the plan is carried out. Infinities and NaN are values like others by default.
    pub execute: ExecuteOptions,
}

impl Default for VerifyOptions {
    fn default() -> Self {
        Self {
            dtype: None,
            padding: Padding::Compare,
            execute: ExecuteOptions {
                non_finite: NonFinite::Allow,
                ..ExecuteOptions::default()
            },
        }
    }
}

/// What a comparison found.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Comparison {
    /// Tensors whose values were compared.
    pub tensors: usize,
    /// Bytes of them, in the dtypes of the comparison.
    pub bytes: u64,
    /// Elements of padding that were left out.
    pub padding: u64,
    /// Everything that differs, by name.
    pub differences: Vec<Difference>,
    /// Time it took.
    pub elapsed: Duration,
}

/// Carries out `plan` from `source` and compares what it gives with the tensors of `other`, bit for bit.
///
/// Where dtypes differ, values are compared in the wider one; that the dtypes differ is a difference by itself. Tensors
/// that only `other` has are not seen here: the caller knows which of them count, see [`Comparison::lacking`].
/// Memory is bounded by threads x buffer size.
///
/// # Errors
/// [`ConvertError`] when the comparison itself fails: the plan is not sound, or a side cannot be read.
pub fn verify(
    plan: &ModelPlan,
    source: &dyn TensorSource,
    other: &dyn TensorSource,
    options: &VerifyOptions,
) -> Result<Comparison, ConvertError> {
    let started = Instant::now();
    plan.validate()?;
    let mut comparison = Comparison::default();
    let mut comparer = Comparer::new(other, options);
    let mut planned = Vec::new();
    for tensor in &plan.tensors {
        let lacks = |one: &&SourceTensor| source.info(&one.name).is_none();
        if let Some(lacking) = tensor.sources.iter().find(lacks) {
            comparison.lack(&lacking.name, Side::Source);
            continue;
        }
        let info = TensorInfo {
            dtype: tensor.dtype,
            shape: tensor.shape.clone(),
        };
        let fill = tensor.fill;
        let Some(dtype) = comparer.expect(&tensor.name, &info, fill, &mut comparison) else {
            continue;
        };
        planned.push(TensorPlan {
            dtype,
            ..tensor.clone()
        });
    }
    let run = || {
        let tensors: Vec<&TensorPlan> = planned.iter().collect();
        carry_out(&tensors, source, &comparer, &options.execute)
    };
    in_pool(options.execute.threads, run).map_err(while_comparing)?;
    comparer.finish(&mut comparison);
    comparison.elapsed = started.elapsed();
    Ok(comparison)
}

/// Compares tensors under the same names, of any dtype; see [`verify`].
///
/// # Errors
/// As [`verify`].
pub fn verify_names<S: AsRef<str> + Sync>(
    names: &[S],
    source: &dyn TensorSource,
    other: &dyn TensorSource,
    options: &VerifyOptions,
) -> Result<Comparison, ConvertError> {
    let started = Instant::now();
    let mut comparison = Comparison::default();
    let mut comparer = Comparer::new(other, options);
    let mut alike: Vec<&str> = Vec::new();
    let mut cast: Vec<TensorPlan> = Vec::new();
    for name in names {
        let name = name.as_ref();
        let Some(info) = source.info(name) else {
            comparison.lack(name, Side::Source);
            continue;
        };
        let Some(dtype) = comparer.expect(name, &info, None, &mut comparison) else {
            continue;
        };
        if dtype == info.dtype {
            alike.push(name);
        } else {
            let (target, source) = (name.to_owned(), name.to_owned());
            cast.push(TensorPlan::whole(target, dtype, source, info));
        }
    }
    // Blocks of whole elements, whatever their dtype.
    let execute = ExecuteOptions {
        buffer_bytes: options.execute.buffer_bytes.next_multiple_of(8),
        ..options.execute.clone()
    };
    let run = || {
        copy_tensors(&alike, source, &comparer, &execute)?;
        let tensors: Vec<&TensorPlan> = cast.iter().collect();
        carry_out(&tensors, source, &comparer, &execute)
    };
    in_pool(options.execute.threads, run).map_err(while_comparing)?;
    comparer.finish(&mut comparison);
    comparison.elapsed = started.elapsed();
    Ok(comparison)
}

fn while_comparing(error: ConvertError) -> ConvertError {
    match error {
        ConvertError::Checkpoint { target, source } => ConvertError::Compare { target, source },
        error => error,
    }
}

impl Comparison {
    /// Whether nothing differs.
    #[must_use]
    pub fn is_equal(&self) -> bool {
        self.differences.is_empty()
    }

    /// The same with tensors that one side lacks.
    #[must_use]
    pub fn lacking<S: AsRef<str>>(mut self, names: &[S], from: Side) -> Self {
        for name in names {
            self.lack(name.as_ref(), from);
        }
        self.sort();
        self
    }

    fn lack(&mut self, name: &str, from: Side) {
        self.differences.push(Difference::Missing {
            name: name.to_owned(),
            from,
        });
    }

    fn sort(&mut self) {
        self.differences
            .sort_by(|a, b| (a.name(), a.order()).cmp(&(b.name(), b.order())));
        // Several targets may lack the same source.
        self.differences.dedup();
    }
}

/// A sink that compares what it is given with the same bytes of another side.
struct Comparer<'a> {
    other: &'a dyn TensorSource,
    options: &'a VerifyOptions,
    expected: HashMap<String, Expected>,
    pool: Buffers,
}

/// A tensor that is being compared.
struct Expected {
    /// Of the comparison.
    dtype: Dtype,
    /// Of the other side.
    found: Dtype,
    shape: Vec<usize>,
    /// Elements from here on are padding.
    padding_from: usize,
    tally: Mutex<Tally>,
}

#[derive(Default)]
struct Tally {
    elements: u64,
    first: Option<(usize, Element, Element)>,
    max_distance: f64,
}

impl<'a> Comparer<'a> {
    fn new(other: &'a dyn TensorSource, options: &'a VerifyOptions) -> Self {
        Self {
            other,
            options,
            expected: HashMap::new(),
            pool: Buffers::default(),
        }
    }

    /// Compares what is known without values; gives the dtype in which values can be compared.
    fn expect(
        &mut self,
        name: &str,
        info: &TensorInfo,
        fill: Option<Fill>,
        comparison: &mut Comparison,
    ) -> Option<Dtype> {
        let Some(found) = self.other.info(name) else {
            comparison.lack(name, Side::Other);
            return None;
        };
        if found.shape != info.shape {
            comparison.differences.push(Difference::Shape {
                name: name.to_owned(),
                source: info.shape.clone(),
                other: found.shape,
            });
            return None;
        }
        let floats = info.dtype.is_float() && found.dtype.is_float();
        // Other types than floats are not cast.
        let asked = self.options.dtype.filter(|_| floats);
        if info.dtype != found.dtype && asked.is_none() {
            comparison.differences.push(Difference::Dtype {
                name: name.to_owned(),
                source: info.dtype,
                other: found.dtype,
            });
            if !floats {
                return None;
            }
        }
        let dtype = asked.unwrap_or_else(|| info.dtype.widest(found.dtype));
        let numel = info.numel();
        let padding_from = match (self.options.padding, fill) {
            (Padding::Ignore, Some(Fill::ZerosFrom(element))) => element.min(numel),
            _ => numel,
        };
        comparison.tensors += 1;
        comparison.bytes += padding_from as u64 * dtype.size_bytes() as u64;
        comparison.padding += (numel - padding_from) as u64;
        let expected = Expected {
            dtype,
            found: found.dtype,
            shape: found.shape,
            padding_from,
            tally: Mutex::default(),
        };
        self.expected.insert(name.to_owned(), expected);
        Some(dtype)
    }

    fn finish(self, comparison: &mut Comparison) {
        for (name, expected) in self.expected {
            let of = expected.padding_from as u64;
            let tally = expected
                .tally
                .into_inner()
                .unwrap_or_else(std::sync::PoisonError::into_inner);
            if let Some((first, source, other)) = tally.first {
                comparison.differences.push(Difference::Values {
                    name,
                    elements: tally.elements,
                    of,
                    index: index_of(first, &expected.shape),
                    source,
                    other,
                    max_distance: tally.max_distance,
                });
            }
        }
        comparison.sort();
    }
}

impl TensorSink for Comparer<'_> {
    fn write(&self, name: &str, offset_bytes: u64, bytes: &[u8]) -> Result<(), CheckpointError> {
        let Some(expected) = self.expected.get(name) else {
            let name = name.to_owned();
            return Err(CheckpointError::NoTensor { name });
        };
        let size = expected.dtype.size_bytes();
        let first = usize::try_from(offset_bytes).unwrap_or(usize::MAX) / size;
        let elements = (bytes.len() / size).min(expected.padding_from.saturating_sub(first));
        if elements == 0 {
            return Ok(());
        }
        let bytes = &bytes[..elements * size];
        let mut pair = self.pool.take();
        let (own, cast) = (&mut pair.scratch, &mut pair.target);
        own.resize(elements * expected.found.size_bytes(), 0);
        let offset = first as u64 * expected.found.size_bytes() as u64;
        self.other.read(name, offset, own)?;
        let found = if expected.found == expected.dtype {
            own
        } else {
            cast.resize(bytes.len(), 0);
            cast_any(expected.found, expected.dtype, own, cast);
            cast
        };
        if bytes != found.as_slice() {
            expected.count(first, bytes, found);
        }
        self.pool.give(pair);
        Ok(())
    }
}

impl Expected {
    fn count(&self, first: usize, bytes: &[u8], found: &[u8]) {
        let size = self.dtype.size_bytes();
        let mut own = Tally::default();
        for (index, (a, b)) in bytes
            .chunks_exact(size)
            .zip(found.chunks_exact(size))
            .enumerate()
        {
            if a == b {
                continue;
            }
            let (a, b) = (Element::of(self.dtype, a, 0), Element::of(self.dtype, b, 0));
            own.elements += 1;
            let distance = (a.value - b.value).abs();
            // Equal infinities have equal bits; here, a NaN is as far from everything as can be.
            let distance = if distance.is_nan() {
                f64::INFINITY
            } else {
                distance
            };
            own.max_distance = own.max_distance.max(distance);
            if own.first.is_none() {
                own.first = Some((first + index, a, b));
            }
        }
        let mut tally = self
            .tally
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner);
        tally.elements += own.elements;
        tally.max_distance = tally.max_distance.max(own.max_distance);
        // Pieces come in any order.
        let earlier = |of: &Tally| of.first.as_ref().map_or(usize::MAX, |(at, _, _)| *at);
        if earlier(&own) < earlier(&tally) {
            tally.first = own.first;
        }
    }
}
