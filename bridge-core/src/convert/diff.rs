//! How far two tensors are apart.

use rayon::prelude::*;

use super::ConvertError;
use super::element::widened;
use super::execute::in_pool;
use crate::Dtype;
use crate::checkpoint::{CheckpointError, TensorSource};

/// Elements that are compared at a time: two blocks of float64 stay in a core's cache.
const BLOCK: usize = 1 << 14;

/// Sums over the elements of two tensors `a` and `b`, in float64.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Distance {
    /// Elements.
    pub elements: u64,
    /// Elements that differ in value; -0 and 0 do not, nor two NaN.
    pub changed: u64,
    /// Differences that are no finite number. They are not in the sums.
    pub non_finite: u64,
    /// The largest difference.
    pub max_abs: f64,
    /// Sum of the squares of `b - a`.
    pub squared_difference: f64,
    /// Sum of the squares of `a`.
    pub squared_a: f64,
    /// Sum of the squares of `b`.
    pub squared_b: f64,
    /// Sum of the products.
    pub dot: f64,
}

impl Distance {
    /// `||b - a|| / ||a||`: infinite where only `a` is zero, 0 where both are.
    #[must_use]
    pub fn relative(&self) -> f64 {
        if self.squared_difference == 0.0 {
            return 0.0;
        }
        (self.squared_difference / self.squared_a).sqrt()
    }

    /// The cosine of the angle between them; `None` where one is zero.
    #[must_use]
    pub fn cosine(&self) -> Option<f64> {
        let norms = (self.squared_a * self.squared_b).sqrt();
        // Rounding may leave it beyond 1 by an ulp.
        (norms > 0.0).then(|| (self.dot / norms).clamp(-1.0, 1.0))
    }

    /// The distance of both tensors together.
    #[must_use]
    pub fn with(self, other: Self) -> Self {
        Self {
            elements: self.elements + other.elements,
            changed: self.changed + other.changed,
            non_finite: self.non_finite + other.non_finite,
            max_abs: self.max_abs.max(other.max_abs),
            squared_difference: self.squared_difference + other.squared_difference,
            squared_a: self.squared_a + other.squared_a,
            squared_b: self.squared_b + other.squared_b,
            dot: self.dot + other.dot,
        }
    }

    fn of(a: &[f64], b: &[f64]) -> Self {
        let mut sums = Self {
            elements: a.len() as u64,
            ..Self::default()
        };
        for (a, b) in a.iter().zip(b) {
            if a == b || (a.is_nan() && b.is_nan()) {
                if a.is_finite() {
                    let square = a * a;
                    sums.squared_a += square;
                    sums.squared_b += square;
                    sums.dot += square;
                }
                continue;
            }
            sums.changed += 1;
            let difference = b - a;
            if !difference.is_finite() {
                sums.non_finite += 1;
                continue;
            }
            sums.max_abs = sums.max_abs.max(difference.abs());
            sums.squared_difference += difference * difference;
            sums.squared_a += a * a;
            sums.squared_b += b * b;
            sums.dot += a * b;
        }
        sums
    }
}

/// The distance of each tensor of `names`, which both sides have in the same shape. Each side keeps its dtype; memory is
/// bounded by threads x block, and sums do not depend on the number of threads.
///
/// # Errors
/// [`ConvertError`] when a side lacks a tensor, has it in another shape, or cannot be read.
pub fn distances<S: AsRef<str> + Sync>(
    names: &[S],
    a: &dyn TensorSource,
    b: &dyn TensorSource,
    threads: usize,
) -> Result<Vec<Distance>, ConvertError> {
    let mut pieces = Vec::new();
    for (number, name) in names.iter().enumerate() {
        let name = name.as_ref();
        let info = |side: &dyn TensorSource| {
            side.info(name).ok_or_else(|| ConvertError::Missing {
                target: name.to_owned(),
                source_name: name.to_owned(),
            })
        };
        let (in_a, in_b) = (info(a)?, info(b)?);
        if in_a.shape != in_b.shape {
            return Err(ConvertError::Shape {
                target: name.to_owned(),
                source_name: name.to_owned(),
                found: in_b.shape,
                expected: in_a.shape,
            });
        }
        let numel = in_a.numel();
        pieces.extend((0..numel.div_ceil(BLOCK)).map(|piece| Piece {
            number,
            name,
            dtypes: (in_a.dtype, in_b.dtype),
            start: piece * BLOCK,
            elements: BLOCK.min(numel - piece * BLOCK),
        }));
    }
    let measure = || {
        pieces
            .par_iter()
            .map_init(Blocks::default, |blocks, piece| {
                let sums = piece.measure(a, b, blocks);
                sums.map_err(|source| ConvertError::Compare {
                    target: piece.name.to_owned(),
                    source,
                })
            })
            .collect::<Result<Vec<Distance>, ConvertError>>()
    };
    let measured = in_pool(threads, measure)?;
    let mut distances = vec![Distance::default(); names.len()];
    // In the order of the elements, whatever thread had which.
    for (piece, sums) in pieces.iter().zip(measured) {
        distances[piece.number] = distances[piece.number].with(sums);
    }
    Ok(distances)
}

/// A run of elements of one tensor.
struct Piece<'a> {
    number: usize,
    name: &'a str,
    dtypes: (Dtype, Dtype),
    start: usize,
    elements: usize,
}

#[derive(Default)]
struct Blocks {
    bytes: Vec<u8>,
    a: Vec<f64>,
    b: Vec<f64>,
}

impl Piece<'_> {
    fn measure(
        &self,
        a: &dyn TensorSource,
        b: &dyn TensorSource,
        blocks: &mut Blocks,
    ) -> Result<Distance, CheckpointError> {
        let Blocks {
            bytes,
            a: values_a,
            b: values_b,
        } = blocks;
        for (side, dtype, values) in [(a, self.dtypes.0, values_a), (b, self.dtypes.1, values_b)] {
            bytes.resize(self.elements * dtype.size_bytes(), 0);
            let offset = self.start as u64 * dtype.size_bytes() as u64;
            side.read(self.name, offset, bytes)?;
            widened(dtype, bytes, values);
        }
        Ok(Distance::of(&blocks.a, &blocks.b))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_distance_is_what_its_formula_says() {
        let distance = Distance::of(&[3.0, 0.0, 4.0], &[3.0, 1.0, 4.0]);
        assert_eq!(distance.relative(), 0.2);
        assert_eq!((distance.changed, distance.max_abs), (1, 1.0));
        assert_eq!(distance.cosine(), Some(25.0 / (25.0 * 26.0f64).sqrt()));
        let zero = Distance::of(&[0.0, -0.0], &[0.0, 0.0]);
        assert_eq!(
            (zero.relative(), zero.cosine(), zero.changed),
            (0.0, None, 0)
        );
        assert!(Distance::of(&[0.0], &[1.0]).relative().is_infinite());
        let opposite = Distance::of(&[1.0, -2.0], &[-1.0, 2.0]);
        assert_eq!((opposite.relative(), opposite.cosine()), (2.0, Some(-1.0)));
    }

    #[test]
    fn what_is_no_number_is_counted_and_leaves_the_sums_alone() {
        let (nan, infinite) = (f64::NAN, f64::INFINITY);
        let distance = Distance::of(&[nan, infinite, nan, 1.0], &[nan, infinite, 2.0, 1.5]);
        assert_eq!((distance.changed, distance.non_finite), (2, 1));
        assert_eq!((distance.relative(), distance.max_abs), (0.5, 0.5));
    }
}
