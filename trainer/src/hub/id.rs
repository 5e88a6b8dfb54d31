//! Hub ids: `org/name` or `org/name@revision`.

use std::path::PathBuf;

use hf_hub::{Repo, RepoType};

/// A model on the Hub.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct HubId {
    /// `org/name`.
    pub(super) repository: String,
    /// A commit, or a branch or tag, which may have slashes.
    revision: Option<String>,
}

/// A revision that does not go with the model.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RevisionError {
    #[error("`{id}` is at revision `{given}`, but --hf-revision says `{asked}`; give one of them")]
    Differs {
        id: String,
        given: String,
        asked: String,
    },
    #[error(
        "--hf-revision chooses a revision of a Hub id, but {} is a path here; leave one of them out",
        path.display()
    )]
    Path { path: PathBuf },
    #[error("--hf-revision `{asked}` is no branch, tag or commit")]
    Invalid { asked: String },
}

impl std::fmt::Display for HubId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}@{}", self.repository, self.revision())
    }
}

impl HubId {
    /// Nothing in an id can lead out of the cache: no part is empty, `.` or `..`.
    pub(super) fn parse(text: &str) -> Option<Self> {
        let (id, revision) = match text.split_once('@') {
            Some((id, revision)) => (id, Some(revision)),
            None => (text, None),
        };
        let (org, name) = id.split_once('/')?;
        let valid = is_part(org) && is_part(name) && revision.is_none_or(is_revision);
        valid.then(|| Self {
            repository: id.to_owned(),
            revision: revision.map(str::to_owned),
        })
    }

    /// The id at the revision that was asked for beside it.
    pub(super) fn at(self, asked: Option<&str>) -> Result<Self, RevisionError> {
        let Some(asked) = asked else {
            return Ok(self);
        };
        let asked = asked.to_owned();
        if !is_revision(&asked) {
            return Err(RevisionError::Invalid { asked });
        }
        match self.revision {
            Some(given) if given != asked => Err(RevisionError::Differs {
                id: self.repository,
                given,
                asked,
            }),
            _ => Ok(Self {
                revision: Some(asked),
                ..self
            }),
        }
    }

    pub(super) fn revision(&self) -> &str {
        self.revision.as_deref().unwrap_or("main")
    }

    /// The same at a commit, in hf-hub's words.
    pub(super) fn repo(&self, revision: &str) -> Repo {
        Repo::with_revision(
            self.repository.clone(),
            RepoType::Model,
            revision.to_owned(),
        )
    }
}

fn is_revision(text: &str) -> bool {
    text.split('/').all(is_part)
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

/// Whether a revision is a commit, whose files never change.
pub(super) fn is_commit(text: &str) -> bool {
    text.len() == 40 && text.bytes().all(|byte| byte.is_ascii_hexdigit())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_have_two_plain_parts_and_a_revision() {
        let id = HubId::parse("Qwen/Qwen3.5-0.8B").unwrap();
        assert_eq!(id.repository, "Qwen/Qwen3.5-0.8B");
        assert_eq!(id.revision(), "main");
        let id = HubId::parse("Qwen/Qwen3.5-0.8B@refs/pr/1").unwrap();
        assert_eq!(id.repository, "Qwen/Qwen3.5-0.8B");
        assert_eq!(id.revision(), "refs/pr/1");
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
    fn a_second_revision_must_be_the_same() {
        let at = |id: &str, asked| {
            let id = HubId::parse(id).unwrap().at(asked);
            id.map(|id| id.to_string()).map_err(|e| e.to_string())
        };
        assert_eq!(at("a/b", Some("v1")).unwrap(), "a/b@v1");
        assert_eq!(at("a/b@v1", Some("v1")).unwrap(), "a/b@v1");
        assert_eq!(at("a/b@v1", None).unwrap(), "a/b@v1");
        let error = at("a/b@v1", Some("v2")).unwrap_err();
        assert!(error.contains("`v1`") && error.contains("`v2`"), "{error}");
        assert!(at("a/b", Some("../x")).is_err());
    }
}
