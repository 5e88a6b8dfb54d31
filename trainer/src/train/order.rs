//! Which rows each step reads: a pure function of the configuration, the rows and the step's number.

use super::config::RunConfig;
use super::streams::{Purpose, shuffle, stream};

/// The rows of one forward pass.
pub(crate) type MicroBatch = Vec<usize>;

/// The forward passes of one optimizer step.
pub(crate) type Step = Vec<MicroBatch>;

/// A place in the data.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Place {
    /// From 0.
    pub epoch: u64,
    /// Steps of the epoch that are done.
    pub step_in_epoch: u64,
}

/// The order of a run's training rows.
#[derive(Debug, Clone)]
pub(crate) struct Order {
    rows: Vec<usize>,
    // Tokens of each row of `rows`, when they are packed.
    lengths: Option<Vec<usize>>,
    batch: usize,
    accumulation: usize,
    max_length: usize,
    seed: Option<u64>,
}

/// Splits `0..rows` into training and evaluation rows: a seeded choice of `fraction`, at least one of each.
#[must_use]
pub(crate) fn split(rows: usize, fraction: f64, seed: u64) -> (Vec<usize>, Vec<usize>) {
    let mut order: Vec<usize> = (0..rows).collect();
    if fraction <= 0.0 || rows < 2 {
        return (order, Vec::new());
    }
    shuffle(&mut order, &mut stream(seed, Purpose::EvalSplit));
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        clippy::cast_precision_loss,
        reason = "a fraction of a row count"
    )]
    let held_out = ((rows as f64 * fraction).round() as usize).clamp(1, rows - 1);
    let mut evaluation = order.split_off(rows - held_out);
    order.sort_unstable();
    evaluation.sort_unstable();
    (order, evaluation)
}

impl Order {
    /// The order of `rows`. `lengths` (tokens, one a row) are needed for packing.
    #[must_use]
    pub(crate) fn new(config: &RunConfig, rows: Vec<usize>, lengths: Option<Vec<usize>>) -> Self {
        Self {
            rows,
            lengths: lengths.filter(|_| config.packing),
            batch: config.per_device_train_batch_size,
            accumulation: config.gradient_accumulation_steps,
            max_length: config.max_length.unwrap_or(usize::MAX),
            seed: config.shuffle.then_some(config.seed),
        }
    }

    /// All steps of an epoch. The last one may be smaller; no row is left out.
    #[must_use]
    pub(crate) fn epoch(&self, epoch: u64) -> Vec<Step> {
        let mut places: Vec<usize> = (0..self.rows.len()).collect();
        if let Some(seed) = self.seed {
            shuffle(&mut places, &mut stream(seed, Purpose::Shuffle { epoch }));
        }
        let items: Vec<Vec<usize>> = match &self.lengths {
            None => places.iter().map(|&place| vec![self.rows[place]]).collect(),
            Some(lengths) => self.packs(&places, lengths),
        };
        let passes: Vec<MicroBatch> = items.chunks(self.batch).map(<[_]>::concat).collect();
        passes
            .chunks(self.accumulation)
            .map(<[_]>::to_vec)
            .collect()
    }

    /// Fills one pack after the other in the order of the epoch. Packs are not padded, so a short one wastes nothing.
    fn packs(&self, places: &[usize], lengths: &[usize]) -> Vec<Vec<usize>> {
        let mut packs: Vec<Vec<usize>> = Vec::new();
        let mut used = usize::MAX;
        for &place in places {
            let length = lengths[place];
            match packs.last_mut() {
                Some(pack) if used.saturating_add(length) <= self.max_length => {
                    pack.push(self.rows[place]);
                    used += length;
                }
                _ => {
                    packs.push(vec![self.rows[place]]);
                    used = length;
                }
            }
        }
        packs
    }

