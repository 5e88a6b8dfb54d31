//! The bytes of archives and of `.metadata`, in the smallest form that torch and Megatron-Core load.

use super::pickle::{PickleWriter, STORAGES};
use crate::Dtype;
use crate::checkpoint::TensorInfo;

/// Data begin at multiples of this, from the archive's start.
const ALIGNMENT: usize = 64;

/// An entry of an archive: its bytes, or the length of bytes that are written by somebody else.
#[derive(Debug)]
enum Content {
    Here(Vec<u8>),
    Elsewhere(u64),
}

/// An archive whose bytes are known but for one entry, the tensor's.
#[derive(Debug)]
pub(super) struct ArchiveLayout {
    entries: Vec<(&'static str, Content)>,
    /// Where the tensor's bytes begin.
    pub(super) data_start: u64,
    /// How many they are.
    pub(super) data_len: u64,
    /// Bytes of the archive.
    pub(super) len: u64,
}

impl ArchiveLayout {
    /// The archive of one chunk.
    pub(super) fn tensor(dtype: Dtype, sizes: &[u64]) -> Self {
        let data_len = sizes.iter().product::<u64>() * dtype.size_bytes() as u64;
        Self::new(vec![
            (
                "archive/data.pkl",
                Content::Here(tensor_pickle(dtype, sizes)),
            ),
            ("archive/data/0", Content::Elsewhere(data_len)),
            ("archive/version", Content::Here(b"3\n".to_vec())),
        ])
    }

    /// The archive of an object.
    pub(super) fn object(pickle: Vec<u8>) -> Self {
        Self::new(vec![
            ("archive/data.pkl", Content::Here(pickle)),
            ("archive/byteorder", Content::Here(b"little".to_vec())),
            ("archive/version", Content::Here(b"3\n".to_vec())),
        ])
    }

