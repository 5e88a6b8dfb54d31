//! A file of rows: JSON lines, or one JSON array. Only the rows' places are kept in memory.

use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde_json::Value as Json;

use super::error::{DataError, RowError};

/// The rows of a data file. Rows count from 0; blank lines are none.
#[derive(Debug)]
pub struct Dataset {
    path: Arc<Path>,
    file: File,
    /// Offset and length of each row, in bytes.
    spans: Vec<(u64, usize)>,
}

/// One parsed row, and where it stands.
#[derive(Debug, Clone)]
pub struct Row {
    /// The data file.
    pub file: Arc<Path>,
    /// Counted from 0.
    pub index: usize,
    /// The row's JSON.
    pub value: Json,
}

impl Dataset {
    /// Finds the rows of `path`.
    ///
    /// # Errors
    /// When it cannot be read, holds no row, or is an array that does not end.
    pub fn open(path: impl AsRef<Path>) -> Result<Self, DataError> {
        let path = path.as_ref();
        let read_error = |source| DataError::Read {
            file: path.to_owned(),
            source,
        };
        let refuse = |reason| DataError::NotADataset {
            file: path.to_owned(),
            reason,
        };
        let file = fs_err::File::open(path).map_err(read_error)?.into_file();
        if !file.metadata().map_err(read_error)?.is_file() {
            return Err(refuse("it is no regular file; give a .jsonl or .json file"));
        }
        let mut reader = BufReader::new(&file);
        let mut offset = skip_byte_order_mark(&mut reader).map_err(read_error)?;
        // The first character tells the format.
        let first = loop {
            match reader.fill_buf().map_err(read_error)? {
                [] => return Err(refuse("it is empty")),
                [byte, ..] if byte.is_ascii_whitespace() => {
                    reader.consume(1);
                    offset += 1;
                }
                [byte, ..] => break *byte,
            }
        };
        let spans = match first {
            b'[' => array_spans(reader, offset).map_err(read_error)?,
            b'{' => Some(line_spans(reader, offset).map_err(read_error)?),
            _ => {
                return Err(refuse(
                    "it starts with neither `{` (JSON lines) nor `[` (a JSON array)",
                ));
            }
        };
        let spans =
            spans.ok_or_else(|| refuse("its array does not end; the file was cut short"))?;
        if spans.is_empty() {
            return Err(refuse("it holds no row"));
        }
        Ok(Self {
            path: path.into(),
            file,
            spans,
        })
    }

    /// The number of rows.
    pub fn len(&self) -> usize {
        self.spans.len()
    }

    /// Never: a file without rows is refused.
    pub fn is_empty(&self) -> bool {
        self.spans.is_empty()
    }

    /// The data file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The folder that relative media paths start from: that of the data file.
    pub fn base_dir(&self) -> PathBuf {
        self.path.parent().map(Path::to_owned).unwrap_or_default()
    }

    /// Reads and parses row `index`.
    ///
    /// # Errors
    /// [`DataError::Row`] when its JSON is broken, [`DataError::NoSuchRow`] past the end.
    pub fn row(&self, index: usize) -> Result<Row, DataError> {
        let Some(&(offset, length)) = self.spans.get(index) else {
            return Err(DataError::NoSuchRow {
                file: self.path.to_path_buf(),
                row: index,
                len: self.len(),
            });
        };
        let parsed = || {
            let mut bytes = vec![0; length];
            self.file
                .read_exact_at(&mut bytes, offset)
                .map_err(RowError::Read)?;
            let value = serde_json::from_slice(&bytes).map_err(RowError::Json)?;
            refuse_huge_integers(&bytes)?;
            Ok(value)
        };
        match parsed() {
            Ok(value) => Ok(Row {
                file: Arc::clone(&self.path),
                index,
                value,
            }),
            Err(cause) => Err(DataError::Row {
                file: self.path.to_path_buf(),
                row: index,
                cause: Box::new(cause),
            }),
        }
    }
}

fn skip_byte_order_mark(reader: &mut impl BufRead) -> std::io::Result<u64> {
    if reader.fill_buf()?.starts_with(b"\xEF\xBB\xBF") {
        reader.consume(3);
        return Ok(3);
    }
    Ok(0)
}

/// Each line that is not blank.
fn line_spans(mut reader: impl BufRead, mut offset: u64) -> std::io::Result<Vec<(u64, usize)>> {
    let mut spans = Vec::new();
    let mut line = Vec::new();
    loop {
        line.clear();
        let read = reader.read_until(b'\n', &mut line)?;
        if read == 0 {
            return Ok(spans);
        }
        if !line.trim_ascii().is_empty() {
            spans.push((offset, read));
        }
        offset += read as u64;
    }
}

