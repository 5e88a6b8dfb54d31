//! Which files make up a checkpoint, and opening them without being led elsewhere.

use std::fs::File;
use std::path::{Component, Path, PathBuf};
use std::sync::OnceLock;

use serde_json::Value;

use super::TorchDistProblem;
use super::common;
use crate::checkpoint::CheckpointError;
use crate::checkpoint::error::io;
use crate::checkpoint::links::{self, Links, Refused};
use crate::json;

pub(super) const METADATA: &str = ".metadata";
pub(super) const BACKEND: &str = "metadata.json";
pub(super) const COMMON: &str = "common.pt";
pub(super) const RUN_CONFIG: &str = "run_config.yaml";
pub(super) const TRAIN_STATE: &str = "train_state.pt";
pub(super) const LATEST_TRAIN_STATE: &str = "latest_train_state.pt";
pub(super) const TRACKER: &str = "latest_checkpointed_iteration.txt";

/// Files of which each such directory has one at least, that of a run or of an iteration; the last is of one whose save
/// was cut off.
pub(super) const MARKS: [&str; 6] = [
    METADATA,
    BACKEND,
    TRAIN_STATE,
    LATEST_TRAIN_STATE,
    TRACKER,
    INTERRUPTED,
];
const INTERRUPTED: &str = ".metadata.tmp";

/// The folder of an iteration.
pub(super) fn iteration_name(iteration: u64) -> String {
    format!("iter_{iteration:07}")
}

/// The iteration that a folder is named after.
pub(super) fn iteration_of(dir: &Path) -> Option<u64> {
    let digits = dir.file_name()?.to_str()?.strip_prefix("iter_")?;
    let plain = digits.bytes().all(|byte| byte.is_ascii_digit());
    digits.parse().ok().filter(|_| plain)
}

pub(super) fn refuse(path: &Path, problem: TorchDistProblem) -> CheckpointError {
    CheckpointError::TorchDist {
        path: path.to_owned(),
        problems: vec![problem],
    }
}

/// The directory of an iteration: `dir` itself, or the newest one that its trackers name.
pub(super) fn resolve(dir: &Path, links: Links) -> Result<PathBuf, CheckpointError> {
    let has = |name: &str| dir.join(name).symlink_metadata().is_ok();
    if [METADATA, BACKEND, RUN_CONFIG, TRAIN_STATE]
        .into_iter()
        .any(has)
    {
        return Ok(dir.to_owned());
    }
    if has(LATEST_TRAIN_STATE) {
        let bytes = read_small(dir, LATEST_TRAIN_STATE, links)?;
        let step = common::step_of(&bytes, LATEST_TRAIN_STATE)
            .map_err(|problem| refuse(&dir.join(LATEST_TRAIN_STATE), problem))?;
        return Ok(dir.join(iteration_name(step)));
    }
    if has(TRACKER) {
        let bytes = read_small(dir, TRACKER, links)?;
        let text = String::from_utf8_lossy(&bytes);
        let word = text.trim();
        if word == "release" {
            return Ok(dir.join(word));
        }
        let digits = !word.is_empty() && word.bytes().all(|byte| byte.is_ascii_digit());
        let iteration = digits.then(|| word.parse().ok()).flatten();
        let iteration = iteration.ok_or_else(|| {
            let content = word.chars().take(40).filter(|c| !c.is_control()).collect();
            refuse(
                dir,
                TorchDistProblem::Tracker {
                    file: TRACKER,
                    content,
                },
            )
        })?;
        return Ok(dir.join(iteration_name(iteration)));
    }
    if has(INTERRUPTED) {
        return Err(refuse(dir, TorchDistProblem::Interrupted));
    }
    Err(refuse(dir, TorchDistProblem::NoMetadata))
}

/// Checks metadata.json. It is absent from what torch's own distributed checkpoint writes.
pub(super) fn check_backend(dir: &Path, links: Links) -> Result<(), CheckpointError> {
    if dir.join(BACKEND).symlink_metadata().is_err() {
        return Ok(());
    }
    let bytes = read_small(dir, BACKEND, links)?;
    let value = json::parse(&bytes).map_err(|error| {
        let reason = error.to_string();
        refuse(dir, TorchDistProblem::Json { reason })
    })?;
    let backend = value.get("sharded_backend").and_then(Value::as_str);
    let version = value.get("sharded_backend_version").and_then(Value::as_u64);
    if (backend, version) == (Some("torch_dist"), Some(1)) {
        return Ok(());
    }
    let found = format!(
        "`{}` version {}",
        backend
            .unwrap_or("nothing")
            .chars()
            .take(40)
            .collect::<String>(),
        version.map_or("unknown".to_owned(), |version| version.to_string())
    );
    Err(refuse(dir, TorchDistProblem::Backend { found }))
}

