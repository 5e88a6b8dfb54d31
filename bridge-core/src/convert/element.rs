//! Single values in and out of bytes.

use half::{bf16, f16};

use crate::Dtype;

/// The value of element `index` of little-endian `bytes`.
pub(super) fn load(dtype: Dtype, bytes: &[u8], index: usize) -> f64 {
    match dtype {
        Dtype::Bf16 => f64::from(bf16::from_le_bytes(array(bytes, index))),
        Dtype::F16 => f64::from(f16::from_le_bytes(array(bytes, index))),
        Dtype::F64 => f64::from_le_bytes(array(bytes, index)),
        _ => f64::from(f32::from_le_bytes(array(bytes, index))),
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

/// Whether a 16- or 32-bit pattern of `bytes` is an infinity or NaN; gives the first such element.
pub(super) fn first_non_finite(dtype: Dtype, bytes: &[u8]) -> Option<usize> {
    let any = |size: usize, exponent: u64| {
        bytes.chunks_exact(size).position(|element| {
            let mut word = [0u8; 8];
            word[..size].copy_from_slice(element);
            u64::from_le_bytes(word) & exponent == exponent
        })
    };
    match dtype {
        Dtype::Bf16 => any(2, 0x7f80),
        Dtype::F16 => any(2, 0x7c00),
        Dtype::F32 => any(4, 0x7f80_0000),
        Dtype::F64 => any(8, 0x7ff0_0000_0000_0000),
        _ => None,
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
    fn stored_values_load_as_their_rounded_selves() {
        for dtype in [Dtype::Bf16, Dtype::F16, Dtype::F32, Dtype::F64] {
            let mut bytes = vec![0; 2 * dtype.size_bytes()];
            store(dtype, &mut bytes, 1, 0.1);
            assert_eq!(load(dtype, &bytes, 1), round(dtype, 0.1));
        }
    }
}
