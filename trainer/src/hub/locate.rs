//! From what a user names as a model to a path.

use std::borrow::Cow;
use std::ffi::OsString;
use std::path::Path;

use bridge_core::checkpoint::hf::CONFIG;

use super::RevisionError;
use super::cache::{CachedModel, Snapshot};
use super::id::HubId;

/// What a command needs of a model.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Wanted {
    /// config.json alone.
    Config,
    /// What text, images and video go through: tokenizer, chat template, settings; no weights.
    Processor,
    /// Weights, config, and the files that a saved checkpoint takes over.
    Model,
}

/// How an id is looked up.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Lookup<'a> {
    /// A revision beside the id.
    pub(crate) revision: Option<&'a str>,
    /// Show no progress of a download.
    pub(crate) no_progress: bool,
}

/// Gives the path that `path` names: itself where it exists, else the snapshot of that Hub id, downloaded as far as it is
/// not in the cache. Of a model of which the config alone is wanted, and whose weights the cache lacks, its config file.
///
/// What is neither a path nor an id stays as it is, for whoever opens it to refuse.
pub(crate) fn local<'a>(
    path: &'a Path,
    wanted: Wanted,
    lookup: &Lookup<'_>,
) -> anyhow::Result<Cow<'a, Path>> {
    if path.exists() {
        if lookup.revision.is_some() {
            let path = path.to_owned();
            return Err(RevisionError::Path { path }.into());
        }
        return Ok(Cow::Borrowed(path));
    }
    let Some(id) = path.to_str().and_then(HubId::parse) else {
        return Ok(Cow::Borrowed(path));
    };
    let variable = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty());
    let model = CachedModel::of(id.at(lookup.revision)?, variable)?;
    let snapshot = find(&model, wanted, lookup, &variable)?;
    let found = match wanted {
        Wanted::Config if !snapshot.lacks(Wanted::Model)?.is_empty() => snapshot.dir.join(CONFIG),
        _ => snapshot.dir,
    };
    tracing::info!("{} is {}", model.id, found.display());
    Ok(Cow::Owned(found))
}

fn find(
    model: &CachedModel,
    wanted: Wanted,
    lookup: &Lookup<'_>,
    variable: &dyn Fn(&str) -> Option<OsString>,
) -> anyhow::Result<Snapshot> {
    if let Some(name) = offline(variable) {
        let advice =
            format!("{name} is set, so nothing is downloaded; unset it, or give a directory");
        return cached(model, wanted, &advice);
    }
    #[cfg(feature = "hub")]
    {
        super::download::fetch(model, wanted, lookup, variable)
    }
    #[cfg(not(feature = "hub"))]
    {
        let _ = lookup.no_progress;
        let advice = format!(
            "this build has no downloads: build it with `--features hub`, fetch the model with `hf download {} --revision {}`, or give a directory",
            model.id.repository,
            model.id.revision()
        );
        cached(model, wanted, &advice)
    }
}

/// The variable that forbids downloads, if one does. Their values and names are huggingface_hub's.
fn offline(variable: &dyn Fn(&str) -> Option<OsString>) -> Option<&'static str> {
    ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"]
        .into_iter()
        .find(|name| {
            let value = variable(name).unwrap_or_default();
            let value = value.to_string_lossy().to_uppercase();
            ["1", "ON", "YES", "TRUE"].contains(&value.as_str())
        })
}

/// The snapshot that the cache has of the revision, with all that a command cannot do without.
fn cached(model: &CachedModel, wanted: Wanted, advice: &str) -> anyhow::Result<Snapshot> {
    let CachedModel { id, cache, dir } = model;
    anyhow::ensure!(
        dir.is_dir(),
        "`{id}` is no path here, and the Hub cache {} has no such model; {advice}",
        cache.path().display()
    );
    let Some(commit) = model.commit()? else {
        anyhow::bail!(
            "{} has no revision `{}`; {advice}",
            dir.display(),
            id.revision()
        );
    };
    let snapshot = model.snapshot(&commit);
    anyhow::ensure!(
        snapshot.dir.is_dir(),
        "{} has no snapshot of commit {commit}; {advice}",
        dir.display()
    );
    let lacks = snapshot.lacks(wanted)?;
    if let Some(first) = lacks.first() {
        anyhow::bail!(
            "{} lacks {} files of {id}, first `{first}`; {advice}",
            snapshot.dir.display(),
            lacks.len()
        );
    }
    Ok(snapshot)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn offline_is_said_as_huggingface_hub_reads_it() {
        let told = |name: &'static str, value: &'static str| {
            offline(&move |asked| (asked == name).then(|| OsString::from(value)))
        };
        for value in ["1", "true", "Yes", "ON"] {
            assert_eq!(told("HF_HUB_OFFLINE", value), Some("HF_HUB_OFFLINE"));
        }
        assert_eq!(
            told("TRANSFORMERS_OFFLINE", "1"),
            Some("TRANSFORMERS_OFFLINE")
        );
        for value in ["0", "", "no", "2"] {
            assert_eq!(told("HF_HUB_OFFLINE", value), None, "{value}");
        }
    }
}
