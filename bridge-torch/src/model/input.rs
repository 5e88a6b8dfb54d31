//! Checks a [`Batch`] against the model and turns it into what the blocks read.
//!
//! Everything that decides a shape is computed here on the host, so the model never asks the device.

use bridge_core::config::HfConfig;
use tch::{Device, Kind, Tensor};

use super::ModelError;
use super::positions::{self, Grids, Positions, Samples};
use crate::batch::{Batch, BatchError, Modality};
use crate::ops::sequences::Sequences;

/// A label that is no target.
const IGNORED: i64 = -100;

/// Which places of the batch get which positions when there are no grids.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum TextPositions {
    /// 0 .. seq in every row, padding included: what a forward pass does.
    Columns,
    /// Real tokens counted from 0: what generation does.
    RealTokens,
}

/// A checked batch, on the model's device.
#[derive(Debug)]
pub(crate) struct ModelInput {
    pub(crate) batch: i64,
    pub(crate) seq: i64,
    /// `[batch, seq]`
    pub(crate) ids: Tensor,
    /// `[batch, seq]`: id of the next token of the same sample, 0 behind the last one.
    pub(crate) next_ids: Tensor,
    pub(crate) sequences: Sequences,
    /// `[batch, seq]`, true at real tokens; `None` when all are.
    pub(crate) mask: Option<Tensor>,
    /// Row and column of the first padding between real tokens.
    pub(crate) hole: Option<(usize, usize)>,
    /// `[3, batch, seq]`
    pub(crate) position_ids: Tensor,
    /// One a sample.
    pub(crate) rope_deltas: Vec<i64>,
    /// Real tokens of each sample.
    pub(crate) lengths: Vec<i64>,
    pub(crate) has_grids: bool,
    pub(crate) images: Option<Visual>,
    pub(crate) videos: Option<Visual>,
    pub(crate) targets: Option<Targets>,
    pub(crate) mtp_targets: Option<Targets>,
}

/// Pixels of one modality and where their tokens go.
#[derive(Debug)]
pub(crate) struct Visual {
    /// `[patches, patch elements]`
    pub(crate) pixels: Tensor,
    pub(crate) grids: Vec<[i64; 3]>,
    /// `[visual tokens]`: flat places (row * seq + column) of the placeholders.
    pub(crate) places: Tensor,
}

/// What each token predicts.
#[derive(Debug)]
pub(crate) struct Targets {
    /// `[batch * seq]`, -100 where there is none.
    pub(crate) ids: Tensor,
    pub(crate) count: i64,
}

