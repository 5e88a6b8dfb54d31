//! The Hub cache, as huggingface_hub lays it out: `blobs`, `refs`, and `snapshots` of links to the blobs.

use std::ffi::OsString;
#[cfg(feature = "torch")]
use std::path::Path;
use std::path::PathBuf;

use anyhow::Context;
use bridge_core::checkpoint::hf::{CONFIG, weight_files};
use hf_hub::Cache;

use super::Wanted;
use super::id::{HubId, is_commit};

/// The place of a model in the cache, whether it is there or not.
#[derive(Debug)]
pub(super) struct CachedModel {
    pub(super) id: HubId,
    pub(super) cache: Cache,
    /// `models--ORG--NAME`.
    pub(super) dir: PathBuf,
}

impl CachedModel {
    /// The place of `id` in the cache that the environment names.
    pub(super) fn of(
        id: HubId,
        variable: impl Fn(&str) -> Option<OsString>,
    ) -> anyhow::Result<Self> {
        // hf-hub itself asks HF_HOME only.
        let dir = cache_dir(variable).with_context(|| {
            format!(
                "`{id}` is no path here, and no Hub cache is known; set HF_HOME or HF_HUB_CACHE"
            )
        })?;
        let cache = Cache::new(std::path::absolute(&dir).unwrap_or(dir));
        let dir = cache.path().join(id.repo("main").folder_name());
        Ok(Self { id, cache, dir })
    }

    /// The commit of the revision, as far as the cache knows it.
    pub(super) fn commit(&self) -> anyhow::Result<Option<String>> {
        let revision = self.id.revision();
        if is_commit(revision) {
            return Ok(Some(revision.to_owned()));
        }
        let reference = self.reference();
        if !reference.is_file() {
            return Ok(None);
        }
        let text = fs_err::read_to_string(&reference)?;
        let commit = text.trim();
        anyhow::ensure!(
            is_commit(commit),
            "{} holds no commit (40 hexadecimal digits); remove it",
            reference.display()
        );
        Ok(Some(commit.to_owned()))
    }

    /// The file that says which commit the revision is.
    pub(super) fn reference(&self) -> PathBuf {
        self.dir.join("refs").join(self.id.revision())
    }

    /// The files of a commit.
    pub(super) fn snapshot(&self, commit: &str) -> Snapshot {
        Snapshot {
            dir: self.cache.repo(self.id.repo(commit)).pointer_path(commit),
        }
    }
}

/// The files of a commit that the cache has.
#[derive(Debug)]
pub(super) struct Snapshot {
    pub(super) dir: PathBuf,
}

impl Snapshot {
    pub(super) fn has(&self, name: &str) -> bool {
        self.dir.join(name).is_file()
    }

    /// What is missing of what a command cannot do without.
    pub(super) fn lacks(&self, wanted: Wanted) -> anyhow::Result<Vec<String>> {
        let mut names = match wanted {
            Wanted::Config => vec![CONFIG.to_owned()],
            Wanted::Processor => vec!["tokenizer.json".to_owned()],
            Wanted::Model => weight_files(&self.dir)?.into_iter().collect(),
        };
        names.retain(|name| !self.has(name));
        Ok(names)
    }
}

/// The name of a model by its path: a snapshot has its repository's, any other path its last part.
#[cfg(feature = "torch")]
pub(crate) fn name_of(path: &Path) -> String {
    let name = |path: &Path| {
        let name = path.file_name().unwrap_or(path.as_os_str());
        name.to_string_lossy().into_owned()
    };
    let snapshots = path.parent().filter(|dir| dir.ends_with("snapshots"));
    snapshots
        .and_then(Path::parent)
        .and_then(|dir| Some(name(dir).strip_prefix("models--")?.replacen("--", "/", 1)))
        .unwrap_or_else(|| name(path))
}

/// The cache's directory, in the order of huggingface_hub's constants.py; an empty variable counts as unset.
fn cache_dir(variable: impl Fn(&str) -> Option<OsString>) -> Option<PathBuf> {
    let set = |name: &str| set(&variable, name);
    set("HF_HUB_CACHE")
        .or_else(|| set("HUGGINGFACE_HUB_CACHE"))
        .or_else(|| Some(hub_home(&variable)?.join("hub")))
}

/// The directory of the cache, the token and the rest.
pub(super) fn hub_home(variable: impl Fn(&str) -> Option<OsString>) -> Option<PathBuf> {
    let set = |name: &str| set(&variable, name);
    set("HF_HOME")
        .or_else(|| Some(set("XDG_CACHE_HOME")?.join("huggingface")))
        .or_else(|| Some(set("HOME")?.join(".cache/huggingface")))
}

fn set(variable: impl Fn(&str) -> Option<OsString>, name: &str) -> Option<PathBuf> {
    variable(name)
        .filter(|value| !value.is_empty())
        .map(PathBuf::from)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_most_special_variable_names_the_cache() {
        let all = [
            ("HF_HUB_CACHE", "/1", "/1"),
            ("HUGGINGFACE_HUB_CACHE", "/2", "/2"),
            ("HF_HOME", "/3", "/3/hub"),
            ("XDG_CACHE_HOME", "/4", "/4/huggingface/hub"),
            ("HOME", "/5", "/5/.cache/huggingface/hub"),
        ];
        for first in 0..all.len() {
            let found = cache_dir(|name| {
                let at = all.iter().position(|row| row.0 == name)?;
                // Those before are set, but empty.
                Some(OsString::from(if at < first { "" } else { all[at].1 }))
            });
            assert_eq!(found, Some(PathBuf::from(all[first].2)));
        }
        assert_eq!(cache_dir(|_| None), None);
    }

    #[cfg(feature = "torch")]
    #[test]
    fn a_snapshot_is_named_after_its_repository() {
        let name = |path: &str| name_of(Path::new(path));
        assert_eq!(
            name("/c/models--Qwen--Qwen3.5-2B/snapshots/0123"),
            "Qwen/Qwen3.5-2B"
        );
        assert_eq!(name("/models/Qwen3.5-2B"), "Qwen3.5-2B");
        assert_eq!(name("/models/snapshots/a"), "a");
    }
}
