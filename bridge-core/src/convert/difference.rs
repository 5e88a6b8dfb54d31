//! What two sides of a comparison do not have in common.

use std::fmt;

use super::element::load_any;
use crate::Dtype;

/// One side of a comparison.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Side {
    /// The one that the plan reads.
    Source,
    /// The one that should hold what the plan gives.
    Other,
}

/// One value as it is stored.
#[derive(Debug, Clone, Copy)]
pub struct Element {
    /// As a number; integers beyond 2^53 are rounded.
    pub value: f64,
    /// Its bits.
    pub bits: u64,
    /// Its dtype.
    pub dtype: Dtype,
}

impl Element {
    /// Element `index` of little-endian `bytes`.
    pub(super) fn of(dtype: Dtype, bytes: &[u8], index: usize) -> Self {
        let size = dtype.size_bytes();
        let mut word = [0; 8];
        word[..size].copy_from_slice(&bytes[index * size..(index + 1) * size]);
        Self {
            value: load_any(dtype, bytes, index),
            bits: u64::from_le_bytes(word),
            dtype,
        }
    }
}

impl PartialEq for Element {
    fn eq(&self, other: &Self) -> bool {
        (self.bits, self.dtype) == (other.bits, other.dtype)
    }
}

impl fmt::Display for Element {
    /// The value and its bits: two that print alike (NaN, integers beyond 2^53) still differ.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let digits = self.dtype.size_bytes() * 2;
        write!(f, "{} (0x{:0digits$x})", self.value, self.bits)
    }
}

/// One thing in which two sides differ.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub enum Difference {
    /// A side lacks a tensor.
    Missing {
        /// The tensor.
        name: String,
        /// The side that lacks it.
        from: Side,
    },
    /// The shapes differ; values were not compared.
    Shape {
        /// The tensor.
        name: String,
        /// The source's.
        source: Vec<usize>,
        /// The other's.
        other: Vec<usize>,
    },
    /// The dtypes differ.
    Dtype {
        /// The tensor.
        name: String,
        /// The source's.
        source: Dtype,
        /// The other's.
        other: Dtype,
    },
    /// Values differ.
    Values {
        /// The tensor.
        name: String,
        /// Values that differ.
        elements: u64,
        /// Values that were compared.
        of: u64,
        /// Where the first one is, an index an axis.
        index: Vec<usize>,
        /// The source's value there, in the dtype of the comparison.
        source: Element,
        /// The other's.
        other: Element,
        /// The largest distance; infinite where one side is no number.
        max_distance: f64,
    },
}

impl Difference {
    /// The tensor.
    #[must_use]
    pub fn name(&self) -> &str {
        match self {
            Difference::Missing { name, .. }
            | Difference::Shape { name, .. }
            | Difference::Dtype { name, .. }
            | Difference::Values { name, .. } => name,
        }
    }

    /// The place among differences of one tensor.
    pub(super) fn order(&self) -> u8 {
        match self {
            Difference::Missing { .. } => 0,
            Difference::Shape { .. } => 1,
            Difference::Dtype { .. } => 2,
            Difference::Values { .. } => 3,
        }
    }
}

/// Indices an axis of the element with this number in row-major order.
pub(super) fn index_of(mut element: usize, shape: &[usize]) -> Vec<usize> {
    let mut index = vec![0; shape.len()];
    for (place, size) in index.iter_mut().zip(shape).rev() {
        *place = element % size;
        element /= size;
    }
    index
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_index_counts_rows_first() {
        assert_eq!(index_of(23, &[2, 3, 4]), [1, 2, 3]);
        assert_eq!(index_of(4, &[2, 3, 4]), [0, 1, 0]);
        assert_eq!(index_of(0, &[]), [0usize; 0]);
    }

    #[test]
    fn values_that_print_alike_differ_in_their_bits() {
        let nan = |bits: u16| Element::of(Dtype::Bf16, &bits.to_le_bytes(), 0);
        assert_ne!(nan(0x7fc0), nan(0x7fc1));
        assert_eq!(nan(0x7fc1).to_string(), "NaN (0x7fc1)");
        assert_eq!(nan(0x8000).to_string(), "-0 (0x8000)");
        let byte = |dtype, bits: u8| Element::of(dtype, &[bits], 0).value;
        assert_eq!(byte(Dtype::I8, 0xff), -1.0);
        assert_eq!(byte(Dtype::F8E4M3, 0x7e), 448.0);
        assert_eq!(byte(Dtype::F8E4M3, 0x01), 0.001_953_125);
        assert_eq!(byte(Dtype::F8E4M3, 0xb8), -1.0);
        assert!(byte(Dtype::F8E4M3, 0x7f).is_nan());
        assert_eq!(byte(Dtype::F8E5M2, 0x7b), 57_344.0);
    }
}
