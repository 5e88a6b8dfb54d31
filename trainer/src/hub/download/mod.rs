//! Downloads into the Hub cache: only what a command needs, from where an earlier run stopped.

mod blob;
mod client;
mod error;
mod explain;
mod lock;
mod patience;

use std::collections::HashSet;
use std::ffi::OsString;
use std::path::{Component, Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Instant;

use anyhow::Context;
use bridge_core::checkpoint::check_space;
use bridge_core::checkpoint::hf::{CONFIG, INDEX, SINGLE, SUPPORT_FILES, weight_files};
use bytesize::ByteSize;
use rayon::prelude::*;

use self::blob::{Download, is_sha256, partial_path};
use self::client::{Client, RemoteFile};
use self::error::{DownloadError, io};
use super::cache::{CachedModel, Snapshot};
use super::id::is_commit;
use super::{Lookup, Wanted};
use crate::report::Transfer;

/// Files that are downloaded at a time, as huggingface_hub does.
const AT_ONCE: usize = 8;

/// Brings what is wanted of a model into the cache.
///
/// A branch or tag is looked up each time, with one request; where the Hub cannot be reached the commit that the cache
/// knows will do. Files that are there are not asked for again.
pub(super) fn fetch(
    model: &CachedModel,
    wanted: Wanted,
    lookup: &Lookup<'_>,
    variable: &dyn Fn(&str) -> Option<OsString>,
) -> anyhow::Result<Snapshot> {
    let revision = model.id.revision();
    if is_commit(revision) {
        let snapshot = model.snapshot(revision);
        if is_settled(&snapshot, &absent(model, revision), wanted)? {
            return Ok(snapshot);
        }
    }
    let client = Client::new(variable)?;
    let listing = match client.patiently(|| client.list(&model.id)) {
        Ok(listing) => listing,
        Err(error) => {
            if error.is_transient()
                && let Some(snapshot) = cached(model, wanted)?
            {
                let error = anyhow::Error::new(error);
                tracing::warn!(
                    "{error:#}; taking {} from the cache",
                    snapshot.dir.display()
                );
                return Ok(snapshot);
            }
            return Err(explain::listing(model, &client, error));
        }
    };
    let job = Job {
        client: &client,
        model,
        snapshot: model.snapshot(&listing.sha),
        commit: listing.sha,
        names: listing
            .siblings
            .into_iter()
            .map(|file| file.rfilename)
            .collect(),
        no_progress: lookup.no_progress,
    };
    job.run(wanted)
        .with_context(|| format!("download {}", model.id))?;
    Ok(job.snapshot)
}

/// Where an empty file stands for each name that the commit is known not to have.
fn absent(model: &CachedModel, commit: &str) -> PathBuf {
    model.dir.join(".no_exist").join(commit)
}

/// Whether there is nothing that the Hub could add: every file that is wanted is there, or known not to exist.
fn is_settled(snapshot: &Snapshot, absent: &Path, wanted: Wanted) -> anyhow::Result<bool> {
    let known = |name: &str| snapshot.has(name) || absent.join(name).is_file();
    let index = wanted != Wanted::Model || known(INDEX);
    Ok(index
        && support_files(wanted).iter().all(|name| known(name))
        && snapshot.lacks(wanted)?.is_empty())
}

/// Files of a model that are fetched where it has them.
fn support_files(wanted: Wanted) -> &'static [&'static str] {
    match wanted {
        Wanted::Config => &[CONFIG],
        Wanted::Processor | Wanted::Model => &SUPPORT_FILES,
    }
}

/// What the cache has of the revision, if that is enough.
fn cached(model: &CachedModel, wanted: Wanted) -> anyhow::Result<Option<Snapshot>> {
    let Some(commit) = model.commit()? else {
        return Ok(None);
    };
    let snapshot = model.snapshot(&commit);
    let enough = snapshot.lacks(wanted)?.is_empty();
    Ok(enough.then_some(snapshot))
}

