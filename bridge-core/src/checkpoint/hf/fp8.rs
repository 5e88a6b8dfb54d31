//! Block-wise FP8: a matrix `NAME` in F8_E4M3 beside `NAME_scale_inv`, one scale a block.
//!
//! An opened checkpoint shows such a matrix as float32, each value multiplied by the scale of its block, and its scales not
//! at all. Whoever reads it rounds once, from float32 to the dtype that is wanted. The way back is closed: what is written
//! instead is [`UNQUANTISED`].

use std::sync::OnceLock;

use half::{bf16, f16};
use indexmap::IndexMap;

use super::HfCheckpoint;
use super::reader::Place;
use crate::Dtype;
use crate::checkpoint::{CheckpointError, FileProblem, TensorInfo, TensorSource};
use crate::float8::E4M3;

/// The dtype of a matrix that was in FP8, where nothing else is asked for.
pub const UNQUANTISED: Dtype = Dtype::Bf16;

/// Stands behind the name of the matrix that the scales belong to.
const SCALE_SUFFIX: &str = "_scale_inv";

/// The scales of one matrix.
#[derive(Debug, Clone)]
pub(super) struct Scales {
    /// Their own name.
    name: String,
    place: Place,
    /// Rows and columns of a block.
    block: [usize; 2],
    /// Columns of the matrix.
    columns: usize,
    /// Read when the matrix first is: one value for 16,384 of the matrix.
    values: OnceLock<Vec<f32>>,
}

impl HfCheckpoint {
    /// The same checkpoint with its FP8 matrices as float32; `block` is `weight_block_size` of its config.
    ///
    /// # Errors
    /// [`CheckpointError::Files`] with every matrix whose scales are missing or misshapen, every scale without a matrix,
    /// and every FP8 tensor that is no matrix.
    pub fn dequantised(mut self, block: [usize; 2]) -> Result<Self, CheckpointError> {
        let mut problems = Vec::new();
        let mut scales: IndexMap<String, Place> = IndexMap::new();
        self.tensors.retain(|name, place| {
            let is_scale = name.ends_with(SCALE_SUFFIX);
            if is_scale {
                scales.insert(name.clone(), place.clone());
            }
            !is_scale
        });
        for (name, place) in &mut self.tensors {
            let scale = scales.shift_remove(&format!("{name}{SCALE_SUFFIX}"));
            match (place.info.dtype == Dtype::F8E4M3, scale) {
                (true, Some(scale)) => match Scales::new(name, place, scale, block) {
                    Ok(scales) => {
                        place.info.dtype = Dtype::F32;
                        place.scales = Some(Box::new(scales));
                    }
                    Err(problem) => problems.push(problem),
                },
                (true, None) => problems.push(FileProblem::NoScales {
                    name: name.clone(),
                    scales: format!("{name}{SCALE_SUFFIX}"),
                }),
                (false, Some(_)) => problems.push(FileProblem::NotQuantised {
                    scales: format!("{name}{SCALE_SUFFIX}"),
                    name: name.clone(),
                    dtype: place.info.dtype,
                }),
                (false, None) => {}
            }
        }
        problems.extend(
            scales
                .into_keys()
                .map(|scales| FileProblem::NothingToScale { scales }),
        );
        if problems.is_empty() {
            Ok(self)
        } else {
            Err(CheckpointError::Files {
                path: self.dir,
                problems,
            })
        }
    }

    /// Names of the matrices that are in FP8 in the files, in their order.
    ///
    /// Importing them loses the way back: their values can be written in [`UNQUANTISED`] only.
    pub fn quantised(&self) -> impl Iterator<Item = &str> {
        self.tensors
            .iter()
            .filter(|(_, place)| place.scales.is_some())
            .map(|(name, _)| name.as_str())
    }

    /// Whether a tensor is in FP8 in its file.
    #[must_use]
    pub fn is_quantised(&self, name: &str) -> bool {
        self.tensors
            .get(name)
            .is_some_and(|place| place.scales.is_some())
    }

    /// The checkpoint as a directory like it is written: matrices that are in FP8 in its files are [`UNQUANTISED`],
    /// rounded once. What is carried over from it unchanged is read here.
    #[must_use]
    pub fn as_written(&self) -> AsWritten<'_> {
        AsWritten { checkpoint: self }
    }
}

/// A checkpoint as [`super::HfLayout::like`] describes it; see [`HfCheckpoint::as_written`].
#[derive(Debug, Clone, Copy)]
pub struct AsWritten<'a> {
    checkpoint: &'a HfCheckpoint,
}

impl TensorSource for AsWritten<'_> {
    fn info(&self, name: &str) -> Option<TensorInfo> {
        let mut info = self.checkpoint.info(name)?;
        if self.checkpoint.is_quantised(name) {
            info.dtype = UNQUANTISED;
        }
        Some(info)
    }

    fn read(&self, name: &str, offset_bytes: u64, into: &mut [u8]) -> Result<(), CheckpointError> {
        if !self.checkpoint.is_quantised(name) {
            return self.checkpoint.read(name, offset_bytes, into);
        }
        self.checkpoint
            .read_scaled(name, offset_bytes, into, |value| {
                bf16::from_f32(value).to_le_bytes()
            })
    }
}

