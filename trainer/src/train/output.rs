//! The output directory of a run.
//!
//! ```text
//! OUTPUT/                 ends as the trained Hugging Face checkpoint
//!   checkpoint-STEP/      what a resumed run needs; written beside, renamed when whole
//!   run/                  config.toml, run.json, metrics.jsonl, loss.svg, tensorboard/, lock
//! ```
//! Invariants: one writer at a time; no half-written directory has a final name; only files of a run are ever deleted.

use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

use fs_err::File;
use rustix::fs::{FlockOperation, flock};

const CHECKPOINT_PREFIX: &str = "checkpoint-";
const STAGING: &str = ".model-being-written";

/// Why an output directory cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum OutputError {
    /// Another process writes there.
    #[error("{} is being written by another run; wait for it to end or choose another --output", dir.display())]
    Locked {
        /// The directory.
        dir: PathBuf,
    },
    /// It holds a run or a model.
    #[error("{} already holds {what}; go on with --resume, replace it with --overwrite, or choose another --output", dir.display())]
    Taken {
        /// The directory.
        dir: PathBuf,
        /// What was found.
        what: &'static str,
    },
    /// It holds something that is no run's.
    #[error("{} holds files that are no run's (`{}` for one); choose an empty or new directory", dir.display(), example)]
    Foreign {
        /// The directory.
        dir: PathBuf,
        /// One of the files.
        example: String,
    },
    /// It is the model's directory.
    #[error("{} is the model's own directory; a run never writes over its source, choose another --output", dir.display())]
    IsModel {
        /// The directory.
        dir: PathBuf,
    },
    /// There is no checkpoint to go on from.
    #[error("{} holds no checkpoint to resume from; start without --resume", dir.display())]
    NothingToResume {
        /// The directory.
        dir: PathBuf,
    },
    /// The system refused.
    #[error(transparent)]
    Io(#[from] std::io::Error),
}

/// What may be in the directory already.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Existing {
    /// Nothing of a run or model.
    Refuse,
    /// A run to go on with.
    Resume,
    /// A run or model to replace.
    Overwrite,
}

/// A locked output directory.
#[derive(Debug)]
pub(crate) struct Output {
    dir: PathBuf,
    // Held for the life of the run; the system frees it when the process ends, however it ends.
    _lock: File,
}

impl Output {
    /// Locks `dir` (made if absent). What it holds stays, but for what a killed run had half written.
    ///
    /// # Errors
    /// [`OutputError`] says what is in the way.
    pub(crate) fn open(dir: &Path, model: &Path, existing: Existing) -> Result<Self, OutputError> {
        let at = || dir.to_path_buf();
        if let (Ok(ours), Ok(theirs)) = (fs_err::canonicalize(dir), fs_err::canonicalize(model))
            && ours == theirs
        {
            return Err(OutputError::IsModel { dir: at() });
        }
        if existing == Existing::Resume && !dir.join("run").is_dir() {
            return Err(OutputError::NothingToResume { dir: at() });
        }
        let found = Found::of(dir)?;
        if let Some(example) = found.foreign.filter(|_| !found.run && !found.model) {
            return Err(OutputError::Foreign { dir: at(), example });
        }
        fs_err::create_dir_all(dir.join("run"))?;
        let lock = fs_err::OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .open(dir.join("run/lock"))?;
        flock(
            lock.file().as_fd(),
            FlockOperation::NonBlockingLockExclusive,
        )
        .map_err(|_| OutputError::Locked { dir: at() })?;
        let output = Self {
            dir: at(),
            _lock: lock,
        };
        match existing {
            Existing::Refuse if found.run => {
                return Err(OutputError::Taken {
                    dir: at(),
                    what: "a run",
                });
            }
            Existing::Refuse if found.model => {
                fs_err::remove_dir_all(output.run_dir())?;
                return Err(OutputError::Taken {
                    dir: at(),
                    what: "a model",
                });
            }
            Existing::Refuse | Existing::Resume | Existing::Overwrite => {}
        }
        output.remove_unfinished()?;
        Ok(output)
    }

    /// Where the run's own files are.
    #[must_use]
    pub(crate) fn run_dir(&self) -> PathBuf {
        self.dir.join("run")
    }

    /// The directory of the checkpoint after `step` steps.
    #[must_use]
    pub(crate) fn checkpoint_dir(&self, step: u64) -> PathBuf {
        self.dir.join(format!("{CHECKPOINT_PREFIX}{step}"))
    }

    /// Deletes all but the newest `limit` checkpoints.
    ///
    /// # Errors
    /// When one cannot be deleted.
    pub(crate) fn keep_newest(&self, limit: usize) -> Result<(), OutputError> {
        let found = checkpoints(&self.dir)?;
        for (_, path) in &found[..found.len().saturating_sub(limit)] {
            remove_whole(path)?;
        }
        Ok(())
    }

