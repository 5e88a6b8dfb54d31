//! A file's content on its way into the cache.
//!
//! hf-hub appends to what is there without a look at what the server sends or at what came out; here the length and, of
//! large files, the digest must be right before a blob gets its name.

use std::fs::File;
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use sha2::{Digest, Sha256};

use super::client::{Client, RemoteFile};
use super::error::{DownloadError, io};
use super::lock::lock;
use super::patience::Patience;
use crate::hub::id::HubId;
use crate::report::Transfer;

const BUFFER_BYTES: usize = 256 << 10;

/// A blob that is to be made, and who watches.
pub(super) struct Download<'a> {
    pub(super) client: &'a Client,
    pub(super) id: &'a HubId,
    pub(super) commit: &'a str,
    pub(super) file: &'a RemoteFile,
    pub(super) blob: &'a Path,
    pub(super) lock: &'a Path,
    pub(super) transfer: &'a Transfer,
    /// Set when another file failed.
    pub(super) stop: &'a AtomicBool,
}

impl Download<'_> {
    /// Downloads the blob, from where an earlier run stopped. Whenever the process ends, what has come is kept.
    pub(super) fn run(&self) -> Result<(), DownloadError> {
        let _lock = lock(self.lock, &self.file.name, self.stop)?;
        // Another process may have made it while we waited.
        if self.blob.is_file() {
            self.transfer.add(self.file.size);
            return Ok(());
        }
        let mut partial = Partial::open(partial_path(self.blob), self.file)?;
        self.transfer.add(partial.len);
        let mut patience = Patience::new();
        while partial.len < self.file.size {
            let before = partial.len;
            if let Err(error) = self.read_into(&mut partial) {
                if partial.len > before {
                    patience = Patience::new();
                }
                partial.remove_if_wrong(&error)?;
                patience.wait(error)?;
            }
        }
        partial.finish(self)
    }

    fn wrong_size(&self, found: u64) -> DownloadError {
        DownloadError::Size {
            id: self.id.to_string(),
            file: self.file.name.clone(),
            found,
            size: self.file.size,
        }
    }

    fn read_into(&self, partial: &mut Partial) -> Result<(), DownloadError> {
        let (from, body) = self
            .client
            .open(self.id, self.commit, self.file, partial.len)
            .map_err(|error| match error {
                // There are no bytes from there on.
                DownloadError::Status { status: 416, .. } => self.wrong_size(partial.len),
                other => other,
            })?;
        let mut body = body.into_reader();
        let cut = |at: u64, source: Option<io::Error>| DownloadError::Cut {
            file: self.file.name.clone(),
            at,
            size: self.file.size,
            source,
        };
        let there = partial.len - from;
        match io::copy(&mut body.by_ref().take(there), &mut io::sink()) {
            Ok(skipped) if skipped == there => {}
            other => return Err(cut(from, other.err())),
        }
        let mut buffer = vec![0; BUFFER_BYTES];
        loop {
            if self.stop.load(Ordering::Relaxed) {
                return Err(DownloadError::Stopped);
            }
            match body.read(&mut buffer) {
                Ok(0) if partial.len == self.file.size => return Ok(()),
                Ok(0) => return Err(cut(partial.len, None)),
                Err(error) => return Err(cut(partial.len, Some(error))),
                Ok(read) if partial.len + read as u64 > self.file.size => {
                    return Err(self.wrong_size(partial.len + read as u64));
                }
                Ok(read) => {
                    partial.write(&buffer[..read])?;
                    self.transfer.add(read as u64);
                }
            }
        }
    }
}

/// What has come of a blob: its first `len` bytes.
struct Partial {
    path: PathBuf,
    file: File,
    len: u64,
    /// Of a file whose blob is named after its digest.
    digest: Option<Sha256>,
}

impl Partial {
    /// Goes on with what an earlier run left, where its digest will show whether that was right.
    fn open(path: PathBuf, of: &RemoteFile) -> Result<Self, DownloadError> {
        if let Some(dir) = path.parent() {
            fs_err::create_dir_all(dir).map_err(io("create", dir))?;
        }
        let file = File::options()
            .create(true)
            .read(true)
            .append(true)
            .open(&path)
            .map_err(io("open", &path))?;
        let found = file.metadata().map_err(io("look at", &path))?.len();
        let mut partial = Self {
            path,
            file,
            len: 0,
            digest: is_sha256(&of.etag).then(Sha256::new),
        };
        match &mut partial.digest {
            Some(digest) if found <= of.size => {
                partial.len = io::copy(&mut partial.file, &mut DigestWriter(digest))
                    .map_err(io("read", &partial.path))?;
            }
            _ => partial
                .file
                .set_len(0)
                .map_err(io("empty", &partial.path))?,
        }
        Ok(partial)
    }

    fn write(&mut self, bytes: &[u8]) -> Result<(), DownloadError> {
        self.file
            .write_all(bytes)
            .map_err(io("write", &self.path))?;
        self.len += bytes.len() as u64;
        if let Some(digest) = &mut self.digest {
            digest.update(bytes);
        }
        Ok(())
    }

    /// Gives the blob its name, if it is the one that was announced.
    fn finish(mut self, download: &Download<'_>) -> Result<(), DownloadError> {
        if let Some(digest) = self.digest.take() {
            let found = hex(&digest.finalize());
            let announced = &download.file.etag;
            if found != announced.to_ascii_lowercase() {
                let error = DownloadError::Digest {
                    id: download.id.to_string(),
                    file: download.file.name.clone(),
                    found,
                    announced: announced.clone(),
                };
                self.remove_if_wrong(&error)?;
                return Err(error);
            }
        }
        self.file.sync_all().map_err(io("sync", &self.path))?;
        fs_err::rename(&self.path, download.blob).map_err(io("create", download.blob))
    }

    fn remove_if_wrong(&self, error: &DownloadError) -> Result<(), DownloadError> {
        if let DownloadError::Size { .. } | DownloadError::Digest { .. } = error {
            fs_err::remove_file(&self.path).map_err(io("remove", &self.path))?;
        }
        Ok(())
    }
}

struct DigestWriter<'a>(&'a mut Sha256);

impl Write for DigestWriter<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.update(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Where a blob's first bytes are kept, by huggingface_hub's name too.
pub(super) fn partial_path(blob: &Path) -> PathBuf {
    let mut name = blob.as_os_str().to_owned();
    name.push(".incomplete");
    name.into()
}

/// Whether an ETag is the digest of the content. Others, of small files, are git's.
pub(super) fn is_sha256(etag: &str) -> bool {
    etag.len() == 64 && etag.bytes().all(|byte| byte.is_ascii_hexdigit())
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
