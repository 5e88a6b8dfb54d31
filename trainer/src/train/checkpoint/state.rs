//! What a checkpoint says of its run, besides tensors.

use std::collections::BTreeMap;
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::super::config::RunConfig;
use super::CheckpointError;

/// The version of `state.json` that this build writes and reads.
pub const STATE_VERSION: u32 = 1;

/// Size and CRC-32C of a file.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileRecord {
    /// Length.
    pub bytes: u64,
    /// Checksum of all bytes.
    pub crc32c: u32,
}

impl FileRecord {
    pub(super) fn add(&mut self, bytes: &[u8]) {
        self.bytes += bytes.len() as u64;
        self.crc32c = crc32c::crc32c_append(self.crc32c, bytes);
    }
}

/// The data of a run and its place in it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DataState {
    /// Rows of the data file.
    pub rows: usize,
    /// SHA-256 of the data file.
    pub sha256: String,
    /// Epoch of the next step, from 0.
    pub epoch: u64,
    /// Steps of that epoch that are done.
    pub step_in_epoch: u64,
}

/// The random streams of a run. A stream is a function of seed, number and place, so this is the whole state.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StreamState {
    /// The generator.
    pub algorithm: String,
    /// The run's seed.
    pub seed: u64,
    /// Stream of the shuffling of the current epoch.
    pub shuffle_stream: u64,
}

impl Default for StreamState {
    fn default() -> Self {
        Self {
            algorithm: "chacha20".to_owned(),
            seed: 0,
            shuffle_stream: 1,
        }
    }
}

/// `state.json`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct TrainerState {
    /// [`STATE_VERSION`].
    pub schema_version: u32,
    /// Optimizer steps done, left-out ones included.
    pub step: u64,
    /// Steps that the optimizer took: those with finite gradients.
    pub optimizer_steps: u64,
    /// Steps of the whole run, which the schedule needs.
    pub total_steps: u64,
    /// Learning rate of the last step.
    pub learning_rate: f64,
    /// Real tokens seen.
    pub tokens: u64,
    /// Tokens that counted in a loss.
    pub supervised_tokens: u64,
    /// Place in the data.
    pub data: DataState,
    /// Random streams.
    pub streams: StreamState,
    /// Threads of libtorch; another number may change the last bits.
    pub num_threads: i32,
    /// What the model computed with.
    pub kernels: BTreeMap<String, String>,
    /// The run's configuration.
    pub config: RunConfig,
    /// Files of the checkpoint.
    pub files: BTreeMap<String, FileRecord>,
}

/// Keys that may differ between a run and its continuation: they change what is written and shown, never a number.
const FREE: [&str; 16] = [
    "model",
    "data",
    "output",
    "media_root",
    "eval_data",
    "eval_steps",
    "per_device_eval_batch_size",
    "logging_steps",
    "save_steps",
    "save_total_limit",
    "report_to",
    "dataloader_num_workers",
    "dataloader_prefetch_factor",
    "keep_freed_memory",
    "num_threads",
    "max_steps",
];

impl TrainerState {
    /// Compares the saved run with the one that is to go on. A longer `max_steps` is allowed where the schedule does not depend
    /// on it.
    ///
    /// # Errors
    /// [`CheckpointError::Mismatch`] lists every key that would change the numbers.
    pub fn check_continues(
        &self,
        dir: &Path,
        config: &RunConfig,
        total_steps: u64,
        data: &DataState,
    ) -> Result<(), CheckpointError> {
        let as_map = |config: &RunConfig| serde_json::to_value(config).unwrap_or_default();
        let (ours, theirs) = (as_map(config), as_map(&self.config));
        let mut differences = Vec::new();
        for (key, was) in theirs.as_object().into_iter().flatten() {
            let now = &ours[key];
            if now != was && !FREE.contains(&key.as_str()) {
                differences.push(format!("`{key}` was {was} and is {now}"));
            }
        }
        if total_steps != self.total_steps && !config.schedule_ignores_length() {
            let (was, now) = (self.total_steps, total_steps);
            differences.push(format!(
                "the run had {was} steps and has {now}, which bends its learning rate"
            ));
        }
        if (data.rows, &data.sha256) != (self.data.rows, &self.data.sha256) {
            let (was, now) = (self.data.rows, data.rows);
            differences.push(format!(
                "the data file changed ({was} rows then, {now} now, or other content)"
            ));
        }
        if differences.is_empty() {
            return Ok(());
        }
        Err(CheckpointError::Mismatch {
            dir: dir.to_path_buf(),
            differences,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::super::super::config::SchedulerType;
    use super::*;

    #[test]
    fn a_continuation_that_would_change_numbers_is_refused_with_every_key() {
        let config = RunConfig {
            max_steps: Some(20),
            ..RunConfig::default()
        };
        let state = TrainerState {
            config: config.clone(),
            total_steps: 20,
            data: DataState {
                rows: 3,
                ..DataState::default()
            },
            ..TrainerState::default()
        };
        let dir = Path::new("run/checkpoint-10");
        let same = DataState {
            rows: 3,
            ..DataState::default()
        };
        let free = RunConfig {
            save_steps: None,
            logging_steps: 7,
            ..config.clone()
        };
        state.check_continues(dir, &free, 20, &same).unwrap();

        let other = RunConfig {
            learning_rate: 1.0,
            seed: 7,
            ..config.clone()
        };
        let data = DataState {
            rows: 4,
            ..DataState::default()
        };
        let text = state
            .check_continues(dir, &other, 30, &data)
            .unwrap_err()
            .to_string();
        for part in [
            "`learning_rate` was",
            "`seed` was 42 and is 7",
            "20 steps and has 30",
            "3 rows then, 4 now",
        ] {
            assert!(text.contains(part), "{part:?} is not in {text}");
        }

        let constant = RunConfig {
            lr_scheduler_type: SchedulerType::Constant,
            ..config
        };
        let state = TrainerState {
            config: constant.clone(),
            total_steps: 20,
            ..state
        };
        state.check_continues(dir, &constant, 30, &same).unwrap();
    }
}
