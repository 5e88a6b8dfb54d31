//! A checkpoint on the command line, of whatever kind it is.

use std::path::{Path, PathBuf};

use bridge_core::checkpoint::hf::HfCheckpoint;
use bridge_core::checkpoint::shard::ShardFile;
use bridge_core::checkpoint::torch_dist::TorchDistCheckpoint;
use bridge_core::checkpoint::{TensorInfo, TensorSource};
use bridge_core::config::HfConfig;
use bridge_core::models::Prefixes;

use crate::hub::{self, Lookup, Wanted};

/// What a path holds.
pub(crate) enum Checkpoint {
    /// A Hugging Face directory; its tensors have their published names.
    Hf(HfCheckpoint),
    /// The directory of an iteration in Megatron-Core's format.
    TorchDist(TorchDistCheckpoint),
    /// One rank's file.
    Shard(ShardFile),
}

impl Checkpoint {
    /// Opens a path: a file is a shard, a directory what its files say; or a Hub id.
    pub(crate) fn open(path: &Path) -> anyhow::Result<Self> {
        let path = &*hub::local(path, Wanted::Model, &Lookup::default())?;
        if path.is_file() {
            return Ok(Self::Shard(ShardFile::open(path)?));
        }
        if TorchDistCheckpoint::is_at(path) {
            return Ok(Self::TorchDist(TorchDistCheckpoint::open(path)?));
        }
        let checkpoint = HfCheckpoint::open(path)?;
        // Which prefixes are the published ones is the architecture's to say; without one names are taken as they are.
        let Ok(config) = HfConfig::from_dir(path) else {
            return Ok(Self::Hf(checkpoint));
        };
        Ok(Self::Hf(Prefixes::publish(
            config.architecture,
            checkpoint,
        )?))
    }

    /// The same with matrices in FP8 as the values that they stand for, and without their scales.
    pub(crate) fn dequantised(self) -> anyhow::Result<Self> {
        let Self::Hf(checkpoint) = self else {
            return Ok(self);
        };
        // What is in no FP8 needs no config.
        let Ok(config) = HfConfig::from_dir(checkpoint.dir()) else {
            return Ok(Self::Hf(checkpoint));
        };
        let block = config.weight_block_size();
        Ok(Self::Hf(checkpoint.dequantised(block)?))
    }

    /// What it is, in words.
    pub(crate) fn kind(&self) -> &'static str {
        match self {
            Self::Hf(_) => "Hugging Face directory",
            Self::TorchDist(_) => "torch_dist directory",
            Self::Shard(_) => "shard",
        }
    }

    /// Its place; of a torch_dist directory, that of the iteration.
    pub(crate) fn path(&self) -> PathBuf {
        match self {
            Self::Hf(checkpoint) => checkpoint.dir().to_owned(),
            Self::TorchDist(checkpoint) => checkpoint.dir().to_owned(),
            Self::Shard(file) => file.path().to_owned(),
        }
    }

    /// Its bytes.
    pub(crate) fn source(&self) -> &dyn TensorSource {
        match self {
            Self::Hf(checkpoint) => checkpoint,
            Self::TorchDist(checkpoint) => checkpoint,
            Self::Shard(file) => file,
        }
    }

    /// All tensors, states of optimizers too.
    pub(crate) fn tensors(&self) -> Vec<(&str, &TensorInfo)> {
        match self {
            Self::Hf(checkpoint) => checkpoint.tensors().collect(),
            Self::TorchDist(checkpoint) => checkpoint.tensors().collect(),
            Self::Shard(file) => file.tensors().collect(),
        }
    }
}
