//! A `torch_dist` directory in the making.

use std::collections::{BTreeMap, HashSet};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use indexmap::IndexMap;

use super::TorchDistProblem;
use super::directory::{self, BACKEND, COMMON, METADATA, TRACKER, refuse};
use super::encode::{self, ArchiveLayout, Bounds, Location};
use crate::checkpoint::beside::{Beside, sync_dir, write_file};
use crate::checkpoint::error::io;
use crate::checkpoint::{CheckpointError, Overwrite, TensorInfo, TensorSink};

/// The tensors of a directory to be written, and how they are cut.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TorchDistLayout {
    /// Stored names with their global shapes, in the order of their bytes.
    pub tensors: Vec<(String, TensorInfo)>,
    /// Names of objects that say "no extra state" (`..._extra_state/shard_0_1`); Megatron-Core's default strictness
    /// wants one for each module that could have a state.
    pub extra_states: Vec<String>,
    /// The iteration that the directory is named after.
    pub iteration: u64,
    /// A tensor is cut into chunks of at most so many bytes: a loader reads whole chunks. At most 2 GiB.
    pub max_chunk_bytes: u64,
    /// Data files, when there is enough to write: writers of one file wait for each other.
    pub files: usize,
}

impl Default for TorchDistLayout {
    fn default() -> Self {
        Self {
            tensors: Vec::new(),
            extra_states: Vec::new(),
            iteration: 0,
            max_chunk_bytes: 1 << 30,
            files: 8,
        }
    }
}

/// A file is worth having from so many bytes on.
const MIN_FILE_BYTES: u64 = 16 << 20;

/// What metadata.json says.
const BACKEND_JSON: &str = r#"{"sharded_backend": "torch_dist", "sharded_backend_version": 1, "common_backend": "torch", "common_backend_version": 1}"#;

/// Writes a directory that Megatron-Core and torch's distributed checkpoint load at any layout.
///
/// Files are made in a hidden directory beside the destination. [`TorchDistWriter::finish`] checks that every byte was
/// written exactly once, syncs and renames; a writer that is dropped before leaves nothing.
#[derive(Debug)]
pub struct TorchDistWriter {
    beside: Beside,
    iteration: u64,
    files: Vec<(String, File)>,
    tensors: IndexMap<String, (TensorInfo, Vec<ChunkFile>)>,
    objects: IndexMap<String, (usize, u64, ArchiveLayout)>,
}

/// A chunk and the bytes that have arrived. Chunks are contiguous in their tensor.
#[derive(Debug)]
struct ChunkFile {
    bounds: Bounds,
    /// The first byte in the tensor.
    start: u64,
    archive: ArchiveLayout,
    file: usize,
    offset: u64,
    written: Mutex<Written>,
}

/// Finished pieces of a chunk: start to end and CRC-32. Neighbours are joined.
#[derive(Debug, Default)]
struct Written(BTreeMap<u64, (u64, u32)>);

impl Written {
    /// `false` if a byte of the piece is there already.
    fn insert(&mut self, mut start: u64, mut end: u64, mut crc: u32) -> bool {
        if let Some((before, (before_end, before_crc))) = self.0.range(..=start).next_back() {
            if *before_end > start {
                return false;
            }
            if *before_end == start {
                let before = *before;
                crc = joined(*before_crc, crc, end - start);
                self.0.remove(&before);
                start = before;
            }
        }
        if let Some((next, (next_end, next_crc))) = self.0.range(start..).next() {
            if *next < end {
                return false;
            }
            if *next == end {
                let next = *next;
                crc = joined(crc, *next_crc, next_end - next);
                end = *next_end;
                self.0.remove(&next);
            }
        }
        self.0.insert(start, (end, crc));
        true
    }

    fn count(&self) -> u64 {
        self.0.iter().map(|(start, (end, _))| end - start).sum()
    }
}