    /// Steps of `epochs` passes over the data; a fraction of a pass is rounded up.
    #[must_use]
    pub(crate) fn steps_of_epochs(&self, epochs: f64) -> u64 {
        let mut steps = 0;
        let mut epoch = 0;
        let mut left = epochs;
        while left > 0.0 {
            #[expect(
                clippy::cast_possible_truncation,
                clippy::cast_sign_loss,
                clippy::cast_precision_loss,
                reason = "a fraction of a step count"
            )]
            let part = (self.epoch(epoch).len() as f64 * left.min(1.0)).ceil() as u64;
            steps += part;
            left -= 1.0;
            epoch += 1;
        }
        steps
    }

    /// Where the step with this index (from 0) begins.
    #[must_use]
    pub(crate) fn place(&self, step: u64) -> Place {
        let mut place = Place {
            epoch: 0,
            step_in_epoch: step,
        };
        loop {
            let length = (self.epoch(place.epoch).len() as u64).max(1);
            if place.step_in_epoch < length {
                return place;
            }
            place.step_in_epoch -= length;
            place.epoch += 1;
        }
    }

    /// The steps from `step` on, without end: each with its place and whether it is the last of its epoch.
    pub(crate) fn steps_from(self, step: u64) -> impl Iterator<Item = (Place, bool, Step)> + Send {
        let start = self.place(step);
        (start.epoch..).flat_map(move |epoch| {
            let steps = self.epoch(epoch);
            let length = steps.len();
            let skip = if epoch == start.epoch {
                start.step_in_epoch
            } else {
                0
            };
            let skip = usize::try_from(skip).unwrap_or(usize::MAX);
            steps
                .into_iter()
                .enumerate()
                .skip(skip)
                .map(move |(index, step)| {
                    let place = Place {
                        epoch,
                        step_in_epoch: index as u64,
                    };
                    (place, index + 1 == length, step)
                })
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(batch: usize, accumulation: usize) -> RunConfig {
        RunConfig {
            per_device_train_batch_size: batch,
            gradient_accumulation_steps: accumulation,
            ..RunConfig::default()
        }
    }

    #[test]
    fn every_row_comes_once_an_epoch_and_epochs_differ() {
        let order = Order::new(&config(3, 2), (0..20).collect(), None);
        let epochs: Vec<Vec<usize>> = (0..2)
            .map(|epoch| order.epoch(epoch).concat().concat())
            .collect();
        assert_eq!(order.epoch(0).len(), 4);
        assert_eq!(order.epoch(0)[3], order.epoch(0)[3].clone());
        assert_ne!(epochs[0], epochs[1]);
        for mut epoch in epochs {
            epoch.sort_unstable();
            assert_eq!(epoch, (0..20).collect::<Vec<_>>());
        }
    }

    #[test]
    fn the_steps_from_the_middle_are_those_of_the_whole_run() {
        let order = Order::new(&config(2, 2), (0..9).collect(), None);
        let all: Vec<_> = order.clone().steps_from(0).take(12).collect();
        for start in 0..12 {
            let from: Vec<_> = order.clone().steps_from(start).take(12).collect();
            let start = usize::try_from(start).unwrap();
            assert_eq!(from[..12 - start], all[start..]);
        }
        assert_eq!(order.steps_of_epochs(2.0), 6);
        assert_eq!(order.steps_of_epochs(1.5), 5);
        assert!(all[2].1 && !all[1].1);
    }

    #[test]
    fn packs_hold_at_most_max_length_and_lose_no_row() {
        let config = RunConfig {
            packing: true,
            max_length: Some(10),
            ..config(1, 1)
        };
        let lengths: Vec<usize> = (0..30).map(|row| 1 + row % 7).collect();
        let order = Order::new(&config, (0..30).collect(), Some(lengths.clone()));
        let packs = order.epoch(0).concat();
        assert!(
            packs
                .iter()
                .all(|pack| pack.iter().map(|row| lengths[*row]).sum::<usize>() <= 10)
        );
        assert!(packs.len() < 30);
        let mut rows = packs.concat();
        rows.sort_unstable();
        assert_eq!(rows, (0..30).collect::<Vec<_>>());
    }

    #[test]
    fn the_held_out_rows_are_a_seeded_choice() {
        let (training, evaluation) = split(40, 0.1, 42);
        assert_eq!((training.len(), evaluation.len()), (36, 4));
        assert!(evaluation.iter().all(|row| !training.contains(row)));
        assert_eq!(split(40, 0.1, 42).1, evaluation);
        assert_ne!(split(40, 0.1, 43).1, evaluation);
        assert_eq!(split(3, 0.01, 1).1.len(), 1);
    }
}
