//! `checksums.json`: the SHA-256 of every file and tensor of a checkpoint, beside it.
//!
//! Files are checked first, in one reading; only where one differs are tensors hashed, to say which of them it is.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};

use anyhow::Context;
use bridge_core::checkpoint::{CheckpointError, TensorSource};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::checkpoint::Checkpoint;

/// Its name in a directory, and the end of its name beside a file.
const NAME: &str = "checksums.json";
/// Changes when a key changes its meaning.
const SCHEMA_VERSION: u32 = 1;
/// Bytes that are hashed at a time.
const BLOCK: usize = 1 << 20;

/// What was recorded.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Checksums {
    schema_version: u32,
    /// Every file of the directory but this one, or the one file.
    files: BTreeMap<String, String>,
    tensors: BTreeMap<String, Tensor>,
}

#[derive(Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Tensor {
    dtype: String,
    shape: Vec<usize>,
    sha256: String,
}

/// A checkpoint held against its record.
pub(crate) struct Checked {
    /// The record.
    pub(crate) record: PathBuf,
    /// Files and tensors that it lists.
    pub(crate) files: usize,
    pub(crate) tensors: usize,
    /// A line for each that differs.
    pub(crate) damage: Vec<Damage>,
}

/// One thing that is not as it was recorded.
#[derive(Debug, PartialEq)]
pub(crate) struct Damage {
    /// `file` or `tensor`.
    pub(crate) kind: &'static str,
    pub(crate) name: String,
    pub(crate) what: String,
}

/// Hashes the checkpoint at `path` and writes the record; gives its place.
pub(crate) fn record(path: &Path) -> anyhow::Result<PathBuf> {
    let checkpoint = Checkpoint::open(path)?;
    let place = checkpoint.path();
    let checksums = Checksums {
        schema_version: SCHEMA_VERSION,
        files: hash_files(&file_names(&place)?, &folder_of(&place))?,
        tensors: hash_tensors(&checkpoint)?,
    };
    let target = record_of(&place);
    let mut beside = target.clone().into_os_string();
    beside.push(".tmp");
    let mut file = fs_err::File::create(&beside)?;
    serde_json::to_writer_pretty(&mut file, &checksums)?;
    file.write_all(b"\n")?;
    file.sync_all()?;
    fs_err::rename(&beside, &target)?;
    Ok(target)
}

/// Takes away the record of what was there before the checkpoint at `place`.
pub(crate) fn forget(place: &Path) -> anyhow::Result<()> {
    let record = record_of(place);
    if record.is_file() {
        fs_err::remove_file(&record)?;
    }
    Ok(())
}

/// Holds the checkpoint at `path` against its record.
///
/// A checkpoint that cannot be opened any more is damage, not an error, where the record says which file it is.
pub(crate) fn check(path: &Path) -> anyhow::Result<Checked> {
    let opened = Checkpoint::open(path);
    let place = match &opened {
        Ok(checkpoint) => checkpoint.path(),
        Err(_) => path.to_owned(),
    };
    let record = record_of(&place);
    if !record.is_file() {
        opened?;
        anyhow::bail!(
            "{} does not exist: there is nothing to hold {} against; name a second checkpoint, or make a record of a good one with trainer inspect --checksum --record",
            record.display(),
            path.display()
        );
    }
    let expected = read(&record)?;
    let folder = folder_of(&place);
    let (present, absent): (Vec<String>, Vec<String>) = expected
        .files
        .keys()
        .cloned()
        .partition(|name| folder.join(name).is_file());
    let found = hash_files(&present, &folder)?;
    let mut damage: Vec<Damage> = absent
        .into_iter()
        .map(|name| Damage::new("file", name, "it is missing"))
        .collect();
    let differs = |(name, sha256): &(&String, &String)| expected.files.get(*name) != Some(*sha256);
    damage.extend(found.iter().filter(differs).map(|(name, _)| {
        Damage::new(
            "file",
            name.clone(),
            "its bytes are not those that were recorded",
        )
    }));
    if !damage.is_empty() {
        match opened {
            Ok(checkpoint) => damage.extend(tensor_damage(&expected, &checkpoint)),
            Err(error) => {
                let name = path.display().to_string();
                damage.push(Damage::new("checkpoint", name, format!("{error:#}")));
            }
        }
    } else {
        // Its bytes are the recorded ones, so whatever is wrong with it was wrong then.
        opened?;
    }
    Ok(Checked {
        record,
        files: expected.files.len(),
        tensors: expected.tensors.len(),
        damage,
    })
}

impl Damage {
    fn new(kind: &'static str, name: String, what: impl Into<String>) -> Self {
        let what = what.into();
        Self { kind, name, what }
    }
}

