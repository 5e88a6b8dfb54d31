//! Which rows of a batch belong together.

use tch::{Device, Kind, Tensor};

use crate::shim::{at, bridge, one};

/// The samples of a batch, as ops that mix positions see them.
#[derive(Debug)]
pub enum Sequences {
    /// One sample a row of `[batch, seq]`.
    Padded {
        /// Rows.
        batch: i64,
        /// Columns.
        seq: i64,
        /// `[batch, seen + seq]`, true at real tokens; `None` when all are. With a cache of `seen` tokens the mask covers
        /// these too; ops without a cache read its last `seq` columns.
        mask: Option<Tensor>,
    },
    /// All samples after each other in one row: sample `i` is `cu_seqlens[i]..cu_seqlens[i + 1]`.
    Packed {
        /// Borders, from 0 to `total`, never falling.
        cu_seqlens: Vec<i64>,
        /// Tokens in the row.
        total: i64,
    },
}

impl Sequences {
    /// How many samples there are; each has a state of its own.
    pub fn count(&self) -> i64 {
        match self {
            Self::Padded { batch, .. } => *batch,
            Self::Packed { cu_seqlens, .. } => {
                i64::try_from(cu_seqlens.len().saturating_sub(1)).expect("fewer samples than i64")
            }
        }
    }

    /// `[batch, seq]` mask of the current tokens, true at real ones.
    pub(crate) fn current_mask(&self) -> Option<Tensor> {
        match self {
            Self::Padded {
                seq,
                mask: Some(mask),
                ..
            } => Some(
                mask.narrow(1, mask.size()[1] - seq, *seq)
                    .to_kind(Kind::Bool),
            ),
            _ => None,
        }
    }

    /// The borders of packed samples, empty for a padded batch.
    pub(crate) fn borders(&self) -> &[i64] {
        match self {
            Self::Padded { .. } => &[],
            Self::Packed { cu_seqlens, .. } => cu_seqlens,
        }
    }

    /// Borders of packed samples, pairwise.
    pub(crate) fn spans(cu_seqlens: &[i64]) -> impl Iterator<Item = (i64, i64)> + '_ {
        cu_seqlens
            .windows(2)
            .map(|pair| (pair[0], pair[1] - pair[0]))
    }

    /// The samples as kernels see them. Padding must be at the ends of rows.
    ///
    /// # Panics
    /// When the operator library has no kernels for `device`.
    pub fn pack(&self, device: Device) -> Pack {
        let options = (Kind::Int64, device);
        let (cu_seqlens, tokens, padded) = match self {
            Self::Packed { cu_seqlens, total } => (
                Tensor::from_slice(cu_seqlens).to_device(device),
                *total,
                false,
            ),
            Self::Padded { batch, seq, .. } => {
                let starts = Tensor::arange(*batch, options) * *seq;
                let end = Tensor::full([1], batch * seq, options);
                let mask = self.current_mask();
                let borders = match &mask {
                    None => starts,
                    Some(mask) => {
                        let mask = mask.to_kind(Kind::Int64);
                        let first = mask.argmax(1, false) + &starts;
                        let behind =
                            &first + mask.sum_dim_intlist([1i64].as_slice(), false, None::<Kind>);
                        Tensor::stack(&[starts, first, behind], 1).view([-1])
                    }
                };
                (Tensor::cat(&[borders, end], 0), batch * seq, mask.is_some())
            }
        };
        let chunk_map = one(bridge::kernel_chunk_map(at(&cu_seqlens), tokens));
        Pack {
            cu_seqlens,
            chunk_map,
            padded,
        }
    }

    /// `x` with zeros at padding; `x` is `[batch, seq, ..]`.
    pub(crate) fn zero_padding(&self, x: &Tensor) -> Tensor {
        let Some(mask) = self.current_mask() else {
            return x.shallow_clone();
        };
        let mut shape = mask.size();
        shape.resize(x.dim(), 1);
        x * mask.view(shape.as_slice()).to_kind(x.kind())
    }
}

/// The sequences of a batch on the device, for kernels; nothing of it is read on the host.
///
/// Where rows have padding, each row is three sequences: the padding before, the real tokens, the padding behind, any of them
/// perhaps empty. So no token moves, and what happens to padding reaches nobody.
#[derive(Debug)]
pub struct Pack {
    /// `[n + 1]` int64.
    pub(crate) cu_seqlens: Tensor,
    /// Of the operator `chunk_map`.
    pub(crate) chunk_map: Tensor,
    padded: bool,
}

impl Pack {
    /// States `[samples, ..]` as states of all sequences: those of padding are zero.
    pub(crate) fn spread(&self, states: &Tensor) -> Tensor {
        if !self.padded {
            return states.shallow_clone();
        }
        let zeros = states.zeros_like();
        Tensor::stack(&[&zeros, states, &zeros], 1).flatten(0, 1)
    }

    /// Of the states of all sequences those of the samples.
    pub(crate) fn samples(&self, states: &Tensor) -> Tensor {
        if !self.padded {
            return states.shallow_clone();
        }
        states.unflatten(0, [-1, 3]).select(1, 1).contiguous()
    }
}

/// A float mask for attention scores: 0 where the key may be seen.
pub(crate) fn additive_mask(visible: &Tensor, kind: Kind) -> Tensor {
    Tensor::zeros(visible.size(), (kind, visible.device()))
        .masked_fill(&visible.logical_not(), f64::NEG_INFINITY)
}

/// `[queries, keys]`, true where query `i` may see key `j`: `j <= i + offset`.
pub(crate) fn causal(queries: i64, keys: i64, offset: i64, device: Device) -> Tensor {
    Tensor::ones([queries, keys], (Kind::Bool, device)).tril(offset)
}
