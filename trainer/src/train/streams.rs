//! Random streams: every random choice of a run comes from one of these, and a stream is a pure function of the run's seed.
//!
//! ChaCha20 keyed by the seed, one stream number a purpose and epoch, so that no choice depends on how often another was
//! made, and a resumed run needs no generator state beyond the seed and its place.

use rand_chacha::ChaCha20Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};

/// What a stream is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Purpose {
    /// Which rows are held out for evaluation.
    EvalSplit,
    /// The order of the samples in this epoch.
    Shuffle {
        /// Counted from 0.
        epoch: u64,
    },
}

/// The stream of `purpose` for `seed`.
#[must_use]
pub(crate) fn stream(seed: u64, purpose: Purpose) -> ChaCha20Rng {
    let mut generator = ChaCha20Rng::seed_from_u64(seed);
    generator.set_stream(match purpose {
        Purpose::EvalSplit => 0,
        Purpose::Shuffle { epoch } => 1 + epoch,
    });
    generator
}

/// Fisher and Yates' shuffle, written out so that an order never changes with a version of a crate.
pub(crate) fn shuffle<T>(items: &mut [T], generator: &mut ChaCha20Rng) {
    for last in (1..items.len()).rev() {
        items.swap(last, below(generator, last + 1));
    }
}

/// A uniform number in `0..bound`, without bias: draws from the uneven rest are thrown away.
fn below(generator: &mut ChaCha20Rng, bound: usize) -> usize {
    let bound = bound as u64;
    let limit = u64::MAX - u64::MAX % bound;
    loop {
        let draw = generator.next_u64();
        if draw < limit {
            return usize::try_from(draw % bound).expect("below a usize");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn order(seed: u64, epoch: u64) -> Vec<usize> {
        let mut items: Vec<usize> = (0..10).collect();
        shuffle(&mut items, &mut stream(seed, Purpose::Shuffle { epoch }));
        items
    }

    #[test]
    fn an_order_is_a_permutation_and_fixed_by_seed_and_epoch() {
        assert_eq!(order(42, 0), order(42, 0));
        assert_ne!(order(42, 0), order(42, 1));
        assert_ne!(order(42, 0), order(43, 0));
        let mut sorted = order(42, 0);
        sorted.sort_unstable();
        assert_eq!(sorted, (0..10).collect::<Vec<_>>());
    }
}
