//! Safetensors files of libtorch tensors, written and read one tensor at a time.

use std::collections::BTreeMap;
use std::io::{BufReader, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use fs_err::File;
use safetensors::tensor::{Dtype, Metadata};
use serde_json::{Map, json};
use tch::{Device, Kind, Tensor};

use super::{CheckpointError, FileRecord};

const BUFFER_BYTES: usize = 8 << 20;

/// Writes `tensors` in their order, synced. Returns size and checksum of the file.
pub(super) fn write(
    path: &Path,
    tensors: &[(String, Tensor)],
) -> Result<FileRecord, CheckpointError> {
    let mut header = Map::new();
    let mut offset = 0;
    for (name, tensor) in tensors {
        let torch = |source| CheckpointError::Torch {
            tensor: name.clone(),
            source,
        };
        let end = offset + num_bytes(tensor).map_err(torch)?;
        let value = json!({
            "dtype": dtype_word(tensor.f_kind().map_err(torch)?),
            "shape": tensor.size(),
            "data_offsets": [offset, end],
        });
        header.insert(name.clone(), value);
        offset = end;
    }
    let mut header = serde_json::to_vec(&header).map_err(std::io::Error::from)?;
    // The format aligns the data to 8 bytes by spaces behind the header.
    header.resize(header.len().next_multiple_of(8), b' ');
    let mut file = Summing {
        file: File::create(path)?,
        record: FileRecord::default(),
    };
    file.write(&(header.len() as u64).to_le_bytes())?;
    file.write(&header)?;
    let mut bytes = Vec::new();
    for (name, tensor) in tensors {
        let torch = |source| CheckpointError::Torch {
            tensor: name.clone(),
            source,
        };
        let flat = tensor
            .f_detach()
            .and_then(|t| t.f_to_device(Device::Cpu))
            .and_then(|t| t.f_contiguous())
            .map_err(torch)?;
        bytes.resize(num_bytes(&flat).map_err(torch)?, 0);
        if !bytes.is_empty() {
            flat.f_copy_data_u8(&mut bytes, flat.numel())
                .map_err(torch)?;
        }
        file.write(&bytes)?;
    }
    file.file.sync_all()?;
    Ok(file.record)
}

/// Size and checksum of the file at `path`.
pub(super) fn checksum(path: &Path) -> Result<FileRecord, CheckpointError> {
    let mut file = File::open(path)?;
    let mut buffer = vec![0; BUFFER_BYTES];
    let mut record = FileRecord::default();
    loop {
        let read = file.read(&mut buffer)?;
        if read == 0 {
            return Ok(record);
        }
        record.add(&buffer[..read]);
    }
}

struct Summing {
    file: File,
    record: FileRecord,
}

impl Summing {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<()> {
        self.record.add(bytes);
        self.file.write_all(bytes)
    }
}

/// A tensor's dtype, shape and byte range behind the header.
type Entry = (Dtype, Vec<usize>, (usize, usize));

/// An open file of tensors.
#[derive(Debug)]
pub struct TensorFile {
    dir: PathBuf,
    file: Mutex<BufReader<File>>,
    data_start: u64,
    tensors: BTreeMap<String, Entry>,
}

impl TensorFile {
    pub(super) fn open(dir: &Path, name: &str) -> Result<Self, CheckpointError> {
        let damaged = |what: String| CheckpointError::Damaged {
            dir: dir.to_path_buf(),
            file: name.to_owned(),
            what,
        };
        let mut file = BufReader::new(File::open(dir.join(name))?);
        let mut length = [0; 8];
        file.read_exact(&mut length)?;
        let available = file.get_ref().metadata()?.len();
        let length = u64::from_le_bytes(length);
        if length > available.saturating_sub(8) {
            return Err(damaged(format!("says its header has {length} bytes")));
        }
        let header_bytes = usize::try_from(length).expect("a header is no larger than its file");
        let mut header = vec![0; header_bytes];
        file.read_exact(&mut header)?;
        let metadata: Metadata =
            serde_json::from_slice(&header).map_err(|error| damaged(error.to_string()))?;
        let data_bytes = (available - 8 - length, metadata.data_len() as u64);
        if data_bytes.0 != data_bytes.1 {
            let (found, described) = data_bytes;
            return Err(damaged(format!(
                "holds {found} bytes of data, {described} are described"
            )));
        }
        let tensors = metadata
            .tensors()
            .into_iter()
            .map(|(name, info)| (name, (info.dtype, info.shape.clone(), info.data_offsets)))
            .collect();
        Ok(Self {
            dir: dir.to_path_buf(),
            file: Mutex::new(file),
            data_start: 8 + length,
            tensors,
        })
    }

    /// Names, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// Reads one tensor into memory.
    ///
    /// # Errors
    /// [`CheckpointError::Tensor`] when it is not there.
    pub fn read(&self, name: &str) -> Result<Tensor, CheckpointError> {
        let wrong = |what: String| CheckpointError::Tensor {
            dir: self.dir.clone(),
            tensor: name.to_owned(),
            what,
        };
        let Some((dtype, shape, (start, end))) = self.tensors.get(name) else {
            return Err(wrong("is missing".to_owned()));
        };
        let kind = kind_of(*dtype).ok_or_else(|| wrong(format!("has dtype {dtype:?}")))?;
        let mut bytes = vec![0; end - start];
        {
            let mut file = self
                .file
                .lock()
                .unwrap_or_else(std::sync::PoisonError::into_inner);
            file.seek(SeekFrom::Start(self.data_start + *start as u64))?;
            file.read_exact(&mut bytes)?;
        }
        let shape: Vec<i64> = shape
            .iter()
            .map(|dim| i64::try_from(*dim).map_err(|_| wrong(format!("has shape {shape:?}"))))
            .collect::<Result<_, _>>()?;
        Tensor::f_from_data_size(&bytes, &shape, kind).map_err(|source| CheckpointError::Torch {
            tensor: name.to_owned(),
            source,
        })
    }

    /// Reads `name` into `target`, which must have its dtype and shape.
    ///
    /// # Errors
    /// [`CheckpointError::Tensor`] when it is absent or differs in dtype or shape.
    pub fn read_into(&self, name: &str, target: &Tensor) -> Result<(), CheckpointError> {
        let read = self.read(name)?;
        let torch = |source| CheckpointError::Torch {
            tensor: name.to_owned(),
            source,
        };
        let (found, expected) = (
            (read.f_kind().map_err(torch)?, read.size()),
            (target.f_kind().map_err(torch)?, target.size()),
        );
        if found != expected {
            return Err(CheckpointError::Tensor {
                dir: self.dir.clone(),
                tensor: name.to_owned(),
                what: format!("is {found:?}, the model's is {expected:?}"),
            });
        }
        // An alias without a gradient history, so that a leaf may be written.
        target.detach().f_copy_(&read).map_err(torch)
    }
}

fn num_bytes(tensor: &Tensor) -> Result<usize, tch::TchError> {
    Ok(tensor.numel() * tensor.f_kind()?.elt_size_in_bytes())
}

const KINDS: [(Kind, Dtype, &str); 7] = [
    (Kind::Float, Dtype::F32, "F32"),
    (Kind::BFloat16, Dtype::BF16, "BF16"),
    (Kind::Double, Dtype::F64, "F64"),
    (Kind::Half, Dtype::F16, "F16"),
    (Kind::Int64, Dtype::I64, "I64"),
    (Kind::Int, Dtype::I32, "I32"),
    (Kind::Uint8, Dtype::U8, "U8"),
];

fn dtype_word(kind: Kind) -> &'static str {
    let row = KINDS.iter().find(|row| row.0 == kind);
    row.expect("a model's and an optimizer's tensors have one of these dtypes")
        .2
}

fn kind_of(dtype: Dtype) -> Option<Kind> {
    KINDS.iter().find(|row| row.1 == dtype).map(|row| row.0)
}
