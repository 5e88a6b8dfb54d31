//! Tensors in memory.

use bridge_core::checkpoint::hf::HfCheckpoint;
use bridge_core::checkpoint::{TensorInfo, TensorSource};

/// Name, dtype and shape, bytes.
pub type Tensors = Vec<(String, TensorInfo, Vec<u8>)>;

/// All tensors of a directory, as its files hold them.
pub fn read_all(checkpoint: &HfCheckpoint) -> Tensors {
    checkpoint
        .tensors()
        .map(|(name, info)| {
            let mut bytes = vec![0; usize::try_from(info.num_bytes()).unwrap()];
            checkpoint.read(name, 0, &mut bytes).unwrap();
            (name.to_owned(), info.clone(), bytes)
        })
        .collect()
}