/// The CRC-32 of two pieces in a row, from those of each.
fn joined(first: u32, second: u32, second_len: u64) -> u32 {
    let mut hasher = crc32fast::Hasher::new_with_initial(first);
    hasher.combine(&crc32fast::Hasher::new_with_initial_len(second, second_len));
    hasher.finalize()
}

impl TorchDistWriter {
    /// Starts a directory: `target` will hold the tracker and the iteration's folder.
    ///
    /// # Errors
    /// [`CheckpointError`] when a name stands twice, or the destination is taken or cannot be written.
    pub fn create(
        layout: &TorchDistLayout,
        target: &Path,
        overwrite: Overwrite,
    ) -> Result<Self, CheckpointError> {
        check_names(layout, target)?;
        let beside = Beside::create(target, overwrite)?;
        let dir = beside
            .path()
            .join(directory::iteration_name(layout.iteration));
        fs_err::create_dir(&dir).map_err(io("create", &dir))?;
        let total: u64 = layout
            .tensors
            .iter()
            .map(|(_, info)| info.num_bytes())
            .sum();
        let most = (layout.files as u64).max(1);
        let share = total.div_ceil((total / MIN_FILE_BYTES).clamp(1, most));
        let mut files: Vec<(String, File)> = Vec::new();
        let (mut offset, mut data) = (0u64, 0u64);
        let mut place = |len: u64, data_len: u64| -> Result<(usize, u64), CheckpointError> {
            if files.is_empty() || (data_len > 0 && data >= share) {
                let name = format!("__0_{}.distcp", files.len());
                let path = dir.join(&name);
                let file = File::create_new(&path).map_err(io("create", &path))?;
                files.push((name, file));
                (offset, data) = (0, 0);
            }
            let at = offset;
            offset += len;
            data += data_len;
            Ok((files.len() - 1, at))
        };
        let mut tensors = IndexMap::with_capacity(layout.tensors.len());
        for (name, info) in &layout.tensors {
            let mut chunks = Vec::new();
            let mut start = 0;
            for bounds in cut(info, layout.max_chunk_bytes.clamp(1, 1 << 31)) {
                let archive = ArchiveLayout::tensor(info.dtype, &bounds.1);
                let (file, offset) = place(archive.len, archive.data_len)?;
                let data_len = archive.data_len;
                chunks.push(ChunkFile {
                    bounds,
                    start,
                    archive,
                    file,
                    offset,
                    written: Mutex::default(),
                });
                start += data_len;
            }
            tensors.insert(name.clone(), (info.clone(), chunks));
        }
        let mut objects = IndexMap::with_capacity(layout.extra_states.len());
        for name in &layout.extra_states {
            let archive = ArchiveLayout::object(encode::no_extra_state());
            let (file, offset) = place(archive.len, 0)?;
            objects.insert(name.clone(), (file, offset, archive));
        }
        Ok(Self {
            beside,
            iteration: layout.iteration,
            files,
            tensors,
            objects,
        })
    }

    fn dir(&self) -> PathBuf {
        let name = directory::iteration_name(self.iteration);
        self.beside.path().join(name)
    }

    /// Names of the tensors that are to be written.
    pub fn names(&self) -> impl ExactSizeIterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// Writes a small file (run_config.yaml, say) into the iteration's folder.
    ///
    /// # Errors
    /// [`CheckpointError::Io`].
    pub fn write_file(&self, name: &str, bytes: &[u8]) -> Result<(), CheckpointError> {
        write_file(&self.dir().join(name), bytes)
    }