/// The download of a commit.
struct Job<'a> {
    client: &'a Client,
    model: &'a CachedModel,
    commit: String,
    snapshot: Snapshot,
    /// The files that the commit has.
    names: HashSet<String>,
    no_progress: bool,
}

impl Job<'_> {
    fn run(&self, wanted: Wanted) -> anyhow::Result<()> {
        if let Some(name) = self.names.iter().find(|name| !is_plain(name)) {
            return Err(DownloadError::FileName {
                id: self.model.id.to_string(),
                name: name.clone(),
            }
            .into());
        }
        let index = (wanted == Wanted::Model).then_some(INDEX);
        let mut names = Vec::new();
        for name in support_files(wanted).iter().copied().chain(index) {
            if self.names.contains(name) {
                names.push(name.to_owned());
            } else {
                self.mark_absent(name)?;
            }
        }
        if wanted == Wanted::Model {
            names.extend(self.weights()?);
        }
        names.retain(|name| !self.snapshot.has(name));
        self.get(&names)?;
        self.point()
    }

    /// The weight files of the commit; the index that names them is downloaded first.
    fn weights(&self) -> anyhow::Result<Vec<String>> {
        if self.names.contains(INDEX) && !self.snapshot.has(INDEX) {
            self.get(&[INDEX.to_owned()])?;
        }
        let id = &self.model.id;
        let names: Vec<String> = weight_files(&self.snapshot.dir)?.into_iter().collect();
        if let Some(name) = names.iter().find(|name| !self.names.contains(*name)) {
            anyhow::ensure!(
                name != SINGLE,
                "{id} has no weights in safetensors files; other formats are not read"
            );
            anyhow::bail!("{id} has no file `{name}`, which its {INDEX} names");
        }
        Ok(names)
    }

    /// Downloads files and links them into the snapshot.
    fn get(&self, names: &[String]) -> anyhow::Result<()> {
        if names.is_empty() {
            return Ok(());
        }
        let files = names
            .par_iter()
            .map(|name| {
                self.client
                    .patiently(|| self.client.look_at(&self.model.id, &self.commit, name))
            })
            .collect::<Result<Vec<RemoteFile>, _>>()
            .map_err(|error| explain::file(self.model, self.client, error))?;
        let started = Instant::now();
        let missing = files.iter().filter(|file| !self.blob(file).is_file());
        let (count, total, left) = missing.fold((0, 0u64, 0u64), |(count, total, left), file| {
            let there = partial_path(&self.blob(file)).metadata();
            let there = there.map_or(0, |there| there.len()).min(file.size);
            let there = if is_sha256(&file.etag) { there } else { 0 };
            (
                count + 1,
                total.saturating_add(file.size),
                left.saturating_add(file.size - there),
            )
        });
        let cache = self.model.cache.path();
        fs_err::create_dir_all(cache)?;
        check_space(cache, &self.snapshot.dir, left)?;
        if count > 0 {
            tracing::info!(
                "downloading {count} files of {} (commit {:.12}), {} of {}, to {}",
                self.model.id.repository,
                self.commit,
                ByteSize(left),
                ByteSize(total),
                cache.display()
            );
        }
        let transfer = Transfer::start(total, !self.no_progress, "downloaded");
        self.work(&files, &transfer)
            .map_err(|error| explain::file(self.model, self.client, error))?;
        drop(transfer);
        if count > 0 {
            tracing::info!(
                "downloaded {} in {:.1} s",
                ByteSize(left),
                started.elapsed().as_secs_f64()
            );
        }
        Ok(())
    }

    /// Makes blobs and links, some at a time; the first failure stops the others.
    fn work(&self, files: &[RemoteFile], transfer: &Transfer) -> Result<(), DownloadError> {
        let (next, stop) = (AtomicUsize::new(0), AtomicBool::new(false));
        let worker = || {
            while let Some(file) = files.get(next.fetch_add(1, Ordering::Relaxed)) {
                self.bring(file, transfer, &stop).inspect_err(|_| {
                    stop.store(true, Ordering::Relaxed);
                })?;
            }
            Ok(())
        };
        let results: Vec<Result<(), DownloadError>> = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..AT_ONCE.min(files.len()))
                .map(|_| scope.spawn(worker))
                .collect();
            threads
                .into_iter()
                .map(|thread| thread.join().unwrap_or(Err(DownloadError::Stopped)))
                .collect()
        });
        // The failure that stopped the others says more than theirs.
        let (stopped, failed): (Vec<_>, Vec<_>) = results
            .into_iter()
            .filter_map(Result::err)
            .partition(|error| matches!(error, DownloadError::Stopped));
        failed.into_iter().chain(stopped).next().map_or(Ok(()), Err)
    }

    fn bring(
        &self,
        file: &RemoteFile,
        transfer: &Transfer,
        stop: &AtomicBool,
    ) -> Result<(), DownloadError> {
        let blob = self.blob(file);
        if !blob.is_file() {
            let locks = self.model.cache.path().join(".locks");
            let folder = self.model.dir.file_name().unwrap_or_default();
            let download = Download {
                client: self.client,
                id: &self.model.id,
                commit: &self.commit,
                file,
                blob: &blob,
                lock: &locks.join(folder).join(format!("{}.lock", file.etag)),
                transfer,
                stop,
            };
            download.run()?;
        }
        self.link(file)
    }

    fn blob(&self, file: &RemoteFile) -> PathBuf {
        let repo = self.model.id.repo(&self.commit);
        self.model.cache.repo(repo).blob_path(&file.etag)
    }

    /// Links a name of the snapshot to its blob, in one step.
    fn link(&self, file: &RemoteFile) -> Result<(), DownloadError> {
        let dir = &self.snapshot.dir;
        let link = dir.join(&file.name);
        let target = format!("../../blobs/{}", file.etag);
        fs_err::create_dir_all(dir).map_err(io("create", dir))?;
        tempfile::Builder::new()
            .prefix(".link")
            .make_in(dir, |path| std::os::unix::fs::symlink(&target, path))
            .and_then(|made| Ok(made.into_temp_path().persist(&link)?))
            .map_err(io("link", &link))
    }

    /// Notes, as huggingface_hub does, that the commit has no file of this name.
    fn mark_absent(&self, name: &str) -> Result<(), DownloadError> {
        let dir = &absent(self.model, &self.commit);
        fs_err::create_dir_all(dir).map_err(io("create", dir))?;
        let path = dir.join(name);
        std::fs::write(&path, []).map_err(io("create", &path))
    }

    /// Lets the revision point to the commit, for whoever is offline later.
    fn point(&self) -> anyhow::Result<()> {
        let reference = self.model.reference();
        if is_commit(self.model.id.revision())
            || self.model.commit().ok().flatten().as_ref() == Some(&self.commit)
        {
            return Ok(());
        }
        let dir = reference.parent().unwrap_or(Path::new("."));
        fs_err::create_dir_all(dir)?;
        let written = tempfile::NamedTempFile::new_in(dir)?;
        fs_err::write(written.path(), &self.commit)?;
        written.persist(&reference)?;
        Ok(())
    }
}

/// Whether a name that the Hub lists stays below the snapshot.
fn is_plain(name: &str) -> bool {
    let path = Path::new(name);
    let plain = path
        .components()
        .all(|part| matches!(part, Component::Normal(_)));
    let same = path.components().collect::<PathBuf>().as_os_str() == path.as_os_str();
    plain && same && !name.is_empty() && !name.contains('\\') && !name.chars().any(char::is_control)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_files_stay_below_the_snapshot() {
        for name in ["config.json", "a/b.txt", ".gitattributes", "a b.txt"] {
            assert!(is_plain(name), "{name}");
        }
        for name in [
            "",
            ".",
            "..",
            "../x",
            "../../x",
            "/x",
            "a/../../x",
            "a/./x",
            "a//x",
            "a/",
            "..\\x",
            "x\0",
        ] {
            assert!(!is_plain(name), "{name:?}");
        }
    }
}
