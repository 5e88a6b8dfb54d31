//! The front door: a Hugging Face directory, seen as a Megatron model.

mod export;
mod found;
mod import;
mod job;

pub use export::{Export, ExportError, ExportOptions, KeyProblem, Missing};
pub use found::FoundPlan;
pub use import::{Import, ImportOptions};

use std::path::{Path, PathBuf};

use crate::Dtype;
use crate::checkpoint::hf::HfCheckpoint;
use crate::checkpoint::{CheckpointError, TensorInfo, TensorSource};
use crate::config::{ConfigError, HfConfig};
use crate::convert::ConvertError;
use crate::layout::{LayoutError, LayoutSpec, ModelFacts, ParallelLayout};
use crate::mapping::{Registry, RegistryError, Stored};
use crate::models::{self, ExpertNames, Facts, Prefixes};
use crate::plan::{self, KeyStyle, ModelPlan, PlanError, PlanOptions, Stage, TensorProblem};
use crate::provider::Provider;
use crate::provider::run_config::RunConfigError;
use crate::stage_planner::StagePlanner;

/// Why a bridge could not be made or could not plan.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BridgeError {
    /// `config.json` cannot be used.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The weight files cannot be used.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// The table of the architecture is wrong.
    #[error(transparent)]
    Registry(#[from] RegistryError),
    /// The checkpoint does not fit its config, or the plan's options do not fit the model.
    #[error(transparent)]
    Plan(#[from] PlanError),
    /// The layout does not fit the model.
    #[error(transparent)]
    Layout(#[from] LayoutError),
    /// A run_config.yaml cannot be used.
    #[error(transparent)]
    RunConfig(#[from] RunConfigError),
    /// A `torch_dist` directory does not hold the reference's model.
    #[error(transparent)]
    Export(#[from] ExportError),
    /// The conversion failed while it ran.
    #[error(transparent)]
    Convert(#[from] ConvertError),
    /// The bridge was made from a config alone.
    #[error("the model has no weights to convert")]
    NoWeights,
    /// The destination would take away what is read.
    #[error("{} and {} overlap; choose a destination apart from what is read", target.display(), path.display())]
    Overlap {
        /// The destination.
        target: PathBuf,
        /// What is read.
        path: PathBuf,
    },
}

/// A Hugging Face model (its config and, where there are any, its weights) and the table that maps it.
#[derive(Debug)]
pub struct AutoBridge {
    config: HfConfig,
    checkpoint: Option<HfCheckpoint>,
    facts: Facts,
}

impl AutoBridge {
    /// Opens a directory; the table follows `architectures[0]` and the form of the checkpoint.
    ///
    /// Names under prefixes of other tools are read as the published ones. Matrices in block-wise FP8 are read as float32
    /// and planned in bfloat16 where no dtype is asked for; [`HfCheckpoint::quantised`] names them.
    ///
    /// # Errors
    /// [`BridgeError`]: an unsupported architecture (the supported ones are listed), a config or weight file that
    /// cannot be used.
    pub fn from_hf_pretrained(dir: &Path) -> Result<Self, BridgeError> {
        let config = HfConfig::from_dir(dir)?;
        let checkpoint = Prefixes::publish(config.architecture, HfCheckpoint::open(dir)?)?;
        let checkpoint = checkpoint.dequantised(config.weight_block_size())?;
        let facts = Facts::detect(&config, checkpoint.names());
        Ok(Self {
            config,
            checkpoint: Some(checkpoint),
            facts,
        })
    }

    /// A model without weights, in the form in which the hub would store it.
    #[must_use]
    pub fn from_hf_config(config: HfConfig) -> Self {
        let facts = Facts::published(&config);
        Self {
            config,
            checkpoint: None,
            facts,
        }
    }

    /// What `config.json` says.
    #[must_use]
    pub fn config(&self) -> &HfConfig {
        &self.config
    }

    /// The weights; `None` for a bridge made from a config alone.
    #[must_use]
    pub fn checkpoint(&self) -> Option<&HfCheckpoint> {
        self.checkpoint.as_ref()
    }

    /// Matrices that are in FP8 in the files: see [`HfCheckpoint::quantised`].
    pub(crate) fn quantised(&self) -> impl Iterator<Item = &str> {
        self.checkpoint.iter().flat_map(HfCheckpoint::quantised)
    }

    /// The form of the checkpoint.
    #[must_use]
    pub fn facts(&self) -> Facts {
        self.facts
    }

    /// The same facts as the config, in Megatron's field names.
    #[must_use]
    pub fn to_megatron_provider(&self) -> Provider {
        Provider::from_config(&self.config)
    }

    /// The table of this checkpoint, the head included.
    ///
    /// # Errors
    /// [`RegistryError`] when the table itself is wrong.
    pub fn registry(&self) -> Result<Registry, RegistryError> {
        models::registry_for(&self.config, &self.facts)
    }

    /// Plans every Megatron parameter out of Hugging Face tensors.
    ///
    /// # Errors
    /// [`PlanError::Tensors`] lists every tensor that is missing, unknown, misshapen or of a dtype that holds no
    /// weights; other [`PlanError`]s when the options do not fit.
    pub fn plan(&self, options: &PlanOptions) -> Result<ModelPlan, BridgeError> {
        let (full, registry) = self.tables(options)?;
        let mut plan = plan::build(&registry, &|name| self.hf_info(&full, name).dtype, options)?;
        plan.left_out = left_out(&full, &registry);
        Ok(plan)
    }

    /// Plans what each of `stages` holds, under its local names, in the order given.
    ///
    /// # Errors
    /// As [`AutoBridge::plan`]; and [`PlanError::Layout`] when the layout was not made from [`AutoBridge::layout_facts`]
    /// of the same options.
    pub fn plan_stages(
        &self,
        options: &PlanOptions,
        stages: &[Stage<'_>],
    ) -> Result<Vec<ModelPlan>, BridgeError> {
        let planner = self.planner(options)?;
        stages.iter().map(|stage| planner.plan(stage)).collect()
    }

    /// Compares the files with the table once, for plans of many stages.
    ///
    /// # Errors
    /// As [`AutoBridge::plan`].
    pub fn planner(&self, options: &PlanOptions) -> Result<StagePlanner<'_>, BridgeError> {
        let (full, registry) = self.tables(options)?;
        Ok(StagePlanner::new(self, full, registry, options.clone()))
    }

    /// Plans every tensor of a `torch_dist` directory out of Hugging Face tensors, under the keys of `keys`.
    ///
    /// Inverted, it reads such a directory.
    ///
    /// # Errors
    /// As [`AutoBridge::plan`].
    pub fn plan_stored(
        &self,
        options: &PlanOptions,
        keys: KeyStyle<'_>,
    ) -> Result<ModelPlan, BridgeError> {
        let (full, registry) = self.tables(options)?;
        let dtype_of = |name: &str| self.hf_info(&full, name).dtype;
        let mut plan = plan::build_stored(&registry, &dtype_of, options, keys)?;
        plan.left_out = left_out(&full, &registry);
        Ok(plan)
    }

    /// Keys of the objects that stand beside the tensors of [`AutoBridge::plan_stored`]; see [`plan::extra_states`].
    ///
    /// # Errors
    /// As [`AutoBridge::plan`].
    pub fn extra_states(&self, options: &PlanOptions) -> Result<Vec<String>, BridgeError> {
        Ok(plan::extra_states(&self.tables(options)?.1))
    }

    /// What a [`crate::layout::ParallelLayout`] needs to know about this model, without padding of the vocabulary.
    #[must_use]
    pub fn layout_facts(&self, options: &PlanOptions) -> ModelFacts {
        let mut facts = ModelFacts::from_config(&self.config);
        if !self.facts.mtp || options.without_mtp {
            facts.mtp_num_layers = 0;
        }
        facts
    }

    /// Makes the layout and the plan's options that `spec` asks for.
    ///
    /// # Errors
    /// [`LayoutError`] with everything that does not fit the model, by parameter and numbers.
    pub fn lay_out(&self, spec: &LayoutSpec) -> Result<(PlanOptions, ParallelLayout), LayoutError> {
        let mut options = PlanOptions {
            dtype: spec.dtype,
            sequential_experts: spec.sequential_experts,
            without_mtp: spec.without_mtp,
            ..PlanOptions::default()
        };
        let facts = ModelFacts {
            make_vocab_size_divisible_by: spec.make_vocab_size_divisible_by,
            ..self.layout_facts(&options)
        };
        let layout = ParallelLayout::new(&spec.sizes, &spec.pipeline, &facts)?;
        options.padded_vocab_size = Some(layout.padded_vocab_size());
        Ok((options, layout))
    }

    /// The whole table, which the files were compared with, and the part of it that `options` choose.
    fn tables(&self, options: &PlanOptions) -> Result<(Registry, Registry), BridgeError> {
        let full = self.registry()?;
        if let Some(checkpoint) = &self.checkpoint {
            let problems = self.compare(&full, checkpoint);
            if !problems.is_empty() {
                return Err(PlanError::Tensors {
                    dir: checkpoint.dir().to_owned(),
                    problems,
                }
                .into());
            }
        }
        let facts = Facts {
            mtp: self.facts.mtp && !options.without_mtp,
            expert_names: if options.sequential_experts {
                ExpertNames::Sequential
            } else {
                ExpertNames::Grouped
            },
            ..self.facts
        };
        let registry = models::registry_for(&self.config, &facts)?;
        Ok((full, registry))
    }

    /// Dtype and shape of a Hugging Face tensor: the checkpoint's, or those of a new one.
    pub(crate) fn hf_info(&self, registry: &Registry, name: &str) -> TensorInfo {
        let files = self.checkpoint.as_ref();
        if let Some(info) = files.and_then(|files| files.as_written().info(name)) {
            return info;
        }
        let own = self.config.text.dtype.unwrap_or(Dtype::F32);
        let row = registry.hf_parameter(name);
        let dtype = match row.map(|row| row.stored) {
            Some(Stored::Float32) => own.widest(Dtype::F32),
            _ => own,
        };
        TensorInfo {
            dtype,
            shape: row.map(|row| row.shape.clone()).unwrap_or_default(),
        }
    }

    /// Every difference between the table and the files.
    fn compare(&self, registry: &Registry, checkpoint: &HfCheckpoint) -> Vec<TensorProblem> {
        let mut problems = Vec::new();
        let file_of = |name: &str| -> PathBuf { checkpoint.file_of(name).unwrap_or_default() };
        let has_mtp = checkpoint.names().any(|name| name.starts_with("mtp."));
        for (name, row) in registry.hf_parameters() {
            let Some(info) = checkpoint.info(name) else {
                let hint = (name.starts_with("mtp.") && !has_mtp).then_some(
                    "config.json has mtp_num_hidden_layers 1, but the checkpoint was saved without its MTP head; \
                     take the head from the original, or set mtp_num_hidden_layers to 0",
                );
                problems.push(TensorProblem::Missing {
                    name: name.to_owned(),
                    shape: row.shape.clone(),
                    hint,
                });
                continue;
            };
            if !info.dtype.is_float() {
                problems.push(TensorProblem::Dtype {
                    name: name.to_owned(),
                    file: file_of(name),
                    found: info.dtype,
                });
            }
            if info.shape != row.shape {
                problems.push(TensorProblem::Shape {
                    name: name.to_owned(),
                    file: file_of(name),
                    hint: shape_hint(name, &info.shape, &row.shape),
                    found: info.shape,
                    expected: row.shape.clone(),
                });
            }
        }
        let mut suggested = 0;
        for name in checkpoint.names() {
            if registry.hf_parameter(name).is_some() {
                continue;
            }
            let hint = self.unexpected_hint(registry, name);
            // A suggestion costs a walk over all names; the first ten are shown.
            suggested += 1;
            let nearest = (hint.is_none() && suggested <= 10)
                .then(|| registry.nearest_hf_name(name).map(str::to_owned))
                .flatten();
            problems.push(TensorProblem::Unexpected {
                name: name.to_owned(),
                file: file_of(name),
                nearest,
                hint,
            });
        }
        problems
    }

    fn classifier_hint(&self, name: &str) -> Option<&'static str> {
        let architecture = self.config.architecture;
        match name {
            "lm_head.weight" if architecture.is_classifier() => Some(
                "a classifier has score.weight in the place of the output layer: remove the tensor",
            ),
            "score.weight" | "score.bias" if !architecture.is_classifier() => Some(
                "a classifier's tensor: its config.json names the architecture Qwen3_5ForTokenClassification",
            ),
            _ if name.starts_with("mtp.") && architecture.is_classifier() => {
                Some("a classifier has no MTP head: remove the tensors")
            }
            _ => None,
        }
    }

    fn unexpected_hint(&self, registry: &Registry, name: &str) -> Option<&'static str> {
        if let Some(hint) = self.classifier_hint(name) {
            return Some(hint);
        }
        if name.starts_with("mtp.") && !self.facts.mtp {
            return Some(
                "the checkpoint has an MTP head, but config.json does not: set mtp_num_hidden_layers to 1",
            );
        }
        if name == "lm_head.weight" && self.config.tie_word_embeddings {
            return Some(
                "config.json ties the output layer to the embedding: set tie_word_embeddings to false, or remove the tensor",
            );
        }
        if registry.is_numbered_otherwise(name) {
            return Some(
                "its layer or expert number is beyond those of config.json, or the layer is of the other type; is this config from the same model?",
            );
        }
        if name.contains(".mlp.experts.") {
            return Some("a checkpoint holds its experts packed or one by one, not both");
        }
        None
    }
}

/// Hugging Face tensors of the whole table that the chosen one has not.
pub(crate) fn left_out(full: &Registry, chosen: &Registry) -> Vec<String> {
    full.hf_parameters()
        .map(|(name, _)| name)
        .filter(|name| chosen.hf_parameter(name).is_none())
        .map(str::to_owned)
        .collect()
}

/// The likely reason of a wrong shape.
fn shape_hint(name: &str, found: &[usize], expected: &[usize]) -> Option<&'static str> {
    if name.ends_with("self_attn.q_proj.weight")
        && found.first().map(|rows| rows * 2) == expected.first().copied()
    {
        return Some(
            "half the rows: q_proj holds a gate beside each query here, this one comes from a model without output gate",
        );
    }
    if found.len() == expected.len() && found.iter().rev().eq(expected.iter()) {
        return Some("it looks transposed");
    }
    (found.iter().product::<usize>() == expected.iter().product::<usize>())
        .then_some("the same number of elements in another shape")
}
