//! The header of one safetensors file.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use safetensors::tensor::Metadata;
use serde_json::{Map, Value};

use crate::checkpoint::{CheckpointError, FileProblem, TensorInfo};
use crate::{Dtype, json};

/// The limit of the safetensors library.
const MAX_HEADER_BYTES: u64 = 100_000_000;
const LENGTH_BYTES: u64 = 8;

/// One tensor of a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::checkpoint) struct Entry {
    pub(in crate::checkpoint) name: String,
    pub(in crate::checkpoint) info: TensorInfo,
    /// First byte in the file.
    pub(in crate::checkpoint) file_offset: u64,
}

/// A checked header; entries in the order of their bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::checkpoint) struct Header {
    pub(in crate::checkpoint) entries: Vec<Entry>,
    pub(in crate::checkpoint) metadata: Map<String, Value>,
}

/// Reads and checks the header of an open file.
pub(in crate::checkpoint) fn read(file: &File, path: &Path) -> Result<Header, CheckpointError> {
    let io = |source| CheckpointError::Io {
        action: "read",
        path: path.to_owned(),
        source,
    };
    let one = |problem| CheckpointError::Files {
        path: path.to_owned(),
        problems: vec![problem],
    };
    let len = file.metadata().map_err(io)?.len();
    if len < LENGTH_BYTES {
        return Err(one(FileProblem::TooShort { len }));
    }
    let mut length = [0u8; 8];
    file.read_exact_at(&mut length, 0).map_err(io)?;
    let header = u64::from_le_bytes(length);
    if header > MAX_HEADER_BYTES && header <= len - LENGTH_BYTES {
        return Err(one(FileProblem::HeaderTooLarge {
            header,
            limit: MAX_HEADER_BYTES,
        }));
    }
    if header > len - LENGTH_BYTES {
        return Err(one(FileProblem::HeaderCut { header, len }));
    }
    let size = usize::try_from(header + LENGTH_BYTES).expect("a header of at most 100 MB");
    let mut buffer = vec![0u8; size];
    file.read_exact_at(&mut buffer, 0).map_err(io)?;
    parse(&buffer, len).map_err(|problems| CheckpointError::Files {
        path: path.to_owned(),
        problems,
    })
}

/// Checks the first bytes of a file of `len` bytes: length field and header.
fn parse(buffer: &[u8], len: u64) -> Result<Header, Vec<FileProblem>> {
    let invalid = |reason: String| {
        vec![FileProblem::Json {
            what: "its header",
            reason,
        }]
    };
    let text = &buffer[8..];
    if text.first() != Some(&b'{') {
        return Err(invalid("it does not begin with `{`".to_owned()));
    }
    let Value::Object(map) = json::parse(text).map_err(|error| invalid(error.to_string()))? else {
        return Err(invalid("it is not an object".to_owned()));
    };
    let data_start = buffer.len() as u64;
    let mut metadata = Map::new();
    let mut entries = Vec::with_capacity(map.len());
    let mut problems = Vec::new();
    for (name, value) in map {
        if name == "__metadata__" {
            match value {
                Value::Object(texts) if texts.values().all(Value::is_string) => metadata = texts,
                _ => problems.push(FileProblem::Entry {
                    name,
                    reason: "it must map texts to texts".to_owned(),
                }),
            }
            continue;
        }
        match entry(&name, &value) {
            Ok((info, begin, end)) => entries.push((name, info, begin, end)),
            Err(problem) => problems.push(problem),
        }
    }
    // The order in the header breaks ties of empty tensors, as the sort is stable.
    entries.sort_by_key(|(_, _, begin, end)| (*begin, *end));
    let mut next = 0u64;
    for (name, _, begin, end) in &entries {
        if *begin < next {
            problems.push(FileProblem::Overlap {
                name: name.clone(),
                start: *begin,
                end: next,
            });
        } else if *begin > next {
            problems.push(FileProblem::Gap {
                name: name.clone(),
                start: *begin,
                end: next,
            });
        }
        next = next.max(*end);
    }
    // Ends are below 2^63 (see `entry`) and a header has at most 100 MB.
    let needed = data_start + next;
    if len < needed {
        problems.push(FileProblem::Truncated { len, needed });
    }
    if len > needed {
        problems.push(FileProblem::Trailing {
            extra: len - needed,
        });
    }
    if !problems.is_empty() {
        return Err(problems);
    }
    // The library's own reading is the second opinion: what it refuses, other tools would refuse too.
    serde_json::from_slice::<Metadata>(text).map_err(|error| invalid(error.to_string()))?;
    Ok(Header {
        entries: entries
            .into_iter()
            .map(|(name, info, begin, _)| Entry {
                name,
                info,
                file_offset: data_start + begin,
            })
            .collect(),
        metadata,
    })
}

