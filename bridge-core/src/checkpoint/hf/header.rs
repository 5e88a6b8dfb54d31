//! The header of one safetensors file.

use std::borrow::Cow;
use std::cmp::Ordering;
use std::fmt;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use serde::Deserialize;
use serde::de::{Deserializer, Error, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Value};

use crate::Dtype;
use crate::checkpoint::{CheckpointError, FileProblem, TensorInfo};
use crate::json::{self, Strict};

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
    let size = usize::try_from(header).expect("a header of at most 100 MB");
    let mut text = vec![0u8; size];
    file.read_exact_at(&mut text, LENGTH_BYTES).map_err(io)?;
    parse(text, len).map_err(|problems| CheckpointError::Files {
        path: path.to_owned(),
        problems,
    })
}

/// Checks the header of a file of `len` bytes.
fn parse(text: Vec<u8>, len: u64) -> Result<Header, Vec<FileProblem>> {
    let invalid = |reason: String| {
        vec![FileProblem::Json {
            what: "its header",
            reason,
        }]
    };
    if text.first() != Some(&b'{') {
        return Err(invalid("it does not begin with `{`".to_owned()));
    }
    let data_start = LENGTH_BYTES + text.len() as u64;
    let Reading {
        mut entries,
        metadata,
        mut problems,
        ..
    } = Reading::of(&text).map_err(invalid)?;
    drop(text);
    if let Some(name) = repeated(entries.iter().map(|entry| entry.name.as_str())) {
        return Err(invalid(format!("the key `{name}` stands twice")));
    }
    // The order in the header breaks ties of empty tensors, as the sort is stable.
    entries.sort_by_key(|entry| (entry.file_offset, entry.info.num_bytes()));
    let mut next = 0u64;
    for entry in &entries {
        let (start, name) = (entry.file_offset, || entry.name.clone());
        let problem = match start.cmp(&next) {
            Ordering::Less => Some(FileProblem::Overlap {
                name: name(),
                start,
                end: next,
            }),
            Ordering::Greater => Some(FileProblem::Gap {
                name: name(),
                start,
                end: next,
            }),
            Ordering::Equal => None,
        };
        keep(&mut problems, problem);
        next = next.max(start + entry.info.num_bytes());
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
    for entry in &mut entries {
        entry.file_offset += data_start;
    }
    Ok(Header { entries, metadata })
}

/// Messages show ten problems, and say how many there are; a hostile file has any number.
pub(super) fn keep(
    problems: &mut Vec<FileProblem>,
    problem: impl IntoIterator<Item = FileProblem>,
) {
    problems.extend(
        problem
            .into_iter()
            .take(1000_usize.saturating_sub(problems.len())),
    );
}

/// A name that stands twice.
pub(super) fn repeated<'a>(names: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    let mut names: Vec<&str> = names.collect();
    names.sort_unstable();
    let pair = names.windows(2).find(|pair| pair[0] == pair[1])?;
    Some(pair[0])
}

/// A header that is read entry by entry; what it says is checked, where its tensors stand not yet.
///
/// Offsets count from the first tensor's first byte.
struct Reading {
    entries: Vec<Entry>,
    metadata: Map<String, Value>,
    problems: Vec<FileProblem>,
    /// Whose entry is read.
    at: Option<String>,
}

impl Reading {
    fn of(text: &[u8]) -> Result<Self, String> {
        /// The shortest entry; with room for as many as fit, the list is never moved.
        const SHORTEST: &str = r#""":{"dtype":"U8","shape":[],"data_offsets":[0,1]},"#;
        let mut reading = Self {
            entries: Vec::with_capacity(text.len() / SHORTEST.len() + 1),
            metadata: Map::new(),
            problems: Vec::new(),
            at: None,
        };
        let mut deserializer = serde_json::Deserializer::from_slice(text);
        deserializer
            .deserialize_map(&mut reading)
            .and_then(|()| deserializer.end())
            .map_err(|error| match &reading.at {
                Some(name) => format!("`{name}`: {error}"),
                None => error.to_string(),
            })?;
        Ok(reading)
    }