impl Scales {
    fn new(
        name: &str,
        matrix: &Place,
        place: Place,
        block: [usize; 2],
    ) -> Result<Self, FileProblem> {
        let [rows, columns] = matrix.info.shape[..] else {
            return Err(FileProblem::NoMatrix {
                name: name.to_owned(),
                shape: matrix.info.shape.clone(),
            });
        };
        let scales = format!("{name}{SCALE_SUFFIX}");
        let expected = [rows.div_ceil(block[0]), columns.div_ceil(block[1])];
        if place.info.shape != expected {
            return Err(FileProblem::ScaleShape {
                scales,
                found: place.info.shape,
                expected,
                block,
                matrix: [rows, columns],
            });
        }
        if !matches!(place.info.dtype, Dtype::F32 | Dtype::Bf16 | Dtype::F16) {
            return Err(FileProblem::ScaleDtype {
                scales,
                found: place.info.dtype,
            });
        }
        Ok(Self {
            name: scales,
            place,
            block,
            columns,
            values: OnceLock::new(),
        })
    }

    /// All scales, in float32.
    fn values(&self, checkpoint: &HfCheckpoint) -> Result<&[f32], CheckpointError> {
        if let Some(values) = self.values.get() {
            return Ok(values);
        }
        let TensorInfo { dtype, .. } = self.place.info;
        let len = usize::try_from(self.place.info.num_bytes()).unwrap_or(usize::MAX);
        let mut bytes = vec![0; len];
        checkpoint.read_place(&self.place, 0, &mut bytes)?;
        let values: Vec<f32> = bytes
            .chunks_exact(dtype.size_bytes())
            .map(|one| match (dtype, one) {
                (Dtype::Bf16, [a, b]) => bf16::from_le_bytes([*a, *b]).to_f32(),
                (Dtype::F16, [a, b]) => f16::from_le_bytes([*a, *b]).to_f32(),
                (_, [a, b, c, d]) => f32::from_le_bytes([*a, *b, *c, *d]),
                _ => f32::NAN,
            })
            .collect();
        if let Some(index) = values.iter().position(|value| !value.is_finite()) {
            return Err(CheckpointError::Scale {
                name: self.name.clone(),
                index,
                value: values[index],
            });
        }
        // Another thread may have been faster; its values are the same.
        Ok(self.values.get_or_init(|| values))
    }

    /// Calls `each` with the runs of elements from `first` on that have one scale: start, length, scale.
    fn runs(
        &self,
        values: &[f32],
        first: usize,
        count: usize,
        mut each: impl FnMut(std::ops::Range<usize>, f32),
    ) {
        let scale_columns = self.columns.div_ceil(self.block[1]);
        let mut done = 0;
        while done < count {
            let (row, column) = ((first + done) / self.columns, (first + done) % self.columns);
            let to_border = self.block[1] - column % self.block[1];
            let run = to_border.min(self.columns - column).min(count - done);
            let scale = (row / self.block[0]) * scale_columns + column / self.block[1];
            each(done..done + run, values[scale]);
            done += run;
        }
    }
}

impl HfCheckpoint {
    /// Fills `into` with the bytes from `offset_bytes` on of a matrix whose scaled values `store` makes.
    pub(super) fn read_scaled<const N: usize>(
        &self,
        name: &str,
        offset_bytes: u64,
        into: &mut [u8],
        store: impl Fn(f32) -> [u8; N] + std::marker::Copy,
    ) -> Result<(), CheckpointError> {
        let (Some(place), size) = (self.tensors.get(name), N as u64) else {
            return Err(CheckpointError::NoTensor {
                name: name.to_owned(),
            });
        };
        let num_bytes = place.info.numel() as u64 * size;
        crate::checkpoint::error::check_range(name, offset_bytes, into.len(), num_bytes)?;
        let inside = offset_bytes % size;
        if inside != 0 || !into.len().is_multiple_of(N) {
            // The elements that the range touches, and of their bytes the range.
            let inside = usize::try_from(inside).unwrap_or(0);
            let mut whole = vec![0; (inside + into.len()).next_multiple_of(N)];
            self.read_scaled(name, offset_bytes - inside as u64, &mut whole, store)?;
            into.copy_from_slice(&whole[inside..inside + into.len()]);
            return Ok(());
        }
        let Some(scales) = &place.scales else {
            return self.read_place(place, offset_bytes, into);
        };
        let values = scales.values(self)?;
        let first = usize::try_from(offset_bytes / size).unwrap_or(usize::MAX);
        let count = into.len() / N;
        // Read into the end and spread from the front: element i is written at or before where it stood.
        let codes = (N - 1) * count;
        self.read_place(place, first as u64, &mut into[codes..])?;
        scales.runs(values, first, count, |run, scale| {
            for element in run {
                let value = E4M3[usize::from(into[codes + element])] * scale;
                into[N * element..N * (element + 1)].copy_from_slice(&store(value));
            }
        });
        Ok(())
    }
}