    fn new(entries: Vec<(&'static str, Content)>) -> Self {
        let mut layout = Self {
            entries,
            data_start: 0,
            data_len: 0,
            len: 0,
        };
        let (head, tail) = layout.parts(0);
        let data_len = layout.entries.iter().map(|(_, content)| match content {
            Content::Here(_) => 0,
            Content::Elsewhere(len) => *len,
        });
        layout.data_len = data_len.sum();
        layout.data_start = head.len() as u64;
        layout.len = head.len() as u64 + layout.data_len + tail.len() as u64;
        layout
    }

    /// What stands before and behind the tensor's bytes, whose CRC-32 is `crc`.
    pub(super) fn parts(&self, crc: u32) -> (Vec<u8>, Vec<u8>) {
        let (mut head, mut tail) = (Vec::new(), Vec::new());
        let mut elsewhere = 0;
        let mut directory = Vec::new();
        let mut behind = false;
        for (name, content) in &self.entries {
            let at = head.len() as u64 + elsewhere + tail.len() as u64;
            let (crc, len) = match content {
                Content::Here(bytes) => (crc32fast::hash(bytes), bytes.len() as u64),
                Content::Elsewhere(len) => (crc, *len),
            };
            let out = if behind { &mut tail } else { &mut head };
            local_header(out, at, name, crc, len);
            directory_entry(&mut directory, at, name, crc, len);
            match content {
                Content::Here(bytes) => out.extend(bytes),
                Content::Elsewhere(len) => {
                    elsewhere = *len;
                    behind = true;
                }
            }
        }
        let start = head.len() as u64 + elsewhere + tail.len() as u64;
        let out = if behind { &mut tail } else { &mut head };
        let count =
            u16::try_from(self.entries.len()).expect("archives have a dozen entries at most");
        let directory_len = directory.len() as u64;
        out.extend(directory);
        out.extend(b"PK\x05\x06\0\0\0\0");
        out.extend(count.to_le_bytes());
        out.extend(count.to_le_bytes());
        out.extend(short(directory_len).to_le_bytes());
        out.extend(short(start).to_le_bytes());
        out.extend([0, 0]);
        (head, tail)
    }
}

/// Sizes and offsets in an archive. Chunks are cut so that none reaches 4 GiB.
fn short(value: u64) -> u32 {
    u32::try_from(value).expect("chunks are cut below 4 GiB")
}

/// Version, flags (UTF-8 names), method, time, date, CRC and both sizes.
fn common_header(out: &mut Vec<u8>, crc: u32, len: u64) {
    out.extend([0, 0, 0, 8, 0, 0, 0, 0, 0, 0]);
    out.extend(crc.to_le_bytes());
    out.extend(short(len).to_le_bytes());
    out.extend(short(len).to_le_bytes());
}

fn name_len(name: &str) -> [u8; 2] {
    u16::try_from(name.len())
        .expect("our own entry names are short")
        .to_le_bytes()
}

fn local_header(out: &mut Vec<u8>, at: u64, name: &str, crc: u32, len: u64) {
    out.extend(b"PK\x03\x04");
    common_header(out, crc, len);
    out.extend(name_len(name));
    // The extra field has an id, a length and at least no byte of padding.
    let before = usize::try_from(at % ALIGNMENT as u64).unwrap_or(0) + 30 + name.len() + 4;
    let padding = before.next_multiple_of(ALIGNMENT) - before;
    let field = u16::try_from(padding).expect("padding is below the alignment");
    out.extend((field + 4).to_le_bytes());
    out.extend(name.as_bytes());
    out.extend(b"FB");
    out.extend(field.to_le_bytes());
    out.extend(std::iter::repeat_n(b'Z', padding));
}

fn directory_entry(out: &mut Vec<u8>, at: u64, name: &str, crc: u32, len: u64) {
    out.extend(b"PK\x01\x02\0\0");
    common_header(out, crc, len);
    out.extend(name_len(name));
    // Extra field, comment, disk, attributes.
    out.extend([0; 12]);
    out.extend(short(at).to_le_bytes());
    out.extend(name.as_bytes());
}

fn tensor_pickle(dtype: Dtype, sizes: &[u64]) -> Vec<u8> {
    let mut pickle = PickleWriter::new();
    tensor(&mut pickle, dtype, sizes, "0");
    pickle.finish()
}

/// A tensor whose bytes are entry `data/{key}`.
fn tensor(pickle: &mut PickleWriter, dtype: Dtype, sizes: &[u64], key: &str) {
    let word = dtype.torch_word();
    let class = STORAGES.iter().find(|(_, name)| *name == word);
    let numel: u64 = sizes.iter().product();
    let function = match class {
        Some(_) => "_rebuild_tensor_v2",
        None => "_rebuild_tensor_v3",
    };
    pickle.call("torch._utils", function, |p| {
        p.persistent(|p| {
            p.tuple(|p| {
                p.text("storage");
                match class {
                    Some((class, _)) => p.global("torch", class),
                    None => p.global("torch.storage", "UntypedStorage"),
                }
                p.text(key);
                p.text("cpu");
                p.int(match class {
                    Some(_) => numel,
                    None => numel * dtype.size_bytes() as u64,
                });
            });
        });
        p.int(0);
        p.tuple(|p| sizes.iter().for_each(|size| p.int(*size)));
        p.tuple(|p| strides(sizes).into_iter().for_each(|stride| p.int(stride)));
        p.bool(false);
        p.call_empty("collections", "OrderedDict");
        if class.is_none() {
            p.global("torch", word);
        }
    });
}

/// Row-major strides in elements, as torch counts them: an empty axis counts as one.
fn strides(sizes: &[u64]) -> Vec<u64> {
    let mut stride = 1;
    let mut strides: Vec<u64> = sizes
        .iter()
        .rev()
        .map(|size| {
            let here = stride;
            stride *= (*size).max(1);
            here
        })
        .collect();
    strides.reverse();
    strides
}

/// `[None]`: the object that stands for a module without an extra state. Spelled as torch spells it.
pub(super) fn no_extra_state() -> Vec<u8> {
    b"\x80\x02]q\0Na.".to_vec()
}

/// common.pt, in full.
pub(super) fn common(iteration: u64) -> Vec<u8> {
    let mut pickle = PickleWriter::new();
    pickle.dict(|p| {
        p.text("checkpoint_version");
        p.float(3.0);
        p.text("iteration");
        p.int(iteration);
        p.text("content_metadata");
        p.dict(|p| {
            p.text("singleton_local_shards");
            p.bool(false);
            p.text("chained_optim_avoid_prefix");
            p.bool(true);
        });
    });
    ArchiveLayout::object(pickle.finish()).parts(0).0
}

/// train_state.pt of a checkpoint that was converted: nothing was trained yet. Megatron Bridge counts from it.
pub(super) fn train_state(step: u64) -> Vec<u8> {
    const STORAGES: [&str; 8] = [
        "archive/data/0",
        "archive/data/1",
        "archive/data/2",
        "archive/data/3",
        "archive/data/4",
        "archive/data/5",
        "archive/data/6",
        "archive/data/7",
    ];
    let step = step.to_le_bytes().to_vec();
    let zero = || vec![0; 8];
    let fields: [(&str, Dtype, Vec<u8>); 8] = [
        ("step", Dtype::I64, step),
        ("consumed_train_samples", Dtype::I64, zero()),
        ("skipped_train_samples", Dtype::I64, zero()),
        ("consumed_valid_samples", Dtype::I64, zero()),
        ("floating_point_operations_so_far", Dtype::F32, vec![0; 4]),
        ("do_train", Dtype::Bool, vec![0]),
        ("do_valid", Dtype::Bool, vec![0]),
        ("do_test", Dtype::Bool, vec![0]),
    ];
    let mut pickle = PickleWriter::new();
    pickle.dict(|p| {
        for (number, (name, dtype, _)) in fields.iter().enumerate() {
            p.text(name);
            tensor(p, *dtype, &[], &number.to_string());
        }
    });
    let mut entries = vec![
        ("archive/data.pkl", Content::Here(pickle.finish())),
        ("archive/byteorder", Content::Here(b"little".to_vec())),
    ];
    let storages = STORAGES.into_iter().zip(fields);
    entries.extend(storages.map(|(entry, (_, _, bytes))| (entry, Content::Here(bytes))));
    entries.push(("archive/version", Content::Here(b"3\n".to_vec())));
    ArchiveLayout::new(entries).parts(0).0
}

/// A tensor's or object's place, for the table of contents.
#[derive(Debug)]
pub(super) struct Location<'a> {
    pub(super) name: &'a str,
    /// `None` for an object.
    pub(super) offsets: Option<&'a [u64]>,
    pub(super) file: &'a str,
    pub(super) offset: u64,
    pub(super) len: u64,
}

const METADATA: &str = "torch.distributed.checkpoint.metadata";
const FILESYSTEM: &str = "torch.distributed.checkpoint.filesystem";

/// Offsets and sizes of a chunk.
pub(super) type Bounds = (Vec<u64>, Vec<u64>);

/// `.metadata`.
pub(super) fn metadata<'a>(
    tensors: impl Iterator<Item = (&'a str, &'a TensorInfo, Vec<&'a Bounds>)>,
    objects: impl Iterator<Item = &'a str>,
    locations: impl Iterator<Item = Location<'a>>,
) -> Vec<u8> {
    let mut pickle = PickleWriter::new();
    pickle.built(METADATA, "Metadata", |p| {
        p.dict(|p| {
            p.text("state_dict_metadata");
            p.dict(|p| {
                for (name, info, chunks) in tensors {
                    p.text(name);
                    describe(p, info, &chunks);
                }
                for name in objects {
                    p.text(name);
                    p.instance(METADATA, "BytesStorageMetadata");
                }
            });
            p.text("storage_data");
            p.dict(|p| locations.for_each(|location| locate(p, &location)));
            p.text("planner_data");
            p.none();
            p.text("storage_meta");
            p.none();
            p.text("version");
            p.text("1.0.0");
        });
    });
    pickle.finish()
}

fn describe(p: &mut PickleWriter, info: &TensorInfo, chunks: &[&Bounds]) {
    p.built(METADATA, "TensorStorageMetadata", |p| {
        p.dict(|p| {
            p.text("properties");
            p.built(METADATA, "TensorProperties", |p| {
                p.tuple(|p| {
                    p.global("torch", info.dtype.torch_word());
                    p.reduce("torch.serialization", "_get_layout", |p| {
                        p.text("torch.strided")
                    });
                    p.bool(false);
                    p.reduce(METADATA, "_MEM_FORMAT_ENCODING", |p| p.int(0));
                    p.bool(false);
                });
            });
            p.text("size");
            size(p, info.shape.iter().map(|size| *size as u64));
            p.text("chunks");
            p.list(|p| {
                for (offsets, sizes) in chunks {
                    p.built(METADATA, "ChunkStorageMetadata", |p| {
                        p.dict(|p| {
                            p.text("offsets");
                            size(p, offsets.iter().copied());
                            p.text("sizes");
                            size(p, sizes.iter().copied());
                        });
                    });
                }
            });
        });
    });
}

fn locate(p: &mut PickleWriter, location: &Location<'_>) {
    p.built(METADATA, "MetadataIndex", |p| {
        p.dict(|p| {
            p.text("fqn");
            p.text(location.name);
            if let Some(offsets) = location.offsets {
                p.text("offset");
                size(p, offsets.iter().copied());
            }
        });
    });
    p.built(FILESYSTEM, "_StorageInfo", |p| {
        p.dict(|p| {
            p.text("relative_path");
            p.text(location.file);
            p.text("offset");
            p.int(location.offset);
            p.text("length");
            p.int(location.len);
        });
    });
}

fn size(p: &mut PickleWriter, sizes: impl Iterator<Item = u64>) {
    p.reduce("torch", "Size", |p| {
        p.tuple(|p| sizes.for_each(|size| p.int(size)))
    });
}
