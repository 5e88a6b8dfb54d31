//! The whole model: vision tower, language model, losses.

use bridge_core::AutoBridge;
use bridge_core::config::HfConfig;
use tch::{Device, Kind, Tensor};

use super::cache::Cache;
use super::error::ModelError;
use super::input::{ModelInput, Targets, TextPositions};
use super::language::{LanguageModel, Scatter, TrunkOutput};
use super::layer::Context;
use super::options::{ForwardOptions, LossOptions, Losses, ModelOptions, ModelOutput};
use super::vision::VisionTower;
use crate::batch::{Batch, BatchError};
use crate::ops::loss::linear_cross_entropy;
use crate::ops::moe::load_balancing_loss;
use crate::ops::policy::{Implementation, Kernels, Op};
use crate::ops::self_check::self_check;
use crate::params::ParamStore;

/// Qwen3.5/3.6-VL, dense or mixture of experts, with Megatron-Core's parameters (`Qwen3VLModel` there).
#[derive(Debug)]
pub struct Qwen3VlModel {
    pub(super) config: HfConfig,
    pub(super) params: ParamStore,
    pub(super) options: ModelOptions,
    vision: Option<VisionTower>,
    language: LanguageModel,
    kernels: Kernels,
    implementations: Vec<Implementation>,
}

/// Hidden states of one pass with what belongs to them.
struct Pass {
    trunk: TrunkOutput,
    visual: Option<Tensor>,
    visual_videos: Option<Tensor>,
    mtp_hidden: Option<Tensor>,
}

impl Qwen3VlModel {
    /// Builds the model and fills it from a checkpoint.
    ///
    /// # Errors
    /// [`ModelError`] when the checkpoint cannot be read, a parameter is not finite, or the config asks for what the
    /// model does not compute.
    pub fn load(bridge: &AutoBridge, options: &ModelOptions) -> Result<Self, ModelError> {
        let params = super::checkpoint::load(bridge, options)?;
        Self::from_params(bridge.config().clone(), params, options)
    }

    pub(super) fn from_params(
        config: HfConfig,
        params: ParamStore,
        options: &ModelOptions,
    ) -> Result<Self, ModelError> {
        let (kernels, implementations) = options.resolve_kernels(Some(&config.text))?;
        if matches!(options.device, Device::Cuda(_)) {
            self_check(kernels, options.dtype, options.device)?;
        }
        params.set_trainable(|_| true);
        let vision = config
            .vision
            .as_ref()
            .map(|vision| VisionTower::new(vision, &params))
            .transpose()?;
        let language = LanguageModel::new(&config, &params, options.mtp)?;
        Ok(Self {
            config,
            params,
            options: options.clone(),
            vision,
            language,
            kernels,
            implementations,
        })
    }

    /// How each op is computed.
    #[must_use]
    pub fn implementations(&self) -> &[Implementation] {
        &self.implementations
    }

    /// The parameters.
    #[must_use]
    pub fn params(&self) -> &ParamStore {
        &self.params
    }

    /// What `config.json` says.
    #[must_use]
    pub fn config(&self) -> &HfConfig {
        &self.config
    }

    /// How the model was built.
    #[must_use]
    pub fn options(&self) -> &ModelOptions {
        &self.options
    }

    /// Whether the prediction head is there.
    #[must_use]
    pub fn has_mtp(&self) -> bool {
        self.language.has_mtp()
    }

    /// The dtype of activations.
    #[must_use]
    pub fn kind(&self) -> Kind {
        self.language.kind()
    }

    /// Where the parameters live.
    #[must_use]
    pub fn device(&self) -> Device {
        self.options.device
    }

