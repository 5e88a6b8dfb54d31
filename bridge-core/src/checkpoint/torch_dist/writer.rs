//! A `torch_dist` directory in the making.

use std::collections::HashSet;
use std::path::{Path, PathBuf};

use indexmap::IndexMap;
use rayon::prelude::*;

use super::TorchDistProblem;
use super::directory::{
    self, BACKEND, COMMON, LATEST_TRAIN_STATE, METADATA, TRACKER, TRAIN_STATE, refuse,
};
use super::encode::{self, ArchiveLayout, Bounds, Location};
use crate::checkpoint::error::{check_range, io};
use crate::checkpoint::staging::{PartPlace, StagedFiles, sync_dir, write_file};
use crate::checkpoint::{CheckpointError, FileSink, Staging, TensorInfo, TensorSink};

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
    /// Data files, when there is enough to write: writers of one file wait for each other. There are more where one
    /// would be larger than 4 GiB.
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

/// A file is finished by itself, so an interrupted run loses at most so much of each.
const MAX_FILE_BYTES: u64 = 4 << 30;

/// Writes a directory that Megatron-Core and torch's distributed checkpoint load at any layout.
///
/// Files are made in a hidden directory beside the destination. [`TorchDistWriter::finish`] checks that every byte was
/// written exactly once, syncs and renames; a writer that is dropped before leaves nothing, or, with [`Staging::job`],
/// what its next run goes on with.
#[derive(Debug)]
pub struct TorchDistWriter {
    staged: StagedFiles,
    iteration: u64,
    tensors: IndexMap<String, (TensorInfo, Vec<ChunkFile>)>,
    objects: IndexMap<String, (usize, u64, ArchiveLayout)>,
    /// The tensors and the objects of each file.
    of_file: Vec<FileContent>,
}

#[derive(Debug, Default)]
struct FileContent {
    tensors: Vec<usize>,
    objects: Vec<usize>,
}

/// A chunk. Chunks are contiguous in their tensor, and all those of a tensor stand in one file.
#[derive(Debug)]
struct ChunkFile {
    bounds: Bounds,
    /// The first byte in the tensor.
    start: u64,
    archive: ArchiveLayout,
    place: PartPlace,
    offset: u64,
}

/// A data file that is being filled.
#[derive(Default)]
struct FilePlan {
    len: u64,
    data_bytes: u64,
    parts: Vec<(u64, u64)>,
    content: FileContent,
}

impl TorchDistWriter {
    /// Starts a directory: `target` will hold the tracker and the iteration's folder.
    ///
    /// # Errors
    /// [`CheckpointError`] when a name stands twice, or the destination is taken or cannot be written.
    pub fn create(
        layout: &TorchDistLayout,
        target: &Path,
        staging: impl Into<Staging>,
    ) -> Result<Self, CheckpointError> {
        check_names(layout, target)?;
        let total: u64 = layout
            .tensors
            .iter()
            .map(|(_, info)| info.num_bytes())
            .sum();
        let most = (layout.files as u64).max(1);
        let share = total
            .div_ceil((total / MIN_FILE_BYTES).clamp(1, most))
            .min(MAX_FILE_BYTES);
        let mut files = vec![FilePlan::default()];
        let mut tensors = IndexMap::with_capacity(layout.tensors.len());
        for (name, info) in &layout.tensors {
            if files.last().is_some_and(|file| file.data_bytes >= share) {
                files.push(FilePlan::default());
            }
            let number = files.len() - 1;
            let file = &mut files[number];
            let mut chunks = Vec::new();
            let mut start = 0;
            for bounds in cut(info, layout.max_chunk_bytes.clamp(1, 1 << 31)) {
                let archive = ArchiveLayout::tensor(info.dtype, &bounds.1);
                let place = PartPlace {
                    file: number,
                    part: file.parts.len(),
                };
                file.parts
                    .push((file.len + archive.data_start, archive.data_len));
                let (offset, data_len) = (file.len, archive.data_len);
                file.len += archive.len;
                file.data_bytes += data_len;
                chunks.push(ChunkFile {
                    bounds,
                    start,
                    archive,
                    place,
                    offset,
                });
                start += data_len;
            }
            file.content.tensors.push(tensors.len());
            tensors.insert(name.clone(), (info.clone(), chunks));
        }
        let mut objects = IndexMap::with_capacity(layout.extra_states.len());
        for name in &layout.extra_states {
            let archive = ArchiveLayout::object(encode::no_extra_state());
            let number = files.len() - 1;
            let file = &mut files[number];
            file.content.objects.push(objects.len());
            objects.insert(name.clone(), (number, file.len, archive));
            file.len += objects[name].2.len;
        }
        Self::start(
            layout.iteration,
            target,
            &staging.into(),
            files,
            tensors,
            objects,
        )
    }

    fn start(
        iteration: u64,
        target: &Path,
        staging: &Staging,
        files: Vec<FilePlan>,
        tensors: IndexMap<String, (TensorInfo, Vec<ChunkFile>)>,
        objects: IndexMap<String, (usize, u64, ArchiveLayout)>,
    ) -> Result<Self, CheckpointError> {
        let mut staged = StagedFiles::create(target, staging)?;
        let folder = directory::iteration_name(iteration);
        let dir = staged.path().join(&folder);
        fs_err::create_dir_all(&dir).map_err(io("create", &dir))?;
        let mut of_file = Vec::with_capacity(files.len());
        for (number, file) in files.into_iter().enumerate() {
            let name = format!("{folder}/__0_{number}.distcp");
            staged.add(name, file.len, file.parts)?;
            of_file.push(file.content);
        }
        staged.begin()?;
        Ok(Self {
            staged,
            iteration,
            tensors,
            objects,
            of_file,
        })
    }

