//! The zip archives that torch.save makes: stored entries, 64-bit sizes allowed, sizes in the central directory only.
//!
//! Deflated and encrypted entries, duplicate names, entries over each other and entries outside of the archive are
//! refused, so that an archive never unfolds to more than its own bytes.

use std::collections::HashSet;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;

/// Bytes to be read at a place.
pub(super) trait ReadAt {
    fn len(&self) -> u64;
    fn read_at(&self, offset: u64, into: &mut [u8]) -> io::Result<()>;
}

/// A part of a file.
#[derive(Debug, Clone, Copy)]
pub(super) struct Section<'a> {
    pub(super) file: &'a File,
    pub(super) start: u64,
    pub(super) len: u64,
}

impl ReadAt for Section<'_> {
    fn len(&self) -> u64 {
        self.len
    }

    fn read_at(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        self.file.read_exact_at(into, self.start + offset)
    }
}

impl ReadAt for &[u8] {
    fn len(&self) -> u64 {
        (**self).len() as u64
    }

    fn read_at(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        let bytes = usize::try_from(offset)
            .ok()
            .and_then(|start| self.get(start..start.checked_add(into.len())?))
            .ok_or(io::ErrorKind::UnexpectedEof)?;
        into.copy_from_slice(bytes);
        Ok(())
    }
}

/// Why an archive cannot be read.
#[derive(Debug)]
pub(super) enum ArchiveError {
    Io(io::Error),
    Malformed(&'static str),
}

impl From<io::Error> for ArchiveError {
    fn from(error: io::Error) -> Self {
        ArchiveError::Io(error)
    }
}

type Result<T> = std::result::Result<T, ArchiveError>;

fn malformed<T>(reason: &'static str) -> Result<T> {
    Err(ArchiveError::Malformed(reason))
}

/// An entry of the central directory.
#[derive(Debug, Clone)]
pub(super) struct Entry {
    pub(super) name: String,
    pub(super) crc: u32,
    pub(super) len: u64,
    header: u64,
    method_and_flags: (u16, u16),
}

/// An opened archive.
#[derive(Debug)]
pub(super) struct Archive<R> {
    source: R,
    entries: Vec<Entry>,
    /// Where the entries end and the central directory begins.
    directory_start: u64,
}

const END: &[u8] = b"PK\x05\x06";
const END_LEN: u64 = 22;
const LOCAL_LEN: u64 = 30;

impl<R: ReadAt> Archive<R> {
    pub(super) fn open(source: R) -> Result<Self> {
        let (end, start, len, count) = find_directory(&source)?;
        if start.checked_add(len).is_none_or(|stop| stop > end) {
            return malformed("its directory lies outside of it");
        }
        if count > len / 46 {
            return malformed("its directory is too short for its entries");
        }
        let bytes = read_vec(&source, start..start + len)?;
        let entries = parse_directory(&bytes, count, start)?;
        Ok(Self {
            source,
            entries,
            directory_start: start,
        })
    }

    pub(super) fn entries(&self) -> &[Entry] {
        &self.entries
    }

    pub(super) fn find(&self, name: &str) -> Option<&Entry> {
        self.entries.iter().find(|entry| entry.name == name)
    }

    /// The one entry `FOLDER/data.pkl`, and its folder.
    pub(super) fn pickle(&self) -> Result<(&Entry, &str)> {
        let mut found = self.entries.iter().filter_map(|entry| {
            let folder = entry.name.strip_suffix("/data.pkl")?;
            (!folder.contains('/')).then_some((entry, folder))
        });
        match (found.next(), found.next()) {
            (Some(entry), None) => Ok(entry),
            _ => malformed("it has not exactly one data.pkl"),
        }
    }

