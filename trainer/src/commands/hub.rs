//! Hub ids: `org/name` or `org/name@revision`, found in the cache that huggingface_hub and its tools share.
//!
//! Reads the cache and never the network; what the cache lacks is an error that says how to fetch it.

use std::borrow::Cow;
use std::path::{Path, PathBuf};

use anyhow::Context;

/// Gives the directory that `path` names: itself where it exists, else the snapshot of that Hub id in the cache.
///
/// What is neither a path nor an id stays as it is, for whoever opens it to refuse.
pub(crate) fn local(path: &Path) -> anyhow::Result<Cow<'_, Path>> {
    if path.exists() {
        return Ok(Cow::Borrowed(path));
    }
    let Some(id) = path.to_str().and_then(HubId::parse) else {
        return Ok(Cow::Borrowed(path));
    };
    let cache = cache_dir(|name| std::env::var_os(name).map(PathBuf::from)).with_context(|| {
        format!("`{id}` is no path here, and no Hub cache is known; set HF_HOME or HF_HUB_CACHE")
    })?;
    let snapshot = id.snapshot(&cache)?;
    tracing::info!("{id} is {}", snapshot.display());
    Ok(Cow::Owned(snapshot))
}

/// A model on the Hub.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct HubId<'a> {
    org: &'a str,
    name: &'a str,
    /// A commit, or a branch or tag, which may have slashes.
    revision: &'a str,
}

impl std::fmt::Display for HubId<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}@{}", self.org, self.name, self.revision)
    }
}

impl<'a> HubId<'a> {
    /// Nothing in an id can lead out of the cache: no part is empty, `.` or `..`.
    fn parse(text: &'a str) -> Option<Self> {
        let (id, revision) = text.split_once('@').unwrap_or((text, "main"));
        let (org, name) = id.split_once('/')?;
        let plain = |part: &str| part.split('/').all(is_part);
        (is_part(org) && is_part(name) && plain(revision)).then_some(Self {
            org,
            name,
            revision,
        })
    }

    fn snapshot(&self, cache: &Path) -> anyhow::Result<PathBuf> {
        let repository = cache.join(format!("models--{}--{}", self.org, self.name));
        let fetch = format!(
            "fetch it with `hf download {}/{} --revision {}`, or give a directory",
            self.org, self.name, self.revision
        );
        anyhow::ensure!(
            repository.is_dir(),
            "`{self}` is no path here, and the Hub cache {} has no such model; {fetch}",
            cache.display()
        );
        let reference = repository.join("refs").join(self.revision);
        let commit = if is_commit(self.revision) {
            self.revision.to_owned()
        } else {
            anyhow::ensure!(
                reference.is_file(),
                "{} has no revision `{}`; {fetch}",
                repository.display(),
                self.revision
            );
            let text = fs_err::read_to_string(&reference)?;
            let commit = text.trim();
            anyhow::ensure!(
                is_commit(commit),
                "{} holds no commit (40 hexadecimal digits); {fetch}",
                reference.display()
            );
            commit.to_owned()
        };
        let snapshot = repository.join("snapshots").join(&commit);
        anyhow::ensure!(
            snapshot.is_dir(),
            "{} has no snapshot of commit {commit}; {fetch}",
            repository.display()
        );
        Ok(snapshot)
    }
}

/// The Hub's own rule for the parts of a name.
fn is_part(part: &str) -> bool {
    let ends = |end: char| part.starts_with(end) || part.ends_with(end);
    !part.is_empty()
        && part
            .chars()
            .all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.'))
        && !ends('-')
        && !ends('.')
        && !part.contains("--")
        && !part.contains("..")
}

fn is_commit(text: &str) -> bool {
    text.len() == 40 && text.bytes().all(|byte| byte.is_ascii_hexdigit())
}

/// The cache's directory, in the order of huggingface_hub's constants.py; an empty variable counts as unset.
fn cache_dir(variable: impl Fn(&str) -> Option<PathBuf>) -> Option<PathBuf> {
    let set = |name: &str| variable(name).filter(|value| !value.as_os_str().is_empty());
    set("HF_HUB_CACHE")
        .or_else(|| set("HUGGINGFACE_HUB_CACHE"))
        .or_else(|| Some(set("HF_HOME")?.join("hub")))
        .or_else(|| Some(set("XDG_CACHE_HOME")?.join("huggingface/hub")))
        .or_else(|| Some(set("HOME")?.join(".cache/huggingface/hub")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_have_two_plain_parts_and_a_revision() {
        let id = HubId::parse("Qwen/Qwen3.5-0.8B").unwrap();
        assert_eq!(
            (id.org, id.name, id.revision),
            ("Qwen", "Qwen3.5-0.8B", "main")
        );
        let id = HubId::parse("Qwen/Qwen3.5-0.8B@refs/pr/1").unwrap();
        assert_eq!(id.revision, "refs/pr/1");
        for text in [
            "Qwen",
            "/Qwen",
            "Qwen/",
            "a/b/c",
            "../b",
            "a/..",
            "a/b@",
            "a/b@../../x",
            "a/b@x/./y",
            "a/b@/etc",
            "a--b/c",
            "a/b c",
        ] {
            assert_eq!(HubId::parse(text), None, "{text}");
        }
    }

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
                Some(PathBuf::from(if at < first { "" } else { all[at].1 }))
            });
            assert_eq!(found, Some(PathBuf::from(all[first].2)));
        }
        assert_eq!(cache_dir(|_| None), None);
    }
}
