//! The values of one source, on their way to a target.

use super::element::{Rounding, cast, first_non_finite, load, round, store};
use super::{ConvertError, NonFinite};
use crate::Dtype;
use crate::checkpoint::Reader;
use crate::mapping::Transform;

/// What is read and then looked at or converted at a time: the kernel leaves what it copies in longer blocks in no near cache,
/// so that looking at it costs more (`benches/results/ffi.md`).
pub(super) const BLOCK_BYTES: usize = 64 << 10;

/// The values that a copy reads.
pub(super) struct Values<'a> {
    /// The target's name.
    pub(super) target: &'a str,
    /// The source's name.
    pub(super) name: &'a str,
    pub(super) reader: Reader<'a>,
    pub(super) from: Dtype,
    pub(super) to: Dtype,
    pub(super) transforms: &'a [Transform],
    pub(super) non_finite: NonFinite,
}

impl Values<'_> {
    /// Fills `into` with the values from element `first` on.
    pub(super) fn make(
        &self,
        mut first: usize,
        into: &mut [u8],
        scratch: &mut Vec<u8>,
    ) -> Result<Rounding, ConvertError> {
        if self.are_moved() && self.non_finite == NonFinite::Allow {
            self.read_into(first, into)?;
            return Ok(Rounding::default());
        }
        let mut rounding = Rounding::default();
        for block in into.chunks_mut(BLOCK_BYTES) {
            let count = block.len() / self.to.size_bytes();
            if self.are_moved() {
                self.read_into(first, block)?;
            } else {
                self.read(first, count, scratch)?;
                rounding.add(self.convert(scratch, block));
            }
            first += count;
        }
        Ok(rounding)
    }

    /// Reads so many values from element `first` on, as they are in the source.
    pub(super) fn read(
        &self,
        first: usize,
        count: usize,
        into: &mut Vec<u8>,
    ) -> Result<(), ConvertError> {
        into.resize(count * self.from.size_bytes(), 0);
        self.read_into(first, into)
    }

    /// Puts values that were read into the target.
    pub(super) fn convert(&self, values: &[u8], into: &mut [u8]) -> Rounding {
        if self.are_moved() {
            into.copy_from_slice(values);
            return Rounding::default();
        }
        convert_values((self.from, self.to), self.transforms, values, into)
    }

    /// Whether the target has the source's bytes.
    fn are_moved(&self) -> bool {
        self.from == self.to && self.transforms.is_empty()
    }

    fn read_into(&self, first: usize, into: &mut [u8]) -> Result<(), ConvertError> {
        let offset_bytes = first as u64 * self.from.size_bytes() as u64;
        (self.reader)(offset_bytes, into).map_err(|source| ConvertError::Checkpoint {
            target: self.target.to_owned(),
            source,
        })?;
        if self.non_finite == NonFinite::Refuse
            && let Some(index) = first_non_finite(self.from, into)
        {
            return Err(ConvertError::NonFinite {
                source_name: self.name.to_owned(),
                index: first + index,
                value: load(self.from, into, index),
            });
        }
        Ok(())
    }
}

/// Casts and transforms `values` into `into`, and counts what would not come back exactly.
pub(super) fn convert_values(
    (from, to): (Dtype, Dtype),
    transforms: &[Transform],
    values: &[u8],
    into: &mut [u8],
) -> Rounding {
    if transforms.is_empty()
        && let Some(rounding) = cast(from, to, values, into)
    {
        return rounding;
    }
    let wide = from.widest(to);
    let exact = transforms.is_empty() && wide == to;
    let mut rounding = Rounding::default();
    for index in 0..into.len() / to.size_bytes() {
        let value = load(from, values, index);
        let mut result = value;
        for transform in transforms {
            result = round(wide, transform.apply(result));
        }
        store(to, into, index, result);
        if exact {
            continue;
        }
        let mut back = load(to, into, index);
        for transform in transforms.iter().rev() {
            back = round(wide, transform.inverse().apply(back));
        }
        let error = (round(from, back) - value).abs();
        if error > 0.0 {
            rounding.elements += 1;
            rounding.max_error = rounding.max_error.max(error);
        }
    }
    rounding
}