impl ModelInput {
    /// Checks `batch` and moves it to `device`.
    pub(crate) fn new(
        batch: &Batch,
        config: &HfConfig,
        text_positions: TextPositions,
        device: Device,
    ) -> Result<Self, ModelError> {
        let (rows, seq) = match batch.input_ids.size()[..] {
            [rows, seq] if rows > 0 && seq > 0 => (rows, seq),
            [_, _] => {
                return Err(BatchError::Empty {
                    found: batch.input_ids.size(),
                }
                .into());
            }
            _ => return Err(wrong_shape("input_ids", &batch.input_ids, "[batch, seq]").into()),
        };
        let table = Table { rows, seq };
        let vocab = i64::try_from(config.text.vocab_size).unwrap_or(i64::MAX);
        let ids = table.read("input_ids", &batch.input_ids)?;
        table.check(
            "input_ids",
            &ids,
            |id| (0..vocab).contains(&id),
            || format!("token ids go from 0 to {}", vocab - 1),
        )?;
        let mask = table.optional("attention_mask", batch.attention_mask.as_ref())?;
        if let Some(mask) = &mask {
            let allowed = || "1 is a real token, 0 is padding".to_owned();
            table.check(
                "attention_mask",
                mask,
                |value| value == 0 || value == 1,
                allowed,
            )?;
        }
        let mask: Option<Vec<bool>> = mask
            .map(|mask| mask.iter().map(|&value| value == 1).collect())
            .filter(|mask: &Vec<bool>| mask.contains(&false));
        let types = table.optional("mm_token_type_ids", batch.mm_token_type_ids.as_ref())?;
        if let Some(types) = &types {
            let allowed = || "0 is text, 1 an image, 2 a video".to_owned();
            table.check(
                "mm_token_type_ids",
                types,
                |kind| (0..3).contains(&kind),
                allowed,
            )?;
        }
        let labels = table.optional("labels", batch.labels.as_ref())?;
        if let Some(labels) = &labels {
            let fits = |label| label == IGNORED || (0..vocab).contains(&label);
            table.check("labels", labels, fits, || {
                format!("labels go from 0 to {}, -100 is no target", vocab - 1)
            })?;
        }

        let borders = borders(batch, table, mask.is_some())?;
        let rows_of = |borders: &Option<Vec<usize>>| match borders {
            Some(borders) => borders.clone(),
            None => (0..=table.rows()).map(|row| row * table.seq()).collect(),
        };
        let sample_borders = rows_of(&borders);
        let samples = match &borders {
            Some(borders) => positions::packed_samples(borders),
            None => positions::padded_samples(table.rows(), table.seq(), mask.as_deref()),
        };
        let lengths = samples
            .iter()
            .map(|sample| i64::try_from(sample.len()).unwrap_or(i64::MAX))
            .collect();
        let visual = VisualReader {
            config,
            ids: &ids,
            device,
        };
        let images = visual.read(
            Modality::Image,
            batch.pixel_values.as_ref(),
            &batch.image_grid_thw,
        )?;
        let videos = visual.read(
            Modality::Video,
            batch.pixel_values_videos.as_ref(),
            &batch.video_grid_thw,
        )?;
        let has_grids = types.is_some() && (images.is_some() || videos.is_some());
        let Positions {
            ids: position_ids,
            rope_deltas,
        } = match types.as_deref().filter(|_| has_grids) {
            Some(types) => {
                let grids = Grids {
                    images: &batch.image_grid_thw,
                    videos: &batch.video_grid_thw,
                    merge: merge(config),
                };
                positions::with_grids(types, &samples, grids)?
            }
            None => positions::text(
                ids.len(),
                &text_samples(text_positions, &borders, table, samples),
            ),
        };

        let next_ids = shifted(&ids, &sample_borders, 1, 0);
        let targets = labels
            .as_ref()
            .map(|labels| shifted(labels, &sample_borders, 1, IGNORED));
        let mtp_targets = labels
            .as_ref()
            .map(|labels| shifted(labels, &sample_borders, 2, IGNORED));
        let hole = mask.as_deref().and_then(|mask| hole(mask, table.seq()));
        let mask = mask.map(|mask| {
            Tensor::from_slice(&mask)
                .view([rows, seq])
                .to_device(device)
        });
        let sequences = match &borders {
            Some(_) => Sequences::Packed {
                cu_seqlens: batch.cu_seqlens.clone().unwrap_or_default(),
                total: seq,
            },
            None => Sequences::Padded {
                batch: rows,
                seq,
                mask: mask.as_ref().map(Tensor::shallow_clone),
            },
        };
        Ok(Self {
            batch: rows,
            seq,
            ids: Tensor::from_slice(&ids).view([rows, seq]).to_device(device),
            next_ids: Tensor::from_slice(&next_ids)
                .view([rows, seq])
                .to_device(device),
            sequences,
            mask,
            hole,
            position_ids: Tensor::from_slice(&position_ids)
                .view([3, rows, seq])
                .to_device(device),
            rope_deltas,
            lengths,
            has_grids,
            images,
            videos,
            targets: targets.map(|ids| Targets::new(&ids, device)),
            mtp_targets: mtp_targets.map(|ids| Targets::new(&ids, device)),
        })
    }

    /// `[batch * seq]`, true at real tokens; `None` when all are.
    pub(crate) fn flat_mask(&self) -> Option<Tensor> {
        self.mask.as_ref().map(|mask| mask.view([-1]))
    }
}

impl Targets {
    fn new(ids: &[i64], device: Device) -> Self {
        let count = ids.iter().filter(|&&id| id != IGNORED).count();
        Self {
            ids: Tensor::from_slice(ids).to_device(device),
            count: i64::try_from(count).unwrap_or(i64::MAX),
        }
    }
}

