//! What one stage of one rank holds, under its local names; and all stages put together again.

use super::build::{Cut, PlanOptions, build_tensor, local_name, local_shape, own_dtype};
use super::coverage::checked_numel;
use super::error::PlanError;
use super::model_plan::{ModelPlan, Role};
use crate::Dtype;
use crate::layout::{Chunk, ParallelLayout, RankCoord};
use crate::mapping::{Group, Parameter, Part, Place, Registry};

/// One model chunk of one rank.
#[derive(Debug, Clone, Copy)]
pub struct Stage<'a> {
    layout: &'a ParallelLayout,
    rank: RankCoord,
    chunk: &'a Chunk,
}

impl<'a> Stage<'a> {
    /// Virtual stage `chunk` of `rank`; the chunk's pipeline rank wins.
    #[must_use]
    pub fn new(layout: &'a ParallelLayout, rank: RankCoord, chunk: &'a Chunk) -> Self {
        Self {
            layout,
            rank,
            chunk,
        }
    }

    /// Every stage of every rank, rank by rank.
    pub fn all(layout: &'a ParallelLayout) -> impl Iterator<Item = Self> {
        layout.ranks().flat_map(move |rank| {
            layout
                .chunks_of(rank.pp_rank)
                .map(move |chunk| Self::new(layout, rank, chunk))
        })
    }

    /// The rank's place.
    #[must_use]
    pub fn rank(&self) -> RankCoord {
        self.rank
    }

    /// What the stage holds.
    #[must_use]
    pub fn chunk(&self) -> &'a Chunk {
        self.chunk
    }

    fn cut(&self) -> Cut {
        Cut {
            tp_rank: self.rank.tp_rank,
            tp_size: self.layout.tp_size(),
            etp_rank: self.rank.etp_rank,
            etp_size: self.layout.etp_size(),
            ep_rank: self.rank.ep_rank,
            ep_size: self.layout.ep_size(),
        }
    }

    /// Whether the stage holds a parameter, and the local number of its layer.
    fn holds(&self, parameter: &Parameter) -> Option<Option<usize>> {
        let chunk = self.chunk;
        let held = match (parameter.part, parameter.row.place) {
            (Part::Vision | Part::Projector, _) => chunk.vision,
            (Part::Mtp, _) => chunk.mtp_num_layers > 0,
            (Part::Language, Place::Embedding) => chunk.embedding,
            (Part::Language, Place::FinalLayernorm) => chunk.final_layernorm,
            (Part::Language, Place::OutputLayer) => chunk.output_layer,
            (Part::Language, Place::WithLayer) => {
                let layer = parameter.layer?;
                let local = layer.checked_sub(chunk.layers.start)?;
                return chunk.layers.contains(&layer).then_some(Some(local));
            }
        };
        // Layers of the vision tower and of the head keep their numbers.
        held.then_some(parameter.layer)
    }

    /// `options` with what the layout decides.
    fn options(&self, options: &PlanOptions) -> PlanOptions {
        PlanOptions {
            cut: self.cut(),
            padded_vocab_size: Some(self.layout.padded_vocab_size()),
            ..options.clone()
        }
    }

    /// Calls `visit` with each parameter that the stage holds, its local name and the role that the stage gives it.
    fn walk(
        &self,
        registry: &Registry,
        mut visit: impl FnMut(&Parameter, String, Role) -> Result<(), PlanError>,
    ) -> Result<(), PlanError> {
        check_model(registry, self.layout)?;
        let cut = self.cut();
        for parameter in registry.parameters() {
            if let Some(layer) = self.holds(parameter)
                && let Some(name) = local_name(parameter, layer, &cut)?
            {
                let copy_of_embedding =
                    parameter.row.place == Place::Embedding && !self.chunk.pre_process;
                let role = if copy_of_embedding || self.repeats(parameter.row.group()) {
                    Role::ReplicaOf(name.clone())
                } else {
                    Role::Primary
                };
                visit(parameter, name, role)?;
            }
            if let Some(name) = parameter.tied_output.clone()
                && self.chunk.output_layer
            {
                let role = Role::ReplicaOf(parameter.megatron_name.clone());
                visit(parameter, name, role)?;
            }
        }
        Ok(())
    }

    /// Whether another rank of the same pipeline stage has the same bytes and comes first.
    fn repeats(&self, group: Group) -> bool {
        match group {
            Group::Tensor => self.rank.cp_rank > 0 || self.rank.dp_rank > 0,
            Group::ExpertTensor => self.rank.edp_rank > 0,
        }
    }
}