    /// Where an entry's bytes stand in the archive.
    pub(super) fn range(&self, entry: &Entry) -> Result<Range<u64>> {
        let name_len = entry.name.len();
        let mut header = vec![0; 30 + name_len];
        if entry.header + LOCAL_LEN + name_len as u64 > self.directory_start {
            return malformed("an entry lies outside of it");
        }
        self.source.read_at(entry.header, &mut header)?;
        if &header[..4] != b"PK\x03\x04" || usize::from(u16_at(&header, 26)) != name_len {
            return malformed("an entry's own header is not where the directory says");
        }
        if &header[30..] != entry.name.as_bytes() {
            return malformed("an entry has two names");
        }
        let (method, flags) = (u16_at(&header, 8), u16_at(&header, 6));
        if (method, flags & 1) != (entry.method_and_flags.0, entry.method_and_flags.1 & 1) {
            return malformed("an entry's two headers contradict each other");
        }
        let sizes = [u32_at(&header, 18), u32_at(&header, 22)];
        let in_directory = u32::try_from(entry.len).unwrap_or(u32::MAX);
        if sizes
            .iter()
            .any(|size| *size != 0 && *size != in_directory && *size != u32::MAX)
        {
            return malformed("an entry's two headers contradict each other");
        }
        let start = entry.header + LOCAL_LEN + name_len as u64 + u64::from(u16_at(&header, 28));
        match start.checked_add(entry.len) {
            Some(end) if end <= self.directory_start => Ok(start..end),
            _ => malformed("an entry lies outside of it"),
        }
    }

    /// All bytes of an entry; at most as many as the archive has.
    pub(super) fn read(&self, entry: &Entry) -> Result<Vec<u8>> {
        read_vec(&self.source, self.range(entry)?)
    }

