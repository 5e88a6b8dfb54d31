//! An opened shard.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use indexmap::IndexMap;

use super::ShardInfo;
use crate::checkpoint::error::{check_range, io};
use crate::checkpoint::hf::header;
use crate::checkpoint::{CheckpointError, FileProblem, Reader, TensorInfo, TensorSource};
use crate::regular_file;

/// One rank's file, its header read and checked.
#[derive(Debug)]
pub struct ShardFile {
    path: PathBuf,
    file: File,
    info: ShardInfo,
    tensors: IndexMap<String, (TensorInfo, u64)>,
}

impl ShardFile {
    /// Opens a file.
    ///
    /// # Errors
    /// [`CheckpointError`] when it cannot be read, its header is wrong, or it does not say whose part it is
    /// ([`FileProblem::NotAShard`]).
    pub fn open(path: &Path) -> Result<Self, CheckpointError> {
        let wrong = |problem| CheckpointError::Files {
            path: path.to_owned(),
            problems: vec![problem],
        };
        let opened = regular_file::open(path).map_err(io("open", path))?;
        let (file, _) = opened.ok_or_else(|| {
            let file = path.display().to_string();
            wrong(FileProblem::NotAFile { file })
        })?;
        let header = header::read(&file, path)?;
        let info = ShardInfo::from_metadata(&header.metadata)
            .ok_or_else(|| wrong(FileProblem::NotAShard))?
            .map_err(|reason| {
                wrong(FileProblem::Json {
                    what: "its description of a rank",
                    reason,
                })
            })?;
        let entries = header.entries.into_iter();
        Ok(Self {
            path: path.to_owned(),
            file,
            info,
            tensors: entries
                .map(|entry| (entry.name, (entry.info, entry.file_offset)))
                .collect(),
        })
    }

    /// The file.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Whose part it is.
    #[must_use]
    pub fn shard(&self) -> &ShardInfo {
        &self.info
    }

    /// Names and infos, in the order of their bytes.
    pub fn tensors(&self) -> impl ExactSizeIterator<Item = (&str, &TensorInfo)> {
        self.tensors
            .iter()
            .map(|(name, (info, _))| (name.as_str(), info))
    }
}

impl TensorSource for ShardFile {
    fn info(&self, name: &str) -> Option<TensorInfo> {
        self.tensors.get(name).map(|(info, _)| info.clone())
    }

    fn read(&self, name: &str, offset_bytes: u64, into: &mut [u8]) -> Result<(), CheckpointError> {
        self.reader(name)?(offset_bytes, into)
    }

    fn reader<'a>(&'a self, name: &'a str) -> Result<Reader<'a>, CheckpointError> {
        let (info, file_offset) =
            self.tensors
                .get(name)
                .ok_or_else(|| CheckpointError::NoTensor {
                    name: name.to_owned(),
                })?;
        let num_bytes = info.num_bytes();
        Ok(Box::new(move |offset_bytes, into| {
            check_range(name, offset_bytes, into.len(), num_bytes)?;
            self.file
                .read_exact_at(into, file_offset + offset_bytes)
                .map_err(io("read", &self.path))
        }))
    }
}
