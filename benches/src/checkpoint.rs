//! Checkpoints to convert.

use std::path::Path;

use bridge_core::checkpoint::hf::{HfLayout, HfWriter};
use bridge_core::checkpoint::{Overwrite, TensorInfo, TensorSink};
use bridge_core::config::HfConfig;
use bridge_core::mapping::Stored;
use bridge_core::{Dtype, models};

/// Bytes of a write, and of the pattern that fills a checkpoint; a multiple of every dtype's size.
const BLOCK_BYTES: usize = 1 << 20;

/// Writes a bfloat16 checkpoint of `config` to `dir`, every byte 0x3c: small finite values in any dtype.
///
/// # Panics
/// When the config describes no model, or the disk is full.
pub fn write_checkpoint(config: &HfConfig, dir: &Path) {
    let registry = models::registry(config).expect("a sound config");
    let tensors = registry.hf_parameters().map(|(name, parameter)| {
        let dtype = match parameter.stored {
            Stored::AsModel => Dtype::Bf16,
            Stored::Float32 => Dtype::F32,
        };
        let shape = parameter.shape.clone();
        (name.to_owned(), TensorInfo { dtype, shape })
    });
    let layout = HfLayout::sharded(tensors.collect(), u64::MAX);
    let writer = HfWriter::create(&layout, dir, Overwrite::Yes).expect("a writable disk");
    let block = vec![0x3c; BLOCK_BYTES];
    for (name, info) in layout.tensors() {
        let mut offset = 0;
        while offset < info.num_bytes() {
            let left = usize::try_from(info.num_bytes() - offset).unwrap_or(BLOCK_BYTES);
            let part = &block[..left.min(BLOCK_BYTES)];
            writer.write(name, offset, part).expect("room on the disk");
            offset += part.len() as u64;
        }
    }
    writer
        .write_file("config.json", config.to_json().as_bytes())
        .expect("room on the disk");
    writer.finish().expect("a whole checkpoint");
}