/// Dtype, shape and offsets of one entry.
fn entry(name: &str, value: &Value) -> Result<(TensorInfo, u64, u64), FileProblem> {
    let wrong = |reason: String| FileProblem::Entry {
        name: name.to_owned(),
        reason,
    };
    let map = value
        .as_object()
        .ok_or_else(|| wrong("it is not an object".to_owned()))?;
    if let Some(key) = map
        .keys()
        .find(|key| !["dtype", "shape", "data_offsets"].contains(&key.as_str()))
    {
        return Err(wrong(format!("the key `{key}` is unknown")));
    }
    let word = map
        .get("dtype")
        .and_then(Value::as_str)
        .ok_or_else(|| wrong("it has no dtype".to_owned()))?;
    let dtype: Dtype = word
        .parse()
        .ok()
        .filter(|dtype: &Dtype| dtype.safetensors_word() == word)
        .ok_or_else(|| wrong(format!("the dtype `{word}` is not supported")))?;
    let numbers = |key: &str| {
        let list = map.get(key)?.as_array()?;
        list.iter().map(Value::as_u64).collect::<Option<Vec<u64>>>()
    };
    let shape = numbers("shape")
        .ok_or_else(|| wrong("its shape is no list of whole numbers".to_owned()))?;
    let bytes = shape
        .iter()
        .try_fold(dtype.size_bytes() as u64, |bytes, dim| {
            bytes.checked_mul(*dim)
        })
        .filter(|bytes| *bytes < 1 << 62)
        .ok_or_else(|| wrong(format!("its shape {shape:?} overflows")))?;
    let offsets = numbers("data_offsets")
        .and_then(|list| <[u64; 2]>::try_from(list).ok())
        .ok_or_else(|| wrong("its data_offsets are no two whole numbers".to_owned()))?;
    let [begin, end] = offsets;
    if end < begin || end >= 1 << 62 {
        return Err(wrong(format!("its data_offsets {offsets:?} are no range")));
    }
    if end - begin != bytes {
        return Err(FileProblem::Size {
            name: name.to_owned(),
            found: end - begin,
            expected: bytes,
        });
    }
    let shape = shape
        .iter()
        .map(|dim| usize::try_from(*dim))
        .collect::<Result<Vec<_>, _>>()
        .map_err(|_| wrong(format!("its shape {shape:?} overflows")))?;
    Ok((TensorInfo { dtype, shape }, begin, end))
}

/// A header for `entries`, written as the safetensors library writes it: padded with spaces to 8 bytes.
pub(in crate::checkpoint) fn write<'a>(
    entries: impl IntoIterator<Item = (&'a str, &'a TensorInfo)>,
    metadata: &Map<String, Value>,
) -> Vec<u8> {
    let mut map = Map::new();
    if !metadata.is_empty() {
        map.insert("__metadata__".to_owned(), Value::Object(metadata.clone()));
    }
    let mut offset = 0u64;
    for (name, info) in entries {
        let end = offset + info.num_bytes();
        map.insert(
            name.to_owned(),
            serde_json::json!({
                "dtype": info.dtype.safetensors_word(),
                "shape": info.shape,
                "data_offsets": [offset, end],
            }),
        );
        offset = end;
    }
    let mut text = Value::Object(map).to_string().into_bytes();
    text.resize(text.len().next_multiple_of(8), b' ');
    let mut bytes = (text.len() as u64).to_le_bytes().to_vec();
    bytes.append(&mut text);
    bytes
}