    fn metadata(&mut self, value: Value) {
        match value {
            Value::Object(texts) if texts.values().all(Value::is_string) => self.metadata = texts,
            _ => self.problems.push(FileProblem::Entry {
                name: METADATA.to_owned(),
                reason: "it must map texts to texts".to_owned(),
            }),
        }
    }
}

const METADATA: &str = "__metadata__";

impl<'de> Visitor<'de> for &mut Reading {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object of tensors")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        let mut has_metadata = false;
        while let Some(name) = map.next_key::<String>()? {
            self.at = Some(name.clone());
            if name == METADATA {
                if has_metadata {
                    return Err(json::twice(METADATA));
                }
                has_metadata = true;
                self.metadata(map.next_value::<Strict>()?.0);
            } else {
                match entry(name, &map.next_value()?) {
                    Ok(entry) => self.entries.push(entry),
                    Err(problem) => keep(&mut self.problems, [problem]),
                }
            }
            self.at = None;
        }
        Ok(())
    }
}

/// The value of a tensor in the header.
#[derive(Deserialize)]
#[serde(
    deny_unknown_fields,
    expecting = "an object with dtype, shape and data_offsets"
)]
struct Described<'a> {
    #[serde(borrow)]
    dtype: Cow<'a, str>,
    shape: Shape,
    data_offsets: [u64; 2],
}

/// Sizes of axes.
struct Shape(Vec<u64>);

impl<'de> Deserialize<'de> for Shape {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_seq(Axes)
    }
}

struct Axes;

impl Axes {
    /// No tensor of a model has more than five.
    const MOST: usize = 8;
}

impl<'de> Visitor<'de> for Axes {
    type Value = Shape;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "a list of at most {} sizes", Self::MOST)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut sizes: A) -> Result<Shape, A::Error> {
        let mut shape = Vec::new();
        while let Some(size) = sizes.next_element()? {
            if shape.len() == Self::MOST {
                return Err(A::Error::invalid_length(Self::MOST + 1, &self));
            }
            shape.push(size);
        }
        Ok(Shape(shape))
    }
}

/// A tensor by its name and value.
fn entry(name: String, described: &Described<'_>) -> Result<Entry, FileProblem> {
    let Described {
        dtype: word,
        shape: Shape(shape),
        data_offsets,
    } = described;
    let wrong = |reason: String| FileProblem::Entry {
        name: name.clone(),
        reason,
    };
    let dtype: Dtype = word
        .parse()
        .ok()
        .filter(|dtype: &Dtype| dtype.safetensors_word() == *word)
        .ok_or_else(|| wrong(format!("the dtype `{word}` is not supported")))?;
    let bytes = shape
        .iter()
        .try_fold(dtype.size_bytes() as u64, |bytes, dim| {
            bytes.checked_mul(*dim)
        })
        .filter(|bytes| *bytes < 1 << 62)
        .ok_or_else(|| wrong(format!("its shape {shape:?} overflows")))?;
    let [begin, end] = *data_offsets;
    if end < begin || end >= 1 << 62 {
        return Err(wrong(format!(
            "its data_offsets {data_offsets:?} are no range"
        )));
    }
    if end - begin != bytes {
        return Err(FileProblem::Size {
            name,
            found: end - begin,
            expected: bytes,
        });
    }
    let shape = shape
        .iter()
        .map(|dim| usize::try_from(*dim))
        .collect::<Result<Vec<_>, _>>()
        .map_err(|_| wrong(format!("its shape {shape:?} overflows")))?;
    Ok(Entry {
        name,
        info: TensorInfo { dtype, shape },
        file_offset: begin,
    })
}

/// A header for `entries`, written as the safetensors library writes it: padded with spaces to 8 bytes.
pub(in crate::checkpoint) fn write<'a>(
    entries: impl IntoIterator<Item = (&'a str, &'a TensorInfo)>,
    metadata: &Map<String, Value>,
) -> Vec<u8> {
    let mut map = Map::new();
    if !metadata.is_empty() {
        map.insert(METADATA.to_owned(), Value::Object(metadata.clone()));
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
