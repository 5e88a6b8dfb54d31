//! Samples to batches: padded, or packed with borders.

use bridge_torch::batch::Batch;
use tch::{TchError, Tensor};

use super::config::PaddingSide;
use crate::data::Sample;

/// How samples become one batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Layout {
    /// `[samples, longest]`, padded with this id on this side.
    Padded {
        /// The id at padding; masked, so it changes no result.
        pad_id: i64,
        /// Where the padding goes.
        side: PaddingSide,
    },
    /// `[1, total]` with `cu_seqlens`.
    Packed,
}

/// What a batch, or several, counts.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counts {
    /// Samples.
    pub samples: u64,
    /// Tokens without padding.
    pub tokens: u64,
    /// Targets of the language model: position i predicts i + 1, so a sample's first label is none.
    pub targets: u64,
    /// Targets of the prediction head, one token further.
    pub mtp_targets: u64,
}

impl Counts {
    /// Counts one sample.
    #[must_use]
    pub(crate) fn of(sample: &Sample) -> Self {
        let behind = |first: usize| {
            let labels = sample.labels.get(first..).unwrap_or_default();
            labels.iter().filter(|label| **label >= 0).count() as u64
        };
        Self {
            samples: 1,
            tokens: sample.input_ids.len() as u64,
            targets: behind(1),
            mtp_targets: behind(2),
        }
    }
}

impl std::ops::Add for Counts {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self {
            samples: self.samples + other.samples,
            tokens: self.tokens + other.tokens,
            targets: self.targets + other.targets,
            mtp_targets: self.mtp_targets + other.mtp_targets,
        }
    }
}

impl std::iter::Sum for Counts {
    fn sum<I: Iterator<Item = Self>>(counts: I) -> Self {
        counts.fold(Self::default(), std::ops::Add::add)
    }
}

/// Joins `samples` into a batch on the CPU; the model moves it to its device.
///
/// # Errors
/// When libtorch has no memory for it.
pub(crate) fn collate(samples: &[&Sample], layout: Layout) -> Result<Batch, TchError> {
    let longest = samples
        .iter()
        .map(|sample| sample.input_ids.len())
        .max()
        .unwrap_or(0);
    let (rows, columns) = match layout {
        Layout::Padded { .. } => (samples.len(), longest),
        Layout::Packed => (1, samples.iter().map(|sample| sample.input_ids.len()).sum()),
    };
    let shape = [to_i64(rows), to_i64(columns)];
    let place = |values: fn(&Sample) -> &[i64], padding: i64| -> Result<Tensor, TchError> {
        let mut flat = Vec::with_capacity(rows * columns);
        for sample in samples {
            let values = values(sample);
            let pad = match layout {
                Layout::Padded { .. } => longest - values.len(),
                Layout::Packed => 0,
            };
            let (left, right) = match layout {
                Layout::Padded {
                    side: PaddingSide::Left,
                    ..
                } => (pad, 0),
                _ => (0, pad),
            };
            flat.extend(std::iter::repeat_n(padding, left));
            flat.extend_from_slice(values);
            flat.extend(std::iter::repeat_n(padding, right));
        }
        Tensor::f_from_slice(&flat)?.f_view(shape)
    };
    let pad_id = match layout {
        Layout::Padded { pad_id, .. } => pad_id,
        Layout::Packed => 0,
    };
    let padded = samples
        .iter()
        .any(|sample| sample.input_ids.len() < columns);
    let attention_mask = match layout {
        Layout::Padded { .. } if padded => {
            let ones: Vec<Vec<i64>> = samples
                .iter()
                .map(|sample| vec![1; sample.input_ids.len()])
                .collect();
            let rows: Vec<Tensor> = ones
                .iter()
                .map(|ones| {
                    let pad = to_i64(longest - ones.len());
                    let sides = match layout {
                        Layout::Padded {
                            side: PaddingSide::Left,
                            ..
                        } => [pad, 0],
                        _ => [0, pad],
                    };
                    Tensor::f_from_slice(ones)?.f_constant_pad_nd(sides)
                })
                .collect::<Result<_, _>>()?;
            Some(Tensor::f_stack(&rows, 0)?)
        }
        _ => None,
    };
    let cu_seqlens = match layout {
        Layout::Packed => {
            let mut borders = vec![0];
            for sample in samples {
                borders.push(borders[borders.len() - 1] + to_i64(sample.input_ids.len()));
            }
            Some(borders)
        }
        Layout::Padded { .. } => None,
    };
    let image_grid_thw: Vec<[i64; 3]> = samples
        .iter()
        .flat_map(|sample| sample.image_grid_thw.iter().copied())
        .collect();
    let video_grid_thw: Vec<[i64; 3]> = samples
        .iter()
        .flat_map(|sample| sample.video_grid_thw.iter().copied())
        .collect();
    Ok(Batch {
        input_ids: place(|sample| &sample.input_ids, pad_id)?,
        attention_mask,
        labels: Some(place(|sample| &sample.labels, -100)?),
        mm_token_type_ids: Some(place(|sample| &sample.mm_token_type_ids, 0)?),
        pixel_values: pixels(samples, |sample| &sample.pixel_values, &image_grid_thw)?,
        image_grid_thw,
        pixel_values_videos: pixels(
            samples,
            |sample| &sample.pixel_values_videos,
            &video_grid_thw,
        )?,
        video_grid_thw,
        cu_seqlens,
    })
}