    /// An empty place inside the directory for the trained model, before [`Output::publish_model`].
    #[must_use]
    pub(crate) fn staging(&self) -> PathBuf {
        self.dir.join(STAGING)
    }

    /// Moves the finished files of [`Output::staging`] into the directory. `config.json` goes first out and last in, so that a
    /// reader at any moment finds the old model, none, or the new one whole.
    ///
    /// # Errors
    /// When a file cannot be moved.
    pub(crate) fn publish_model(&self) -> Result<(), OutputError> {
        let staging = self.staging();
        let config = self.dir.join("config.json");
        if config.exists() {
            fs_err::remove_file(&config)?;
            sync_dir(&self.dir)?;
        }
        for entry in fs_err::read_dir(&self.dir)? {
            let path = entry?.path();
            if path.is_file() && is_weights(&path) {
                fs_err::remove_file(path)?;
            }
        }
        for entry in fs_err::read_dir(&staging)? {
            let path = entry?.path();
            let Some(name) = path.file_name() else {
                continue;
            };
            if name != "config.json" {
                fs_err::rename(&path, self.dir.join(name))?;
            }
        }
        sync_dir(&self.dir)?;
        fs_err::rename(staging.join("config.json"), config)?;
        fs_err::remove_dir(staging)?;
        sync_dir(&self.dir)?;
        Ok(())
    }

    /// Deletes what an earlier run left: its own files and checkpoints. The old model goes when the new one comes.
    ///
    /// # Errors
    /// When something cannot be deleted.
    pub(crate) fn clear_run(&self) -> Result<(), OutputError> {
        for (_, path) in checkpoints(&self.dir)? {
            remove_whole(&path)?;
        }
        for entry in fs_err::read_dir(self.run_dir())? {
            let path = entry?.path();
            if path.is_dir() {
                fs_err::remove_dir_all(path)?;
            } else if !path.ends_with("lock") {
                fs_err::remove_file(path)?;
            }
        }
        Ok(())
    }

    /// Deletes half-written directories of a killed run.
    fn remove_unfinished(&self) -> Result<(), OutputError> {
        for entry in fs_err::read_dir(&self.dir)? {
            let path = entry?.path();
            let name = path
                .file_name()
                .and_then(|name| name.to_str())
                .unwrap_or_default();
            // The writer of the model builds its directory beside the staging place, under a name that contains its name.
            if name.starts_with(".checkpoint-") || name.contains(STAGING) {
                fs_err::remove_dir_all(path)?;
            }
        }
        Ok(())
    }
}

/// All finished checkpoints of an output directory, by step.
///
/// # Errors
/// When the directory cannot be read.
pub fn checkpoints(dir: &Path) -> Result<Vec<(u64, PathBuf)>, OutputError> {
    let mut found = Vec::new();
    for entry in fs_err::read_dir(dir)? {
        let path = entry?.path();
        let name = path
            .file_name()
            .and_then(|name| name.to_str())
            .unwrap_or_default();
        if let Some(step) = name
            .strip_prefix(CHECKPOINT_PREFIX)
            .and_then(|s| s.parse().ok())
        {
            found.push((step, path));
        }
    }
    found.sort_unstable();
    Ok(found)
}

/// What a directory holds.
#[derive(Debug, Default)]
struct Found {
    run: bool,
    model: bool,
    foreign: Option<String>,
}

impl Found {
    fn of(dir: &Path) -> Result<Self, OutputError> {
        let mut found = Self::default();
        if !dir.exists() {
            return Ok(found);
        }
        for entry in fs_err::read_dir(dir)? {
            let path = entry?.path();
            let name = path.file_name().map(|n| n.to_string_lossy().into_owned());
            let name = name.unwrap_or_default();
            if name == "run" {
                // A directory with nothing but a lock belongs to a run that never began.
                found.run |= path.join("run.json").exists();
            } else if name.starts_with(CHECKPOINT_PREFIX) {
                found.run = true;
            } else if name == "config.json" || is_weights(&path) {
                found.model = true;
            } else if !name.starts_with('.') {
                found.foreign = Some(name);
            }
        }
        Ok(found)
    }
}

fn is_weights(path: &Path) -> bool {
    let name = path
        .file_name()
        .and_then(|name| name.to_str())
        .unwrap_or_default();
    name.ends_with(".safetensors") || name == "model.safetensors.index.json"
}

/// Deletes a directory so that a kill in between leaves no part of it under its name.
fn remove_whole(path: &Path) -> Result<(), OutputError> {
    let hidden = hidden_name(path);
    fs_err::rename(path, &hidden)?;
    fs_err::remove_dir_all(hidden)?;
    Ok(())
}

/// `.NAME` beside `path`: where it is built before it is whole, and where it goes before it is deleted.
#[must_use]
pub(crate) fn hidden_name(path: &Path) -> PathBuf {
    let name = path
        .file_name()
        .map(|name| name.to_string_lossy().into_owned());
    path.with_file_name(format!(".{}", name.unwrap_or_default()))
}

