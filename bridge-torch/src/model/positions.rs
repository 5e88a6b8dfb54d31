//! Position ids: temporal, height and width of every token, from token types and grids.
//!
//! Works on plain numbers, so that positions are exact and no device is asked.

use crate::batch::{BatchError, Modality};

/// The flat indices (row * seq + column) of each sample's real tokens, in order.
pub(super) type Samples = Vec<Vec<usize>>;

/// Positions of a batch.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Positions {
    /// `[3, tokens]`, row-major: temporal, height, width; 0 at padding.
    pub(super) ids: Vec<i64>,
    /// For each sample: largest position + 1 - number of real tokens.
    pub(super) rope_deltas: Vec<i64>,
}

/// The real tokens of a padded batch (`mask`: `[batch * seq]`, true at real tokens).
pub(super) fn padded_samples(batch: usize, seq: usize, mask: Option<&[bool]>) -> Samples {
    (0..batch)
        .map(|row| {
            (row * seq..(row + 1) * seq)
                .filter(|&at| mask.is_none_or(|mask| mask[at]))
                .collect()
        })
        .collect()
}

/// The tokens of each packed sample; `borders` were checked.
pub(super) fn packed_samples(borders: &[usize]) -> Samples {
    borders
        .windows(2)
        .map(|pair| (pair[0]..pair[1]).collect())
        .collect()
}

/// Counts each sample's real tokens from 0, the same in all three rows.
pub(super) fn text(tokens: usize, samples: &Samples) -> Positions {
    let mut row = vec![0; tokens];
    for sample in samples {
        for (position, &at) in (0..).zip(sample) {
            row[at] = position;
        }
    }
    Positions {
        ids: row.repeat(3),
        rope_deltas: vec![0; samples.len()],
    }
}

/// Grids of the whole batch, in the order in which its text uses them.
#[derive(Debug, Clone, Copy)]
pub(super) struct Grids<'a> {
    pub(super) images: &'a [[i64; 3]],
    pub(super) videos: &'a [[i64; 3]],
    /// `spatial_merge_size`.
    pub(super) merge: i64,
}

/// Gives text runs ascending positions, and each grid a plane of rows and columns.
///
/// `types` is `[tokens]` with 1 at image and 2 at video placeholders. A video appears in the text frame by frame:
/// each of its frame pairs is a grid of its own. After a grid the text goes on behind its longer side.
pub(super) fn with_grids(
    types: &[i64],
    samples: &Samples,
    grids: Grids<'_>,
) -> Result<Positions, BatchError> {
    let tokens = types.len();
    let mut ids = vec![0; 3 * tokens];
    let mut rope_deltas = Vec::with_capacity(samples.len());
    let mut images = grids.images.iter().copied();
    let mut frames = grids
        .videos
        .iter()
        .flat_map(|&[t, h, w]| (0..t).map(move |_| [1, h, w]));
    for (sample, places) in samples.iter().enumerate() {
        let mut next = 0; // first free position
        let mut largest = -1;
        let mut done = 0;
        for run in places.chunk_by(|&a, &b| types[a] == types[b]) {
            let modality = match types[run[0]] {
                1 => Some(Modality::Image),
                2 => Some(Modality::Video),
                _ => None,
            };
            let Some(modality) = modality else {
                for &at in run {
                    for row in 0..3 {
                        ids[row * tokens + at] = next;
                    }
                    next += 1;
                }
                largest = largest.max(next - 1);
                done += run.len();
                continue;
            };
            let grid = match modality {
                Modality::Image => images.next(),
                Modality::Video => frames.next(),
            };
            let [_, h, w] = match grid {
                Some(grid) if merged_tokens(grid, grids.merge) == run.len() => grid,
                other => {
                    return Err(BatchError::Run {
                        sample,
                        position: done,
                        modality,
                        found: run.len(),
                        expected: other.map(|grid| (grid, merged_tokens(grid, grids.merge))),
                    });
                }
            };
            let (rows, columns) = (h / grids.merge, w / grids.merge);
            let cells = (0..rows).flat_map(|r| (0..columns).map(move |c| (r, c)));
            for (&at, (r, c)) in run.iter().zip(cells) {
                ids[at] = next;
                ids[tokens + at] = next + r;
                ids[2 * tokens + at] = next + c;
            }
            largest = largest.max(next + rows.max(columns) - 1);
            next += h.max(w) / grids.merge;
            done += run.len();
        }
        rope_deltas.push(largest + 1 - i64::try_from(places.len()).unwrap_or(i64::MAX));
    }
    for (modality, left) in [
        (Modality::Image, images.count()),
        (Modality::Video, frames.count()),
    ] {
        if left > 0 {
            return Err(BatchError::Unused { modality, left });
        }
    }
    Ok(Positions { ids, rope_deltas })
}

/// Visual tokens of a grid after merging.
pub(super) fn merged_tokens([t, h, w]: [i64; 3], merge: i64) -> usize {
    usize::try_from(t * (h / merge) * (w / merge)).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    const NONE: Grids<'static> = Grids {
        images: &[],
        videos: &[],
        merge: 2,
    };

    #[test]
    fn text_goes_on_behind_the_longer_side_of_an_image() {
        let types = [0, 1, 1, 1, 1, 1, 1, 0];
        let grids = Grids {
            images: &[[1, 4, 6]],
            ..NONE
        };
        let found = with_grids(&types, &padded_samples(1, 8, None), grids).unwrap();
        assert_eq!(found.ids[..8], [0, 1, 1, 1, 1, 1, 1, 4]);
        assert_eq!(found.ids[8..16], [0, 1, 1, 1, 2, 2, 2, 4]);
        assert_eq!(found.ids[16..], [0, 1, 2, 3, 1, 2, 3, 4]);
        assert_eq!(found.rope_deltas, [5 - 8]);
    }

    #[test]
    fn each_frame_of_a_video_is_a_grid_of_its_own() {
        let types = [2, 0, 2];
        let grids = Grids {
            videos: &[[2, 2, 2]],
            ..NONE
        };
        let found = with_grids(&types, &padded_samples(1, 3, None), grids).unwrap();
        assert_eq!(found.ids, [0, 1, 2].repeat(3));
    }

    #[test]
    fn packed_samples_count_from_zero_each() {
        let found = text(5, &packed_samples(&[0, 2, 2, 5]));
        assert_eq!(found.ids[..5], [0, 1, 0, 1, 2]);
        let types = [0, 1, 0, 1, 0];
        let grids = Grids {
            images: &[[1, 2, 2], [1, 2, 2]],
            ..NONE
        };
        let found = with_grids(&types, &packed_samples(&[0, 2, 2, 5]), grids).unwrap();
        assert_eq!(found.ids[..5], [0, 1, 0, 1, 2]);
    }

    #[test]
    fn a_run_that_is_no_grid_names_both_lengths() {
        let grids = Grids {
            images: &[[1, 4, 4]],
            ..NONE
        };
        let error = with_grids(&[0, 1, 1], &padded_samples(1, 3, None), grids).unwrap_err();
        assert_eq!(
            error.to_string(),
            "sample 0: the image placeholders from position 1 are 2 tokens long, but the next grid [1, 4, 4] makes 4 tokens; \
             each image needs a run of its own"
        );
        let error = with_grids(&[0, 2], &padded_samples(1, 2, None), NONE).unwrap_err();
        assert!(error.to_string().contains("no video grid left"), "{error}");
        let error = with_grids(&[0, 0, 0], &padded_samples(1, 3, None), grids).unwrap_err();
        assert!(error.to_string().starts_with("1 image grids"), "{error}");
    }
}