/// Each element of a JSON array, by counting brackets outside strings; `None` when the array does not end. What the
/// elements hold is checked when they are read.
fn array_spans(reader: impl Read, mut offset: u64) -> std::io::Result<Option<Vec<(u64, usize)>>> {
    let mut spans = Vec::new();
    let mut start = None;
    let (mut depth, mut in_string, mut escaped) = (0usize, false, false);
    for byte in BufReader::new(reader).bytes() {
        let byte = byte?;
        if in_string {
            match byte {
                _ if escaped => escaped = false,
                b'\\' => escaped = true,
                b'"' => in_string = false,
                _ => {}
            }
        } else {
            let ends = depth == 1 && matches!(byte, b',' | b']' | b'}');
            if ends && let Some(start) = start.take() {
                spans.push((start, usize::try_from(offset - start).unwrap_or(usize::MAX)));
            }
            if depth == 1 && start.is_none() && !ends && !byte.is_ascii_whitespace() {
                start = Some(offset);
            }
            match byte {
                b'"' => in_string = true,
                b'[' | b'{' => depth += 1,
                b']' | b'}' => depth = depth.saturating_sub(1),
                _ => {}
            }
            if depth == 0 {
                return Ok(Some(spans));
            }
        }
        offset += 1;
    }
    Ok(None)
}

/// Integers past 64 bits would come back as floats and lose digits without a word.
fn refuse_huge_integers(json: &[u8]) -> Result<(), RowError> {
    let mut at = 0;
    while at < json.len() {
        match json[at] {
            b'"' => {
                at += 1;
                while at < json.len() && json[at] != b'"' {
                    at += if json[at] == b'\\' { 2 } else { 1 };
                }
                at += 1;
            }
            b'-' | b'0'..=b'9' => {
                let start = at;
                while at < json.len()
                    && matches!(json[at], b'0'..=b'9' | b'-' | b'+' | b'.' | b'e' | b'E')
                {
                    at += 1;
                }
                let digits = String::from_utf8_lossy(&json[start..at]);
                let is_integer = !digits.contains(['.', 'e', 'E']);
                if is_integer && digits.parse::<u64>().is_err() && digits.parse::<i64>().is_err() {
                    return Err(RowError::HugeInteger {
                        digits: digits.into_owned(),
                    });
                }
            }
            _ => at += 1,
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rows(text: &str) -> Result<Vec<String>, DataError> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("rows.json");
        std::fs::write(&path, text).unwrap();
        let dataset = Dataset::open(&path)?;
        (0..dataset.len())
            .map(|index| Ok(dataset.row(index)?.value.to_string()))
            .collect()
    }

    #[test]
    fn lines_and_arrays_hold_the_same_rows() {
        let expected = [r#"{"a":"]}\","}"#, r#"{"b":[1,{"c":2}]}"#];
        let lines = format!("\u{feff}\n{}\r\n\n  {}", expected[0], expected[1]);
        let array = format!(" [ {} ,\n{}\n]\n", expected[0], expected[1]);
        assert_eq!(rows(&lines).unwrap(), expected);
        assert_eq!(rows(&array).unwrap(), expected);
    }

    #[test]
    fn files_without_rows_are_refused_with_the_reason() {
        for (text, reason) in [
            ("", "empty"),
            (" \n", "empty"),
            ("[]", "no row"),
            ("[{}", "cut short"),
            ("x", "neither"),
        ] {
            let error = rows(text).unwrap_err().to_string();
            assert!(error.contains(reason), "{text}: {error}");
        }
    }

    #[test]
    fn a_broken_row_is_named_and_the_others_are_read() {
        let error = rows("{\"a\":1}\n{\"a\":\n").unwrap_err().to_string();
        assert!(error.contains("row 1"), "{error}");
        let error = rows("[{\"a\":1}, {\"a\" 2}]").unwrap_err().to_string();
        assert!(error.contains("row 1"), "{error}");
    }

    #[test]
    fn integers_that_would_lose_digits_are_refused() {
        assert_eq!(
            rows(r#"{"a":18446744073709551615,"b":"99999999999999999999"}"#)
                .unwrap()
                .len(),
            1
        );
        let error = rows(r#"{"a":18446744073709551616}"#)
            .unwrap_err()
            .to_string();
        assert!(error.contains("18446744073709551616"), "{error}");
    }

    #[test]
    fn deep_nesting_is_an_error_and_no_overflow() {
        let deep = format!("{{\"a\":{}{}}}", "[".repeat(100_000), "]".repeat(100_000));
        assert!(rows(&deep).is_err());
    }
}
