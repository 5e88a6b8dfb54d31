//! An opened checkpoint, in either format.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use bridge_core::AutoBridge;
use bridge_core::checkpoint::torch_dist::TorchDistCheckpoint;
use bridge_core::config::HfConfig;
use bridge_core::layout::{LayoutSpec, ParallelLayout, RankCoord};
use bridge_core::plan::Stage;

use crate::error::FfiError;
use crate::plan::Plan;
use crate::provider::Provider;
use crate::stored::Stored;

/// How a checkpoint is opened.
#[derive(Debug, Clone, Default)]
pub struct OpenOptions {
    /// The model directory or config of a `torch_dist` directory.
    pub reference: Option<PathBuf>,
    /// Takes a `torch_dist` directory that the reference contradicts.
    pub not_strict: bool,
}

/// Which rank, and which of its virtual stages.
#[derive(Debug, Clone, Copy, Default)]
pub struct Rank {
    /// The global rank; the four coordinates are not looked at then.
    pub global_rank: Option<usize>,
    /// Tensor-parallel rank.
    pub tp_rank: usize,
    /// Pipeline rank.
    pub pp_rank: usize,
    /// Expert-parallel rank.
    pub ep_rank: usize,
    /// Expert-tensor-parallel rank.
    pub etp_rank: usize,
    /// Virtual stage of the pipeline rank.
    pub vp_stage: usize,
}

impl Rank {
    /// The rank's place in a layout.
    ///
    /// # Errors
    /// [`FfiError::Layout`] when there is no such rank.
    pub fn in_layout(&self, layout: &ParallelLayout) -> Result<RankCoord, FfiError> {
        Ok(match self.global_rank {
            Some(global_rank) => layout.coord(global_rank)?,
            None => layout.first_rank(self.tp_rank, self.pp_rank, self.ep_rank, self.etp_rank)?,
        })
    }
}

/// An opened checkpoint; clones share it.
#[derive(Debug, Clone)]
pub struct Checkpoint(pub(crate) Arc<Opened>);

/// What all handles of a checkpoint share.
#[derive(Debug)]
pub(crate) struct Opened {
    pub(crate) bridge: Arc<AutoBridge>,
    /// Where the bytes are when they are not in the bridge's own files.
    pub(crate) stored: Option<Stored>,
}

impl Checkpoint {
    /// Opens a Hugging Face directory, or a `torch_dist` directory of an iteration or a run.
    ///
    /// # Errors
    /// [`FfiError`]: files that cannot be used, a reference that is missing or of another model.
    pub fn open(path: &Path, options: &OpenOptions) -> Result<Self, FfiError> {
        let opened = if TorchDistCheckpoint::is_at(path) {
            let Some(reference) = &options.reference else {
                let dir = path.to_owned();
                return Err(FfiError::NoReference { dir });
            };
            let bridge = Arc::new(reference_at(reference)?);
            let stored = Stored::open(path, &bridge, options.not_strict)?;
            Opened {
                bridge,
                stored: Some(stored),
            }
        } else {
            if let Some(reference) = &options.reference {
                return Err(FfiError::NeedlessReference {
                    dir: path.to_owned(),
                    reference: reference.clone(),
                });
            }
            Opened {
                bridge: Arc::new(AutoBridge::from_hf_pretrained(path)?),
                stored: None,
            }
        };
        Ok(Self(Arc::new(opened)))
    }

    /// The model in Megatron's fields.
    #[must_use]
    pub fn provider(&self) -> Provider {
        Provider::new(&self.0.bridge.to_megatron_provider())
    }

    /// Checks a layout against the model.
    ///
    /// # Errors
    /// [`FfiError::Layout`] with everything that does not fit.
    pub fn layout(&self, spec: &LayoutSpec) -> Result<ParallelLayout, FfiError> {
        Ok(self.0.bridge.lay_out(spec)?.1)
    }

    /// Plans one virtual stage of a rank.
    ///
    /// # Errors
    /// [`FfiError`]: a layout that does not fit, a rank that does not exist, tensors that are not those of the config.
    pub fn plan(&self, spec: &LayoutSpec, rank: &Rank) -> Result<Plan, FfiError> {
        if let Some(dtype) = spec.dtype.filter(|dtype| !dtype.is_float()) {
            return Err(FfiError::ParamsDtype { dtype });
        }
        let bridge = &self.0.bridge;
        let (options, layout) = bridge.lay_out(spec)?;
        let coord = rank.in_layout(&layout)?;
        let chunk = layout.chunk(coord.pp_rank, rank.vp_stage)?;
        let planner = bridge.planner(&options)?;
        let mut plan = planner.plan(&Stage::new(&layout, coord, chunk))?;
        if let Some(stored) = &self.0.stored {
            stored.adopt(&mut plan, spec.dtype)?;
        }
        Ok(Plan::new(self.clone(), plan, coord, rank.vp_stage))
    }
}

/// A model directory with weights or without, or a config file of any name.
fn reference_at(path: &Path) -> Result<AutoBridge, FfiError> {
    let config = |config: Result<HfConfig, _>| {
        let config = config.map_err(bridge_core::BridgeError::from)?;
        Ok(AutoBridge::from_hf_config(config))
    };
    if path.is_file() {
        return config(HfConfig::from_file(path));
    }
    let is_weights =
        |name: &str| name.ends_with(".safetensors") || name.ends_with(".safetensors.index.json");
    let has_weights = fs_err::read_dir(path).is_ok_and(|entries| {
        let mut names = entries.flatten().map(|entry| entry.file_name());
        names.any(|name| is_weights(&name.to_string_lossy()))
    });
    if has_weights {
        return Ok(AutoBridge::from_hf_pretrained(path)?);
    }
    config(HfConfig::from_dir(path))
}
