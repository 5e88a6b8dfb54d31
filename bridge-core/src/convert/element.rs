//! Single values in and out of bytes.

use half::{bf16, f16};

use crate::Dtype;
use crate::float8::E4M3;

/// The value of element `index` of little-endian `bytes`.
pub(super) fn load(dtype: Dtype, bytes: &[u8], index: usize) -> f64 {
    match dtype {
        Dtype::Bf16 => f64::from(bf16::from_le_bytes(array(bytes, index))),
        Dtype::F16 => f64::from(f16::from_le_bytes(array(bytes, index))),
        Dtype::F64 => f64::from_le_bytes(array(bytes, index)),
        _ => f64::from(f32::from_le_bytes(array(bytes, index))),
    }
}

/// The value of element `index` of any dtype; integers beyond 2^53 are rounded.
#[expect(
    clippy::cast_precision_loss,
    reason = "for messages, beside which the bits stand"
)]
pub(super) fn load_any(dtype: Dtype, bytes: &[u8], index: usize) -> f64 {
    match dtype {
        Dtype::Bool | Dtype::U8 => f64::from(bytes[index]),
        Dtype::I8 => f64::from(i8::from_le_bytes(array(bytes, index))),
        Dtype::I16 => f64::from(i16::from_le_bytes(array(bytes, index))),
        Dtype::U16 => f64::from(u16::from_le_bytes(array(bytes, index))),
        Dtype::I32 => f64::from(i32::from_le_bytes(array(bytes, index))),
        Dtype::U32 => f64::from(u32::from_le_bytes(array(bytes, index))),
        Dtype::I64 => i64::from_le_bytes(array(bytes, index)) as f64,
        Dtype::U64 => u64::from_le_bytes(array(bytes, index)) as f64,
        Dtype::F8E4M3 => f64::from(E4M3[usize::from(bytes[index])]),
        Dtype::F8E5M2 => f64::from(f16::from_bits(u16::from(bytes[index]) << 8)),
        Dtype::F16 | Dtype::Bf16 | Dtype::F32 | Dtype::F64 => load(dtype, bytes, index),
    }
}

/// All values of `bytes`, in the place of those that `values` had.
pub(super) fn widened(dtype: Dtype, bytes: &[u8], values: &mut Vec<f64>) {
    fn fill<const N: usize>(bytes: &[u8], values: &mut Vec<f64>, load: impl Fn([u8; N]) -> f64) {
        let (words, _) = bytes.as_chunks::<N>();
        values.extend(words.iter().map(|word| load(*word)));
    }
    values.clear();
    match dtype {
        Dtype::Bf16 => fill(bytes, values, |word| f64::from(bf16::from_le_bytes(word))),
        Dtype::F16 => fill(bytes, values, |word| f64::from(f16::from_le_bytes(word))),
        Dtype::F32 => fill(bytes, values, |word| f64::from(f32::from_le_bytes(word))),
        Dtype::F64 => fill(bytes, values, f64::from_le_bytes),
        other => {
            let elements = 0..bytes.len() / other.size_bytes();
            values.extend(elements.map(|index| load_any(other, bytes, index)));
        }
    }
}

/// Rounds `value` to `dtype` (ties to even) and puts it at element `index`.
pub(super) fn store(dtype: Dtype, bytes: &mut [u8], index: usize, value: f64) {
    match dtype {
        Dtype::Bf16 => put(bytes, index, round_bf16(value).to_le_bytes()),
        Dtype::F16 => put(bytes, index, f16::from_f64(value).to_le_bytes()),
        Dtype::F64 => put(bytes, index, value.to_le_bytes()),
        _ => put(bytes, index, round_f32(value).to_le_bytes()),
    }
}

/// `value` as `dtype` holds it.
pub(super) fn round(dtype: Dtype, value: f64) -> f64 {
    match dtype {
        Dtype::Bf16 => f64::from(round_bf16(value)),
        Dtype::F16 => f64::from(f16::from_f64(value)),
        Dtype::F64 => value,
        _ => f64::from(round_f32(value)),
    }
}