    /// Runs the model and gives everything that can be compared with another implementation.
    ///
    /// # Errors
    /// [`ModelError::Batch`] when the batch does not fit.
    pub fn forward(
        &self,
        batch: &Batch,
        options: &ForwardOptions,
    ) -> Result<ModelOutput, ModelError> {
        let input = self.input(batch, TextPositions::Columns)?;
        let pass = self.pass(&input, options.hidden_states, options.mtp);
        let Pass {
            trunk, mtp_hidden, ..
        } = pass;
        let aux_loss = self.aux_loss(&input, &trunk);
        let target_loss = |hidden: &Tensor, targets: &Option<Targets>| {
            let targets = targets.as_ref()?;
            Some(self.target_loss(hidden, targets, None))
        };
        let has_target = input
            .targets
            .as_ref()
            .is_some_and(|targets| targets.count > 0);
        let coefficient = options
            .router_aux_loss_coef
            .unwrap_or_else(|| self.config_aux_coef());
        let lm = has_target
            .then(|| target_loss(&trunk.hidden, &input.targets))
            .flatten();
        let loss = lm.map(|lm| match &aux_loss {
            Some(aux) => lm + aux * coefficient,
            None => lm,
        });
        let mtp_loss = mtp_hidden
            .as_ref()
            .filter(|_| has_target)
            .and_then(|hidden| target_loss(hidden, &input.mtp_targets));
        let total_loss = match (&loss, &mtp_loss) {
            (Some(loss), Some(mtp)) => Some(loss + mtp * options.mtp_loss_scaling_factor),
            _ => None,
        };
        let logits = |hidden: &Tensor| self.language.logits(hidden);
        Ok(ModelOutput {
            rope_deltas: input.has_grids.then_some(input.rope_deltas),
            position_ids: input.position_ids,
            visual: pass.visual,
            visual_videos: pass.visual_videos,
            logits: options.logits.then(|| logits(&trunk.hidden)),
            mtp_logits: mtp_hidden.as_ref().filter(|_| options.logits).map(logits),
            hidden_states: trunk.hidden_states,
            hidden_norm: trunk.hidden,
            routers: trunk.routers,
            loss,
            aux_loss,
            mtp_loss,
            total_loss,
        })
    }

    /// The training loss of a batch. Logits of all tokens are never held in float32.
    ///
    /// # Errors
    /// [`ModelError::Batch`] when the batch does not fit, [`ModelError::NoTarget`] when no token has a target and no
    /// normalizer is given.
    pub fn loss(&self, batch: &Batch, options: &LossOptions) -> Result<Losses, ModelError> {
        let input = self.input(batch, TextPositions::Columns)?;
        let targets = match &input.targets {
            Some(targets) if targets.count > 0 || options.normalizer.is_some() => targets,
            _ => return Err(ModelError::NoTarget),
        };
        let with_mtp = options.mtp_loss_scaling_factor != 0.0;
        let pass = self.pass(&input, false, with_mtp);
        let lm = self.target_loss(&pass.trunk.hidden, targets, options.normalizer);
        let aux = (options.router_aux_loss_coef != 0.0)
            .then(|| self.aux_loss(&input, &pass.trunk))
            .flatten();
        let mtp = pass
            .mtp_hidden
            .as_ref()
            .zip(input.mtp_targets.as_ref())
            .map(|(hidden, targets)| self.target_loss(hidden, targets, options.mtp_normalizer));
        let weighted = [
            aux.as_ref().map(|aux| aux * options.router_aux_loss_coef),
            mtp.as_ref()
                .map(|mtp| mtp * options.mtp_loss_scaling_factor),
        ];
        let total = weighted
            .into_iter()
            .flatten()
            .fold(lm.shallow_clone(), |sum, term| sum + term);
        Ok(Losses {
            total,
            lm,
            mtp,
            aux,
            supervised_tokens: targets.count,
            mtp_tokens: input
                .mtp_targets
                .as_ref()
                .map_or(0, |targets| targets.count),
        })
    }

    /// Checks a batch and moves it to the model's device.
    pub(crate) fn input(
        &self,
        batch: &Batch,
        text_positions: TextPositions,
    ) -> Result<ModelInput, ModelError> {
        let input = ModelInput::new(batch, &self.config, text_positions, self.options.device)?;
        match input.hole {
            Some((sample, position)) if self.kernels.run(Op::Gdn) => {
                Err(BatchError::Hole { sample, position }.into())
            }
            _ => Ok(input),
        }
    }

    /// An empty cache.
    pub(crate) fn cache(&self) -> Cache {
        Cache::new(self.language.num_layers())
    }

