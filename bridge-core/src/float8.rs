//! float8_e4m3fn, which no crate in use has.

/// The value of every code of float8_e4m3fn: 4 bits of exponent with bias 7, 3 of mantissa, no infinity.
pub(crate) static E4M3: [f32; 256] = {
    let mut values = [0.0; 256];
    let mut code = 0;
    while code < 256 {
        values[code] = value_of(code);
        code += 1;
    }
    values
};

#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_precision_loss,
    reason = "a code has 8 bits"
)]
const fn value_of(code: usize) -> f32 {
    let (exponent, mantissa) = ((code >> 3) & 15, code & 7);
    let magnitude = match (exponent, mantissa) {
        (15, 7) => f32::NAN,
        (0, mantissa) => mantissa as f32 / 512.0,
        // The exponent's bias is 127 in float32, its mantissa has 23 bits.
        (exponent, mantissa) => {
            f32::from_bits(((exponent as u32 + 120) << 23) | ((mantissa as u32) << 20))
        }
    };
    if code < 128 { magnitude } else { -magnitude }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The values that the format's paper states (Micikevicius et al., FP8 formats for deep learning, 2022, table 1).
    #[test]
    fn codes_have_the_values_of_the_format() {
        for (code, value) in [
            (0b0000_0000, 0.0),
            (0b0000_0001, 2f32.powi(-9)),
            (0b0000_0111, 0.875 * 2f32.powi(-6)),
            (0b0000_1000, 2f32.powi(-6)),
            (0b0011_1000, 1.0),
            (0b0011_1001, 1.125),
            (0b1100_0000, -2.0),
            (0b0111_1110, 448.0),
            (0b1111_1110, -448.0),
        ] {
            assert_eq!(E4M3[code], value, "{code:#b}");
        }
        let not_numbers: Vec<usize> = (0..256).filter(|code| E4M3[*code].is_nan()).collect();
        assert_eq!(not_numbers, [0x7f, 0xff]);
        let rising = E4M3[..0x7f].windows(2).all(|pair| pair[0] < pair[1]);
        assert!(rising);
    }
}
