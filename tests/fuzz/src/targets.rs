//! One function a parser. Their names are those of the fuzz targets and of the folders of the corpus.

use bridge_core::AutoBridge;
use bridge_core::checkpoint::hf::HfCheckpoint;
use bridge_core::checkpoint::torch_dist::TorchDistCheckpoint;
use bridge_core::checkpoint::{TensorInfo, TensorSource};
use bridge_core::config::HfConfig;
use bridge_core::layout::PipelineLayout;

use crate::room::peak_of;
use crate::{Room, Target};

mod forged;

/// Of a header and of an index only names, sizes and places are kept, and nothing is kept twice: measured, at most 3.5
/// times the shortest entries, 2.9 and 1.9 times those of a real model. Only an index that names as many shards as tensors
/// takes 10 times its size: each shard is a list.
const ENTRIES_FACTOR: usize = 4;
/// Other JSON becomes a tree of values, of which a text may have 131072: what stands in a config, beside the map of an
/// index and in the metadata of a header. Keys take the most, about 330 bytes each while their map grows.
const JSON_FLOOR: usize = 48 << 20;
/// The pickle machine keeps 20 bytes for a value of one byte, and its growing tables up to twice as much: measured, 27
/// times for such values, 8 times for what Megatron-Core writes. Its limit cannot be lower: a list of small numbers, which
/// a checkpoint may hold, takes 12 times its two bytes each, before growth.
const PICKLE_FACTOR: usize = 28;
const FLOOR: usize = 128 << 10;
/// A layout is written out to at most 2^18 characters, each of which may be a stage, and here it is so twice.
const LAYOUT_FLOOR: usize = 64 << 20;

/// Every target.
pub const ALL: [Target; 7] = [
    target(
        "safetensors_header",
        safetensors_header,
        ENTRIES_FACTOR,
        JSON_FLOOR,
    ),
    target("index_json", index_json, ENTRIES_FACTOR, JSON_FLOOR),
    target("config_json", config_json, ENTRIES_FACTOR, JSON_FLOOR),
    target(
        "torch_dist_metadata",
        torch_dist_metadata,
        PICKLE_FACTOR,
        FLOOR,
    ),
    target("common_pt", common_pt, PICKLE_FACTOR, FLOOR),
    target("distcp_item", distcp_item, PICKLE_FACTOR, FLOOR),
    target(
        "pipeline_layout",
        pipeline_layout,
        PICKLE_FACTOR,
        LAYOUT_FLOOR,
    ),
];

const fn target(
    name: &'static str,
    peak_of: fn(&[u8]) -> usize,
    memory_factor: usize,
    memory_floor: usize,
) -> Target {
    Target {
        name,
        peak_of,
        memory_factor,
        memory_floor,
    }
}

/// A safetensors file, header and data. Tensors of an accepted file are read; the library must accept it too.
#[must_use]
pub fn safetensors_header(input: &[u8]) -> usize {
    thread_local! {
        static ROOM: Room = Room::with(&[]);
    }
    ROOM.with(|room| {
        room.peak_of("model.safetensors", input, |dir| {
            if let Ok(checkpoint) = HfCheckpoint::open(dir) {
                read_all(&checkpoint, checkpoint.tensors());
                allocation_counter::opt_out(|| {
                    let theirs = safetensors::SafeTensors::read_metadata(input);
                    assert!(theirs.is_ok(), "other tools refuse it: {theirs:?}");
                });
            }
        })
    })
}

/// An index beside two shards that hold one tensor each, `a` and `b`.
#[must_use]
pub fn index_json(input: &[u8]) -> usize {
    thread_local! {
        static ROOM: Room = Room::with(&[
            ("model-00001-of-00002.safetensors", forged::shard("a")),
            ("model-00002-of-00002.safetensors", forged::shard("b")),
        ]);
    }
    ROOM.with(|room| {
        room.peak_of("model.safetensors.index.json", input, |dir| {
            if let Ok(checkpoint) = HfCheckpoint::open(dir) {
                read_all(&checkpoint, checkpoint.tensors());
            }
        })
    })
}

/// A config. From an accepted one the provider is made.
#[must_use]
pub fn config_json(input: &[u8]) -> usize {
    thread_local! {
        static ROOM: Room = Room::with(&[]);
    }
    ROOM.with(|room| {
        room.peak_of("config.json", input, |dir| {
            if let Ok(config) = HfConfig::from_dir(dir) {
                // The provider's size does not depend on the input.
                allocation_counter::opt_out(|| {
                    drop(AutoBridge::from_hf_config(config).to_megatron_provider())
                });
            }
        })
    })
}

/// The table of contents of a `torch_dist` directory, beside data files of 64 KiB.
#[must_use]
pub fn torch_dist_metadata(input: &[u8]) -> usize {
    thread_local! {
        static ROOM: Room = Room::with(&[
            ("__0_0.distcp", vec![0; 64 << 10]),
            ("__0_1.distcp", vec![0; 64 << 10]),
            ("__1_0.distcp", vec![0; 64 << 10]),
        ]);
    }
    ROOM.with(|room| {
        room.peak_of(".metadata", input, |dir| {
            let _ = TorchDistCheckpoint::open(dir);
        })
    })
}

/// common.pt: a zip archive with a pickle of plain values.
#[must_use]
pub fn common_pt(input: &[u8]) -> usize {
    thread_local! {
        static ROOM: Room = Room::with(&[
            (".metadata", forged::metadata(0)),
            ("__0_0.distcp", Vec::new()),
        ]);
    }
    ROOM.with(|room| {
        room.peak_of("common.pt", input, |dir| {
            if let Ok(checkpoint) = TorchDistCheckpoint::open(dir) {
                let _ = checkpoint.common();
            }
        })
    })
}

/// A data file with one item: a zip archive with a pickle that describes a tensor, and its bytes.
#[must_use]
pub fn distcp_item(input: &[u8]) -> usize {
    thread_local! {
        static ROOM: Room = Room::with(&[]);
    }
    ROOM.with(|room| {
        room.put(".metadata", &forged::metadata(input.len()));
        room.peak_of("__0_0.distcp", input, |dir| {
            if let Ok(checkpoint) = TorchDistCheckpoint::open(dir) {
                read_all(&checkpoint, checkpoint.tensors());
                let _ = checkpoint.verify();
            }
        })
    })
}

/// A pipeline layout string. An accepted one is printed and parsed again.
#[must_use]
pub fn pipeline_layout(input: &[u8]) -> usize {
    let Ok(text) = std::str::from_utf8(input) else {
        return 0;
    };
    peak_of(|| {
        if let Ok(layout) = text.parse::<PipelineLayout>() {
            let again = layout.to_string().parse::<PipelineLayout>();
            assert_eq!(again.as_ref(), Ok(&layout), "printing changes the layout");
        }
    })
}

/// Reads the accepted tensors through a small buffer, as a user of any size of tensor would.
fn read_all<'a>(
    source: &impl TensorSource,
    tensors: impl Iterator<Item = (&'a str, &'a TensorInfo)>,
) {
    let mut buffer = [0; 4096];
    for (name, info) in tensors {
        let len = buffer
            .len()
            .min(usize::try_from(info.num_bytes()).unwrap_or(usize::MAX));
        let _ = source.read(name, 0, &mut buffer[..len]);
        let _ = source.read(name, info.num_bytes() - len as u64, &mut buffer[..len]);
    }
}