/// Plans what a stage holds, under its local names: layers and experts count from 0.
///
/// `options.cut` and `options.padded_vocab_size` are the layout's. [`Role::ReplicaOf`] marks what another stage or rank
/// holds too and comes first with, so that over a whole world the primaries cover the model once ([`gather`]).
///
/// # Errors
/// [`PlanError::Layout`] when the layout is another model's; else as [`super::build`].
pub fn build_stage(
    registry: &Registry,
    dtype_of: &dyn Fn(&str) -> Dtype,
    options: &PlanOptions,
    stage: &Stage<'_>,
) -> Result<ModelPlan, PlanError> {
    let options = stage.options(options);
    let mut plan = ModelPlan::default();
    stage.walk(registry, |parameter, name, role| {
        let mut tensor = build_tensor(parameter, name, dtype_of, &options)?;
        if role != Role::Primary {
            tensor.role = role;
        }
        plan.tensors.push(tensor);
        Ok(())
    })?;
    plan.validate()?;
    Ok(plan)
}

/// One tensor that a stage holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Held {
    /// Its local name.
    pub name: String,
    /// Its dtype.
    pub dtype: Dtype,
    /// The shape of the rank's part.
    pub shape: Vec<usize>,
    /// The ranks over which it is cut.
    pub group: Group,
}

/// What [`build_stage`] plans, without the copies: counting the tensors of a large model needs no more.
///
/// # Errors
/// As [`build_stage`].
pub fn held(
    registry: &Registry,
    dtype_of: &dyn Fn(&str) -> Dtype,
    options: &PlanOptions,
    stage: &Stage<'_>,
) -> Result<Vec<Held>, PlanError> {
    let options = stage.options(options);
    let mut list = Vec::new();
    stage.walk(registry, |parameter, name, _| {
        let shape = local_shape(parameter, &options)?;
        checked_numel(&name, &shape)?;
        list.push(Held {
            dtype: options.dtype_of(&name, own_dtype(parameter, dtype_of)),
            name,
            shape,
            group: parameter.row.group(),
        });
        Ok(())
    })?;
    Ok(list)
}

/// Elements and bytes of every parameter of `registry`, each counted once and without padding.
///
/// # Errors
/// [`PlanError::TooLarge`] names a parameter that cannot be counted.
pub fn model_size(
    registry: &Registry,
    dtype_of: &dyn Fn(&str) -> Dtype,
    options: &PlanOptions,
) -> Result<(u64, u64), PlanError> {
    let (mut elements, mut bytes) = (0u64, 0u64);
    for parameter in registry.parameters() {
        let name = &parameter.megatron_name;
        let numel = checked_numel(name, &parameter.shape)? as u64;
        let dtype = options.dtype_of(name, own_dtype(parameter, dtype_of));
        let too_large = || PlanError::TooLarge {
            name: name.clone(),
            shape: parameter.shape.clone(),
        };
        let more = numel.checked_mul(dtype.size_bytes() as u64);
        elements = elements.checked_add(numel).ok_or_else(too_large)?;
        bytes = more
            .and_then(|more| bytes.checked_add(more))
            .ok_or_else(too_large)?;
    }
    Ok((elements, bytes))
}

/// Makes one plan of Hugging Face tensors out of the plans of all stages of all ranks.
///
/// A source of it is called `label` followed by the local name. Only primaries are read.
///
/// # Errors
/// [`PlanError`] when the plans together do not cover every Hugging Face tensor exactly once: a stage is missing or
/// stands twice.
pub fn gather(
    stages: impl IntoIterator<Item = (String, ModelPlan)>,
) -> Result<ModelPlan, PlanError> {
    let mut whole = ModelPlan::default();
    for (label, plan) in stages {
        let primaries = plan
            .tensors
            .into_iter()
            .filter(|tensor| tensor.role == Role::Primary);
        whole.tensors.extend(primaries.map(|mut tensor| {
            tensor.name = format!("{label}{}", tensor.name);
            tensor
        }));
    }
    let gathered = whole.inverted();
    gathered.validate()?;
    Ok(gathered)
}

fn check_model(registry: &Registry, layout: &ParallelLayout) -> Result<(), PlanError> {
    let (mut model_layers, mut model_mtp) = (0, 0);
    for section in registry.sections() {
        let layers = section.layers.iter().flatten().max();
        let layers = layers.map_or(0, |last| last + 1);
        match section.part {
            Part::Language => model_layers = model_layers.max(layers),
            Part::Mtp => model_mtp = model_mtp.max(layers),
            Part::Vision | Part::Projector => {}
        }
    }
    let chunks = layout.chunks();
    let layout_layers = chunks.iter().map(|chunk| chunk.layers.len()).sum();
    let layout_mtp = chunks.iter().map(|chunk| chunk.mtp_num_layers).sum();
    if (layout_layers, layout_mtp) != (model_layers, model_mtp) {
        return Err(PlanError::Layout {
            layout_layers,
            layout_mtp,
            model_layers,
            model_mtp,
        });
    }
    Ok(())
}
