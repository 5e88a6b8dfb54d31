//! Tensors in memory.

use std::collections::BTreeMap;
use std::sync::Mutex;

use super::{CheckpointError, TensorInfo, TensorSink, TensorSource};

/// Named tensors in memory, a source and a sink.
#[derive(Debug, Default)]
pub struct MemoryTensors {
    tensors: BTreeMap<String, (TensorInfo, Mutex<Vec<u8>>)>,
}

impl MemoryTensors {
    /// Adds a tensor of zeros.
    pub fn insert(&mut self, name: &str, info: TensorInfo) {
        let len = usize::try_from(info.num_bytes()).unwrap_or(usize::MAX);
        self.insert_bytes(name, info, vec![0; len]);
    }

    /// Adds a tensor.
    ///
    /// # Panics
    /// When `bytes` has not the info's length.
    pub fn insert_bytes(&mut self, name: &str, info: TensorInfo, bytes: Vec<u8>) {
        assert_eq!(bytes.len() as u64, info.num_bytes(), "bytes of `{name}`");
        self.tensors
            .insert(name.to_owned(), (info, Mutex::new(bytes)));
    }

    /// A copy of a tensor's bytes.
    #[must_use]
    pub fn bytes(&self, name: &str) -> Option<Vec<u8>> {
        let (_, bytes) = self.tensors.get(name)?;
        Some(lock(bytes).clone())
    }

    /// The names, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    fn range(
        &self,
        name: &str,
        offset: u64,
        len: usize,
    ) -> Result<(&Mutex<Vec<u8>>, std::ops::Range<usize>), CheckpointError> {
        let (info, bytes) = self
            .tensors
            .get(name)
            .ok_or_else(|| CheckpointError::NoTensor {
                name: name.to_owned(),
            })?;
        let end = offset.checked_add(len as u64);
        let range = end
            .filter(|end| *end <= info.num_bytes())
            .and_then(|end| Some(usize::try_from(offset).ok()?..usize::try_from(end).ok()?));
        match range {
            Some(range) => Ok((bytes, range)),
            None => Err(CheckpointError::Range {
                name: name.to_owned(),
                start: offset,
                end: end.unwrap_or(u64::MAX),
                num_bytes: info.num_bytes(),
            }),
        }
    }
}

fn lock(bytes: &Mutex<Vec<u8>>) -> std::sync::MutexGuard<'_, Vec<u8>> {
    bytes
        .lock()
        .unwrap_or_else(std::sync::PoisonError::into_inner)
}

impl TensorSource for MemoryTensors {
    fn info(&self, name: &str) -> Option<TensorInfo> {
        self.tensors.get(name).map(|(info, _)| info.clone())
    }

    fn read(&self, name: &str, offset_bytes: u64, into: &mut [u8]) -> Result<(), CheckpointError> {
        let (bytes, range) = self.range(name, offset_bytes, into.len())?;
        into.copy_from_slice(&lock(bytes)[range]);
        Ok(())
    }
}

impl TensorSink for MemoryTensors {
    fn write(&self, name: &str, offset_bytes: u64, bytes: &[u8]) -> Result<(), CheckpointError> {
        let (target, range) = self.range(name, offset_bytes, bytes.len())?;
        lock(target)[range].copy_from_slice(bytes);
        Ok(())
    }
}