/// All bytes of a file that is small in every real checkpoint.
pub(super) fn read_small(dir: &Path, name: &str, links: Links) -> Result<Vec<u8>, CheckpointError> {
    const LIMIT: u64 = 1 << 30;
    let (file, len) = open(dir, name, links)?;
    let Some(mut bytes) = usize::try_from(len)
        .ok()
        .filter(|_| len <= LIMIT)
        .map(|len| vec![0; len])
    else {
        let problem = super::PickleProblem::TooLong { len, limit: LIMIT };
        let part = name.to_owned();
        return Err(refuse(dir, TorchDistProblem::Pickle { part, problem }));
    };
    std::os::unix::fs::FileExt::read_exact_at(&file, &mut bytes, 0)
        .map_err(io("read", &dir.join(name)))?;
    Ok(bytes)
}

/// One component that means the same file on every system.
pub(super) fn is_plain(name: &str) -> bool {
    let mut components = Path::new(name).components();
    let single = matches!(components.next(), Some(Component::Normal(part)) if part == name);
    single
        && components.next().is_none()
        && name.len() <= 255
        && !name.contains(['\\', ':'])
        && !name.chars().any(char::is_control)
}

/// Opens a regular file of the directory, with its length.
pub(super) fn open(dir: &Path, name: &str, links: Links) -> Result<(File, u64), CheckpointError> {
    let file = name.to_owned();
    links::open(dir, name, links).map_err(|refused| match refused {
        Refused::Io(action, error) => io(action, &dir.join(name))(error),
        Refused::Link(target) => refuse(dir, TorchDistProblem::Link { file, target }),
        Refused::NotAFile => refuse(dir, TorchDistProblem::NotAFile { file }),
    })
}

/// The data files. The first few hundred stay open once they were used; systems limit open files to 1024 and more.
#[derive(Debug)]
pub(super) struct DataFiles {
    pub(super) dir: PathBuf,
    links: Links,
    pub(super) files: Vec<DataFile>,
}

#[derive(Debug)]
pub(super) struct DataFile {
    pub(super) name: String,
    pub(super) len: u64,
    opened: OnceLock<File>,
}

/// An opened file, kept or not.
pub(super) enum Opened<'a> {
    Kept(&'a File),
    Fresh(File),
}

impl std::ops::Deref for Opened<'_> {
    type Target = File;

    fn deref(&self) -> &File {
        match self {
            Opened::Kept(file) => file,
            Opened::Fresh(file) => file,
        }
    }
}

impl DataFiles {
    const KEPT: usize = 256;

    /// Looks at every file; what is wrong is reported together. `first` is an item of each file, for messages.
    pub(super) fn look<'a>(
        dir: &Path,
        links: Links,
        names: impl Iterator<Item = (&'a str, &'a str)>,
    ) -> Result<Self, CheckpointError> {
        let mut files = Vec::new();
        let mut problems = Vec::new();
        for (name, first) in names {
            if !is_plain(name) {
                let name = name.chars().take(300).collect();
                problems.push(TorchDistProblem::FileName { name });
            } else if dir.join(name).symlink_metadata().is_err() {
                problems.push(TorchDistProblem::MissingFile {
                    file: name.to_owned(),
                    first: first.to_owned(),
                });
            } else {
                let (file, len) = open(dir, name, links)?;
                let opened = OnceLock::new();
                if files.len() < Self::KEPT {
                    opened.get_or_init(|| file);
                }
                files.push(DataFile {
                    name: name.to_owned(),
                    len,
                    opened,
                });
            }
        }
        if problems.is_empty() {
            Ok(Self {
                dir: dir.to_owned(),
                links,
                files,
            })
        } else {
            Err(CheckpointError::TorchDist {
                path: dir.to_owned(),
                problems,
            })
        }
    }

    pub(super) fn open(&self, number: usize) -> Result<Opened<'_>, CheckpointError> {
        let file = &self.files[number];
        match file.opened.get() {
            Some(file) => Ok(Opened::Kept(file)),
            None => Ok(Opened::Fresh(open(&self.dir, &file.name, self.links)?.0)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_plain_name_in_the_same_directory_is_a_data_file() {
        assert!(is_plain("__0_0.distcp"));
        for name in [
            "../x",
            "/x",
            "a/../../x",
            "a/x",
            "./x",
            "..\\x",
            "c:x",
            "x\0",
            "",
            ".",
            "..",
            "x/",
            &"x".repeat(300),
        ] {
            assert!(!is_plain(name), "{name:?}");
        }
    }
}
