//! One process at a time downloads a blob; huggingface_hub uses the same locks.

use std::fs::File;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use rustix::fs::FlockOperation;
use rustix::io::Errno;

use super::error::{DownloadError, io};

/// Between two tries to get a lock.
const PAUSE: Duration = Duration::from_millis(100);

/// Waits for the lock of a blob, which is held as long as the file is open.
pub(super) fn lock(path: &Path, name: &str, stop: &AtomicBool) -> Result<File, DownloadError> {
    if let Some(dir) = path.parent() {
        fs_err::create_dir_all(dir).map_err(io("create", dir))?;
    }
    let file = File::options()
        .create(true)
        .append(true)
        .open(path)
        .map_err(io("open", path))?;
    let mut said = false;
    loop {
        match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => return Ok(file),
            // Some network file systems have no locks; large blobs are still checked by their digest there.
            Err(Errno::NOTSUP | Errno::NOLCK | Errno::NOSYS) => return Ok(file),
            Err(Errno::WOULDBLOCK) => {}
            Err(error) => return Err(io("lock", path)(error.into())),
        }
        if stop.load(Ordering::Relaxed) {
            return Err(DownloadError::Stopped);
        }
        if !said {
            tracing::info!("waiting for another process that downloads {name}");
            said = true;
        }
        std::thread::sleep(PAUSE);
    }
}
