//! Checkpoints: everything that a run needs to go on to the same numbers.
//!
//! A checkpoint is a directory `checkpoint-STEP` with `model.safetensors` (weights in the run's dtype under Megatron names),
//! `optimizer.safetensors` (`exp_avg.NAME`, `exp_avg_sq.NAME`, `master.NAME`) and `state.json`, which names the other files
//! with their sizes and checksums. It is built under a hidden name, synced and renamed: a directory with the final name is whole.

mod files;
mod state;

use std::path::{Path, PathBuf};

use tch::Tensor;

use super::output::{hidden_name, sync_dir, write_whole};

pub use files::TensorFile;
pub use state::{DataState, FileRecord, STATE_VERSION, StreamState, TrainerState};

const WEIGHTS: &str = "model.safetensors";
const OPTIMIZER: &str = "optimizer.safetensors";
const STATE: &str = "state.json";

/// Why a checkpoint cannot be written or read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CheckpointError {
    /// A file of the checkpoint is not there.
    #[error("{} is a partial checkpoint: `{file}` is missing; resume from an older one with --resume=CHECKPOINT", dir.display())]
    Missing {
        /// The checkpoint.
        dir: PathBuf,
        /// The file.
        file: String,
    },
    /// A file is not what was written.
    #[error("{} is damaged: `{file}` {what}; resume from an older one with --resume=CHECKPOINT", dir.display())]
    Damaged {
        /// The checkpoint.
        dir: PathBuf,
        /// The file.
        file: String,
        /// What is wrong with it, with numbers.
        what: String,
    },
    /// The checkpoint belongs to another model.
    #[error("{}: `{tensor}` {what}; this checkpoint belongs to another model or configuration", dir.display())]
    Tensor {
        /// The checkpoint.
        dir: PathBuf,
        /// The tensor.
        tensor: String,
        /// Found and expected.
        what: String,
    },
    /// The run would not go on to the same numbers.
    #[error("{} cannot be resumed with these settings: {}; restore them, or start a new run from the trained weights", dir.display(), differences.join("; "))]
    Mismatch {
        /// The checkpoint.
        dir: PathBuf,
        /// Each key with both values.
        differences: Vec<String>,
    },
    /// libtorch failed.
    #[error("tensor `{tensor}`")]
    Torch {
        /// The tensor.
        tensor: String,
        /// Its reason.
        #[source]
        source: tch::TchError,
    },
    /// The system refused.
    #[error(transparent)]
    Io(#[from] std::io::Error),
}

/// Writes a checkpoint to `dir`: beside, synced, renamed. An older one of the same name is replaced.
///
/// # Errors
/// [`CheckpointError::Io`] when the disk is full or the directory cannot be written.
pub fn save(
    dir: &Path,
    weights: &[(String, Tensor)],
    optimizer: &[(String, Tensor)],
    state: &mut TrainerState,
) -> Result<(), CheckpointError> {
    let beside = hidden_name(dir);
    if beside.exists() {
        fs_err::remove_dir_all(&beside)?;
    }
    fs_err::create_dir_all(&beside)?;
    state.schema_version = STATE_VERSION;
    state.files.clear();
    for (name, tensors) in [(WEIGHTS, weights), (OPTIMIZER, optimizer)] {
        state
            .files
            .insert(name.to_owned(), files::write(&beside.join(name), tensors)?);
    }
    let text = serde_json::to_string_pretty(state).map_err(std::io::Error::from)?;
    write_whole(&beside.join(STATE), &text)?;
    sync_dir(&beside)?;
    if dir.exists() {
        fs_err::remove_dir_all(dir)?;
    }
    fs_err::rename(&beside, dir)?;
    if let Some(parent) = dir.parent() {
        sync_dir(parent)?;
    }
    Ok(())
}

/// A checkpoint whose files were found whole.
#[derive(Debug)]
pub struct Checkpoint {
    /// Where it is.
    pub dir: PathBuf,
    /// What it says of the run.
    pub state: TrainerState,
}

