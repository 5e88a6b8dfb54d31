//! Tensors in memory, and directories of some of them.

use std::path::Path;

use bridge_core::checkpoint::hf::HfCheckpoint;
use bridge_core::checkpoint::torch_dist::{TorchDistCheckpoint, TorchDistLayout, TorchDistWriter};
use bridge_core::checkpoint::{Overwrite, TensorInfo, TensorSink, TensorSource};

/// Name, dtype and shape, bytes.
pub type Tensors = Vec<(String, TensorInfo, Vec<u8>)>;

/// All tensors of a directory, as its files hold them.
pub fn read_all(checkpoint: &HfCheckpoint) -> Tensors {
    checkpoint
        .tensors()
        .map(|(name, info)| (name.to_owned(), info.clone(), bytes(checkpoint, name)))
        .collect()
}

/// All bytes of a tensor.
pub fn bytes(source: &dyn TensorSource, name: &str) -> Vec<u8> {
    let info = source.info(name).unwrap();
    let mut bytes = vec![0; usize::try_from(info.num_bytes()).unwrap()];
    source.read(name, 0, &mut bytes).unwrap();
    bytes
}

/// A `torch_dist` directory with the tensors of another one that `keep` answers true for, and `more`.
pub fn filtered(
    source: &Path,
    target: &Path,
    keep: impl Fn(&str) -> bool,
    more: &[(&str, TensorInfo)],
) {
    let source = TorchDistCheckpoint::open(source).unwrap();
    let kept = source.tensors().filter(|(key, _)| keep(key));
    let mut layout = TorchDistLayout {
        tensors: kept
            .map(|(key, info)| (key.to_owned(), info.clone()))
            .collect(),
        ..TorchDistLayout::default()
    };
    let more = more
        .iter()
        .map(|(key, info)| ((*key).to_owned(), info.clone()));
    layout.tensors.extend(more);
    let writer = TorchDistWriter::create(&layout, target, Overwrite::Yes).unwrap();
    for (key, info) in &layout.tensors {
        let zeros = || vec![0; usize::try_from(info.num_bytes()).unwrap()];
        let same = source.info(key).filter(|theirs| theirs == info);
        let content = same.map_or_else(zeros, |_| bytes(&source, key));
        writer.write(key, 0, &content).unwrap();
    }
    writer.finish().unwrap();
}
