//! What a user can do about a refusal of the Hub.

use std::path::{Path, PathBuf};

use super::client::Client;
use super::error::DownloadError;
use crate::hub::cache::CachedModel;

/// The list of a model's files was not to be had.
pub(super) fn listing(model: &CachedModel, client: &Client, error: DownloadError) -> anyhow::Error {
    let id = &model.id;
    let advice = match &error {
        DownloadError::Status { status, code, .. } => {
            refusal(model, client, *status, code.as_deref())
        }
        _ => None,
    };
    let advice = advice.unwrap_or_else(|| {
        format!(
            "`{id}` is no path here and not in the cache, and the list of its files cannot be had from {}",
            client.endpoint()
        )
    });
    anyhow::Error::new(error).context(advice)
}

/// A file was not to be had.
pub(super) fn file(model: &CachedModel, client: &Client, error: DownloadError) -> anyhow::Error {
    let advice = match &error {
        DownloadError::Status {
            status: status @ (401 | 403),
            code,
            from_endpoint: true,
            ..
        } => refusal(model, client, *status, code.as_deref()),
        DownloadError::Cut { .. } | DownloadError::Transport { .. } => {
            Some("what has come is kept; the same command goes on from there".to_owned())
        }
        _ => None,
    };
    let error = anyhow::Error::new(error);
    match advice {
        Some(advice) => error.context(advice),
        None => error,
    }
}

fn refusal(
    model: &CachedModel,
    client: &Client,
    status: u16,
    code: Option<&str>,
) -> Option<String> {
    let repository = &model.id.repository;
    let endpoint = client.endpoint();
    Some(match (status, code) {
        (404, Some("RevisionNotFound")) => {
            format!("{repository} has no revision `{}`", model.id.revision())
        }
        (401 | 403, Some("GatedRepo")) | (403, _) => {
            let token = if client.has_token() {
                "with an account that your HF_TOKEN belongs to"
            } else {
                "and set HF_TOKEN"
            };
            format!(
                "{repository} is gated or private; ask for access at {endpoint}/{repository}, {token}"
            )
        }
        // Without a token the Hub answers 401 for models that do not exist, too.
        (401 | 404, _) => {
            let model = if client.has_token() {
                "no such model that your HF_TOKEN may read"
            } else {
                "no such public model; a private or gated one needs HF_TOKEN"
            };
            let near = nearest(Path::new(repository))
                .map(|path| format!(" (did you mean {}?)", path.display()));
            format!(
                "`{repository}` is no path here{}, and {endpoint} has {model}",
                near.unwrap_or_default()
            )
        }
        _ => return None,
    })
}

/// What is there under a name like that of a path that is not.
fn nearest(path: &Path) -> Option<PathBuf> {
    let (dir, name) = (path.parent()?, path.file_name()?.to_str()?);
    fs_err::read_dir(dir)
        .ok()?
        .flatten()
        .map(|entry| entry.file_name())
        .filter_map(|found| {
            let likeness = strsim::jaro_winkler(name, found.to_str()?);
            (likeness > 0.8).then(|| (likeness, dir.join(&found)))
        })
        .max_by(|a, b| a.0.total_cmp(&b.0))
        .map(|(_, path)| path)
}
