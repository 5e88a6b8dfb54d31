//! What generation keeps between calls: keys and values of attention layers, states of delta layers.

use tch::{Kind, Tensor};

use crate::ops::gdn::GdnState;

/// Smallest number of tokens that a new buffer has room for.
const FIRST_CAPACITY: i64 = 256;

/// State of every layer for one running batch.
#[derive(Debug)]
pub(crate) struct Cache {
    pub(super) layers: Vec<LayerCache>,
    /// Tokens seen so far, padding included.
    pub(crate) length: i64,
}

impl Cache {
    /// An empty cache for a model of `layers` layers.
    pub(crate) fn new(layers: usize) -> Self {
        Self {
            layers: (0..layers).map(|_| LayerCache::default()).collect(),
            length: 0,
        }
    }
}

/// State of one layer; which half is used depends on its kind.
#[derive(Debug, Default)]
pub(super) struct LayerCache {
    pub(super) keys_values: KeysValues,
    pub(super) delta: Option<GdnState>,
}

/// Keys and values `[batch, tokens, heads, d]` in buffers that grow by doubling.
#[derive(Debug, Default)]
pub(super) struct KeysValues {
    buffers: Option<(Tensor, Tensor)>,
    length: i64,
}

impl KeysValues {
    /// Appends `[batch, new, heads, d]` and returns all keys and values so far.
    pub(super) fn append(&mut self, k: &Tensor, v: &Tensor) -> (Tensor, Tensor) {
        let length = self.length + k.size()[1];
        let capacity = self.buffers.as_ref().map_or(0, |(keys, _)| keys.size()[1]);
        if length > capacity {
            let room = (2 * length).max(FIRST_CAPACITY);
            let grown = |old: Option<&Tensor>, new: &Tensor| {
                let mut size = new.size();
                size[1] = room;
                let buffer = Tensor::empty(&size[..], (new.kind(), new.device()));
                if let Some(old) = old {
                    let mut head = buffer.narrow(1, 0, self.length);
                    head.copy_(&old.narrow(1, 0, self.length));
                }
                buffer
            };
            let old = self.buffers.as_ref();
            self.buffers = Some((
                grown(old.map(|(keys, _)| keys), k),
                grown(old.map(|(_, values)| values), v),
            ));
        }
        let (keys, values) = self.buffers.as_ref().expect("the buffers were made above");
        for (buffer, new) in [(keys, k), (values, v)] {
            buffer.narrow(1, self.length, new.size()[1]).copy_(new);
        }
        self.length = length;
        (keys.narrow(1, 0, length), values.narrow(1, 0, length))
    }
}

/// The mask `[batch, seen + 1]` after one more real token of each sample.
pub(crate) fn grown_mask(mask: &Tensor) -> Tensor {
    let one = Tensor::ones([mask.size()[0], 1], (Kind::Bool, mask.device()));
    Tensor::cat(&[mask, &one], 1)
}