/// Prompts as one batch to generate from: padded on the left, so that every answer starts behind its prompt.
///
/// # Errors
/// When libtorch has no memory for it.
pub fn ask_batch(prompts: &[Sample], pad_id: Option<i64>) -> Result<Batch, TchError> {
    let layout = Layout::Padded {
        pad_id: pad_id.unwrap_or(0),
        side: PaddingSide::Left,
    };
    let batch = collate(&prompts.iter().collect::<Vec<_>>(), layout)?;
    Ok(Batch {
        labels: None,
        ..batch
    })
}

/// `[patches, values of a patch]` of all samples, or `None` without any.
fn pixels(
    samples: &[&Sample],
    values: fn(&Sample) -> &[f32],
    grids: &[[i64; 3]],
) -> Result<Option<Tensor>, TchError> {
    let patches: i64 = grids.iter().map(|grid| grid.iter().product::<i64>()).sum();
    if patches == 0 {
        return Ok(None);
    }
    let parts: Vec<Tensor> = samples
        .iter()
        .map(|sample| values(sample))
        .filter(|values| !values.is_empty())
        .map(Tensor::f_from_slice)
        .collect::<Result<_, _>>()?;
    Ok(Some(Tensor::f_cat(&parts, 0)?.f_view([patches, -1])?))
}

fn to_i64(length: usize) -> i64 {
    i64::try_from(length).expect("a length in memory fits")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(length: i64) -> Sample {
        Sample {
            input_ids: (1..=length).collect(),
            labels: (1..=length)
                .map(|id| if id > 2 { id } else { -100 })
                .collect(),
            mm_token_type_ids: vec![0; usize::try_from(length).unwrap()],
            image_grid_thw: vec![[1, 2, 2]],
            pixel_values: vec![0.5; 4 * 6],
            ..Sample::default()
        }
    }

    fn ids(tensor: &Tensor) -> Vec<Vec<i64>> {
        Vec::<Vec<i64>>::try_from(tensor).unwrap()
    }

    #[test]
    fn padding_goes_to_its_side_and_is_masked_and_no_target() {
        let (long, short) = (sample(4), sample(3));
        let batch = |side| collate(&[&long, &short], Layout::Padded { pad_id: 9, side }).unwrap();
        let right = batch(PaddingSide::Right);
        assert_eq!(ids(&right.input_ids), [[1, 2, 3, 4], [1, 2, 3, 9]]);
        assert_eq!(
            ids(right.attention_mask.as_ref().unwrap()),
            [[1, 1, 1, 1], [1, 1, 1, 0]]
        );
        assert_eq!(
            ids(right.labels.as_ref().unwrap()),
            [[-100, -100, 3, 4], [-100, -100, 3, -100]]
        );
        let left = batch(PaddingSide::Left);
        assert_eq!(ids(&left.input_ids)[1], [9, 1, 2, 3]);
        assert_eq!(ids(left.attention_mask.as_ref().unwrap())[1], [0, 1, 1, 1]);
        assert_eq!(right.pixel_values.unwrap().size(), [8, 6]);
        assert_eq!(right.image_grid_thw.len(), 2);
    }

    #[test]
    fn packing_joins_samples_and_marks_their_borders() {
        let (long, short) = (sample(4), sample(3));
        let batch = collate(&[&long, &short], Layout::Packed).unwrap();
        assert_eq!(ids(&batch.input_ids), [[1, 2, 3, 4, 1, 2, 3]]);
        assert_eq!(batch.cu_seqlens, Some(vec![0, 4, 7]));
        assert!(batch.attention_mask.is_none());
    }

    #[test]
    fn a_target_is_a_label_that_an_earlier_token_predicts() {
        let all = Sample {
            labels: vec![5, 6, 7, -100],
            input_ids: vec![5, 6, 7, 8],
            ..sample(4)
        };
        let counts = Counts::of(&all);
        assert_eq!(
            (counts.tokens, counts.targets, counts.mtp_targets),
            (4, 2, 1)
        );
        let sum: Counts = [counts, counts].into_iter().sum();
        assert_eq!((sum.samples, sum.targets), (2, 4));
    }
}