    /// Logits of the last position `[batch, vocabulary]`, in float32 (float64 in a float64 model).
    ///
    /// With a `cache`, `input` goes on behind what it holds, and `sequences`' mask covers all keys.
    pub(crate) fn next_logits(&self, input: &ModelInput, cache: Option<&mut Cache>) -> Tensor {
        let visual = self.encode(input);
        let trunk = self.with_context(
            input,
            cache.as_ref().map_or(0, |cache| cache.length),
            |context| {
                let scatter = visual.scatter(input);
                self.language.trunk(input, &scatter, context, cache, false)
            },
        );
        let last = trunk.hidden.select(1, input.seq - 1);
        let logits = self.language.logits(&last);
        if logits.kind() == Kind::Double {
            logits
        } else {
            logits.to_kind(Kind::Float)
        }
    }

    fn pass(&self, input: &ModelInput, keep: bool, mtp: bool) -> Pass {
        let visual = self.encode(input);
        self.with_context(input, 0, |context| {
            let trunk = self
                .language
                .trunk(input, &visual.scatter(input), context, None, keep);
            let mtp_hidden = mtp
                .then(|| self.language.mtp_hidden(input, &trunk.hidden, context))
                .flatten();
            Pass {
                trunk,
                visual: visual.images,
                visual_videos: visual.videos,
                mtp_hidden,
            }
        })
    }

    fn with_context<T>(
        &self,
        input: &ModelInput,
        seen: i64,
        job: impl FnOnce(&Context<'_>) -> T,
    ) -> T {
        let kernels = self.kernels;
        let (cos, sin) = self.language.rotary(kernels, &input.position_ids);
        // Once for all layers.
        let pack = kernels
            .run(Op::Gdn)
            .then(|| input.sequences.pack(self.options.device));
        job(&Context {
            kernels,
            sequences: &input.sequences,
            pack: pack.as_ref(),
            cos: &cos,
            sin: &sin,
            seen,
        })
    }

    fn encode(&self, input: &ModelInput) -> VisualTokens {
        let encode = |visual: &Option<super::input::Visual>| {
            let visual = visual.as_ref()?;
            let tower = self.vision.as_ref()?;
            Some(tower.forward(&visual.pixels, &visual.grids))
        };
        VisualTokens {
            images: encode(&input.images),
            videos: encode(&input.videos),
        }
    }

    fn target_loss(&self, hidden: &Tensor, targets: &Targets, normalizer: Option<f64>) -> Tensor {
        let rows = hidden.view([-1, hidden.size()[2]]);
        let count = i32::try_from(targets.count.max(1)).map_or(f64::MAX, f64::from);
        let normalizer = normalizer.unwrap_or(count);
        linear_cross_entropy(
            self.kernels,
            &rows,
            self.language.output_weight(),
            &targets.ids,
            normalizer,
        )
    }

    fn aux_loss(&self, input: &ModelInput, trunk: &TrunkOutput) -> Option<Tensor> {
        let moe = self.config.text.moe.as_ref()?;
        let logits: Vec<&Tensor> = trunk.routers.iter().map(|router| &router.logits).collect();
        let top_k = i64::try_from(moe.num_experts_per_tok).unwrap_or(i64::MAX);
        Some(load_balancing_loss(
            &logits,
            top_k,
            input.flat_mask().as_ref(),
        ))
    }

    fn config_aux_coef(&self) -> f64 {
        let moe = self.config.text.moe.as_ref();
        moe.map_or(0.0, |moe| moe.router_aux_loss_coef)
    }
}

/// Merged tokens of the batch's images and videos.
struct VisualTokens {
    images: Option<Tensor>,
    videos: Option<Tensor>,
}

impl VisualTokens {
    fn scatter<'a>(&'a self, input: &'a ModelInput) -> Vec<Scatter<'a>> {
        [(&self.images, &input.images), (&self.videos, &input.videos)]
            .into_iter()
            .filter_map(|(tokens, input)| {
                Some(Scatter {
                    tokens: tokens.as_ref()?,
                    input: input.as_ref()?,
                })
            })
            .collect()
    }
}