/// Tensors that are not as they were recorded.
fn tensor_damage(expected: &Checksums, checkpoint: &Checkpoint) -> Vec<Damage> {
    let damage = |name: &str, what: &str| Damage::new("tensor", name.to_owned(), what);
    let lacking = expected
        .tensors
        .keys()
        .filter(|name| checkpoint.source().info(name).is_none())
        .map(|name| damage(name, "it is missing"));
    let mut all: Vec<Damage> = lacking.collect();
    let tensors = checkpoint.tensors();
    let found: Vec<Option<Damage>> = tensors
        .par_iter()
        .map(|(name, info)| {
            let Some(tensor) = expected.tensors.get(*name) else {
                return Some(damage(name, "it was not recorded"));
            };
            if tensor.dtype != info.dtype.torch_word() || tensor.shape != info.shape {
                return Some(damage(name, "its dtype or shape is not the recorded one"));
            }
            match sha256(checkpoint.source(), name) {
                Ok(sha256) if sha256 == tensor.sha256 => None,
                Ok(_) => Some(damage(name, "its bytes are not those that were recorded")),
                Err(error) => {
                    let error = anyhow::Error::from(error);
                    Some(damage(name, &format!("it cannot be read: {error:#}")))
                }
            }
        })
        .collect();
    all.extend(found.into_iter().flatten());
    all
}

fn read(record: &Path) -> anyhow::Result<Checksums> {
    let bytes = fs_err::read(record)?;
    let wrong = || format!("{} is no record of checksums", record.display());
    let checksums: Checksums = serde_json::from_slice(&bytes).with_context(wrong)?;
    if checksums.schema_version != SCHEMA_VERSION {
        anyhow::bail!(
            "{} has schema_version {}, this program reads {SCHEMA_VERSION}",
            record.display(),
            checksums.schema_version
        );
    }
    // A record is as little trusted as what it is about.
    if let Some(name) = checksums.files.keys().find(|name| {
        Path::new(name).file_name() != Some(name.as_ref()) || name.contains(['/', '\\'])
    }) {
        anyhow::bail!(
            "{} names the file {name:?}; a file is a plain name in the same directory",
            record.display()
        );
    }
    Ok(checksums)
}

/// Where the record of a checkpoint is: in a directory, or beside a file.
fn record_of(place: &Path) -> PathBuf {
    if place.is_dir() {
        return place.join(NAME);
    }
    let mut name: OsString = place.as_os_str().to_owned();
    name.push(".");
    name.push(NAME);
    name.into()
}

fn folder_of(place: &Path) -> PathBuf {
    if place.is_dir() {
        return place.to_owned();
    }
    match place.parent() {
        Some(folder) if folder != Path::new("") => folder.to_owned(),
        _ => PathBuf::from("."),
    }
}

/// The files of a checkpoint; names that are no text are left to those who gave them.
fn file_names(place: &Path) -> anyhow::Result<Vec<String>> {
    if !place.is_dir() {
        let name = place.file_name().and_then(|name| name.to_str());
        return Ok(name.map(str::to_owned).into_iter().collect());
    }
    let mut names = Vec::new();
    for entry in fs_err::read_dir(place)? {
        let entry = entry?;
        if let Some(name) = entry.file_name().to_str()
            && name != NAME
            && entry.path().is_file()
        {
            names.push(name.to_owned());
        }
    }
    Ok(names)
}

fn hash_files(names: &[String], folder: &Path) -> anyhow::Result<BTreeMap<String, String>> {
    let hash = |name: &String| -> anyhow::Result<(String, String)> {
        let mut file = fs_err::File::open(folder.join(name))?;
        let mut hash = Sha256::new();
        let mut buffer = vec![0u8; BLOCK];
        loop {
            match file.read(&mut buffer)? {
                0 => return Ok((name.clone(), hex(hash))),
                len => hash.update(&buffer[..len]),
            }
        }
    };
    names.par_iter().map(hash).collect()
}

fn hash_tensors(checkpoint: &Checkpoint) -> anyhow::Result<BTreeMap<String, Tensor>> {
    let hash = |(name, info): &(&str, &bridge_core::checkpoint::TensorInfo)| {
        let tensor = Tensor {
            dtype: info.dtype.torch_word().to_owned(),
            shape: info.shape.clone(),
            sha256: sha256(checkpoint.source(), name)?,
        };
        Ok(((*name).to_owned(), tensor))
    };
    checkpoint.tensors().par_iter().map(hash).collect()
}

/// The SHA-256 of a tensor's bytes, read through one buffer.
pub(crate) fn sha256(source: &dyn TensorSource, name: &str) -> Result<String, CheckpointError> {
    let num_bytes = source.info(name).map_or(0, |info| info.num_bytes());
    let mut hash = Sha256::new();
    let mut buffer = vec![0u8; usize::try_from(num_bytes).unwrap_or(BLOCK).min(BLOCK)];
    let mut offset = 0;
    while offset < num_bytes {
        let left = usize::try_from(num_bytes - offset).unwrap_or(usize::MAX);
        let len = left.min(buffer.len());
        source.read(name, offset, &mut buffer[..len])?;
        hash.update(&buffer[..len]);
        offset += len as u64;
    }
    Ok(hex(hash))
}

fn hex(hash: Sha256) -> String {
    let digest = hash.finalize();
    digest.iter().map(|byte| format!("{byte:02x}")).collect()
}