impl Checkpoint {
    /// Reads the state and checks that every file it names is there, whole and unchanged.
    ///
    /// # Errors
    /// [`CheckpointError::Missing`] or [`CheckpointError::Damaged`].
    pub fn open(dir: &Path) -> Result<Self, CheckpointError> {
        let missing = |file: &str| CheckpointError::Missing {
            dir: dir.into(),
            file: file.into(),
        };
        let text = match fs_err::read_to_string(dir.join(STATE)) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                return Err(missing(STATE));
            }
            Err(error) => return Err(error.into()),
        };
        let damaged = |file: &str, what: String| CheckpointError::Damaged {
            dir: dir.into(),
            file: file.into(),
            what,
        };
        let state: TrainerState = serde_json::from_str(&text)
            .map_err(|error| damaged(STATE, format!("does not read: {error}")))?;
        if state.schema_version != STATE_VERSION {
            let what = format!(
                "has version {}, this build reads {STATE_VERSION}",
                state.schema_version
            );
            return Err(damaged(STATE, what));
        }
        for file in [WEIGHTS, OPTIMIZER] {
            let Some(record) = state.files.get(file) else {
                return Err(missing(file));
            };
            let path = dir.join(file);
            if !path.is_file() {
                return Err(missing(file));
            }
            let found = files::checksum(&path)?;
            if found.bytes != record.bytes {
                let what = format!("has {} bytes, {} were written", found.bytes, record.bytes);
                return Err(damaged(file, what));
            }
            if found != *record {
                return Err(damaged(
                    file,
                    "has another checksum than what was written".to_owned(),
                ));
            }
        }
        Ok(Self {
            dir: dir.to_path_buf(),
            state,
        })
    }

    /// The weights, under Megatron names.
    ///
    /// # Errors
    /// When the header does not read.
    pub fn weights(&self) -> Result<TensorFile, CheckpointError> {
        TensorFile::open(&self.dir, WEIGHTS)
    }

    /// The optimizer's tensors.
    ///
    /// # Errors
    /// When the header does not read.
    pub fn optimizer(&self) -> Result<TensorFile, CheckpointError> {
        TensorFile::open(&self.dir, OPTIMIZER)
    }
}

#[cfg(test)]
mod tests {
    use tch::Kind;

    use super::*;

    type Named = Vec<(String, Tensor)>;

    fn sample() -> (Named, Named) {
        let weight = Tensor::arange(6, (Kind::Float, tch::Device::Cpu)).view([2, 3]);
        let weights = vec![
            ("a.weight".to_owned(), weight.shallow_clone()),
            (
                "b.weight".to_owned(),
                weight.transpose(0, 1).to_kind(Kind::BFloat16),
            ),
        ];
        let optimizer = vec![("exp_avg.a.weight".to_owned(), &weight * 0.5)];
        (weights, optimizer)
    }

    fn saved() -> (tempfile::TempDir, PathBuf) {
        let root = tempfile::tempdir().unwrap();
        let dir = root.path().join("checkpoint-3");
        let (weights, optimizer) = sample();
        save(&dir, &weights, &optimizer, &mut TrainerState::default()).unwrap();
        (root, dir)
    }

    #[test]
    fn tensors_come_back_bit_for_bit_with_dtype_and_shape() {
        let (root, dir) = saved();
        let checkpoint = Checkpoint::open(&dir).unwrap();
        let (weights, optimizer) = sample();
        for (file, expected) in [
            (checkpoint.weights().unwrap(), weights),
            (checkpoint.optimizer().unwrap(), optimizer),
        ] {
            assert_eq!(file.names().count(), expected.len());
            for (name, tensor) in expected {
                let read = file.read(&name).unwrap();
                assert_eq!((read.kind(), read.size()), (tensor.kind(), tensor.size()));
                assert!(read.equal(&tensor));
            }
        }
        assert_eq!(fs_err::read_dir(root.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_partial_or_damaged_checkpoint_is_refused() {
        for file in [WEIGHTS, OPTIMIZER, STATE] {
            let (_root, dir) = saved();
            fs_err::remove_file(dir.join(file)).unwrap();
            let text = Checkpoint::open(&dir).unwrap_err().to_string();
            assert!(
                text.contains(&format!("partial checkpoint: `{file}` is missing")),
                "{text}"
            );
        }
        let (_root, dir) = saved();
        let mut bytes = fs_err::read(dir.join(OPTIMIZER)).unwrap();
        let last = bytes.len() - 1;
        bytes[last] ^= 1;
        fs_err::write(dir.join(OPTIMIZER), &bytes).unwrap();
        let text = Checkpoint::open(&dir).unwrap_err().to_string();
        assert!(text.contains("another checksum"), "{text}");
        fs_err::write(dir.join(OPTIMIZER), &bytes[..last]).unwrap();
        let text = Checkpoint::open(&dir).unwrap_err().to_string();
        assert!(
            text.contains("bytes were written") || text.contains("were written"),
            "{text}"
        );
    }
}