/// Through float32, as torch rounds: a float64 that lies by a float32 ulp off a bfloat16 tie rounds as torch has it.
fn round_bf16(value: f64) -> bf16 {
    bf16::from_f32(round_f32(value))
}

#[expect(
    clippy::cast_possible_truncation,
    reason = "rounding to nearest is what is wanted"
)]
fn round_f32(value: f64) -> f32 {
    value as f32
}

fn array<const N: usize>(bytes: &[u8], index: usize) -> [u8; N] {
    let mut one = [0; N];
    one.copy_from_slice(&bytes[index * N..(index + 1) * N]);
    one
}

fn put<const N: usize>(bytes: &mut [u8], index: usize, one: [u8; N]) {
    bytes[index * N..(index + 1) * N].copy_from_slice(&one);
}

/// The first element that is an infinity or NaN: all bits of its exponent are set.
pub(super) fn first_non_finite(dtype: Dtype, bytes: &[u8]) -> Option<usize> {
    // Two instructions a vector: the largest value without its sign, which has all bits of the exponent set or has not.
    let narrow = |exponent: i16| {
        find(
            bytes,
            |most: i16, word| most.max(i16::from_le_bytes(word) & i16::MAX),
            |most| most >= exponent,
        )
    };
    /// Wider types have no such instruction in the x86-64 that all machines share. The sum of the exponent's bits and the
    /// lowest of them carries into the sign's place where all are set, and nowhere else.
    macro_rules! wide {
        ($word:ty, $exponent:expr, $lowest:expr) => {
            find(
                bytes,
                |any: $word, word| {
                    let carried = (<$word>::from_le_bytes(word) & $exponent).wrapping_add($lowest);
                    any | carried & ($exponent + $lowest)
                },
                |any| any != 0,
            )
        };
    }
    match dtype {
        Dtype::Bf16 => narrow(0x7f80),
        Dtype::F16 => narrow(0x7c00),
        Dtype::F32 => wide!(u32, 0x7f80_0000, 0x80_0000),
        Dtype::F64 => wide!(u64, 0x7ff0_0000_0000_0000, 0x10_0000_0000_0000),
        _ => None,
    }
}

/// The first element that is bad by itself. Whole blocks are joined without leaving early, so that they vectorise.
fn find<const N: usize, W: Default>(
    bytes: &[u8],
    join: impl Fn(W, [u8; N]) -> W,
    is_bad: impl Fn(W) -> bool,
) -> Option<usize> {
    let (elements, _) = bytes.as_chunks::<N>();
    const BLOCK: usize = 1024;
    elements
        .chunks(BLOCK)
        .enumerate()
        .find_map(|(number, block)| {
            let joined = block
                .iter()
                .fold(W::default(), |joined, word| join(joined, *word));
            let within = match is_bad(joined) {
                true => block
                    .iter()
                    .position(|word| is_bad(join(W::default(), *word))),
                false => None,
            };
            within.map(|at| number * BLOCK + at)
        })
}

/// What a cast did to a run of values.
#[derive(Debug, Default, Clone, Copy, PartialEq)]
pub(super) struct Rounding {
    /// Values that do not come back exactly.
    pub(super) elements: usize,
    /// The largest distance to what comes back.
    pub(super) max_error: f64,
}

impl Rounding {
    /// Counts what a cast did to more values.
    pub(super) fn add(&mut self, more: Self) {
        self.elements += more.elements;
        self.max_error = self.max_error.max(more.max_error);
    }
}

/// Casts a run of values, for the pairs of types that checkpoints and runs use; `None` for other pairs.
pub(super) fn cast(from: Dtype, to: Dtype, values: &[u8], into: &mut [u8]) -> Option<Rounding> {
    let load_bf16 = |word| bf16::from_le_bytes(word).to_f32();
    let load_f16 = |word| f16::from_le_bytes(word).to_f32();
    let store_bf16 = |value| bf16::from_f32(value).to_le_bytes();
    let store_f16 = |value| f16::from_f32(value).to_le_bytes();
    match (from, to) {
        (Dtype::Bf16, Dtype::F32) => widen(values, into, load_bf16),
        (Dtype::F16, Dtype::F32) => widen(values, into, load_f16),
        (Dtype::F32, Dtype::Bf16) => return Some(narrow(values, into, store_bf16, load_bf16)),
        (Dtype::F32, Dtype::F16) => return Some(narrow(values, into, store_f16, load_f16)),
        _ => return None,
    }
    Some(Rounding::default())
}

