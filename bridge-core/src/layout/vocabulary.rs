//! Rows of the vocabulary with padding.

/// Megatron's `make_vocab_size_divisible_by` for a vocabulary: the largest power of two up to 128 that divides it.
#[must_use]
pub fn default_vocab_divisor(vocab_size: usize) -> usize {
    1 << vocab_size.trailing_zeros().min(7)
}

/// `vocab_size` rounded up to a multiple of `divisor x tp_size`; `None` when there is no such number.
#[must_use]
pub fn padded_vocab_size(vocab_size: usize, divisor: usize, tp_size: usize) -> Option<usize> {
    let multiple = divisor.checked_mul(tp_size)?;
    (multiple > 0).then(|| vocab_size.checked_next_multiple_of(multiple))?
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_default_divisor_is_a_power_of_two_up_to_128() {
        assert_eq!(default_vocab_divisor(248_320), 128);
        assert_eq!(default_vocab_divisor(500), 4);
        assert_eq!(default_vocab_divisor(501), 1);
    }

    #[test]
    fn padding_rounds_up_to_divisor_times_tp() {
        assert_eq!(padded_vocab_size(512, 96, 1), Some(576));
        assert_eq!(padded_vocab_size(512, 96, 2), Some(576));
        assert_eq!(padded_vocab_size(576, 96, 2), Some(576));
        assert_eq!(padded_vocab_size(577, 96, 2), Some(768));
        assert_eq!(padded_vocab_size(512, 0, 1), None);
        assert_eq!(padded_vocab_size(512, usize::MAX, 2), None);
    }
}
