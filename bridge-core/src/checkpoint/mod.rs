//! Bytes of tensors, behind two traits: a [`TensorSource`] gives ranges, a [`TensorSink`] takes them.
//!
//! Files, memory, torch tensors and C++ pointers are all one of these. This room knows no mapping.

mod error;
pub mod hf;
mod links;
mod memory;
pub mod shard;
mod staging;
pub mod torch_dist;

pub use error::{CheckpointError, FileProblem, OtherDescription};
pub use links::Links;
pub use memory::MemoryTensors;
pub use staging::{
    Overwrite, Published, ReadBack, Resume, Staging, check_space, discard_exports, is_id,
    partial_path,
};

use crate::Dtype;

/// Dtype and shape of a stored tensor.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorInfo {
    /// Type of the elements.
    pub dtype: Dtype,
    /// Shape; empty for a scalar.
    pub shape: Vec<usize>,
}

impl TensorInfo {
    /// Elements. Infos of an opened checkpoint are checked against overflow.
    #[must_use]
    pub fn numel(&self) -> usize {
        self.shape.iter().product()
    }

    /// Bytes.
    #[must_use]
    pub fn num_bytes(&self) -> u64 {
        self.numel() as u64 * self.dtype.size_bytes() as u64
    }
}

/// Where tensors come from. Elements are little-endian and row-major.
pub trait TensorSource: Sync {
    /// Dtype and shape of a tensor, `None` when there is none of this name.
    fn info(&self, name: &str) -> Option<TensorInfo>;

    /// Fills `into` with the tensor's bytes from `offset_bytes` on.
    ///
    /// # Errors
    /// [`CheckpointError`] when there is no such tensor or range, or reading fails.
    fn read(&self, name: &str, offset_bytes: u64, into: &mut [u8]) -> Result<(), CheckpointError>;

    /// [`TensorSource::read`] for many ranges of one tensor. Sources in files find it once, here: beside a read of 1 KiB the
    /// search for its name counts.
    ///
    /// # Errors
    /// [`CheckpointError`] when there is no such tensor; a source may leave that to the first read.
    fn reader<'a>(&'a self, name: &'a str) -> Result<Reader<'a>, CheckpointError> {
        Ok(Box::new(move |offset_bytes, into| {
            self.read(name, offset_bytes, into)
        }))
    }
}

/// Fills memory with a tensor's bytes from an offset on.
pub type Reader<'a> = Box<dyn Fn(u64, &mut [u8]) -> Result<(), CheckpointError> + 'a>;

/// Where tensors go. Elements are little-endian and row-major.
pub trait TensorSink: Sync {
    /// Stores `bytes` at `offset_bytes` of a tensor. Called from several threads, never twice for one byte.
    ///
    /// # Errors
    /// [`CheckpointError`] when there is no such tensor or range, or writing fails.
    fn write(&self, name: &str, offset_bytes: u64, bytes: &[u8]) -> Result<(), CheckpointError>;
}

/// A sink whose tensors stand in files that are finished one by one.
pub trait FileSink: TensorSink {
    /// How many files.
    fn num_files(&self) -> usize;

    /// Bytes of a file's tensors.
    fn file_bytes(&self, file: usize) -> u64;

    /// The tensors of a file that are to be written; none when an earlier run finished it.
    fn unwritten(&self, file: usize) -> Vec<&str>;

    /// Checks that a file is whole, syncs it, reads it back when that was asked for, and records it.
    ///
    /// # Errors
    /// [`CheckpointError::Unfinished`] names the first tensor with missing bytes; otherwise what the system said.
    fn finish_file(&self, file: usize) -> Result<(), CheckpointError>;
}