/// Casts a run of values of any pair of float types.
pub(super) fn cast_any(from: Dtype, to: Dtype, values: &[u8], into: &mut [u8]) {
    if cast(from, to, values, into).is_some() {
        return;
    }
    for index in 0..into.len() / to.size_bytes() {
        store(to, into, index, load(from, values, index));
    }
}

fn widen(values: &[u8], into: &mut [u8], load: impl Fn([u8; 2]) -> f32) {
    let (values, _) = values.as_chunks::<2>();
    let (into, _) = into.as_chunks_mut::<4>();
    for (value, target) in values.iter().zip(into) {
        *target = load(*value).to_le_bytes();
    }
}

fn narrow(
    values: &[u8],
    into: &mut [u8],
    store: impl Fn(f32) -> [u8; 2],
    load: impl Fn([u8; 2]) -> f32,
) -> Rounding {
    let (values, _) = values.as_chunks::<4>();
    let (into, _) = into.as_chunks_mut::<2>();
    let (mut elements, mut max_error) = (0usize, 0f32);
    for (value, target) in values.iter().zip(into) {
        let value = f32::from_le_bytes(*value);
        *target = store(value);
        let error = (load(*target) - value).abs();
        elements += usize::from(error > 0.0);
        max_error = max_error.max(error);
    }
    Rounding {
        elements,
        max_error: f64::from(max_error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn non_finite_values_are_found_in_every_float_type() {
        for dtype in [Dtype::Bf16, Dtype::F16, Dtype::F32, Dtype::F64] {
            for value in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
                let mut bytes = vec![0; 3 * dtype.size_bytes()];
                store(dtype, &mut bytes, 0, -1.5);
                assert_eq!(first_non_finite(dtype, &bytes), None);
                store(dtype, &mut bytes, 2, value);
                assert_eq!(first_non_finite(dtype, &bytes), Some(2), "{dtype} {value}");
            }
        }
    }

    #[test]
    fn every_pattern_of_sixteen_bits_is_finite_or_found() {
        for bits in 0..=u16::MAX {
            let bytes = bits.to_le_bytes();
            let finite = |dtype| first_non_finite(dtype, &bytes).is_none();
            assert_eq!(finite(Dtype::Bf16), bf16::from_bits(bits).is_finite());
            assert_eq!(finite(Dtype::F16), f16::from_bits(bits).is_finite());
        }
    }

    #[test]
    fn stored_values_load_as_their_rounded_selves() {
        for dtype in [Dtype::Bf16, Dtype::F16, Dtype::F32, Dtype::F64] {
            let mut bytes = vec![0; 2 * dtype.size_bytes()];
            store(dtype, &mut bytes, 1, 0.1);
            assert_eq!(load(dtype, &bytes, 1), round(dtype, 0.1));
        }
    }

    #[test]
    fn casting_a_run_gives_what_casting_each_value_gives() {
        let numbers: Vec<f64> = (0..3000).map(|i| f64::from(i) * 0.37 - 500.1).collect();
        for from in [Dtype::Bf16, Dtype::F16, Dtype::F32] {
            for to in [Dtype::Bf16, Dtype::F16, Dtype::F32] {
                let mut values = vec![0; numbers.len() * from.size_bytes()];
                let mut wanted = vec![0; numbers.len() * to.size_bytes()];
                let mut inexact = 0;
                for (index, number) in numbers.iter().enumerate() {
                    store(from, &mut values, index, *number);
                    let value = load(from, &values, index);
                    store(to, &mut wanted, index, value);
                    inexact += usize::from(load(to, &wanted, index) != value);
                }
                let mut found = vec![0; wanted.len()];
                let Some(rounding) = cast(from, to, &values, &mut found) else {
                    assert!(from == to || from.size_bytes() == to.size_bytes());
                    continue;
                };
                assert!(found == wanted, "{from} to {to}");
                assert_eq!(rounding.elements, inexact, "{from} to {to}");
            }
        }
    }
}
