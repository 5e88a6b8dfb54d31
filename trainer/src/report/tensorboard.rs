//! TensorBoard event files: scalars only.
//!
//! A file is a run of records, each `u64 length, u32 masked crc32c of the length, payload, u32 masked crc32c of the payload`
//! (little endian); a payload is the protobuf message `tensorflow.Event` (tensorflow/core/util/event.proto). The few fields
//! that scalars need are encoded here by hand.

use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use fs_err::File;

/// An open event file.
#[derive(Debug)]
pub(crate) struct EventFile {
    file: BufWriter<File>,
}

impl EventFile {
    /// Starts a new event file in `dir`. Readers drop what older files of `dir` say behind `step`, as after a kill.
    pub(crate) fn create(dir: &Path, step: u64) -> std::io::Result<Self> {
        fs_err::create_dir_all(dir)?;
        let path = free_name(dir);
        let mut file = Self {
            file: BufWriter::new(File::create_new(path)?),
        };
        file.event(0, |event| bytes_field(event, 3, b"brain.Event:2"))?;
        if step > 0 {
            // SessionLog { status: START } makes TensorBoard purge later steps of earlier files.
            file.event(step + 1, |event| bytes_field(event, 7, &[0x08, 1]))?;
        }
        file.file.flush()?;
        Ok(file)
    }

    /// Writes the scalars of one step and flushes, so that TensorBoard sees them at once.
    pub(crate) fn scalars(&mut self, step: u64, scalars: &[(&str, f64)]) -> std::io::Result<()> {
        let mut summary = Vec::new();
        for (tag, number) in scalars {
            let mut value = Vec::new();
            bytes_field(&mut value, 1, tag.as_bytes());
            #[expect(clippy::cast_possible_truncation, reason = "the format holds float32")]
            let number = *number as f32;
            value.push(2 << 3 | 5);
            value.extend(number.to_le_bytes());
            bytes_field(&mut summary, 1, &value);
        }
        self.event(step, |event| bytes_field(event, 5, &summary))?;
        self.file.flush()
    }

    fn event(&mut self, step: u64, what: impl FnOnce(&mut Vec<u8>)) -> std::io::Result<()> {
        let now = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default()
            .as_secs_f64();
        let mut event = vec![1 << 3 | 1];
        event.extend(now.to_le_bytes());
        event.push(2 << 3);
        varint(&mut event, step);
        what(&mut event);
        let length = (event.len() as u64).to_le_bytes();
        self.file.write_all(&length)?;
        self.file.write_all(&masked_crc(&length).to_le_bytes())?;
        self.file.write_all(&event)?;
        self.file.write_all(&masked_crc(&event).to_le_bytes())
    }
}

/// `events.out.tfevents.SECONDS.trainer`, with a counter when a run resumes within the second.
fn free_name(dir: &Path) -> PathBuf {
    let seconds = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default()
        .as_secs();
    let names = (0..).map(|n| dir.join(format!("events.out.tfevents.{seconds}.trainer.{n}")));
    names
        .into_iter()
        .find(|path| !path.exists())
        .expect("the counter has no end")
}

/// CRC-32C, rotated and shifted as the record format asks.
fn masked_crc(bytes: &[u8]) -> u32 {
    crc32c::crc32c(bytes)
        .rotate_right(15)
        .wrapping_add(0xa282_ead8)
}

fn bytes_field(message: &mut Vec<u8>, field: u8, bytes: &[u8]) {
    message.push(field << 3 | 2);
    varint(message, bytes.len() as u64);
    message.extend_from_slice(bytes);
}

fn varint(message: &mut Vec<u8>, mut number: u64) {
    loop {
        let low = number.to_le_bytes()[0] & 0x7f;
        number >>= 7;
        message.push(if number == 0 { low } else { low | 0x80 });
        if number == 0 {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_have_lengths_and_masked_checksums_that_agree() {
        let dir = tempfile::tempdir().unwrap();
        let mut file = EventFile::create(dir.path(), 300).unwrap();
        file.scalars(301, &[("train/loss", 0.5), ("train/grad_norm", 2.0)])
            .unwrap();
        let path = fs_err::read_dir(dir.path())
            .unwrap()
            .next()
            .unwrap()
            .unwrap()
            .path();
        let mut bytes = fs_err::read(path).unwrap();
        let mut payloads = Vec::new();
        while !bytes.is_empty() {
            let length = u64::from_le_bytes(bytes[..8].try_into().unwrap());
            let length = usize::try_from(length).unwrap();
            let crc = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap());
            assert_eq!(crc(8), masked_crc(&bytes[..8]));
            assert_eq!(crc(12 + length), masked_crc(&bytes[12..12 + length]));
            payloads.push(bytes[12..12 + length].to_vec());
            bytes.drain(..16 + length);
        }
        assert_eq!(payloads.len(), 3);
        assert!(payloads[0].ends_with(b"brain.Event:2"));
        assert!(
            payloads[1].ends_with(&[0x10, 0xad, 0x02, 0x3a, 2, 0x08, 1]),
            "{:?}",
            payloads[1]
        );
        let tag = b"train/loss".as_slice();
        assert!(payloads[2].windows(tag.len()).any(|window| window == tag));
    }

    #[test]
    fn checksum_equals_the_published_vector() {
        // RFC 3720, B.4: 32 bytes of zeroes.
        assert_eq!(crc32c::crc32c(&[0; 32]), 0x8a91_36aa);
        assert_eq!(
            masked_crc(&[0; 32]),
            0x8a91_36aa_u32.rotate_right(15).wrapping_add(0xa282_ead8)
        );
    }
}