/// Row and column of the first padding that has real tokens of its row on both sides.
fn hole(mask: &[bool], seq: usize) -> Option<(usize, usize)> {
    mask.chunks(seq).enumerate().find_map(|(row, mask)| {
        let first = mask.iter().position(|&real| real)?;
        let last = mask.iter().rposition(|&real| real)?;
        let column = mask[first..last].iter().position(|&real| !real)?;
        Some((row, first + column))
    })
}

/// `spatial_merge_size`, 1 without a tower.
fn merge(config: &HfConfig) -> i64 {
    let size = config
        .vision
        .as_ref()
        .map_or(1, |vision| vision.spatial_merge_size);
    i64::try_from(size).unwrap_or(i64::MAX)
}

/// Which tokens count as real for text positions.
fn text_samples(
    text_positions: TextPositions,
    borders: &Option<Vec<usize>>,
    table: Table,
    samples: Samples,
) -> Samples {
    match (text_positions, borders) {
        (TextPositions::RealTokens, _) | (_, Some(_)) => samples,
        (TextPositions::Columns, None) => {
            positions::padded_samples(table.rows(), table.seq(), None)
        }
    }
}

/// Moves values `by` places to the left within each sample; freed places hold `fill`.
fn shifted(values: &[i64], borders: &[usize], by: usize, fill: i64) -> Vec<i64> {
    let mut out = vec![fill; values.len()];
    for pair in borders.windows(2) {
        let (start, end) = (pair[0], pair[1]);
        if end - start > by {
            out[start..end - by].copy_from_slice(&values[start + by..end]);
        }
    }
    out
}

/// The borders of a packed batch; `None` when it is padded.
fn borders(batch: &Batch, table: Table, masked: bool) -> Result<Option<Vec<usize>>, BatchError> {
    let Some(found) = &batch.cu_seqlens else {
        return Ok(None);
    };
    if table.rows != 1 || masked {
        return Err(BatchError::Packed {
            found: batch.input_ids.size(),
            masked,
        });
    }
    let rising = found.windows(2).all(|pair| pair[0] <= pair[1]);
    if found.first() != Some(&0) || found.last() != Some(&table.seq) || !rising {
        return Err(BatchError::Borders {
            found: found.clone(),
            total: table.seq,
        });
    }
    let borders = found
        .iter()
        .map(|&border| usize::try_from(border).unwrap_or(0));
    Ok(Some(borders.collect()))
}

fn wrong_shape(name: &'static str, found: &Tensor, expected: impl Into<String>) -> BatchError {
    BatchError::Shape {
        name,
        found: found.size(),
        expected: expected.into(),
    }
}

/// The shape of `input_ids`, which the other token fields share.
#[derive(Debug, Clone, Copy)]
struct Table {
    rows: i64,
    seq: i64,
}

impl Table {
    fn rows(self) -> usize {
        usize::try_from(self.rows).unwrap_or(0)
    }

    fn seq(self) -> usize {
        usize::try_from(self.seq).unwrap_or(0)
    }

    fn read(self, name: &'static str, tensor: &Tensor) -> Result<Vec<i64>, ModelError> {
        if tensor.size() != [self.rows, self.seq] {
            let expected = format!("[{}, {}] as input_ids", self.rows, self.seq);
            return Err(wrong_shape(name, tensor, expected).into());
        }
        let kind = tensor.f_kind()?;
        if !matches!(
            kind,
            Kind::Int64 | Kind::Int | Kind::Int16 | Kind::Uint8 | Kind::Bool
        ) {
            return Err(BatchError::Type {
                name,
                found: format!("{kind:?}"),
                expected: "integers",
            }
            .into());
        }
        let host = tensor.f_to_device(Device::Cpu)?.f_to_kind(Kind::Int64)?;
        Ok(Vec::try_from(host.f_contiguous()?.f_view([-1])?)?)
    }

    fn optional(
        self,
        name: &'static str,
        tensor: Option<&Tensor>,
    ) -> Result<Option<Vec<i64>>, ModelError> {
        tensor.map(|tensor| self.read(name, tensor)).transpose()
    }