    fn dir(&self) -> PathBuf {
        let name = directory::iteration_name(self.iteration);
        self.staged.path().join(name)
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

    /// Writes what Megatron Bridge wants beside the tensors: train_state.pt, which counts from this iteration on.
    ///
    /// # Errors
    /// [`CheckpointError::Io`].
    pub fn write_train_state(&self) -> Result<(), CheckpointError> {
        let bytes = encode::train_state(self.iteration);
        self.write_file(TRAIN_STATE, &bytes)?;
        write_file(&self.staged.path().join(LATEST_TRAIN_STATE), &bytes)
    }

    /// Checks that everything was written, completes and syncs the files, and moves the directory to its destination.
    ///
    /// # Errors
    /// [`CheckpointError::Unfinished`] names the first tensor with missing bytes; otherwise what the system said.
    /// The destination is untouched then.
    pub fn finish(self) -> Result<PathBuf, CheckpointError> {
        (0..self.of_file.len()).try_for_each(|file| self.check_written(file))?;
        (0..self.of_file.len())
            .into_par_iter()
            .filter(|file| !self.staged.is_finished(*file))
            .try_for_each(|file| self.finish_file(file))?;
        let dir = self.dir();
        self.write_file(METADATA, &self.metadata())?;
        self.write_file(COMMON, &encode::common(self.iteration))?;
        self.write_file(BACKEND, BACKEND_JSON.as_bytes())?;
        sync_dir(&dir)?;
        let tracker = self.staged.path().join(TRACKER);
        write_file(&tracker, self.iteration.to_string().as_bytes())?;
        self.staged.finish()
    }

    fn check_written(&self, file: usize) -> Result<(), CheckpointError> {
        for tensor in &self.of_file[file].tensors {
            let (name, (info, chunks)) =
                &self.tensors.get_index(*tensor).expect("a number of ours");
            let written = chunks
                .iter()
                .map(|chunk| self.staged.written(chunk.place))
                .sum();
            if written != info.num_bytes() {
                return Err(CheckpointError::Unfinished {
                    name: (*name).clone(),
                    written,
                    num_bytes: info.num_bytes(),
                    dir: self.staged.target().to_owned(),
                });
            }
        }
        Ok(())
    }

    /// What stands around the tensors' bytes of a file.
    fn write_archives(&self, file: usize) -> Result<(), CheckpointError> {
        let content = &self.of_file[file];
        for chunk in content
            .tensors
            .iter()
            .flat_map(|index| &self.tensors[*index].1)
        {
            let (head, tail) = chunk.archive.parts(self.staged.crc(chunk.place));
            self.staged.write_around(file, chunk.offset, &head)?;
            let behind = chunk.archive.data_start + chunk.archive.data_len;
            self.staged
                .write_around(file, chunk.offset + behind, &tail)?;
        }
        for (_, offset, archive) in content.objects.iter().map(|index| &self.objects[*index]) {
            self.staged
                .write_around(file, *offset, &archive.parts(0).0)?;
        }
        Ok(())
    }

    /// The name of a data file in the iteration's folder.
    fn file_name(&self, file: usize) -> &str {
        let name = self.staged.name(file);
        name.rsplit_once('/').map_or(name, |(_, name)| name)
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
                file: self.file_name(chunk.place.file),
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
                file: self.file_name(*file),
                offset: *offset,
                len: archive.len,
            });
        let names = self.objects.keys().map(String::as_str);
        encode::metadata(described, names, chunks.chain(objects))
    }
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
        check_range(name, offset_bytes, bytes.len(), info.num_bytes())?;
        let first =
            chunks.partition_point(|chunk| chunk.start + chunk.archive.data_len <= offset_bytes);
        let (mut at, mut rest) = (offset_bytes, bytes);
        for chunk in &chunks[first..] {
            if rest.is_empty() {
                break;
            }
            let left = chunk.start + chunk.archive.data_len - at;
            let len = usize::try_from(left).map_or(rest.len(), |left| left.min(rest.len()));
            let (piece, behind) = rest.split_at(len);
            if !self.staged.write(chunk.place, at - chunk.start, piece)? {
                return Err(CheckpointError::Twice {
                    name: name.to_owned(),
                    start: at,
                    end: at + len as u64,
                    dir: self.staged.target().to_owned(),
                });
            }
            at += len as u64;
            rest = behind;
        }
        Ok(())
    }
}

impl FileSink for TorchDistWriter {
    fn num_files(&self) -> usize {
        self.of_file.len()
    }

    fn file_bytes(&self, file: usize) -> u64 {
        let tensors = self.of_file[file].tensors.iter();
        tensors
            .map(|index| self.tensors[*index].0.num_bytes())
            .sum()
    }

    fn unwritten(&self, file: usize) -> Vec<&str> {
        if self.staged.is_finished(file) {
            return Vec::new();
        }
        let tensors = self.of_file[file].tensors.iter();
        tensors
            .filter_map(|index| Some(self.tensors.get_index(*index)?.0.as_str()))
            .collect()
    }

    fn finish_file(&self, file: usize) -> Result<(), CheckpointError> {
        self.check_written(file)?;
        self.write_archives(file)?;
        self.staged.finish_file(file)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Dtype;

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