    /// The CRC-32 of an entry's bytes, read a megabyte at a time.
    pub(super) fn crc(&self, entry: &Entry) -> Result<u32> {
        let range = self.range(entry)?;
        let mut hasher = crc32fast::Hasher::new();
        let mut buffer = vec![0; usize::try_from(entry.len.min(1 << 20)).unwrap_or(1 << 20)];
        let mut at = range.start;
        while at < range.end {
            let piece =
                usize::try_from(range.end - at).map_or(buffer.len(), |n| n.min(buffer.len()));
            self.source.read_at(at, &mut buffer[..piece])?;
            hasher.update(&buffer[..piece]);
            at += piece as u64;
        }
        Ok(hasher.finalize())
    }
}

fn read_vec(source: &impl ReadAt, range: Range<u64>) -> Result<Vec<u8>> {
    let Ok(len) = usize::try_from(range.end - range.start) else {
        return malformed("an entry is larger than memory");
    };
    let mut bytes = vec![0; len];
    source.read_at(range.start, &mut bytes)?;
    Ok(bytes)
}

/// Where the end record begins; start, length and number of entries of the directory.
fn find_directory(source: &impl ReadAt) -> Result<(u64, u64, u64, u64)> {
    let total = source.len();
    if total < END_LEN {
        return malformed("it is too short");
    }
    // torch's end records take 98 bytes; others may have a comment, or bytes behind them.
    let (mut tail, mut tail_start) = (Vec::new(), total);
    let mut found = None;
    for want in [98, 65_557] {
        tail_start = total.saturating_sub(want);
        tail = read_vec(source, tail_start..total)?;
        let last = tail.len() - 22;
        found = (0..=last).rev().find(|at| &tail[*at..*at + 4] == END);
        if found.is_some() {
            break;
        }
    }
    let Some(at) = found else {
        return malformed("it has no end record");
    };
    let end = tail_start + at as u64;
    let record = &tail[at..];
    let (count, len, start) = (u16_at(record, 10), u32_at(record, 12), u32_at(record, 16));
    if u16_at(record, 4) != 0 || u16_at(record, 6) != 0 {
        return malformed("it is split over several files");
    }
    if count != u16::MAX && len != u32::MAX && start != u32::MAX {
        return Ok((end, start.into(), len.into(), count.into()));
    }
    let Some(locator_at) = end.checked_sub(20) else {
        return malformed("its 64-bit end record is missing");
    };
    let mut locator = [0; 20];
    source.read_at(locator_at, &mut locator)?;
    let record_at = u64_at(&locator, 8);
    if &locator[..4] != b"PK\x06\x07" || record_at.checked_add(56).is_none_or(|e| e > locator_at) {
        return malformed("its 64-bit end record is missing");
    }
    let mut record = [0; 56];
    source.read_at(record_at, &mut record)?;
    if &record[..4] != b"PK\x06\x06" {
        return malformed("its 64-bit end record is missing");
    }
    Ok((
        record_at,
        u64_at(&record, 48),
        u64_at(&record, 40),
        u64_at(&record, 32),
    ))
}

fn parse_directory(bytes: &[u8], count: u64, directory_start: u64) -> Result<Vec<Entry>> {
    let mut entries = Vec::new();
    let mut rest = bytes;
    for _ in 0..count {
        let (entry, behind) = parse_entry(rest)?;
        entries.push(entry);
        rest = behind;
    }
    if !rest.is_empty() {
        return malformed("its directory has bytes that belong to no entry");
    }
    let mut names = HashSet::new();
    if !entries
        .iter()
        .all(|entry| names.insert(entry.name.as_str()))
    {
        return malformed("two entries have the same name");
    }
    let mut places: Vec<(u64, u64)> = entries.iter().map(|e| (e.header, e.len)).collect();
    places.sort_unstable();
    let ends = places
        .iter()
        .skip(1)
        .map(|place| place.0)
        .chain([directory_start]);
    for ((header, len), next) in places.iter().zip(ends) {
        let end = header
            .checked_add(LOCAL_LEN)
            .and_then(|end| end.checked_add(*len));
        if end.is_none_or(|end| end > next) {
            return malformed("its entries overlap");
        }
    }
    Ok(entries)
}

fn parse_entry(bytes: &[u8]) -> Result<(Entry, &[u8])> {
    if bytes.len() < 46 || &bytes[..4] != b"PK\x01\x02" {
        return malformed("its directory is cut short");
    }
    let (flags, method) = (u16_at(bytes, 8), u16_at(bytes, 10));
    if flags & 1 != 0 {
        return malformed("an entry is encrypted");
    }
    if method != 0 {
        return malformed("an entry is compressed; torch stores entries as they are");
    }
    let name_len = usize::from(u16_at(bytes, 28));
    let extra_len = usize::from(u16_at(bytes, 30));
    let comment_len = usize::from(u16_at(bytes, 32));
    let Some((variable, rest)) = bytes[46..].split_at_checked(name_len + extra_len + comment_len)
    else {
        return malformed("its directory is cut short");
    };
    let Ok(name) = std::str::from_utf8(&variable[..name_len]) else {
        return malformed("an entry's name is not UTF-8");
    };
    let mut wide = [
        u64::from(u32_at(bytes, 24)),
        u64::from(u32_at(bytes, 20)),
        u64::from(u32_at(bytes, 42)),
    ];
    widen(&mut wide, &variable[name_len..name_len + extra_len])?;
    let [len, stored_len, header] = wide;
    if len != stored_len {
        return malformed("a stored entry has two sizes");
    }
    let entry = Entry {
        name: name.to_owned(),
        crc: u32_at(bytes, 16),
        len,
        header,
        method_and_flags: (method, flags),
    };
    Ok((entry, rest))
}

/// Replaces the values that are all ones by those of the extra field 1, in its order.
fn widen(values: &mut [u64; 3], mut extra: &[u8]) -> Result<()> {
    if values.iter().all(|value| *value != u64::from(u32::MAX)) {
        return Ok(());
    }
    while extra.len() >= 4 {
        let (id, len) = (u16_at(extra, 0), usize::from(u16_at(extra, 2)));
        let Some(field) = extra.get(4..4 + len) else {
            return malformed("an extra field is cut short");
        };
        if id == 1 {
            let mut words = field.as_chunks::<8>().0.iter();
            for value in values.iter_mut().filter(|v| **v == u64::from(u32::MAX)) {
                let Some(word) = words.next() else {
                    return malformed("a 64-bit size is missing");
                };
                *value = u64::from_le_bytes(*word);
            }
            return Ok(());
        }
        extra = &extra[4 + len..];
    }
    malformed("a 64-bit size is missing")
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from(u16_at(bytes, at)) | u32::from(u16_at(bytes, at + 2)) << 16
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from(u32_at(bytes, at)) | u64::from(u32_at(bytes, at + 4)) << 32
}