/// Makes renames and new names in `dir` survive a power cut.
pub(crate) fn sync_dir(dir: &Path) -> std::io::Result<()> {
    File::open(dir)?.sync_all()
}

/// Writes a whole file: beside, synced, renamed.
pub(crate) fn write_whole(path: &Path, text: &str) -> std::io::Result<()> {
    let hidden = hidden_name(path);
    fs_err::write(&hidden, text)?;
    File::open(&hidden)?.sync_all()?;
    fs_err::rename(hidden, path)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn dirs() -> (tempfile::TempDir, PathBuf, PathBuf) {
        let root = tempfile::tempdir().unwrap();
        let (model, output) = (root.path().join("model"), root.path().join("out"));
        fs_err::create_dir(&model).unwrap();
        (root, model, output)
    }

    fn text(result: Result<Output, OutputError>) -> String {
        result.map(|_| ()).unwrap_err().to_string()
    }

    #[test]
    fn a_second_writer_is_refused_while_the_first_lives() {
        let (_root, model, output) = dirs();
        let first = Output::open(&output, &model, Existing::Refuse).unwrap();
        let refused = text(Output::open(&output, &model, Existing::Refuse));
        assert!(
            refused.contains("is being written by another run"),
            "{refused}"
        );
        drop(first);
        Output::open(&output, &model, Existing::Refuse).unwrap();
    }

    #[test]
    fn a_finished_run_a_model_and_foreign_files_are_not_overwritten() {
        let (root, model, output) = dirs();
        drop(Output::open(&output, &model, Existing::Refuse).unwrap());
        fs_err::write(output.join("run/run.json"), "{}").unwrap();
        let taken = text(Output::open(&output, &model, Existing::Refuse));
        assert!(
            taken.contains("already holds a run; go on with --resume"),
            "{taken}"
        );

        let other = root.path().join("other");
        fs_err::create_dir(&other).unwrap();
        fs_err::write(other.join("config.json"), "{}").unwrap();
        let taken = text(Output::open(&other, &model, Existing::Refuse));
        assert!(taken.contains("already holds a model"), "{taken}");
        assert!(!other.join("run").exists());

        let home = root.path().join("home");
        fs_err::create_dir(&home).unwrap();
        fs_err::write(home.join("thesis.tex"), "").unwrap();
        for existing in [Existing::Refuse, Existing::Overwrite] {
            let foreign = text(Output::open(&home, &model, existing));
            assert!(foreign.contains("`thesis.tex` for one"), "{foreign}");
        }
        let own = text(Output::open(&model, &model, Existing::Overwrite));
        assert!(own.contains("never writes over its source"), "{own}");
    }

    #[test]
    fn overwrite_clears_the_old_run_and_the_new_model_replaces_every_old_shard() {
        let (_root, model, output) = dirs();
        drop(Output::open(&output, &model, Existing::Refuse).unwrap());
        for file in [
            "run/run.json",
            "run/metrics.jsonl",
            "config.json",
            "model-00001-of-00002.safetensors",
        ] {
            fs_err::write(output.join(file), "old").unwrap();
        }
        fs_err::create_dir(output.join("checkpoint-5")).unwrap();
        fs_err::create_dir(output.join(".checkpoint-6")).unwrap();
        let open = Output::open(&output, &model, Existing::Overwrite).unwrap();
        assert!(output.join("run/metrics.jsonl").exists() && output.join("checkpoint-5").exists());
        open.clear_run().unwrap();
        assert!(
            !output.join("run/metrics.jsonl").exists() && !output.join("checkpoint-5").exists()
        );
        assert!(!output.join(".checkpoint-6").exists());
        assert!(output.join("config.json").exists());
        fs_err::create_dir(open.staging()).unwrap();
        fs_err::write(open.staging().join("config.json"), "new").unwrap();
        fs_err::write(open.staging().join("model.safetensors"), "new").unwrap();
        open.publish_model().unwrap();
        assert_eq!(
            fs_err::read_to_string(output.join("config.json")).unwrap(),
            "new"
        );
        assert!(output.join("model.safetensors").exists());
        assert!(!output.join("model-00001-of-00002.safetensors").exists());
        assert!(!open.staging().exists());
    }

    #[test]
    fn the_newest_checkpoints_stay() {
        let (_root, model, output) = dirs();
        let open = Output::open(&output, &model, Existing::Refuse).unwrap();
        for step in [2, 10, 4] {
            fs_err::create_dir(open.checkpoint_dir(step)).unwrap();
        }
        open.keep_newest(2).unwrap();
        let steps: Vec<u64> = checkpoints(&output)
            .unwrap()
            .into_iter()
            .map(|(step, _)| step)
            .collect();
        assert_eq!(steps, [4, 10]);
    }
}