    fn check(
        self,
        name: &'static str,
        values: &[i64],
        fits: impl Fn(i64) -> bool,
        allowed: impl Fn() -> String,
    ) -> Result<(), BatchError> {
        match values.iter().position(|&value| !fits(value)) {
            None => Ok(()),
            Some(at) => Err(BatchError::Value {
                name,
                found: values[at],
                sample: at / self.seq(),
                position: at % self.seq(),
                allowed: allowed(),
            }),
        }
    }
}

/// Reads the pixels of one modality and finds their places in the text.
struct VisualReader<'a> {
    config: &'a HfConfig,
    ids: &'a [i64],
    device: Device,
}

impl VisualReader<'_> {
    fn read(
        &self,
        modality: Modality,
        pixels: Option<&Tensor>,
        grids: &[[i64; 3]],
    ) -> Result<Option<Visual>, ModelError> {
        let (id, name) = match modality {
            Modality::Image => (self.config.image_token_id, "pixel_values"),
            Modality::Video => (self.config.video_token_id, "pixel_values_videos"),
        };
        let places: Vec<i64> = (0..)
            .zip(self.ids)
            .filter(|&(_, &found)| found == id)
            .map(|(at, _)| at)
            .collect();
        let half = |present, absent| BatchError::Half {
            modality,
            present,
            absent,
        };
        let pixels = match (pixels, grids.is_empty()) {
            (Some(pixels), false) => pixels,
            (Some(_), true) => return Err(half("pixels", "grids").into()),
            (None, false) => return Err(half("grids", "pixels").into()),
            (None, true) if places.is_empty() => return Ok(None),
            (None, true) => {
                return Err(BatchError::Placeholders {
                    modality,
                    id,
                    placeholders: places.len(),
                    visual: 0,
                }
                .into());
            }
        };
        let Some(vision) = &self.config.vision else {
            return Err(ModelError::Unsupported {
                what: "pixels in a model without a vision tower",
                found: format!("{name} of shape {:?}", pixels.size()),
            });
        };
        let elements = i64::try_from(vision.patch_elements()).unwrap_or(i64::MAX);
        if !matches!(pixels.size()[..], [_, columns] if columns == elements) {
            return Err(wrong_shape(name, pixels, format!("[patches, {elements}]")).into());
        }
        if !pixels.f_kind().is_ok_and(|kind| {
            matches!(
                kind,
                Kind::Float | Kind::Double | Kind::BFloat16 | Kind::Half
            )
        }) {
            return Err(BatchError::Type {
                name,
                found: format!("{:?}", pixels.kind()),
                expected: "floating point numbers",
            }
            .into());
        }
        let merge = merge(self.config);
        let mut described: i64 = 0;
        let mut visual = 0;
        for (index, &grid) in grids.iter().enumerate() {
            let [t, h, w] = grid;
            let patches = t.checked_mul(h).and_then(|th| th.checked_mul(w));
            let fits = t > 0 && h > 0 && w > 0 && h % merge == 0 && w % merge == 0;
            let sum = patches.and_then(|patches| described.checked_add(patches));
            described = match sum {
                Some(sum) if fits => sum,
                _ => {
                    return Err(BatchError::Grid {
                        modality,
                        index,
                        grid,
                        merge,
                    }
                    .into());
                }
            };
            visual += positions::merged_tokens(grid, merge);
        }
        if described != pixels.size()[0] {
            return Err(BatchError::Patches {
                modality,
                described,
                found: pixels.size()[0],
            }
            .into());
        }
        if visual != places.len() {
            return Err(BatchError::Placeholders {
                modality,
                id,
                placeholders: places.len(),
                visual,
            }
            .into());
        }
        Ok(Some(Visual {
            pixels: pixels.f_to_device(self.device)?,
            grids: grids.to_vec(),
            places: Tensor::from_slice(&places).to_device(self.device),
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_shift_never_takes_a_value_from_the_next_sample() {
        let shifted_once = shifted(&[1, 2, 3, 4, 5], &[0, 3, 3, 4, 5], 1, IGNORED);
        assert_eq!(shifted_once, [2, 3, IGNORED, IGNORED, IGNORED]);
        let shifted_twice = shifted(&[1, 2, 3, 4, 5], &[0, 5], 2, 0);
        assert_eq!(shifted_twice, [3, 4, 5, 0, 0]);
    }
}