    /// Checks that everything was written, completes and syncs the files, and moves the directory to its destination.
    ///
    /// # Errors
    /// [`CheckpointError::Unfinished`] names the first tensor with missing bytes; otherwise what the system said.
    /// The destination is untouched then.
    pub fn finish(self) -> Result<PathBuf, CheckpointError> {
        use rayon::prelude::*;
        for (name, (info, chunks)) in &self.tensors {
            let written = chunks
                .iter()
                .map(|chunk| lock(&chunk.written).count())
                .sum();
            if written != info.num_bytes() {
                return Err(CheckpointError::Unfinished {
                    name: name.clone(),
                    written,
                    num_bytes: info.num_bytes(),
                    dir: self.beside.target().to_owned(),
                });
            }
        }
        self.write_archives()?;
        let dir = self.dir();
        self.files
            .par_iter()
            .try_for_each(|(name, file)| file.sync_all().map_err(io("sync", &dir.join(name))))?;
        self.write_file(METADATA, &self.metadata())?;
        self.write_file(COMMON, &encode::common(self.iteration))?;
        self.write_file(BACKEND, BACKEND_JSON.as_bytes())?;
        sync_dir(&dir)?;
        let tracker = self.beside.path().join(TRACKER);
        write_file(&tracker, self.iteration.to_string().as_bytes())?;
        self.beside.finish()
    }

    /// What stands around the tensors' bytes.
    fn write_archives(&self) -> Result<(), CheckpointError> {
        let dir = self.dir();
        let write = |file: usize, bytes: &[u8], offset: u64| {
            let (name, file) = &self.files[file];
            file.write_all_at(bytes, offset)
                .map_err(io("write", &dir.join(name)))
        };
        for chunk in self.tensors.values().flat_map(|(_, chunks)| chunks) {
            let whole = lock(&chunk.written).0.get(&0).map_or(0, |(_, crc)| *crc);
            let (head, tail) = chunk.archive.parts(whole);
            write(chunk.file, &head, chunk.offset)?;
            let behind = chunk.archive.data_start + chunk.archive.data_len;
            write(chunk.file, &tail, chunk.offset + behind)?;
        }
        for (file, offset, archive) in self.objects.values() {
            write(*file, &archive.parts(0).0, *offset)?;
        }
        Ok(())
    }

    fn metadata(&self) -> Vec<u8> {
        let described = self.tensors.iter().map(|(name, (info, chunks))| {
            let bounds = chunks.iter().map(|chunk| &chunk.bounds).collect();
            (name.as_str(), info, bounds)
        });
        let chunks = self.tensors.iter().flat_map(|(name, (_, chunks))| {
            chunks.iter().map(move |chunk| Location {
                name,
                offsets: Some(&chunk.bounds.0),
                file: &self.files[chunk.file].0,
                offset: chunk.offset,
                len: chunk.archive.len,
            })
        });
        let objects = self
            .objects
            .iter()
            .map(|(name, (file, offset, archive))| Location {
                name,
                offsets: None,
                file: &self.files[*file].0,
                offset: *offset,
                len: archive.len,
            });
        let names = self.objects.keys().map(String::as_str);
        encode::metadata(described, names, chunks.chain(objects))
    }
}

fn lock(written: &Mutex<Written>) -> std::sync::MutexGuard<'_, Written> {
    written
        .lock()
        .unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// A name that stands twice would make a table that no reader accepts.
fn check_names(layout: &TorchDistLayout, target: &Path) -> Result<(), CheckpointError> {
    let mut names = HashSet::new();
    let tensors = layout.tensors.iter().map(|(name, _)| name);
    for name in tensors.chain(&layout.extra_states) {
        if !names.insert(name) {
            return Err(refuse(
                target,
                TorchDistProblem::Value {
                    part: format!("`{name}`"),
                    what: "it would be written twice",
                },
            ));
        }
    }
    Ok(())
}

