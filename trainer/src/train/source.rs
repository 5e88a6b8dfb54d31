//! Rows of a data file as samples, ready for the background threads.

use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use fs_err::File;
use sha2::{Digest, Sha256};

use super::config::{OnBadRow, RunConfig, Truncation};
use super::prefetch::{Encode, Encoded};
use crate::data::{DataError, Dataset, EncodeOptions, Processor, Sample, TooLong};
use crate::report::note;

/// A data file and what makes samples of it.
#[derive(Clone)]
pub(crate) struct Source {
    file: PathBuf,
    base_dir: PathBuf,
    dataset: Arc<Dataset>,
    processor: Arc<Processor>,
    options: EncodeOptions,
}

impl Source {
    pub(crate) fn open(
        file: &Path,
        processor: &Arc<Processor>,
        config: &RunConfig,
    ) -> Result<Self, DataError> {
        let options = EncodeOptions {
            max_length: config.max_length,
            too_long: match config.truncation {
                Truncation::Refuse => TooLong::Refuse,
                Truncation::Truncate => TooLong::Truncate,
            },
            ..EncodeOptions::default()
        };
        let dataset = Dataset::open(file)?;
        Ok(Self {
            file: file.to_path_buf(),
            base_dir: config
                .media_root
                .clone()
                .unwrap_or_else(|| dataset.base_dir()),
            dataset: Arc::new(dataset),
            processor: Arc::clone(processor),
            options,
        })
    }

    /// Rows of the file.
    pub(crate) fn rows(&self) -> usize {
        self.dataset.len()
    }

    /// What a background thread does with a row.
    pub(crate) fn encode(&self) -> Encode<Sample, DataError> {
        let source = self.clone();
        Arc::new(move |row| {
            source
                .processor
                .encode(&source.dataset.row(row)?, &source.base_dir, &source.options)
        })
    }

    /// The samples of a pass; bad rows stop the run or are left out with a note, as configured.
    pub(crate) fn samples(
        &self,
        encoded: Vec<Encoded<Sample, DataError>>,
        on_bad_row: OnBadRow,
    ) -> anyhow::Result<Vec<Sample>> {
        let mut samples = Vec::with_capacity(encoded.len());
        for (row, result) in encoded {
            let sample = match result {
                Some(Ok(sample)) => Ok(sample),
                Some(Err(error)) => Err(anyhow::Error::new(error)),
                None => Err(anyhow::anyhow!(
                    "{} row {row}: its preprocessing panicked; look at its media files",
                    self.file.display()
                )),
            };
            match (sample, on_bad_row) {
                (Ok(sample), _) => samples.push(sample),
                (Err(error), OnBadRow::Stop) => {
                    return Err(error.context(
                        "a training row cannot be used (on_bad_row=skip leaves such rows out)",
                    ));
                }
                (Err(error), OnBadRow::Skip) => {
                    note(format_args!("warning: row left out: {error:#}"))
                }
            }
        }
        Ok(samples)
    }

    /// SHA-256 of the file, so that a resumed run sees whether it changed.
    pub(crate) fn sha256(&self) -> anyhow::Result<String> {
        let mut hasher = Sha256::new();
        let mut file = File::open(&self.file)?;
        let mut buffer = vec![0; 1 << 20];
        loop {
            let read = file.read(&mut buffer)?;
            if read == 0 {
                break;
            }
            hasher.update(&buffer[..read]);
        }
        Ok(hasher
            .finalize()
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect())
    }
}
