//! Opening files of which somebody else decides what they are.

use std::fs::{File, OpenOptions};
use std::io::{self, Read};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

/// Opens a regular file, with its length; `None` for anything else (a FIFO would block, a device could act or never end).
pub(crate) fn open(path: &Path) -> io::Result<Option<(File, u64)>> {
    if !path.metadata()?.is_file() {
        return Ok(None);
    }
    // It may have changed since; then opening must not block.
    let flags = i32::try_from(rustix::fs::OFlags::NONBLOCK.bits()).unwrap_or(0);
    let file = OpenOptions::new()
        .read(true)
        .custom_flags(flags)
        .open(path)?;
    let metadata = file.metadata()?;
    Ok(metadata.is_file().then_some((file, metadata.len())))
}

/// The content of a regular file of at most `limit` bytes.
///
/// # Errors
/// What the system said, that it is no regular file, or that it is longer.
pub(crate) fn read(path: &Path, limit: u64) -> io::Result<Vec<u8>> {
    let (file, len) = open(path)?.ok_or_else(|| io::Error::other("it is not a regular file"))?;
    if len > limit {
        return Err(io::Error::other(format!(
            "it has {len} bytes, the limit is {limit}; is it the right file?"
        )));
    }
    let mut bytes = Vec::with_capacity(usize::try_from(len).unwrap_or(0));
    file.take(limit).read_to_end(&mut bytes)?;
    Ok(bytes)
}