/// Cuts a tensor into chunks that are contiguous in it: along the first axis whose slices are small enough.
fn cut(info: &TensorInfo, max_bytes: u64) -> Vec<Bounds> {
    let shape: Vec<u64> = info.shape.iter().map(|size| *size as u64).collect();
    let zeros = vec![0; shape.len()];
    if info.num_bytes() <= max_bytes {
        return vec![(zeros, shape)];
    }
    let slice_bytes = |axis: usize| {
        let inner: u64 = shape[axis + 1..].iter().product();
        inner * info.dtype.size_bytes() as u64
    };
    // Slices of the last axis are single elements.
    let axis = (0..shape.len())
        .find(|axis| slice_bytes(*axis) <= max_bytes)
        .unwrap_or(shape.len() - 1);
    let rows = (max_bytes / slice_bytes(axis)).max(1);
    let outer: u64 = shape[..axis].iter().product();
    let mut chunks = Vec::new();
    for number in 0..outer {
        let (mut offsets, mut sizes) = (zeros.clone(), shape.clone());
        let mut rest = number;
        for before in (0..axis).rev() {
            offsets[before] = rest % shape[before];
            sizes[before] = 1;
            rest /= shape[before];
        }
        let mut row = 0;
        while row < shape[axis] {
            offsets[axis] = row;
            sizes[axis] = rows.min(shape[axis] - row);
            chunks.push((offsets.clone(), sizes.clone()));
            row += rows;
        }
    }
    chunks
}

impl TensorSink for TorchDistWriter {
    fn write(&self, name: &str, offset_bytes: u64, bytes: &[u8]) -> Result<(), CheckpointError> {
        let Some((info, chunks)) = self.tensors.get(name) else {
            let name = name.to_owned();
            return Err(CheckpointError::NoTensor { name });
        };
        let (start, end) = (
            offset_bytes,
            offset_bytes.saturating_add(bytes.len() as u64),
        );
        let range_error = || CheckpointError::Range {
            name: name.to_owned(),
            start,
            end,
            num_bytes: info.num_bytes(),
        };
        if end > info.num_bytes() {
            return Err(range_error());
        }
        let first = chunks.partition_point(|chunk| chunk.start + chunk.archive.data_len <= start);
        let (mut at, mut rest) = (start, bytes);
        for chunk in &chunks[first..] {
            if rest.is_empty() {
                break;
            }
            let left = chunk.start + chunk.archive.data_len - at;
            let len = usize::try_from(left).map_or(rest.len(), |left| left.min(rest.len()));
            let (piece, behind) = rest.split_at(len);
            let (file_name, file) = &self.files[chunk.file];
            let within = at - chunk.start;
            file.write_all_at(piece, chunk.offset + chunk.archive.data_start + within)
                .map_err(io("write", &self.dir().join(file_name)))?;
            let crc = crc32fast::hash(piece);
            let new = lock(&chunk.written).insert(within, within + len as u64, crc);
            if !new {
                return Err(refuse(
                    self.beside.target(),
                    TorchDistProblem::Value {
                        part: format!("`{name}`"),
                        what: "a byte of it was written twice",
                    },
                ));
            }
            at += len as u64;
            rest = behind;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Dtype;

    #[test]
    fn pieces_in_any_order_give_the_checksum_of_the_whole() {
        let bytes: Vec<u8> = (0..=255).collect();
        let mut written = Written::default();
        for (start, end) in [(100u8, 200u8), (0, 3), (200, 255), (3, 100)] {
            let piece = &bytes[usize::from(start)..usize::from(end)];
            assert!(written.insert(start.into(), end.into(), crc32fast::hash(piece)));
        }
        assert!(!written.insert(7, 9, 0));
        assert_eq!(written.count(), 255);
        assert_eq!(written.0[&0], (255, crc32fast::hash(&bytes[..255])));
    }

    #[test]
    fn chunks_are_contiguous_and_below_the_limit() {
        let info = TensorInfo {
            dtype: Dtype::Bf16,
            shape: vec![3, 5, 4],
        };
        for limit in [1, 2, 7, 8, 17, 40, 79, 80, 1000] {
            let chunks = cut(&info, limit);
            let mut next = 0;
            for (offsets, sizes) in &chunks {
                assert_eq!(offsets[0] * 20 + offsets[1] * 4 + offsets[2], next);
                next += sizes.iter().product::<u64>();
                assert!(sizes.iter().product::<u64>() * 2 <= limit.max(2));
            }
            assert_eq!(next, 60);
        }
    }
}
